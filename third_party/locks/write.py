"""Writes the lock files anew, from what is installed and what pip resolves.

    python third_party/locks/write.py VLLM_PYTHON

The interpreter that runs it is the one whose packages are locked; VLLM_PYTHON
is that of vLLM's CPU build. Comments at a file's head stay. For GPUs pip
resolves without installing, and may download some packages to look inside.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
VLLM = HERE.parent / "vllm"


def installed(python: str) -> Iterator[str]:
  """Yields NAME==VERSION of what an environment has, but for this project."""
  command = [python, "-m", "pip", "freeze", "--exclude-editable"]
  told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  # "NAME @ FILE" is what was installed from a folder.
  yield from (line for line in told.stdout.splitlines() if " @ " not in line)


def resolved(*arguments: str) -> Iterator[str]:
  """Yields NAME==VERSION of what pip would install into an empty environment.

  Raises:
    subprocess.CalledProcessError: pip found no solution, and has said why.
  """
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
  command += ["--ignore-installed", "--report=-", *arguments]
  told = subprocess.run(command, stdout=subprocess.PIPE, check=True)
  for item in json.loads(told.stdout)["install"]:
    yield f"{item['metadata']['name']}=={item['metadata']['version']}"


def write(path: Path, lines: Iterator[str]) -> None:
  """Writes a lock; a build's local version (+cpu) isn't part of it."""
  head = [line for line in path.read_text().splitlines() if line[0] == "#"]
  found = sorted({line.partition("+")[0] for line in lines}, key=str.lower)
  path.write_text("\n".join([*head, *found]) + "\n")
  print(f"written: {path.relative_to(HERE.parents[1])}, {len(found)} packages")


def without(lines: Iterator[str], left_out: str) -> Iterator[str]:
  """Yields the lines that a pattern doesn't match."""
  return (line for line in lines if not re.match(left_out, line))


def main(vllm_python: str) -> None:
  """Writes all of them."""
  runtime = HERE / "py311.txt"
  write(runtime, installed(sys.executable))
  write(VLLM / "lock-cpu.txt", installed(vllm_python))
  cuda = resolved(f"-c{runtime}", "jax[cuda12]")
  nvidia = (line for line in cuda if re.match("nvidia-|jax-cuda", line))
  write(HERE / "cuda12.txt", nvidia)
  # torch's wheel for CUDA pins these itself, and may not be the one that is to
  # be had here.
  cuda = resolved(f"-r{VLLM / 'cuda.txt'}")
  write(VLLM / "lock-cuda.txt", without(cuda, "nvidia-|triton=="))


if __name__ == "__main__":
  main(*sys.argv[1:])
