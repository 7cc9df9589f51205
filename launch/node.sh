#!/usr/bin/env bash
# A row of the paper on one node of eight GPUs, from nothing to its table.
#
# usage: launch/node.sh CONFIG WORKDIR [--dry-run] [-- flags of trd_jax.pipeline]
#
#   CONFIG     a config with its variants, as configs/opsd.py:model=8b
#   WORKDIR    the run's directory
#   --dry-run  print the commands, look at models and data, print budgets,
#              devices, hours and disk; start and install nothing
#
# TRD_PYTHON is the interpreter that the environments are made from; default
# python3, 3.11 or newer. Same command again: it goes on where it stopped.
#
# example: launch/node.sh configs/opd.py:model=1.7b,domain=code runs/opd-code
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
base=${TRD_PYTHON:-python3}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
refuse() {
  printf 'node.sh: %s\n' "$*" >&2
  exit 2
}

dry='' positional=()
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run) dry=yes ;;
    --)
      shift
      break
      ;;
    -*) refuse "there is no flag $1; flags of the pipeline stand behind --" ;;
    *) positional+=("$1") ;;
  esac
  shift
done
((${#positional[@]} == 2)) || refuse "give CONFIG and WORKDIR; see --help"
config=${positional[0]} workdir=${positional[1]}
[[ $config != \~/* ]] || config=~/${config#\~/}
[[ -n $workdir ]] || refuse "WORKDIR is empty; name the run's directory"
cd "$root"
[[ -f ${config%%:*} ]] || refuse "there is no file ${config%%:*}"

# What a Python lacks of some modules, in words; nothing where it is fit.
lacks() {
  command -v "$1" >/dev/null || {
    printf 'there is no %s here' "$1"
    return
  }
  "$1" - "$@" <<'END' 2>/dev/null || printf '%s is no Python' "$1"
import sys

name, version = sys.argv[1], "Python %d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
  sys.stdout.write("%s is %s" % (name, version))
else:
  from importlib.util import find_spec

  missing = [one for one in sys.argv[2:] if find_spec(one) is None]
  if missing:
    told = ", ".join(missing)
    sys.stdout.write("%s (%s) has no %s" % (name, version, told))
END
}

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [[ $dry ]] || "$@"
}
pipeline=(.venv/bin/python -m trd_jax.pipeline "--config=$config"
  "--workdir=$workdir" "$@")

if [[ ! $dry ]] && ! { .venv/bin/python -m pip --version &&
  [[ -e .venv-vllm/installed ]]; } &>/dev/null; then
  why=$(lacks "$base" venv ensurepip)
  [[ -z $why ]] || refuse "$why, and environments are made with it: name a" \
    "Python 3.11 or newer that has venv in TRD_PYTHON"
fi

# Two environments that never meet: JAX's, which trains, and vLLM's, which
# generates; on GPUs they want different NVIDIA packages. What an interrupted
# installation left is taken up again.
.venv/bin/python -m pip --version &>/dev/null || run "$base" -m venv .venv
run .venv/bin/python -m pip install --quiet -e '.[cuda12]'
[[ -e .venv-vllm/installed ]] ||
  run env "PYTHON=$base" third_party/vllm/install.sh cuda .venv-vllm

# Programs are judged in a sandbox, HumanEval+ and MBPP+ by EvalPlus there, and
# LiveCodeBench by lcb_runner. Both also ask their questions themselves.
if [[ $config == *domain=code* ]]; then
  [[ -e .venv-evalplus/installed ]] ||
    run env "PYTHON=$base" third_party/evalplus/install.sh .venv-evalplus
  [[ -e .venv-lcb/lcb_runner.txt ]] ||
    run env "PYTHON=$base" third_party/lcb_runner/install.sh .venv-lcb
fi

# Is this machine fit for it? Two minutes, before an hour is spent.
doctor=(.venv/bin/python -m trd_jax.doctor)
for flag in "${pipeline[@]:3}"; do
  [[ $flag == --*dry_run* ]] || doctor+=("$flag") # the pipeline's alone
done
run "${doctor[@]}"

# What will be run, with its budgets, devices, hours and disk. On a dry run
# that is all, said by whatever Python has the packages; none is installed.
if [[ $dry ]]; then
  run "${pipeline[@]}"
  python=$base
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  why=$(lacks "$python" absl ml_collections numpy pyarrow \
    tokenizers jinja2)
  [[ -z $why ]] || refuse "$why: for the rest of the plan (models, data," \
    "budgets, devices, hours, disk) make .venv as shown above and give this" \
    "command again, or name a Python 3.11 or newer that has trd-jax's" \
    "packages in TRD_PYTHON"
  exec "$python" "${pipeline[@]:1}" --dry_run
fi
run "${pipeline[@]}" --dry_run

# Prompts are counted and checked before a GPU is touched: over budget, control
# tokens spelt out in texts, references that leak, thinking modes that differ.
run "${pipeline[@]}" --config.preflight_only=True

# Rollout, refinement, training, merge, evaluation before and after. A stage that
# computes with JAX would go on without GPUs if they failed: it is told not to.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
run "${pipeline[@]}"
