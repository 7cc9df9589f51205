"""Makes all analyses and draws their figures, and prints what that took.

    python -m tests.support.analyses_alone WORKDIR

The last line is JSON: `gib`, the most memory that the process had, `seconds`,
and `figures`, how many were drawn.
"""

import json
import re
import sys
import time
from pathlib import Path

from trd_jax.analyze import analysis, look, runs

if __name__ == "__main__":
  began = time.monotonic()
  opened = runs.open_runs(sys.argv[1:])
  drawn = 0
  for one in analysis.registry().values():
    result = one.make(opened)
    for figure in result.figures if result else ():
      look.svg(figure.draw())
      drawn += 1
  # Not `ru_maxrss`, which begins with what the starting process had.
  status = Path("/proc/self/status").read_text()
  peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
  seconds = time.monotonic() - began
  print(json.dumps({"gib": peak, "seconds": seconds, "figures": drawn}))
