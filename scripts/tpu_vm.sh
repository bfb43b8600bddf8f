#!/usr/bin/env bash
# Creates a TPU, sets recexplore up on all of its workers, and runs, watches and stops a job there:
# a thin layer over `gcloud compute tpus` that shows every command before it runs it. docs/tpu.md
# tells the whole story. Written for bash 3.2 too, which is what macOS has: no associative arrays,
# and ${array[@]+"${array[@]}"} for an array that may be empty.
set -euo pipefail

readonly POLL_SECONDS=30 # between two looks of status --wait
readonly APOSTROPHE="'"

usage() {
  cat <<'END'
Usage: scripts/tpu_vm.sh VERB [flags]

  create [-- FLAGS]  ask for a TPU: a queued resource with one node, both called NAME; FLAGS go to
                     `gcloud compute tpus queued-resources create` as they are
      --accelerator TYPE       v4-32, v5litepod-16, v5p-32, v6e-16 …    (or $ACCELERATOR)
      --runtime_version V      software of the VMs; the usual one for TYPE if not given
      --spot | --reserved      cheaper and taken back at any time | from a reservation
      --network N  --subnetwork N  --service_account EMAIL
  status             state of the queued resource and of the node
      --wait                   come back when the TPU is ready, or never will be
  setup              copy the sources of HEAD to all workers and install them with their TPU extra
  run -- COMMAND     start a job on all workers; it goes on when the connection ends
  logs               the log of worker 0
      --worker W               another one, a list (0,2), a range (0-3), or all
      --lines N                how much of it (40)
      --follow                 and what comes, until the job ends
  stop               SIGTERM, upon which training saves a checkpoint; then wait for the end
      --seconds N              how long to wait on each worker (600)
      --kill                   SIGKILL if that wasn't enough
  delete             delete node and queued resource, and all that is on the workers' disks
      --yes                    don't ask

Every verb takes (and --help shows this)
      --name NAME              of the TPU                               (or $TPU_NAME)
      --zone ZONE              us-central2-b …                          (or $ZONE)
      --project PROJECT        that pays                                (or $PROJECT)
      --internal_ips           workers have internal addresses only     (or INTERNAL_IPS=1)
      --dry_run                show the commands and run none; needs no gcloud
END
}

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

# One line that a POSIX shell reads back as these words.
quote() {
  local word rest quoted line=""
  for word in "$@"; do
    case "$word" in
      "" | *[!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=@%+,-]*)
        rest="$word" quoted=""
        while [ "$rest" != "${rest#*"$APOSTROPHE"}" ]; do
          quoted+="${rest%%"$APOSTROPHE"*}'\\''"
          rest="${rest#*"$APOSTROPHE"}"
        done
        word="'$quoted$rest'"
        ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Shows a command, then runs it. What is shown is the answer of a dry run, otherwise a note.
step() {
  if [ "$dry_run" = 1 ]; then
    quote "$@"
  else
    quote "$@" >&2
    "$@"
  fi
}

verb="" name="${TPU_NAME:-}" zone="${ZONE:-}" project="${PROJECT:-}"
accelerator="${ACCELERATOR:-}" runtime_version="${RUNTIME_VERSION:-}"
network="" subnetwork="" service_account="" worker=0 lines=40 seconds=600
internal_ips="${INTERNAL_IPS:-0}" spot=0 reserved=0 wait=0 follow=0 kill=0 yes=0 dry_run=0
words=() where=()

# The verb that a flag goes with; "every" for those that go with all.
verb_of() {
  case "$1" in
    --name | --zone | --project | --internal_ips | --dry_run) echo every ;;
    --accelerator | --runtime_version | --spot | --reserved) echo create ;;
    --network | --subnetwork | --service_account) echo create ;;
    --wait) echo status ;;
    --worker | --lines | --follow) echo logs ;;
    --seconds | --kill) echo stop ;;
    --yes) echo delete ;;
    *) fail "there is no flag $1. See: scripts/tpu_vm.sh --help" ;;
  esac
}

parse() {
  [ $# -gt 0 ] || fail "say what to do: create, status, setup, run, logs, stop or delete (--help)"
  verb="$1"
  shift
  case "$verb" in
    create | status | setup | run | logs | stop | delete) ;;
    *) fail "there is no verb $verb; there are: create, status, setup, run, logs, stop, delete" ;;
  esac
  local flag value owner has_value
  while [ $# -gt 0 ]; do
    case "$1" in
      --)
        shift
        words=("$@")
        break
        ;;
      -h | --help)
        usage
        exit
        ;;
      --*) ;;
      *) fail "$1 isn't a flag. A command comes after --, as in: run -- recexplore train …" ;;
    esac
    flag="${1%%=*}" value="${1#*=}" has_value=0
    [ "$flag" = "$1" ] || has_value=1
    shift
    owner="$(verb_of "$flag")"
    [ "$owner" = every ] || [ "$owner" = "$verb" ] || fail "$flag goes with $owner, not with $verb"
    case "$flag" in
      --spot | --reserved | --wait | --follow | --kill | --yes | --dry_run | --internal_ips)
        [ "$has_value" = 0 ] || fail "$flag takes no value"
        value=1
        ;;
      *)
        if [ "$has_value" = 0 ]; then
          case "${1:-}" in "" | --*) fail "$flag wants a value" ;; esac
          value="$1"
          shift
        fi
        [ -n "$value" ] || fail "$flag wants a value"
        ;;
    esac
    printf -v "${flag#--}" %s "$value"
  done
}

