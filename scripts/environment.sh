# Sourced by demo.sh and test.sh: makes the virtual environment $VENV (default .venv) with recexplore
# and the extras named in $EXTRAS, and does nothing when it is already there and setup.py is as it was.
# Uses uv when it is on the path, pip otherwise.

VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"

make_environment() {
  local stamp="$VENV/.recexplore-$1" wanted
  wanted="$(cat setup.py pyproject.toml | cksum) $PWD"
  if [ -x "$VENV/bin/recexplore" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Installing recexplore into $VENV"
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$VENV/bin/python" --editable "$2"
  else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$2"
  fi
  echo "$wanted" >"$stamp"
}
