#!/usr/bin/env bash
# Makes the environment of lcb_runner, which judges LiveCodeBench. It is on no
# registry, and asks for what generates (torch, vLLM, clients of six services),
# so that its source is fetched and put on the path of an environment that has
# what its evaluation imports.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: third_party/lcb_runner/install.sh [VENV]

  VENV   the environment to make or mend [.venv-lcb in the project's root]

PYTHON names the interpreter that makes it [python3]; Python 3.11 or newer.
LCB_SOURCE is the repository, an address or a folder
[https://github.com/LiveCodeBench/LiveCodeBench]; LCB_COMMIT a commit of it [the
newest]. The commit that it came to is printed, and kept in VENV/lcb_runner.txt.
With a VENV of your own: --config.python.lcb_runner=VENV/bin/python
TEXT
}

fail() {
  echo "install.sh: $*" >&2
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
venv=${1:-$root/.venv-lcb}
repository=${LCB_SOURCE:-https://github.com/LiveCodeBench/LiveCodeBench}

case $venv in
  \~) venv=~ ;;
  \~/*) venv=~/${venv#\~/} ;;
esac
[ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
  fail "$venv is there and no environment; name another, or move it away"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than Python 3.11: PYTHON=python3.11 $0"
command -v git > /dev/null || fail "there is no git to fetch lcb_runner with"

echo "installing lcb_runner into $venv (once)"
# Fetched first: where that fails there is no environment that looks whole.
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
git init --quiet "$fetched"
git -C "$fetched" fetch --quiet --depth 1 "$repository" "${LCB_COMMIT:-HEAD}" ||
  fail "$repository can't be fetched; LCB_SOURCE names another copy"
git -C "$fetched" checkout --quiet FETCH_HEAD
[ -f "$fetched/lcb_runner/evaluation/compute_code_generation_metrics.py" ] ||
  fail "$repository has no lcb_runner/evaluation"

"$venv/bin/python" -m pip --version > /dev/null 2>&1 ||
  "$python" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install \
  -r "$here/evaluation.txt" ||
  fail "pip failed; give the same command again once that is mended"
site=$("$venv/bin/python" -c \
  'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# A folder below the root is removed further down, so which one has to be sure.
[[ $site == /*/site-packages && -d $site ]] ||
  fail "$venv/bin/python says that its packages are in \"$site\", and that" \
    "is no folder of packages; name another VENV"
# What was not copied by this script is somebody's.
[ ! -e "$site/lcb_runner" ] || [ -e "$venv/lcb_runner.txt" ] ||
  fail "$site/lcb_runner is there already; name another VENV, or move it away"
git -C "$fetched" rev-parse HEAD > "$venv/lcb_runner.txt"
rm -rf "$site/lcb_runner"
cp -r "$fetched/lcb_runner" "$site/lcb_runner"

"$venv/bin/python" - <<'CHECK'
import lcb_runner.evaluation.compute_code_generation_metrics  # noqa: F401
CHECK
echo "lcb_runner at $(cat "$venv/lcb_runner.txt")"
