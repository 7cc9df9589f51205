#!/usr/bin/env bash
# Makes the environments that the benchmarks run in: one with trd-jax and the
# peers that go beside it, one for Tunix, whose pins do not.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: third_party/bench/install.sh [VENV [TUNIX_VENV]]

  VENV         the environment to make or mend [.venv-bench in the project's root]
  TUNIX_VENV   Tunix's [.venv-tunix]

PYTHON names the interpreter that makes them [python3]; Python 3.11 or newer.
Everything is for CPUs. Afterwards: make bench
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
esac
[ $# -le 2 ] || fail "two environments at most, not also: ${*:3}"
venv=${1:-$root/.venv-bench}
tunix_venv=${2:-$root/.venv-tunix}

for one in "$venv" "$tunix_venv"; do
  [ ! -e "$one" ] || [ -e "$one/pyvenv.cfg" ] || [ -z "$(ls -A "$one")" ] ||
    fail "$one is there and no environment; name another, or move it away"
done

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than Python 3.11: PYTHON=python3.11 $0"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# pip warns of much that is of no concern here: only a failure is shown.
pip() {
  local into=$1
  shift
  "$into/bin/python" -m pip --disable-pip-version-check "$@" 2> "$log" || {
    cat "$log" >&2
    echo "install.sh: pip $1 failed; give the same command again once that is" \
      "mended" >&2
    exit 1
  }
}
make() {
  "$1/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv "$1"
}
pin() { grep "^$1" "$here/peers.txt" || fail "$here/peers.txt has no $1"; }

echo "installing the benchmarks' peers into $venv (once; a few minutes)"
make "$venv"
pip "$venv" install --quiet "$(pin torch==)"
pip "$venv" install --quiet -r "$here/peers.txt" -e "$root"

echo "installing Tunix into $tunix_venv (once; a few minutes)"
make "$tunix_venv"
pip "$tunix_venv" install --quiet -r "$here/tunix.txt"

"$venv/bin/python" - <<'CHECK'
from importlib import metadata

import torch
import trd_jax
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: F401

names = ("torch", "transformers", "peft", "trl", "liger-kernel", "jax")
versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
print(f"trd-jax {trd_jax.__version__}, {versions}")
assert torch.version.cuda is None, "this torch is not the CPU build"
CHECK
"$tunix_venv/bin/python" - <<'CHECK'
from importlib import metadata

import tunix  # noqa: F401

names = ("google-tunix", "qwix", "jax", "flax")
print(", ".join(f"{name} {metadata.version(name)}" for name in names))
CHECK
