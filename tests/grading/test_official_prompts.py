"""What EvalPlus and lcb_runner ask and take out of answers, by themselves.

EvalPlus is the real one (`test_evalplus` says when these tests skip). In place
of lcb_runner, which is on no registry, stands a package with the names and the
forms of what is used of it.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.test_benchmarks import lcb_row, write
from tests.grading.test_evalplus import (
  CODE,
  FILES,
  PYTHON,
  needs_data,
  needs_evalplus,
  tasks,
)
from tests.support import judging, sandboxes
from tests.support.chat_folders import HYBRID, INSTRUCT, QWEN, needs_qwen
from tests.test_stages import go, small
from trd_jax import evaluate
from trd_jax.data import problems, prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import livecodebench, questions
from trd_jax.data.problems.questions import Questions
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import GradedSample
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Data
from trd_jax.generation import sampling_stage
from trd_jax.grading import benchmark_prompts, graders
from trd_jax.grading.code import evalplus, lcb_runner
from trd_jax.model.weights import hub


def official(**changes):
  flat = {
    "evaluate.code_prompt": "official",
    "evaluate.root": str(CODE),
    "python.evalplus": PYTHON,
    **changes,
  }
  return small(**flat)


def asked_of(e, name):
  found = questions.load(e, name)
  asked = benchmark_prompts.of_benchmark(name, found, prompts.default(), e)
  return found, asked


# EvalPlus


@pytest.mark.slow
@needs_qwen
@needs_data
@needs_evalplus
@sandboxes.needed
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("template", [HYBRID, INSTRUCT], ids=lambda p: p.stem)
def test_prompts_are_those_that_evalplus_makes(name, template):
  """By its own function around the model's tokenizer, id for id."""
  transformers = pytest.importorskip("transformers")
  (path,) = (
    Path(PYTHON)
    .parents[1]
    .glob("lib/*/site-packages/evalplus/provider/utility.py")
  )
  spec = importlib.util.spec_from_file_location("utility", path)
  assert spec is not None
  assert spec.loader is not None
  utility = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(utility)
  tokenizer = transformers.AutoTokenizer.from_pretrained(QWEN)
  tokenizer.chat_template = template.read_text()
  chat = Chat.load(QWEN, template)
  found, asked = asked_of(official(**{"evaluate.num_problems": 40}), name)
  lines = evalplus._task_lines(FILES[name])
  assert asked.version == evalplus.VERSION
  assert asked.system is None
  for problem, message in zip(found.problems, asked.messages, strict=True):
    theirs = utility.make_raw_chat_prompt(
      json.loads(lines[problem.problem_id])["prompt"].strip() + "\n",
      message.partition("\n```\n")[0],
      asked.begun.removesuffix("\n```python\n"),
      tokenizer,
    )
    assert theirs.endswith("```python\n")
    switch = asked.switch(chat, True)
    (ids,) = chat.render_many([message], switch, begun=asked.begun)
    assert ids == tokenizer(theirs, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
@pytest.mark.parametrize("name", FILES)
def test_evalplus_takes_the_program_out_of_an_answer(name):
  found, _ = problems.read(Data(source=name, root=str(FILES[name])))
  p = found[4]
  program = p.solution.removeprefix("```python\n").removesuffix("\n```")
  known = next(q for q in found if q.problem_id in evalplus.DEFECTS)
  answers = [
    # It ends where EvalPlus's model would have: at the fence, at a test.
    (p.problem_id, f"{program}\n```\nSo:\n```python\nraise SystemExit\n```"),
    (p.problem_id, f"{program}\nprint(1)\nraise SystemExit"),
    (p.problem_id, program.replace("    ", "\t")),
    # What ours takes, and what EvalPlus does not see as one.
    (p.problem_id, f"So:\n```\n```python\n{program}\n```"),
    (p.problem_id, "```\nNothing."),
    (p.problem_id, ""),
    (p.problem_id, f"{program}\ndef unused(): return 1\n```"),
    (known.problem_id, "x"),
  ]
  grader = evalplus.Grader(
    FILES[name], python=PYTHON, least_seconds=30.0, official=True
  )
  verdicts = judging.verdicts(grader, tasks(name, answers))
  assert [(one.correct, one.reason) for one in verdicts] == [
    *3 * [(True, "match")],
    *2 * [(False, "mismatch")],
    (False, "no_code"),
    (True, "match"),
    (None, "ungradable"),
  ]
  # The program is EvalPlus's: what the function doesn't need is left out.
  entry = json.loads(p.meta)["entry_point"]
  assert f"def {entry}" in verdicts[6].extracted
  assert "unused" not in verdicts[6].extracted
  assert "\t" not in verdicts[2].extracted


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_an_answer_that_sanitize_never_ends_with_costs_the_others_nothing():
  found, _ = problems.read(
    Data(source="humanevalplus", root=str(FILES["humanevalplus"]))
  )
  p = found[4]
  program = p.solution.removeprefix("```python\n").removesuffix("\n```")
  answers = [
    (p.problem_id, "x = 1\n" * 4000),
    (p.problem_id, "(" * 200_000),
    (p.problem_id, program),
  ]
  grader = evalplus.Grader(
    FILES["humanevalplus"],
    python=PYTHON,
    least_seconds=30.0,
    official=True,
    workers=1,
  )
  verdicts = judging.verdicts(grader, tasks("humanevalplus", answers))
  assert (verdicts[0].correct, verdicts[0].reason) == (None, "ungradable")
  assert verdicts[1].correct is not True
  assert verdicts[2].correct is True


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_an_evaluation_asks_officially_and_says_so(tmp_path, capsys):
  sizes = {
    "evaluate.num_problems": 2,
    "evaluate.k": 1,
    "evaluate.max_prompt_tokens": 900,
    "evaluate.max_response_tokens": 8,
  }
  names = {"evaluate.benchmarks": ("mbppplus", "arithmetic")}
  e = official(**sizes, **names)
  run_dir = RunDir(tmp_path)
  go(evaluate, e, run_dir, model="base")
  assert (
    "mbppplus evalplus-0.3.1, which begins the answer, arithmetic 1"
    in capsys.readouterr().out
  )
  chat = Chat.load(hub.model_folder("lab:student"))
  found, asked = asked_of(e, "mbppplus")
  prompts_ = chat.render_many(asked.messages, None, begun=asked.begun)
  shas = {
    problem.problem_id: sampling_stage.prompt_sha256(ids)
    for problem, ids in zip(found.problems, prompts_, strict=True)
  }
  rows = run_dir.read("evaluate/base", GradedSample)
  rows = [row for row in rows if row.benchmark == "mbppplus"]
  assert {row.problem_id: row.prompt_sha256 for row in rows} == shas
  assert {row.prompt_version for row in rows} == {evalplus.VERSION}
  assert {row.grader_version for row in rows} == {evalplus.VERSION}
  assert not any(row.thinking for row in rows)
  # What is trained is not asked otherwise.
  done = {"merged": True, "largest_logit_distance_to_base": 1.0}
  run_dir.mark_done("merge", done)
  folder = hub.model_folder("lab:student")
  run_dir.merged.parent.mkdir(parents=True, exist_ok=True)
  run_dir.merged.symlink_to(folder)
  ours = official(**sizes, **names, **{"evaluate.code_prompt": "ours"})
  with pytest.raises(UserError, match="put to base after another prompt"):
    go(evaluate, ours, run_dir, model="trained")


@pytest.mark.parametrize(
  ("name", "key"),
  [("humanevalplus", "evalplus"), ("livecodebench", "lcb_runner")],
)
def test_without_its_tool_a_benchmark_names_the_script(tmp_path, name, key):
  missing = {f"python.{key}": str(tmp_path / "python")}
  e = official(**missing, **{"evaluate.benchmarks": (name,)})
  script = rf"third_party/{key}/install\.sh"
  with pytest.raises(UserError, match=script):
    go(evaluate, e, RunDir(tmp_path / "run"), model="base")
  p = [livecodebench.problem(lcb_row(7), name)]
  grader = graders.GRADERS[key]
  with pytest.raises(UserError, match=script):
    grader.official(e, p, [FILES["humanevalplus"]])
  # Our own words need no tool.
  ours = official(**missing, **{"evaluate.code_prompt": "ours"})
  asked = benchmark_prompts.of_benchmark(
    name, Questions(p, {}), prompts.default(), ours
  )
  assert asked.messages == [prompts.default().initial(p[0])]


def test_our_executor_judges_no_answers_to_lcb_runners_prompts(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # where there is no .venv-lcb
  p = livecodebench.problem(lcb_row(7), "livecodebench")
  names = {"evaluate.benchmarks": ("livecodebench",)}
  for words, grader in (("ours", "code"), ("official", "lcb_runner")):
    e = small(**names, **{"evaluate.code_prompt": words})
    assert graders.of_problem("livecodebench", p, e) == grader
    assert graders.of_benchmarks(e.evaluate.benchmarks, e) == [grader]


def test_a_begun_answer_is_in_the_mode_without_thoughts():
  e = experiment.from_config(
    {
      "evaluate": {
        "code_prompt": "official",
        "benchmarks": ("humanevalplus", "livecodebench", "aime24"),
      }
    }
  )
  assert benchmark_prompts.modes(e, True) == {
    "humanevalplus": False,
    "livecodebench": True,
    "aime24": True,
  }


# lcb_runner

STYLES = """
import enum, types
class LMStyle(enum.Enum):
  OpenAIChat = "OpenAIChat"
  CodeQwenInstruct = "CodeQwenInstruct"
  Claude3 = "Claude3"
  GenericBase = "GenericBase"
LanguageModelList = [
  types.SimpleNamespace(model_name=name, model_style=LMStyle(style))
  for name, style in (
    ("Qwen/Qwen3-235B-A22B", "CodeQwenInstruct"), ("chat", "OpenAIChat"),
    ("beside", "Claude3"), ("base", "GenericBase"),
  )
]
"""
BENCHMARK = """
import json
from dataclasses import dataclass
from datetime import datetime
from datasets import load_dataset
@dataclass
class CodeGenerationProblem:
  question_title: str
  question_content: str
  platform: str
  question_id: str
  contest_id: str
  contest_date: str
  starter_code: str
  difficulty: str
  public_test_cases: str
  private_test_cases: str
  metadata: str
  def __post_init__(self):
    datetime.fromisoformat(self.contest_date)
    assert self.platform in ("leetcode", "codeforces", "atcoder")
    assert self.difficulty in ("easy", "medium", "hard")
    for tests in (self.public_test_cases, self.private_test_cases):
      assert json.loads(tests) == []
    json.loads(self.metadata)
"""
PROMPTS = """
from a_service_of_answers import HUMAN_PROMPT, AI_PROMPT
from lcb_runner.lm_styles import LMStyle
from lcb_runner.benchmarks.code_generation import CodeGenerationProblem
with open("lcb_runner/prompts/examples.json") as f:
  f.read()
def format_prompt_generation(question, style):
  text = f"Q: {question.question_content}\\n{question.starter_code}\\n\\n"
  user = {"role": "user", "content": text}
  if style == LMStyle.OpenAIChat:
    return [{"role": "system", "content": "S"}, user]
  if style == LMStyle.Claude3:
    return "S", [user]
  if style == LMStyle.GenericBase:
    return text
  head = "<|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\n\\n"
  return f"{head}{text}<|im_end|>\\n<|im_start|>assistant\\n"
"""
EXTRACTION = """
def extract_code(model_output, lmstyle):
  assert lmstyle.value == "CodeQwenInstruct"
  parts = model_output.split("```")
  return parts[1] if len(parts) > 2 else ""
"""
METRICS = """
def codegen_metrics(
  samples, generations, k_list, num_process_evaluate, timeout
):
  assert all("input_output" in sample for sample in samples)
  codes = {
    i: [[True] if "right" in program else [False]]
    for i, (program,) in enumerate(generations)
  }
  return {}, codes, []
"""


@pytest.fixture(scope="module")
def lcb(tmp_path_factory):
  """An environment with a package in lcb_runner's place; its interpreter."""
  venv = tmp_path_factory.mktemp("lcb") / "venv"
  subprocess.run(
    [sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True
  )
  (site,) = venv.glob("lib/python*/site-packages")
  package = site / "lcb_runner"
  files = {
    "lm_styles.py": STYLES,
    "benchmarks/__init__.py": "",
    "benchmarks/code_generation.py": BENCHMARK,
    "prompts/__init__.py": "from lcb_runner.prompts import code_generation",
    "prompts/code_generation.py": PROMPTS,
    "prompts/examples.json": "{}",
    "utils/extraction_utils.py": EXTRACTION,
    "evaluation/__init__.py": "",
    "evaluation/compute_code_generation_metrics.py": METRICS,
  }
  for name, text in files.items():
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  (venv / "lcb_runner.txt").write_text("0123456789abcdef\n")
  return str(venv / "bin/python")


def lcb_asked(lcb, tmp_path, rows, **changes):
  write(tmp_path / "livecodebench.jsonl", rows)
  e = official(
    **{
      "evaluate.root": str(tmp_path),
      "evaluate.unchecked": True,
      "python.lcb_runner": lcb,
      **changes,
    }
  )
  return asked_of(e, "livecodebench")


@needs_qwen
@sandboxes.needed
def test_prompts_are_those_that_lcb_runner_makes(lcb, tmp_path):
  rows = [lcb_row(7, question_content=" Add one. <think>\n", starter_code="f")]
  rows.append(lcb_row(8))
  found, asked = lcb_asked(lcb, tmp_path, rows)
  assert asked.version == "lcb_runner-0123456789ab CodeQwenInstruct"
  assert (asked.system, asked.begun) == ("S", "")
  by_id = {
    problem.problem_id: message
    for problem, message in zip(found.problems, asked.messages, strict=True)
  }
  for template, mode in ((HYBRID, None), (HYBRID, True), (INSTRUCT, None)):
    chat = Chat.load(QWEN, template)
    assert asked.switch(chat, mode) is mode
    text = chat.decode(
      [
        *chat.render(by_id["livecodebench-abc7_a"], mode, asked.system),
        chat.stop_ids[0],
      ]
    )
    # To the letter, in the model's own template, which Qwen's styles spell out.
    assert text == (
      "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n\n"
      "Q:  Add one. <think>\n\nf\n\n<|im_end|>\n<|im_start|>assistant\n"
    )


@sandboxes.needed
@pytest.mark.parametrize("model", ["chat", "beside"])
def test_a_style_may_write_a_conversation_in_other_ways(lcb, tmp_path, model):
  chosen = {"evaluate.lcb_model": model}
  _, asked = lcb_asked(lcb, tmp_path, [lcb_row(1)], **chosen)
  (message,) = asked.messages
  assert asked.system == "S"
  assert message.startswith("Q: Add one to the number. (1)\n")


@sandboxes.needed
@pytest.mark.parametrize(
  ("model", "said"),
  [
    ("base", "is no conversation that another model's template could write"),
    ("Qwen/Qwen3-8B", r"no model Qwen/Qwen3-8B; .*\(Qwen/Qwen3-235B-A22B\)"),
  ],
)
def test_a_style_that_cannot_be_asked_is_refused(lcb, tmp_path, model, said):
  chosen = {"evaluate.lcb_model": model}
  with pytest.raises(UserError, match=said):
    lcb_asked(lcb, tmp_path, [lcb_row(1)], **chosen)


@sandboxes.needed
def test_lcb_runner_takes_the_program_out_of_an_answer(lcb):
  p = livecodebench.problem(lcb_row(7), "livecodebench")
  answers = ["``` right ```", "``` wrong ```\n```python\nright\n```", "right"]
  for model, expected in (
    ("Qwen/Qwen3-235B-A22B", ["match", "mismatch", "no_code"]),
    (None, ["no_code", "match", "no_code"]),
  ):
    grader = lcb_runner.Grader(lcb, workers=1, model=model)
    found = judging.verdicts(grader, [(p, text) for text in answers])
    assert [one.reason for one in found] == expected
  assert found[1].extracted.strip() == "right"
