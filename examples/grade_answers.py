"""Grades a file of mathematical answers with the package as a library.

    python examples/grade_answers.py
    python examples/grade_answers.py answers.jsonl

A line is an object with `completion`, what a model wrote, and `gold`, the right
answer. `python -m trd_jax.grading.math` does the same as a command, and
`python -m trd_jax.grading.code` grades programs.
"""

import collections
import json
import sys
from pathlib import Path

from trd_jax.grading.math.verifier import close, verify_batch

ANSWERS = Path(__file__).parent / "answers.jsonl"


def main(path: Path) -> None:
  rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  verdicts = verify_batch([(row["completion"], row["gold"]) for row in rows])
  close()  # ends the processes that compared formulas
  for row, verdict in zip(rows, verdicts, strict=True):
    mark = {True: "right", False: "wrong", None: "not judged"}[verdict.correct]
    print(f"{mark:10} {verdict.reason:10} {verdict.extracted} = {row['gold']}?")
  reasons = collections.Counter(verdict.reason for verdict in verdicts)
  print(f"{sum(v.correct is True for v in verdicts)} of {len(rows)} right")
  print(", ".join(f"{n} {reason}" for reason, n in reasons.items()))


if __name__ == "__main__":
  main(Path(sys.argv[1]) if len(sys.argv) > 1 else ANSWERS)
