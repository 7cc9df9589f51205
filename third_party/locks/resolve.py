"""Prints what pip would install beside a lock, a line each: NAME==VERSION.

    python third_party/locks/resolve.py -c LOCK REQUIREMENT...

What the lock names already is left out. Nothing is installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path


def resolve(lock: Path, requirements: list[str]) -> list[str]:
  """Returns the lines, sorted.

  Raises:
    subprocess.CalledProcessError: pip found no solution, and has said why.
  """
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
  command += ["--ignore-installed", "--report=-", f"-c{lock}", *requirements]
  report = json.loads(subprocess.run(command, stdout=-1, check=True).stdout)
  known = {_plain(line.partition("==")[0]) for line in lock.open()}
  found = [item["metadata"] for item in report["install"]]
  return sorted(
    f"{item['name']}=={item['version']}"
    for item in found
    if _plain(item["name"]) not in known
  )


def _plain(name: str) -> str:
  """A package's name as pip compares it."""
  return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
  _, _, lock_name, *wanted = sys.argv
  print(*resolve(Path(lock_name), wanted), sep="\n")
