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
from trd_jax.data.problems.questions import Questions
from trd_jax.experiment import experiment, paper_recipe, prompt_sets
from trd_jax.experiment.records import GradedSample
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation import sampling_stage
from trd_jax.grading import benchmark_prompts
from trd_jax.model.weights import hub

# As AMO-Bench's prompts end, in other words.
ASKS = "\n\nSay at the end: The final answer is: \\boxed{...}"


def asked_of(name, problems, prompt_set=None, **section):
  return benchmark_prompts.of_benchmark(
    name,
    Questions(problems, {}),
    prompt_set or prompts.default(),
    experiment.from_config({"evaluate": {"k": 1, **section}}),
  )


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


def test_mathematics_is_asked_as_the_model_card_does():
  p = [problem(), problem(text="And 2?")]
  asked = asked_of("aime24", p)
  card = "Please reason step by step, and put your final answer within "
  assert asked.version == benchmark_prompts.CARD == "card"
  assert asked.messages == [f"{q.text}\n\n{card}\\boxed{{}}." for q in p]
  ours = asked_of("aime24", p, math_prompt="ours")
  assert ours.version == prompts.VERSION
  assert ours.messages == [*map(prompts.default().initial, p)]
  # The set that has the authors' content asks mathematics so everywhere.
  authors = prompts.load("authors")
  assert [*map(authors.initial, p)] == asked.messages
  assert asked_of("aime24", p, authors) == asked
  # Only mathematics: arithmetic and programs have the set's words.
  for name, domain in (("arithmetic", "arithmetic"), ("livecodebench", "code")):
    other = [problem(domain)]
    said = asked_of(name, other, math_prompt="card").messages
    assert said == [prompts.default().initial(other[0])]


def test_a_folders_own_words_are_not_overridden_without_a_word(tmp_path):
  p = [problem()]
  without = prompts.load(folder(tmp_path / "a", refinement_math=REFINE))
  assert asked_of("aime24", p, without).version == "card"
  mine = prompts.load(folder(tmp_path / "b", initial_math="{{ problem }} Go."))
  asked = asked_of("aime24", p, mine)
  assert asked.messages == [f"{p[0].text} Go."]
  assert asked.version == mine.initial_version("math") != prompts.VERSION
  assert asked_of("aime24", p, mine, math_prompt="card").version == "card"
  # Even where it says what the default set says, for now.
  text = (prompt_sets.FOLDER / "default/initial_math.jinja").read_text("utf-8")
  same = prompts.load(folder(tmp_path / "c", initial_math=text))
  assert asked_of("aime24", p, same).version == prompts.VERSION


@pytest.mark.parametrize(
  ("regime", "models"), [("opd", ("1.7b", "4b")), ("opsd", ("8b", "4b"))]
)
def test_the_papers_rows_ask_mathematics_as_the_card(regime, models):
  e = experiment.from_config(paper_recipe.build(regime, models, None))
  named = prompts.load(e.prompts.set)
  for name in set(e.evaluate.benchmarks) - {"amobench"}:
    some = Questions([problem()], {})
    asked = benchmark_prompts.of_benchmark(name, some, named, e)
    assert asked.version == "card"


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


def test_a_folders_system_prompt_is_before_the_questions(tmp_path):
  p, program = [problem()], [problem("code")]
  mine = prompts.load(folder(tmp_path / "a", system_math="Be brief."))
  asked = asked_of("aime24", p, mine)
  assert asked.system == "Be brief."
  assert asked.messages == [mine.initial(p[0])]
  assert asked.version == mine.initial_version("math") != prompts.VERSION
  assert [*asked.of(p)] == [(p[0], asked.messages[0], "Be brief.")]
  # Who names the card means its words alone; other domains have no such file.
  named = asked_of("aime24", p, mine, math_prompt="card")
  assert (named.version, named.system) == ("card", None)
  other = asked_of("livecodebench", program, mine)
  assert (other.version, other.system) == (prompts.VERSION, None)
  # A question that is the whole message stays one, after it.
  whole = asked_of("amobench", p, mine)
  assert (whole.messages, whole.system) == ([p[0].text], "Be brief.")
  assert whole.version.startswith("question after ")
