#!/usr/bin/env bash
# Trains on hosts that ssh reaches: stage 3, one process a host.
#
# usage: launch/train_ssh.sh HOST[,HOST...] [--port P] [--dir DIR] [--dry-run]
#          -- arguments of trd_jax.train
#
#   HOST        as ssh takes it; the first has the coordinator, and the others
#               must reach it by that name (without the user@)
#   --port P    of the coordinator; default 8471
#   --dir DIR   this folder on the hosts; default: as here
#   --dry-run   print the commands and start nothing
#
# One process a host, with all of its devices. The hosts have to see the same
# files: the workdir, and what the config names, are on a disk that they share.
# Lines are shown with their host in front. When one process ends with an
# error, or this is interrupted, the connections are closed, and a process whose
# connection is gone interrupts itself; the exit code is the first error's. Same
# command again: it goes on.
#
# TRD_PYTHON is the interpreter on the hosts, default .venv/bin/python. TRD_SSH
# is the program that runs a command on a host, in the place of ssh, called as
# TRD_SSH HOST COMMAND. Variables JAX_* and XLA_* are passed on to the hosts.
#
# example: launch/train_ssh.sh gpu1,gpu2 -- --workdir=/shared/runs/opsd-8b
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${TRD_PYTHON:-.venv/bin/python}
# A shared connection would outlive its command.
ssh=(ssh -o BatchMode=yes -o ControlPath=none -o ServerAliveInterval=15)
[[ -z ${TRD_SSH:-} ]] || ssh=("$TRD_SSH")

say() { printf 'train_ssh.sh: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

hosts='' port=8471 dir=$root dry=''
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
    --port=* | --dir=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --port | --dir)
      [[ -n ${2:-} && ${2:-} != --* ]] || refuse "$1 wants a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -*) refuse "there is no option $1; arguments of the stage go behind --" ;;
    *)
      [[ -z $hosts ]] || refuse "one list of hosts, not \"$hosts\" and \"$1\""
      hosts=$1
      shift
      ;;
  esac
done
[[ -n $hosts ]] || refuse "name the hosts: launch/train_ssh.sh HOST,HOST -- ..."
(($#)) || refuse "name the stage's arguments behind --, as -- --workdir=DIR"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || refuse "\"$port\" is no port"
((port < 65536)) || refuse "\"$port\" is no port"
IFS=, read -r -a names <<<"$hosts"
for host in "${names[@]}"; do
  [[ -n $host && $host != -* && $host != *[[:space:]]* ]] ||
    refuse "\"$host\" is no host"
done

first=${names[0]#*@}
[[ $first != *:* ]] || first="[$first]"
settings=()
for name in $(compgen -e); do
  case $name in
    JAX_* | XLA_*) settings+=("$name=${!name}") ;;
  esac
done

# A word as every shell reads it, quoted where it has to be.
quoted() {
  local word=$1
  if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf '%s' "$word"
  else
    printf "'%s'" "${word//\'/\'\\\'\'}"
  fi
}
# What the host of a process runs. PPID is the connection's process there.
command_for() {
  local process=$1 word
  shift
  # A home is the host's, which its shell puts in the place of a bare tilde.
  local folder=$dir home=''
  if [[ $dir =~ ^(~[A-Za-z0-9_.-]*)(/(.*))?$ ]]; then
    home=${BASH_REMATCH[1]}/ folder=${BASH_REMATCH[3]}
  fi
  # shellcheck disable=SC2016  # expanded on the host
  printf 'cd %s%s && exec env TRD_JAX_PIPELINE=$PPID' "$home" \
    "$(quoted "$folder")"
  for word in "TRD_COORDINATOR=$first:$port" "TRD_PROCESSES=${#names[@]}" \
    "TRD_PROCESS=$process" "${settings[@]}" "$python" -m trd_jax.train "$@"; do
    printf ' %s' "$(quoted "$word")"
  done
}

if [[ -n $dry ]]; then
  for i in "${!names[@]}"; do
    printf '%s %s %s\n' "${ssh[*]}" "${names[i]}" \
      "$(quoted "$(command_for "$i" "$@")")"
  done
  exit 0
fi
command -v "${ssh[0]}" >/dev/null ||
  refuse "there is no program ${ssh[0]} (TRD_SSH)"

pids=()
# shellcheck disable=SC2317,SC2329  # called by the trap
finish() {
  trap '' INT TERM
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Lines with their host in front.
named() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s: %s\n' "$1" "$line"
  done
}

for i in "${!names[@]}"; do
  "${ssh[@]}" "${names[i]}" "$(command_for "$i" "$@")" </dev/null \
    > >(named "${names[i]}") 2> >(named "${names[i]}" >&2) &
  pids+=($!)
done

left=("${pids[@]}")
while ((${#left[@]})); do
  gone='' code=0
  wait -n -p gone "${left[@]}" || code=$?
  running=()
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$gone" ]] || host=${names[i]}
  done
  for pid in "${left[@]}"; do [[ $pid == "$gone" ]] || running+=("$pid"); done
  left=("${running[@]}")
  if ((code)); then
    say "the process on $host ended with code $code; ending the others"
    exit "$code"
  fi
done
