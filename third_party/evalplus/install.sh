#!/usr/bin/env bash
# Makes the environment of EvalPlus, which judges HumanEval+ and MBPP+. It runs
# what a model wrote, so it holds nothing else, and is run in the sandbox only.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: third_party/evalplus/install.sh [VENV]

  VENV   the environment to make or mend [.venv-evalplus in the project's root]

PYTHON names the interpreter that makes it [python3]; Python 3.11 or newer.
With a VENV of your own: --config.python.evalplus=VENV/bin/python
TEXT
}

fail() {
  echo "install.sh: $1" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  -*)
    usage >&2
    exit 2
    ;;
esac
[ $# -le 1 ] || fail "one environment at a time, not: ${*:2}"
venv=${1:-$root/.venv-evalplus}

case $venv in
  \~) venv=~ ;;
  \~/*) venv=~/${venv#\~/} ;;
esac
[ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
  fail "$venv is there and no environment; name another, or move it away"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than Python 3.11: PYTHON=python3.11 $0"

echo "installing EvalPlus into $venv (once; about a minute)"
rm -f "$venv/installed"
"$venv/bin/python" -m pip --version > /dev/null 2>&1 ||
  "$python" -m venv "$venv"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# EvalPlus misses on purpose what it would generate with, and pip says so:
# only a failure is shown.
pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" \
    2> "$log" || {
    cat "$log" >&2
    echo "install.sh: pip $1 failed; give the same command again once that is" \
      "mended" >&2
    exit 1
  }
}

pip install -r "$here/evaluation.txt"
pip install --no-deps -r "$here/requirements.txt"

"$venv/bin/python" - <<'CHECK'
import importlib.metadata as metadata

import evalplus.evaluate  # noqa: F401

print(f"EvalPlus {metadata.version('evalplus')}")
CHECK
# launch/node.sh looks for it: an interrupted installation has none.
touch "$venv/installed"
