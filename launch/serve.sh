#!/usr/bin/env bash
# Starts servers of one model for engine.name=server, and ends them.
#
# usage: launch/serve.sh MODEL [--servers N] [--port P] [--host H]
#          [--tensor-parallel N] [--lora RANK] [--dry-run]
#          [-- arguments of vllm serve]
#
#   MODEL                a folder, lab:student, lab:teacher, or a hub id
#   --servers N          how many; default: one for each N GPUs of
#                        --tensor-parallel, without GPUs one
#   --port P             of the first, the others follow; default 8000
#   --host H             address to listen on; default 127.0.0.1
#   --tensor-parallel N  GPUs that share each layer; default 1
#   --lora RANK          take adapters of up to this rank (512 at most) at run
#                        time, for engine.weights=adapter; on GPUs in bfloat16
#   --speculative N      draft N tokens ahead by looking up the prompt: for
#                        servers of refinements, on GPUs
#   --dry-run            print the commands and start nothing
#
# Once all are ready it prints the flag that a stage is to be given, and stays
# until it is interrupted; then it ends the servers that it started. With
# VLLM_API_KEY in the environment of both, servers want that key and the engine
# sends it. TRD_VLLM_PYTHON is the interpreter that has vllm; default
# .venv-vllm/bin/python.
#
# The model is served in the dtype that its config.json names, or in that of
# -- --dtype DTYPE: give the one of the experiment's student.dtype or
# teacher.dtype, which a stage can't see.
#
# example: launch/serve.sh lab:student --servers 2 -- --dtype float32
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${TRD_VLLM_PYTHON:-$root/.venv-vllm/bin/python}

say() { printf 'serve.sh: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

model='' servers='' port=8000 host=127.0.0.1 parallel=1 rank='' drafts='' dry=''
further=()
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      further=("$@")
      break
      ;;
    --dry-run) dry=yes ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --servers | --port | --host | --tensor-parallel | --lora | --speculative)
      [[ -n ${2:-} && ${2:-} != --* ]] || refuse "$1 wants a value"
      case $1 in
        --servers) servers=$2 ;;
        --port) port=$2 ;;
        --host) host=$2 ;;
        --tensor-parallel) parallel=$2 ;;
        --lora) rank=$2 ;;
        --speculative) drafts=$2 ;;
      esac
      shift 2
      continue
      ;;
    -*) refuse "there is no option $1; arguments of vllm serve go behind --" ;;
    *)
      [[ -z $model ]] || refuse "one model only, not \"$model\" and \"$1\""
      model=$1
      ;;
  esac
  shift
done
[[ -n $model ]] || refuse "name a model: launch/serve.sh MODEL; see --help"
for number in "${servers:-1}" "$port" "$parallel" "${rank:-1}" "${drafts:-1}"; do
  [[ $number =~ ^[1-9][0-9]{0,4}$ ]] ||
    refuse "\"$number\" is no number for an option; see --help"
done
# What is only shown needs no vllm.
[[ -z $dry || -x $python ]] || python=$root/.venv/bin/python
[[ -x $python ]] || refuse "$python is no Python interpreter; make an" \
  "environment with vllm, or name one's interpreter in TRD_VLLM_PYTHON"

if [[ -d $model ]]; then
  [[ -f $model/config.json ]] || refuse "$model has no config.json"
  model=$(cd -- "$model" && pwd -P)
else
  model=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" - "$model" <<'END'
import sys

from trd_jax.model.weights import hub
from trd_jax.experiment.errors import UserError

try:
  print(hub.model_folder(sys.argv[1]).resolve())
except UserError as error:
  sys.exit(f"serve.sh: {error}")
END
  ) || exit 2
fi

gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader || true)
fi
if ((${#gpus[@]})); then
  servers=${servers:-$((${#gpus[@]} / parallel))}
  ((servers > 0 && servers * parallel <= ${#gpus[@]})) ||
    refuse "${servers:-0} servers of $parallel GPUs don't fit on the" \
      "${#gpus[@]} there are; lower --servers or --tensor-parallel"
else
  servers=${servers:-1}
fi
((port + servers <= 65536)) || refuse "--port $port leaves no room for $servers"

case $host in
  127.* | localhost | ::1) ;;
  *)
    [[ -n ${VLLM_API_KEY:-} ]] ||
      say "warning: $host can be reached from outside of this machine and" \
        "VLLM_API_KEY is not set: whoever reaches it can use it"
    ;;
esac
case $host in
  0.0.0.0 | ::) near=127.0.0.1 shown=$(hostname) ;;
  *:*) near="[$host]" shown="[$host]" ;;
  *) near=$host shown=$host ;;
esac

# Left to itself, vLLM serves a float32 model in bfloat16.
dtype=''
for ((i = 0; i < ${#further[@]}; i++)); do
  case ${further[i]} in
    --dtype) dtype=${further[i + 1]:-} ;;
    --dtype=*) dtype=${further[i]#*=} ;;
  esac
done
given=$dtype
[[ -n $dtype ]] || dtype=$("$python" - "$model/config.json" <<'END'
import json
import sys

with open(sys.argv[1]) as file:
  config = json.load(file)
print(config.get("dtype") or config.get("torch_dtype") or "auto")
END
) || refuse "$model/config.json is not JSON"
if [[ -n $rank && $dtype == float32 ]] && ((${#gpus[@]})); then
  refuse "vLLM applies adapters on GPUs in bfloat16 alone, and the model is in" \
    "float32: add -- --dtype bfloat16, or serve merged weights without --lora"
fi

# Its check of drafts reads a temperature that was never written.
[[ -z $drafts ]] || ((${#gpus[@]})) ||
  refuse "--speculative: vLLM's CPU build checks drafts at temperature 0 alone," \
    "which a server can't hold its requests to; leave it out"

for ((i = 0; i < servers && ! ${#dry}; i++)); do
  "$python" - "$host" $((port + i)) <<'END' || refuse "$host:$((port + i)) is" \
    "taken or no address of this machine; choose another --port or --host"
import socket
import sys

family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as probe:
  probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    probe.bind((sys.argv[1], int(sys.argv[2])))
  except OSError:
    sys.exit(1)
END
done

arguments=(
  --host "$host"
  --tensor-parallel-size "$parallel"
  # How to sample is the experiment's to say, not the model's folder's.
  --generation-config vllm
  --max-logprobs 1024
  # The model's own distribution, before temperature and masks.
  --logprobs-mode raw_logprobs
  --disable-uvicorn-access-log
)
[[ -n $given ]] || arguments+=(--dtype "$dtype")
if [[ -n $rank ]]; then
  room=''
  for each in 8 16 32 64 128 256 320 512; do
    [[ -n $room ]] || ((each < rank)) || room=$each
  done
  [[ -n $room ]] ||
    refuse "--lora $rank: vLLM applies adapters up to rank 512; serve merged" \
      "weights instead (engine.weights=merged)"
  arguments+=(--enable-lora --max-lora-rank "$room")
  export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
fi
if [[ -n $drafts ]]; then
  # As engine.vllm.speculative=ngram. Beside drafts vLLM takes no biases, by
  # which a head's surplus rows are kept from being drawn otherwise.
  arguments+=(
    --speculative-config
    "{\"method\": \"ngram\", \"num_speculative_tokens\": $drafts,\
 \"prompt_lookup_min\": 3, \"prompt_lookup_max\": 8}"
    --logits-processors trd_jax.generation.engines.vllm_worker:SurplusRows
  )
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
# As engine.name=vllm has them, and for the same reasons.
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
export VLLM_RAISE_ON_LOGIT_NANS=${VLLM_RAISE_ON_LOGIT_NANS:-1}

# The cores of each server on a CPU, as vLLM wants them: a list a rank.
cores=()
if ((!${#gpus[@]})); then
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  # A prompt in parts ends vLLM 0.32 on a CPU where requests have seeds, and to
  # compile takes longer than small models gain from it.
  arguments+=(--no-enable-chunked-prefill --enforce-eager)
  mapfile -t cores < <(
    "$python" - "$servers" "$parallel" <<'END'
import os
import sys

servers, parallel = map(int, sys.argv[1:])
cores, ranks = sorted(os.sched_getaffinity(0)), servers * parallel
share = len(cores) // ranks
for server in range(servers):
  lists = [
    ",".join(map(str, cores[rank * share : (rank + 1) * share]))
    for rank in range(server * parallel, (server + 1) * parallel)
  ]
  print("|".join(lists) if share else "nobind")
END
  )
fi

# vLLM's command line wants the version of a distribution named vllm, and the
# one of its CPU build is named vllm-cpu.
vllm='
import sys
from importlib import metadata

version = metadata.version

def named(name):
  try:
    return version(name)
  except metadata.PackageNotFoundError:
    return version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

metadata.version = named
from vllm.entrypoints.cli.main import main

sys.argv[0] = "vllm"
sys.exit(main())
'

pids=()
# Ends what was started here and nothing else: each server leads a process
# group of its own.
# shellcheck disable=SC2317,SC2329  # called by the trap
finish() {
  trap '' INT TERM
  local pid tries
  for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  for ((tries = 0; tries < 100; tries++)); do
    alive || return 0
    sleep 0.2
  done
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
# Whether anything of a server that was started is left.
# shellcheck disable=SC2317,SC2329  # called by what the trap calls
alive() {
  local pid
  for pid in "${pids[@]}"; do
    kill -0 -- "-$pid" 2>/dev/null && return 0
  done
  return 1
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((i = 0; i < servers; i++)); do
  environment=()
  if ((${#gpus[@]})); then
    mine=$(IFS=, && echo "${gpus[*]:i * parallel:parallel}")
    environment+=("CUDA_VISIBLE_DEVICES=$mine")
  elif [[ -z ${VLLM_CPU_OMP_THREADS_BIND:-} ]]; then
    environment+=("VLLM_CPU_OMP_THREADS_BIND=${cores[i]}")
  fi
  if [[ $dry ]]; then
    printf '%q ' env "${environment[@]}" vllm serve "$model" \
      --port $((port + i)) "${arguments[@]}" "${further[@]}"
    printf '\n'
    continue
  fi
  setsid env "${environment[@]}" "$python" -c "$vllm" serve "$model" \
    --port $((port + i)) "${arguments[@]}" "${further[@]}" >&2 </dev/null &
  pids+=($!)
done

healthy() {
  "$python" - "http://$near:$1/health" <<'END' 2>/dev/null
import sys
import urllib.request

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
direct.open(sys.argv[1], timeout=10)
END
}

urls='' start=$SECONDS
if [[ $dry ]]; then exit 0; fi
for ((i = 0; i < servers; i++)); do
  until healthy $((port + i)); do
    for ((k = 0; k < servers; k++)); do
      kill -0 "${pids[k]}" 2>/dev/null || {
        say "the server on port $((port + k)) ended; what it says above tells why"
        exit 1
      }
    done
    (((SECONDS - start) % 15)) || say "waiting for port $((port + i))" \
      "($((SECONDS - start)) s)"
    sleep 1
  done
  urls+=${urls:+,}http://$shown:$((port + i))
done
say "ready after $((SECONDS - start)) s: $model ($dtype)"
echo "--config.engine.name=server --config.engine.server.urls=$urls"

# A server that ends leaves the others at work.
while ((${#pids[@]})); do
  gone='' code=0
  wait -n -p gone "${pids[@]}" || code=$?
  [[ -n $gone ]] || break
  kill -KILL -- "-$gone" 2>/dev/null || true # what is left of its group
  running=()
  for pid in "${pids[@]}"; do [[ $pid == "$gone" ]] || running+=("$pid"); done
  pids=("${running[@]}")
  say "a server (process $gone) ended with code $code; ${#pids[@]} left"
done
say "no server is left"
exit 1
