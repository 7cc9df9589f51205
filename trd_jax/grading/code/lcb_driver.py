"""Runs inside lcb_runner's environment; see `grading.lcb_runner`."""

import json
import sys
from pathlib import Path


def main() -> None:
  """Reads FOLDER/asked.json, writes FOLDER/answered.json: codes by program."""
  from lcb_runner.evaluation.compute_code_generation_metrics import (  # type: ignore[import-not-found]
    codegen_metrics,
  )

  folder, workers = Path(sys.argv[1]), int(sys.argv[2])
  asked = json.loads((folder / "asked.json").read_text())
  _, results, _ = codegen_metrics(
    [{"input_output": row["input_output"]} for row in asked["rows"]],
    [[row["program"]] for row in asked["rows"]],
    k_list=[1],
    num_process_evaluate=workers,
    timeout=asked["seconds"],
  )
  codes = [results[index][0] for index in range(len(asked["rows"]))]
  # Whole or not at all: half a file would be read as an answer.
  unfinished = folder / "answered.tmp"
  unfinished.write_text(json.dumps(codes))
  unfinished.rename(folder / "answered.json")


if __name__ == "__main__":
  main()
