"""Runs inside lcb_runner's environment; see `grading.lcb_runner`.

    driver.py prompts FOLDER MODEL
    driver.py judge FOLDER WORKERS

Both read FOLDER/asked.json and write FOLDER/answered.json. MODEL is an entry of
lcb_runner's list of models: its style decides prompts, and what of a response
is the program.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

_TURN, _ENDS = "<|im_start|>", "<|im_end|>"


def _imported(name: str):
  """Imports a module of lcb_runner, whatever it imports beside its own.

  At its top are clients of services and of data sets, which nothing here calls
  and few environments have: an empty module stands in for each.
  """
  while True:
    try:
      return importlib.import_module(name)
    except ModuleNotFoundError as error:
      missing = error.name or ""
      if not missing or missing.partition(".")[0] == "lcb_runner":
        raise
      stand_in = types.ModuleType(missing)
      vars(stand_in)["__getattr__"] = _empty
      sys.modules[missing] = stand_in


def _empty(name: str) -> str:
  if name.startswith("__"):
    raise AttributeError(name)
  return ""


def _style(model: str):
  """Returns the style of a model in lcb_runner's list.

  Raises:
    SystemExit: it isn't there; says which are like it.
  """
  from lcb_runner import lm_styles  # type: ignore[import-not-found]

  store = {each.model_name: each for each in lm_styles.LanguageModelList}
  if model not in store:
    family = model.split("/")[0].lower()
    like = [name for name in store if name.lower().startswith(family)]
    sys.exit(
      f"lcb_runner lists no model {model}; name one in evaluate.lcb_model"
      f" ({', '.join(like) or 'there is none of its family'})"
    )
  return store[model].model_style


def _messages(prompt) -> list[dict]:
  """Returns a prompt as a conversation; styles write it in three ways.

  As one; as a system turn's text beside one; or as text with Qwen's marks,
  which is taken apart so that the model's own template writes it.

  Raises:
    ValueError: it is none of these.
  """
  if isinstance(prompt, tuple):
    system, turns = prompt
    return [{"role": "system", "content": system}, *turns]
  if isinstance(prompt, list):
    return prompt
  turns = []
  for turn in prompt.split(_TURN)[1:]:
    role, _, rest = turn.partition("\n")
    content, mark, _ = rest.rpartition(_ENDS)
    if mark:
      turns.append({"role": role, "content": content})
  if not turns or not prompt.endswith(f"{_TURN}assistant\n"):
    raise ValueError(prompt[:80])
  return turns


def _prompts(folder: Path, model: str) -> None:
  """Answers with the style's name and a conversation a question."""
  style = _style(model)
  asked = json.loads((folder / "asked.json").read_text())
  # lcb_runner opens its examples by paths from its root.
  styles = _imported("lcb_runner.lm_styles")
  os.chdir(Path(styles.__file__ or "").parents[1])
  benchmark = _imported("lcb_runner.benchmarks.code_generation")
  prompts = _imported("lcb_runner.prompts.code_generation")
  messages = []
  for row in asked["rows"]:
    question = benchmark.CodeGenerationProblem(
      question_title="",
      question_content=row["content"],
      platform="leetcode",
      question_id="",
      contest_id="",
      contest_date="2025-01-01T00:00:00",
      starter_code=row["starter_code"],
      difficulty="easy",
      # No tests: the tool would unpickle those that are packed.
      public_test_cases="[]",
      private_test_cases="[]",
      metadata="{}",
    )
    prompt = prompts.format_prompt_generation(question, style)
    try:
      messages.append(_messages(prompt))
    except ValueError:
      sys.exit(
        f"lcb_runner's prompt for {model} ({style.value}) is no conversation"
        " that another model's template could write; name a chat model of"
        " lcb_runner's list in evaluate.lcb_model"
      )
  _answer(folder, {"style": style.value, "messages": messages})


def _judge(folder: Path, workers: str) -> None:
  """Answers with codes by program, and the programs of whole responses."""
  from lcb_runner.evaluation.compute_code_generation_metrics import (  # type: ignore[import-not-found]
    codegen_metrics,
  )

  asked = json.loads((folder / "asked.json").read_text())
  programs = [row["program"] for row in asked["rows"]]
  if asked["model"] is not None:
    from lcb_runner.utils.extraction_utils import (  # type: ignore[import-not-found]
      extract_code,
    )

    style = _style(asked["model"])
    programs = [extract_code(text, style) for text in programs]
  _, results, _ = codegen_metrics(
    [{"input_output": row["input_output"]} for row in asked["rows"]],
    [[program] for program in programs],
    k_list=[1],
    num_process_evaluate=int(workers),
    timeout=asked["seconds"],
  )
  codes = [results[index][0] for index in range(len(programs))]
  _answer(folder, {"codes": codes, "programs": programs})


def _answer(folder: Path, answer: dict) -> None:
  # Whole or not at all: half a file would be read as an answer.
  unfinished = folder / "answered.tmp"
  unfinished.write_text(json.dumps(answer))
  unfinished.rename(folder / "answered.json")


def main() -> None:
  """Does what the module's head says."""
  mode, folder, argument = sys.argv[1:]
  {"prompts": _prompts, "judge": _judge}[mode](Path(folder), argument)


if __name__ == "__main__":
  main()
