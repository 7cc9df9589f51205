"""The process that does algebra for the grader: JSON lines in, JSON lines out.

Run by `pool` as `python -m trd_jax.grading.math.worker SECONDS BYTES`. Each
line `{"gold": …, "answer": …}` gets the line `{"correct": …, "reason": …}`.
The kernel ends it when one answer has taken SECONDS of processor time, which
no long product of integers can hold off (a Python handler would wait for the
product), and later by the wall clock, should the parent not have done so; an
address-space limit stands in for memory.
"""

import json
import os
import signal
import sys

WALL = 3.0  # times SECONDS: the wall clock, on a machine that is busy
_GRACE = 2.0  # seconds that the parent has to be first


def _limit_memory(limit: int) -> None:
  """Bounds the address space, where the system knows such a bound."""
  try:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  except (ImportError, ValueError, OSError):
    pass


def main(seconds: float, memory: int) -> None:
  """Answers questions until standard input ends."""
  replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
  os.dup2(2, 1)  # what a library prints is not an answer
  _limit_memory(memory)
  try:
    from trd_jax.grading.math import compare_symbolic, grade_answer

    compare_symbolic.equal("\\frac{1}{2}x", "\\frac{x}{2}")  # builds the parser
  except ImportError as error:
    replies.write(json.dumps({"error": str(error)}) + "\n")
    return
  replies.write(json.dumps({"ready": True}) + "\n")
  for line in sys.stdin:
    question = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL * seconds + _GRACE)
    try:
      correct, reason = grade_answer.decide(
        question["gold"], question["answer"]
      )
    except MemoryError:
      return  # the parent sees the end of the pipe and starts another
    except Exception:  # of a library, at an answer that it isn't made for
      correct, reason = False, "unparsed"
    finally:
      signal.setitimer(signal.ITIMER_PROF, 0)
      signal.setitimer(signal.ITIMER_REAL, 0)
    replies.write(json.dumps({"correct": correct, "reason": reason}) + "\n")


if __name__ == "__main__":
  main(float(sys.argv[1]), int(sys.argv[2]))
