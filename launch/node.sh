#!/usr/bin/env bash
# A row of the paper on one node of eight GPUs, from nothing to its table.
#
# usage: launch/node.sh CONFIG WORKDIR [--dry-run] [-- flags of trd_jax.pipeline]
#
#   CONFIG     a config with its variants, as configs/opsd.py:model=8b
#   WORKDIR    the run's directory
#   --dry-run  print the commands, budgets, devices, hours and disk, and
#              start nothing
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
cd "$root"
[[ -f ${config%%:*} ]] || refuse "there is no file ${config%%:*}"

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [[ $dry ]] || "$@"
}
pipeline=(.venv/bin/python -m trd_jax.pipeline "--config=$config"
  "--workdir=$workdir" "$@")

# Two environments that never meet: JAX's, which trains, and vLLM's, which
# generates; on GPUs they want different NVIDIA packages. What an interrupted
# installation left is taken up again.
.venv/bin/python -m pip --version &>/dev/null || run "$base" -m venv .venv
run .venv/bin/python -m pip install --quiet -e '.[cuda12]'
[[ -e .venv-vllm/installed ]] ||
  run env "PYTHON=$base" third_party/vllm/install.sh cuda .venv-vllm

# Programs are judged in a sandbox, HumanEval+ and MBPP+ by EvalPlus there.
if [[ $config == *domain=code* ]]; then
  [[ -e .venv-evalplus/installed ]] ||
    run env "PYTHON=$base" third_party/evalplus/install.sh .venv-evalplus
fi

# Is this machine fit for it? Two minutes, before an hour is spent.
doctor=(.venv/bin/python -m trd_jax.doctor)
for flag in "${pipeline[@]:3}"; do
  [[ $flag == --*dry_run* ]] || doctor+=("$flag") # the pipeline's alone
done
run "${doctor[@]}"

# What will be run, with its budgets, devices, hours and disk. On a dry run
# that is all, said by whatever Python has the package.
if [[ $dry ]]; then
  run "${pipeline[@]}"
  python=$base
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
  exec "$python" "${pipeline[@]:1}" --dry_run
fi
run "${pipeline[@]}" --dry_run

# Prompts are counted and checked before a GPU is touched: over budget, control
# tokens spelt out in texts, references that leak, thinking modes that differ.
run "${pipeline[@]}" --config.preflight_only=True

# Rollout, refinement, training, merge, evaluation before and after.
run "${pipeline[@]}"
