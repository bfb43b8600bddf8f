#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each worker of a TPU; tpu_vm.sh copies it there and calls it.
# Everything lies in the folder this script is in:
#   source/       the source tree           files     what the last archive put into it
#   environment/  the virtual environment   job/      lock, pid, command, log, ended
# A job holds job/lock as long as any of its processes lives. So what is running is known after a
# restart of the machine too, where a process id would mean another process.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
HOST="$(hostname)"
export PATH="$HERE/environment/bin:$HOME/.local/bin:$PATH"

say() { echo "[$HOST] $*"; }

fail() {
  say "$*" >&2
  exit 1
}

now() { date -u +%Y-%m-%dT%H:%M:%SZ; }

# Whether a job is running. The lock is only tried, in a process of its own.
running() { [ -e "$HERE/job/lock" ] && ! flock --nonblock "$HERE/job/lock" true; }

# setup ARCHIVE: unpacks the source tree and installs recexplore with its TPU extra.
setup() {
  local archive="$HERE/$1"
  if running; then
    fail "a job is running from this source tree. Stop it first: tpu_vm.sh stop"
  fi
  mkdir -p "$HERE/source"
  cd "$HERE/source"
  # What an earlier archive brought goes, what a job wrote stays.
  if [ -e ../files ]; then
    xargs --delimiter='\n' rm -f -- <../files
  fi
  tar -xzf "$archive"
  tar -tzf "$archive" | sed '/\/$/d' >../files
  # TPU images of Ubuntu 22.04 have Python 3.10, which is too old for recexplore; uv brings another.
  # Later ones than 3.11 would also bring a later JAX than recexplore is tested with.
  if ! command -v uv >/dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | sh ||
      fail "uv could not be installed from astral.sh. Has this worker a way out (Cloud NAT)?"
  fi
  [ -x ../environment/bin/python ] || uv venv --quiet --python 3.11 ../environment
  VENV="$HERE/environment"
  # shellcheck source=scripts/environment.sh
  . scripts/environment.sh
  make_environment tpu '.[tpu]'
  say "ready: $(basename "$archive" .tar.gz), $("$VENV/bin/python" --version)"
}

# run COMMAND...: starts a job that outlives the connection. If the same one is running already,
# nothing is done, so that the command can be given again when some workers weren't reached.
run() {
  [ -x "$HERE/environment/bin/recexplore" ] ||
    fail "recexplore isn't set up here. First: tpu_vm.sh setup"
  mkdir -p "$HERE/job"
  exec 9>>"$HERE/job/lock"
  if ! flock --nonblock 9; then
    # The words are compared with NUL between them: they may hold spaces and line ends.
    if printf '%s\0' "$@" | cmp --silent - "$HERE/job/command"; then
      say "this command is running already"
      return
    fi
    fail "another job is running: $(tr '\0' ' ' <"$HERE/job/command"). First: tpu_vm.sh stop"
  fi
  rm -f "$HERE/job/ended"
  printf '%s\0' "$@" >"$HERE/job/command"
  cd "$HERE/source"
  # Progress shows in the log at once. No TPU is an error, not a reason to go on with the CPU.
  export PYTHONUNBUFFERED=1 JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
  # A session of its own, so that stop reaches all processes of the job and nothing else.
  nohup setsid bash "$HERE/tpu_worker.sh" job "$@" </dev/null >>"$HERE/job/log" 2>&1 &
  echo $! >"$HERE/job/pid"
  say "started"
}

# job COMMAND...: what run starts. The command gets SIGTERM from stop; this process waits for it.
job() {
  trap : TERM
  echo "=== $(now) $*"
  local status=0
  "$@" || status=$?
  echo "$status" >"$HERE/job/ended"
  echo "=== $(now) ended with status $status"
}

# logs LINES FOLLOW: the last lines, and with FOLLOW=1 what comes after, until the job ends.
logs() {
  [ -e "$HERE/job/log" ] || fail "no job has been started here yet"
  local follow=()
  if [ "$2" = 1 ] && running; then
    follow=(--follow --pid="$(cat "$HERE/job/pid")")
  fi
  tail --lines="$1" "${follow[@]}" "$HERE/job/log" | sed --unbuffered "s/^/[$HOST] /"
  report
}

# In one line how the job stands.
report() {
  if running; then
    say "the job is running"
  elif [ -e "$HERE/job/ended" ]; then
    say "the job has ended with status $(cat "$HERE/job/ended")"
  elif [ -e "$HERE/job/pid" ]; then
    say "the job is gone without a status: it was killed, or the machine was restarted"
  else
    say "no job is running"
  fi
}

# stop SECONDS KILL: SIGTERM, so that training saves; then waits; with KILL=1 SIGKILL at last.
stop() {
  if running; then
    local group
    group="$(cat "$HERE/job/pid")"
    kill -TERM -- "-$group" || true
    if ! flock --wait "$1" "$HERE/job/lock" true; then
      [ "$2" = 1 ] || fail \
        "the job hasn't ended within $1 seconds. Look at its log, wait longer (stop --seconds N)," \
        "or lose what it hasn't saved (stop --kill)."
      kill -KILL -- "-$group" || true
      flock --wait 30 "$HERE/job/lock" true || fail "the job can't be killed"
    fi
  fi
  report
}

main() {
  local verb="$1"
  shift
  case "$verb" in
    setup) setup "$@" ;;
    run) run "$@" ;;
    job) job "$@" ;;
    logs) logs "$@" ;;
    stop) stop "$@" ;;
    *) fail "there is no verb $verb" ;;
  esac
}

# One line, so that bash has read all it needs when setup puts another script in this one's place.
main "$@"; exit
