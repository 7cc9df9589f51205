"""Whose words a benchmark's questions are asked in."""

import re

import pytest

from tests.data.test_benchmarks import MATH, amo_row, chosen, write
from tests.data.test_prompts import problem
from tests.data.test_templates import folder
from tests.test_stages import go, small
from trd_jax import evaluate
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import questions, sources
from trd_jax.experiment.records import GradedSample
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation import sampling_stage
from trd_jax.grading import benchmark_prompts
from trd_jax.model.weights import hub

# As AMO-Bench's prompts end, in other words.
ASKS = "\n\nSay at the end: The final answer is: \\boxed{...}"


def asked_of(name, problems, prompt_set=None):
  prompt_set = prompt_set or prompts.default()
  return benchmark_prompts.of_benchmark(name, problems, prompt_set)


def test_amo_bench_asks_in_its_own_words_alone(tmp_path):
  rows = [amo_row(i, prompt=f"Problem {i}?{ASKS}") for i in range(1, 51)]
  write(tmp_path / "amobench.jsonl", rows)
  found = questions.load(chosen(tmp_path), "AMO-Bench").problems
  asked = asked_of("AMO-Bench", found)
  assert asked.version == benchmark_prompts.QUESTION == "question"
  assert asked.messages == [p.text for p in found]
  assert asked.messages[0] == f"Problem 1?{ASKS}"
  # It is a training set like any other where it is trained on.
  assert prompts.default().initial(found[0]) != found[0].text


@pytest.mark.skipif(
  sources.in_folder(MATH, "amobench") is None,
  reason=f"no copy of AMO-Bench in {MATH}",
)
def test_amo_bench_itself_says_how_to_answer():
  found = questions.load(chosen(MATH), "amobench").problems
  for text in asked_of("amobench", found).messages:
    assert "\\boxed{" in text
    assert "final answer" in text.lower()


REFINE = "{{ problem }}\n{{ draft }}\nMend it."


def test_words_are_known_by_the_message_and_not_by_the_set(tmp_path):
  p = [problem("arithmetic")]
  default = asked_of("arithmetic", p)
  assert default.version == prompts.VERSION
  other = prompts.load(folder(tmp_path / "a", refinement_math=REFINE))
  assert other.version != prompts.VERSION
  assert asked_of("arithmetic", p, other) == default
  mine = folder(tmp_path / "b", initial_arithmetic="{{ problem }} Go.")
  asked = asked_of("arithmetic", p, prompts.load(mine))
  assert asked.version != default.version
  assert asked.messages == [f"{p[0].text} Go."]


@pytest.mark.slow
def test_samples_say_whose_words_asked(tmp_path, capsys):
  rows = [amo_row(i, prompt=f"Start at {i}.") for i in range(1, 51)]
  write(tmp_path / "amobench.jsonl", rows)
  e = small(
    **{
      "evaluate.root": str(tmp_path),
      "evaluate.benchmarks": ("arithmetic", "amobench"),
      "evaluate.num_problems": 2,
      "evaluate.k": 1,
      "evaluate.max_response_tokens": 8,
    }
  )
  run_dir = RunDir(tmp_path / "run")
  go(evaluate, e, run_dir, model="base")
  assert re.search(
    r"asked as +arithmetic 1, amobench question", capsys.readouterr().out
  )
  done = run_dir.done("evaluate/base")
  words = {name: row["prompt_version"] for name, row in done.items()}
  assert words == {"arithmetic": "1", "amobench": "question"}
  chat = Chat.load(hub.model_folder("lab:student"))
  for row in run_dir.read("evaluate/base", GradedSample):
    assert row.prompt_version == words[row.benchmark]
    if row.benchmark == "amobench":
      number = row.problem_id.rpartition("-")[2]
      ids = chat.render(f"Start at {number}.", None)
      assert row.prompt_sha256 == sampling_stage.prompt_sha256(ids)
