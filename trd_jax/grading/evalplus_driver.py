"""Runs inside EvalPlus's environment; see `grading.evalplus`.

EvalPlus waits for ever for a worker that a candidate has ended; this ends.
"""

import os
import sys
import traceback


def main() -> int:
  """DATASET SAMPLES WORKERS SECONDS as arguments; the exit code."""
  from evalplus.evaluate import evaluate  # type: ignore[import-not-found]

  dataset, samples, workers, seconds = sys.argv[1:]
  try:
    evaluate(
      dataset=dataset,
      samples=samples,
      parallel=int(workers),
      min_time_limit=float(seconds),
    )
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


if __name__ == "__main__":
  code = main()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
