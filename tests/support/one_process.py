"""Runs commands of ours, with all that they start, inside one process.

    python -m tests.support.one_process pipeline --config=… --workdir=…
    python -m tests.support.one_process rollout,refine --config=… --workdir=…

A stage's start, imports and tracing are two thirds of a small pipeline's
processor time. Tests of what rounds and sweeps make go without them; that each
stage is a process of its own is what `test_pipeline` runs.
"""

import runpy
import sys
import warnings
from collections.abc import Sequence

from trd_jax.experiment.processes import supervise


def run(command: Sequence[str], patient: bool = False) -> int:
  """Runs `python -m MODULE ARGUMENTS` here; replaces `supervise.run`.

  Returns:
    the exit code that a process of its own would have ended with.
  """
  del patient
  python, m, module, *arguments = command
  assert (python, m) == (sys.executable, "-m"), command
  before = sys.argv
  sys.argv = [module, *arguments]
  try:
    with warnings.catch_warnings():
      # The module is imported already, and runs once more under this name.
      warnings.filterwarnings(
        "ignore", ".*found in sys.modules", RuntimeWarning
      )
      runpy.run_module(module, run_name="__main__")
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else int(end.code is not None)
  finally:
    sys.argv = before
  return 0


if __name__ == "__main__":
  supervise.run = run
  for name in sys.argv[1].split(","):
    code = run([sys.executable, "-m", f"trd_jax.{name}", *sys.argv[2:]])
    if code:
      sys.exit(code)
