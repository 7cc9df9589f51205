r"""Distils a larger teacher into a student on your own problems (OPD).

    python examples/own_opd.py runs/own-opd
    python examples/own_opd.py runs/mine --problems mine.jsonl --domain math \
        --student FOLDER --teacher FOLDER --benchmark math500

The laboratory's two models stand for yours, which may be folders or hub ids. A
line of the problems is an object with `problem` and `answer`; docs/data.md says
what else it may have. Lengths are the laboratory's: raise them for real models.
"""

import argparse
from pathlib import Path

import trd_jax

HERE = Path(__file__).parent


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir")
  parser.add_argument("--problems", default=str(HERE / "problems.jsonl"))
  parser.add_argument("--student", default="lab:student")
  parser.add_argument("--teacher", default="lab:teacher")
  parser.add_argument("--domain", default="arithmetic")
  parser.add_argument("--benchmark", default="arithmetic")
  parser.add_argument("--questions", type=int, default=32)
  parser.add_argument("--updates", type=int, default=8)
  args = parser.parse_args()

  config = trd_jax.load_config(
    "demo:regime=opd",
    student__path=args.student,
    teacher__path=args.teacher,
    domain=args.domain,
    data__source="jsonl",
    data__root=args.problems,
    train__batch_size=8,
    train__epochs=8,
    train__max_steps=args.updates,
    # A question is asked four times, before training and afterwards.
    evaluate__benchmarks=(args.benchmark,),
    evaluate__num_problems=args.questions,
    evaluate__k=4,
  )
  run = trd_jax.run(config, args.workdir)

  figures = run.summary["benchmarks"][args.benchmark]
  for side in ("base", "trained"):
    print(f"{side:8} Avg@4 {100 * figures[side]['avg_at_k']:.1f}%")
  print(f"the student to serve: {run.workdir / 'merge' / 'model'}")


if __name__ == "__main__":
  main()
