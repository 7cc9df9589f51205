#!/usr/bin/env bash
# Trains on the nodes of a Slurm job: stage 3, one process a node.
#
# usage: launch/train_slurm.sh --nodes N [--gpus N] [--time T] [--partition P]
#          [--account A] [--port P] [--grace S] [--dry-run] -- arguments of trd_jax.train
#
#   --nodes N      nodes of the job
#   --gpus N       GPUs of each node; default 8, 0 for none
#   --time T       its time limit, as sbatch takes it; default 04:00:00
#   --partition P  the partition; default: the cluster's
#   --account A    the account; default: yours
#   --port P       of the first process; default: made from the job's id
#   --grace S      seconds between SIGTERM and the end of its time; default 300
#   --dry-run      print the commands and start nothing
#
# One process a node, not one a GPU: each process reads the trajectories and the
# weights and packs for itself, and the devices of one process share what it has
# read. Outside of a job it submits itself (sbatch) and prints the job's id;
# inside of one (sbatch, salloc) it starts the processes (srun) and stays until
# they end. The workdir has to be on a disk that the nodes share. A process
# that ends with an error ends the others, and so does scancel. TRD_PYTHON is
# the interpreter; default .venv/bin/python. Same command again: it goes on, and
# so does a job that was preempted, by itself.
#
# example: launch/train_slurm.sh --nodes 2 -- --workdir=runs/opsd-8b
set -euo pipefail

root=${TRD_ROOT:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)}
python=${TRD_PYTHON:-$root/.venv/bin/python}

say() { printf 'train_slurm.sh: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
# A command as one could type it.
shown() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

given=("$@")
nodes='' gpus=8 time=04:00:00 partition='' account='' port='' grace=300 dry=''
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    --dry-run)
      dry=yes
      shift
      ;;
    --nodes=* | --gpus=* | --time=* | --partition=* | --account=* | --port=* | --grace=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      ;;
    --nodes | --gpus | --time | --partition | --account | --port | --grace)
      [[ -n ${2:-} && ${2:-} != --* ]] || refuse "$1 wants a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -*) refuse "there is no option $1; arguments of the stage go behind --" ;;
    *) refuse "\"$1\" is no option; arguments of the stage go behind --" ;;
  esac
done
(($#)) || refuse "name the stage's arguments behind --, as -- --workdir=DIR"
[[ -n $nodes ]] || refuse "--nodes is missing; see --help"
for number in "$nodes" "$gpus" "${port:-1}" "$grace"; do
  [[ $number =~ ^(0|[1-9][0-9]{0,4})$ ]] ||
    refuse "\"$number\" is no number for an option; see --help"
done

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  submit=(
    sbatch
    --job-name trd-train
    --nodes "$nodes"
    --ntasks-per-node 1
    --exclusive
    --time "$time"
    # Time to save an update before the job is killed; preempted, it comes back.
    --signal "TERM@$grace"
    --requeue
    --open-mode append
  )
  ((gpus == 0)) || submit+=(--gpus-per-node "$gpus")
  [[ -z $partition ]] || submit+=(--partition "$partition")
  [[ -z $account ]] || submit+=(--account "$account")
  submit+=("${BASH_SOURCE[0]}")
  # The job runs what a dry run shows.
  for word in "${given[@]:0:${#given[@]}-$#}"; do
    [[ $word == --dry-run ]] || submit+=("$word")
  done
  submit+=("$@")
  # What Slurm runs is a copy of this file: it has to be told where it is from.
  export TRD_ROOT=$root
  if [[ -n $dry ]]; then
    shown export "TRD_ROOT=$root"
    shown "${submit[@]}"
    exit 0
  fi
  command -v sbatch >/dev/null ||
    refuse "there is no sbatch here: run it where jobs are submitted"
  exec "${submit[@]}"
fi

[[ -n $dry || -x $python ]] || refuse "$python is no Python interpreter; name" \
  "one that all nodes see in TRD_PYTHON"
port=${port:-$((20000 + SLURM_JOB_ID % 10000))}
# Each process learns from srun which it is; all devices of its node are its.
# shellcheck disable=SC2016  # expanded on the nodes
start='export TRD_PROCESSES=$SLURM_NTASKS TRD_PROCESS=$SLURM_PROCID; exec "$@"'
# JAX would train on CPUs if the GPUs failed: it is told not to.
# shellcheck disable=SC2016  # expanded on the nodes
((gpus == 0)) || start='export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} '${start#* }
run=(
  srun
  --nodes "$nodes"
  --ntasks "$nodes"
  --ntasks-per-node 1
  --label
  --kill-on-bad-exit=1
  bash -c "$start" -- "$python" -m trd_jax.train "$@"
)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${first%%$'\n'*}
if [[ -n $dry ]]; then
  shown export "TRD_COORDINATOR=$first:$port"
  shown cd "$root"
  shown "${run[@]}"
  exit 0
fi
export TRD_COORDINATOR=$first:$port
cd "$root"
# In the foreground, so that what interrupts this interrupts the processes.
exec "${run[@]}"