check() {
  [ -n "$name" ] || fail "the TPU has no name: give --name, or set TPU_NAME"
  [ -n "$zone" ] || fail "no zone: give --zone, or set ZONE; \`gcloud compute tpus locations list\`"
  [ -n "$project" ] || fail "no project: give --project, or set PROJECT"
  local setting
  for setting in lines seconds; do
    case "${!setting}" in *[!0-9]*) fail "--$setting is ${!setting}, not a whole number" ;; esac
  done
  case "$worker" in
    all) ;;
    *[!0-9,-]*) fail "--worker is $worker; it can be 2, a list 0,2, a range 0-3, or all" ;;
  esac
  case "$internal_ips" in 0 | 1) ;; *) fail "INTERNAL_IPS is $internal_ips, not 0 or 1" ;; esac
  case "$verb:${#words[@]}" in
    run:0) fail "nothing to run: the command comes after --, as in: run -- recexplore train …" ;;
    run:* | create:* | *:0) ;;
    *) fail "$verb takes nothing after --" ;;
  esac
  [ "$dry_run" = 1 ] || command -v gcloud >/dev/null ||
    fail "gcloud isn't on the path. Install the Google Cloud CLI" \
      "(https://cloud.google.com/sdk/docs/install), or see what would be done with --dry_run."
  where=("--zone=$zone" "--project=$project")
}

# The software that Google names for each generation when JAX is installed afterwards.
usual_runtime_version() {
  case "$accelerator" in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no usual software is known for $accelerator: give --runtime_version" ;;
  esac
}

create() {
  [ -n "$accelerator" ] || fail "no accelerator type: give --accelerator, or set ACCELERATOR"
  [ "$spot$reserved" != 11 ] || fail "--spot and --reserved exclude each other"
  [ -n "$runtime_version" ] || runtime_version="$(usual_runtime_version)"
  local more=()
  [ "$spot" = 0 ] || more+=(--spot)
  [ "$reserved" = 0 ] || more+=(--reserved)
  [ -z "$network" ] || more+=("--network=$network")
  [ -z "$subnetwork" ] || more+=("--subnetwork=$subnetwork")
  [ -z "$service_account" ] || more+=("--service-account=$service_account")
  [ "$internal_ips" = 0 ] || more+=(--internal-ips)
  step gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$accelerator" "--runtime-version=$runtime_version" \
    ${more[@]+"${more[@]}"} ${words[@]+"${words[@]}"}
}

status() {
  local describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    "--format=value(state.state)")
  local describe_node=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}"
    "--format=value(state,health)")
  if [ "$dry_run" = 1 ]; then
    step "${describe[@]}"
    step "${describe_node[@]}"
    return
  fi
  quote "${describe[@]}" >&2
  quote "${describe_node[@]}" >&2
  local state node found seen=""
  while true; do
    state="$("${describe[@]}")" node=""
    # There is no node before the request is granted, and none after it was taken back.
    if [ "$state" = ACTIVE ]; then
      node="$("${describe_node[@]}" | tr '\t' ' ')"
    fi
    # Changes only: waiting can take hours.
    found="queued resource: $state${node:+, node: $node}"
    [ "$found" = "$seen" ] || echo "$found"
    seen="$found"
    case "$state ${node%% *}" in
      "ACTIVE READY") return ;;
      FAILED* | DELETING* | SUSPEND* | *" PREEMPTED" | *" TERMINATED" | *" DELETING")
        echo "This TPU won't come (back): delete it. After create and setup the same run goes on."
        return "$wait"
        ;;
    esac
    [ "$wait" = 1 ] || return 0
    sleep "$POLL_SECONDS"
  done
}

# A command on workers, each word quoted for the shell there.
on_workers() {
  local workers="$1" more=()
  shift
  [ "$internal_ips" = 0 ] || more+=(--internal-ip)
  step gcloud compute tpus tpu-vm ssh "$name" "--worker=$workers" "${where[@]}" \
    ${more[@]+"${more[@]}"} "--command=$(quote "$@")"
}

setup() {
  local commit archive more=()
  commit="$(git rev-parse --short=12 HEAD 2>/dev/null)" ||
    fail "setup copies what is committed, and $PWD isn't a git repository with a commit"
  git diff --quiet HEAD || echo "tpu_vm.sh: what isn't committed won't be copied" >&2
  archive="recexplore-$commit.tar.gz"
  [ "$internal_ips" = 0 ] || more+=(--internal-ip)
  step mkdir -p dist
  step git archive --format=tar.gz "--output=dist/$archive" HEAD
  on_workers all mkdir -p recexplore
  step gcloud compute tpus tpu-vm scp "dist/$archive" scripts/tpu_worker.sh "$name:recexplore/" \
    --worker=all "${where[@]}" ${more[@]+"${more[@]}"}
  on_workers all bash recexplore/tpu_worker.sh setup "$archive"
}

delete() {
  local more=()
  [ "$yes" = 0 ] || more+=(--quiet)
  step gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force \
    ${more[@]+"${more[@]}"}
}

case "${1:-}" in
  -h | --help | help)
    usage
    exit
    ;;
esac
parse "$@"
check
cd "$(dirname "$0")/.."
case "$verb" in
  run) on_workers all bash recexplore/tpu_worker.sh run "${words[@]}" ;;
  logs) on_workers "$worker" bash recexplore/tpu_worker.sh logs "$lines" "$follow" ;;
  stop) on_workers all bash recexplore/tpu_worker.sh stop "$seconds" "$kill" ;;
  *) "$verb" ;;
esac
