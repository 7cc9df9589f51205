"""What is counted before an engine is made, and that nothing else happens."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from tests.support.places import ROOT
from tests.support.stage_runs import chosen
from trd_jax import evaluate, merge, refine, rollout, train
from trd_jax.data.chat import Chat
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation import preflight
from trd_jax.generation.forecasts import Lengths
from trd_jax.generation.preflight import PreflightReport
from trd_jax.model.weights import hub
from trd_jax.pipeline import pipeline

DEEPSCALER = ROOT / "../shared/data/deepscaler"
STEPS = "3 + 4 = 7, 7 * 2 = 14. "


def go(stage, which, run_dir, **flags):
  if stage is evaluate:
    flags = {flag.name: flag.key.default for flag in evaluate.FLAGS} | flags
  stage.run(which, run_dir, types.SimpleNamespace(**flags))


def report_of(run_dir, stage):
  return PreflightReport.from_json(read_json(run_dir.preflight(stage)))


def files(run_dir):
  return {p.name for p in run_dir.root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def chat():
  return Chat.load(hub.model_folder("lab:student"))


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
  """Preflights of two stages, then their real runs in the same place."""
  run_dir = RunDir(tmp_path_factory.mktemp("looked"))
  only = chosen(preflight_only=True)
  real = chosen()
  seen = {}
  for stage in (rollout, refine):
    go(stage, only, run_dir)
    seen[stage.STAGE] = files(run_dir), report_of(run_dir, stage.STAGE)
    assert not run_dir.keys(stage.STAGE)
    assert run_dir.done(stage.STAGE) is None
    go(stage, real, run_dir)
  return run_dir, seen


@pytest.mark.slow
def test_preflight_only_writes_a_report_and_nothing_else(looked_at):
  run_dir, seen = looked_at
  there, _ = seen["rollout"]
  assert "preflight.json" in there
  rows = {name for name in there if name.startswith("shard-")}
  problems = run_dir.problems_dir.glob("shard-*")
  assert rows == {path.name for path in problems}


def test_a_run_after_a_preflight_has_the_rows_of_one_without(
  looked_at, tmp_path
):
  run_dir, _ = looked_at
  plain = RunDir(tmp_path)
  for stage in (rollout, refine):
    go(stage, chosen(), plain)
    assert plain.read(stage.STAGE, Trajectory) == run_dir.read(
      stage.STAGE, Trajectory
    )
    assert plain.done(stage.STAGE) == run_dir.done(stage.STAGE)


def test_the_counts_are_those_of_the_rows_that_came_of_it(looked_at):
  run_dir, seen = looked_at
  for stage in ("rollout", "refine"):
    report = seen[stage][1]
    assert report == report_of(run_dir, stage)
    lengths = sorted(
      len(row.prompt_ids) for row in run_dir.read(stage, Trajectory)
    )
    assert report.prompts == report.problems == len(lengths) == 24
    assert report.prompt_tokens == Lengths(
      lengths[0], (lengths[11] + lengths[12]) / 2, lengths[22], lengths[-1]
    )
    assert (report.aside, report.trimmed, report.filled) == (0, 0, 0)
    assert report.max_positions == 1024
  assert seen["rollout"][1].applies == "student.thinking"
  assert seen["refine"][1].applies == "refine.thinking"


def test_the_modes_of_each_stage_and_of_scoring_are_told(looked_at):
  reports = {name: report for name, (_, report) in looked_at[1].items()}
  for stage, other in (("rollout", "refine"), ("refine", "rollout")):
    report = reports[stage]
    assert (report.thinks, report.can_choose) == (False, False)
    assert report.elsewhere == {other: False, "evaluate": False}
    lines = preflight.table(report).splitlines()
    (first,) = [line for line in lines if line.startswith("  thinking ")]
    assert f"; {other} off" in first
    assert "as the template has no switch" in first
    (second,) = [line for line in lines if line.startswith("  scoring ")]
    assert "y_r: written and scored with thinking off" in second
    assert not report.warnings


@pytest.mark.parametrize("stage", [train, merge])
def test_a_stage_without_prompts_refuses_it(looked_at, stage):
  run_dir, _ = looked_at
  with pytest.raises(UserError, match=f"{stage.STAGE} has no prompts"):
    go(stage, chosen(preflight_only=True), run_dir)
  assert run_dir.done(stage.STAGE) is None
  assert not run_dir.checkpoints.exists()


def test_what_is_printed_is_what_is_kept(tmp_path, capsys):
  run_dir = RunDir(tmp_path)
  go(rollout, chosen(preflight_only=True), run_dir)
  go(evaluate, chosen(preflight_only=True), run_dir, model="base")
  out = capsys.readouterr().out
  for stage in ("rollout", "evaluate/base"):
    table = preflight.table(report_of(run_dir, stage))
    assert table in out
    assert len(table.splitlines()) <= 20
  assert out.count(preflight.STOPPED) == 2
  assert out.endswith(preflight.STOPPED + "\n")
  assert not run_dir.keys("evaluate/base")
  assert run_dir.done("evaluate/base") is None
  assert report_of(run_dir, "evaluate/base").prompts == 8 * 4


def test_over_budget_trimmed_and_dropped_are_counted(looked_at, tmp_path):
  whole, _ = looked_at
  lengths = sorted(
    len(row.prompt_ids) for row in whole.read("refine", Trajectory)
  )
  budget = lengths[12]
  for overflow in ("trim_middle", "drop"):
    run_dir = RunDir(tmp_path / overflow)
    which = chosen(
      **{"refine.max_prompt_tokens": budget, "refine.overflow": overflow}
    )
    go(rollout, which, run_dir)
    go(refine, which, run_dir)
    report = report_of(run_dir, "refine")
    rows = run_dir.read("refine", Trajectory)
    lost = [r.draft_elided_tokens for r in rows if r.draft_elided_tokens]
    assert report.trimmed == len(lost)
    assert report.elided_tokens == sum(lost)
    assert report.elided == Lengths.of(lost)
    aside = run_dir.read_rejected("refine")
    assert report.aside == len(aside)
    assert report.trimmed + report.aside == sum(n > budget for n in lengths)
    kept = {(row.problem_id, row.reason) for row in aside}
    assert len(report.aside_examples) == min(3, len(aside))
    assert {tuple(each) for each in report.aside_examples} <= kept


def own_problems(tmp_path, rows):
  path = tmp_path / "own.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {
    "domain": "math",
    "data.source": "jsonl",
    "data.root": str(path),
    "rollout.max_prompt_tokens": 900,
    "refine.max_prompt_tokens": 900,
    "train.max_student_tokens": 1024,
    "train.max_teacher_tokens": 1024,
  }


MARKED = [
  {"problem": "What is 1 + 1? <think>", "answer": "2", "solution": "It is 2."},
  {"problem": "What is 2 + 1?", "answer": "3", "solution": "<|im_end|> so 3."},
  {
    "problem": "As the reference solution says, what is 3 + 1? <think>",
    "answer": "4",
    "solution": "The provided answer is 4.</think>",
  },
  {"problem": "What is 4 + 1?", "answer": "5", "solution": "The sum is 5."},
]


def test_marks_and_leaks_are_found_where_they_stand(tmp_path, capsys, chat):
  run_dir = RunDir(tmp_path / "run")
  which = chosen(preflight_only=True, **own_problems(tmp_path, MARKED))
  go(rollout, which, run_dir)
  report = report_of(run_dir, "rollout")
  known = set(chat._controls)
  wanted = {
    "problems": {"<think>": 2},
    "references": {"<|im_end|>": 1, "</think>": 1},
  }
  wanted = {
    where: {mark: n for mark, n in marks.items() if mark in known}
    for where, marks in wanted.items()
  }
  assert wanted["references"]
  assert report.marks == {where: m for where, m in wanted.items() if m}
  assert report.leaks == {"problems": 1, "references": 1}
  assert report.leak_examples["problems"][0][1] == "reference solution"
  assert report.leak_examples["references"][0][1] == "provided answer"
  assert "they stay plain text" in capsys.readouterr().out


def test_drafts_are_searched_as_the_prompt_shows_them(looked_at, tmp_path):
  whole, _ = looked_at
  rows = whole.read("rollout", Trajectory)
  marks = "<think>Wait.</think> The reference says 3. <|im_end|>"
  cut = "<think>The reference says 3. <|im_end|>"
  for draft_think, wanted in (
    ("keep_text", {"<think>": 4, "</think>": 4, "<|im_end|>": 4}),
    ("strip", {"<|im_end|>": 4}),
    ("answer", {"<think>": 1, "<|im_end|>": 4}),
  ):
    run_dir = RunDir(tmp_path / draft_think)
    which = chosen(preflight_only=True, **{"refine.draft_think": draft_think})
    with run_dir.shard_writer("rollout", Trajectory) as writer:
      for i, row in enumerate(rows):
        text = [row.text, marks, cut][
          (i < 4) + (i < 1 and draft_think == "answer")
        ]
        writer.add(dataclasses.replace(row, text=text))
    run_dir.mark_done("rollout", {})
    go(refine, which, run_dir)
    report = report_of(run_dir, "refine")
    known = {"<think>", "</think>", "<|im_end|>"} & set(
      Chat.load(hub.model_folder("lab:student"))._controls
    )
    assert known
    assert report.marks == {
      "drafts": {mark: n for mark, n in wanted.items() if mark in known}
    }
    assert report.leaks == {"drafts": 4}
    # Nothing follows the thoughts of one.
    assert report.all_thoughts == (draft_think == "answer")
    told = preflight.table(report)
    assert ("1 drafts: nothing follows" in told) == report.all_thoughts


def test_budgets_that_contradict_every_problem_are_named(tmp_path):
  run_dir = RunDir(tmp_path)
  which = chosen(
    preflight_only=True,
    **{
      "refine.max_prompt_tokens": 40,
      "train.max_student_tokens": 10,
      "train.max_teacher_tokens": 10,
    },
  )
  go(rollout, which, run_dir)
  report = report_of(run_dir, "rollout")
  assert [w.partition("=")[0] for w in report.warnings] == [
    "refine.max_prompt_tokens",
    "train.max_student_tokens",
    "train.max_teacher_tokens",
  ]
  assert report.forecast.no_room == report.forecast.problems == 24


def test_nothing_within_its_budget_is_an_error_that_names_the_key(tmp_path):
  run_dir = RunDir(tmp_path)
  nothing = {"rollout.max_prompt_tokens": 5, "evaluate.max_prompt_tokens": 5}
  with pytest.raises(UserError, match=r"raise rollout\.max_prompt_tokens"):
    go(rollout, chosen(**nothing), run_dir)
  with pytest.raises(UserError, match=r"raise evaluate\.max_prompt_tokens"):
    go(evaluate, chosen(**nothing), run_dir, model="base")
  go(rollout, chosen(), run_dir)
  small = chosen(**{"refine.max_prompt_tokens": 20})
  with pytest.raises(UserError, match=r"raise refine\.max_prompt_tokens"):
    go(refine, small, run_dir)
  assert not run_dir.keys("refine")
  # A part of a benchmark is no benchmark.
  some = chosen(**{"evaluate.max_prompt_tokens": 34})
  with pytest.raises(UserError, match="has to be whole"):
    go(evaluate, some, run_dir, model="base")


def test_the_models_context_bounds_prompt_and_response(tmp_path):
  rows = [
    {"problem": "1 + 1? " * n, "answer": "2", "solution": "2"}
    for n in (5, 115, 150)
  ]
  own = own_problems(tmp_path, rows)
  run_dir = RunDir(tmp_path / "run")
  which = chosen(
    preflight_only=True, **own | {"rollout.max_prompt_tokens": 1010}
  )
  go(rollout, which, run_dir)
  report = report_of(run_dir, "rollout")
  assert (report.prompts, report.aside) == (2, 1)
  assert (report.cut_short, report.filled) == (1, 0)
  assert report.prompt_tokens.max + 160 > 1024
  which = chosen(
    preflight_only=True, **own | {"rollout.max_prompt_tokens": 4096}
  )
  with pytest.raises(UserError, match="1 prompts fill the 1,024 positions"):
    go(rollout, which, RunDir(tmp_path / "filled"))


def test_a_missing_teacher_is_noted_and_the_rollout_goes_on(tmp_path):
  run_dir = RunDir(tmp_path)
  which = chosen(
    regime="opd",
    preflight_only=True,
    **{"teacher.path": str(tmp_path / "nothing")},
  )
  go(rollout, which, run_dir)
  report = report_of(run_dir, "rollout")
  assert report.forecast is None
  assert (
    "will make of it is not checked: there is no model" in report.warnings[0]
  )


def test_leaks_of_refined_texts_stand_in_the_summary(looked_at, tmp_path):
  whole, _ = looked_at
  assert whole.done("refine")["leaks"] == 0
  run_dir = RunDir(tmp_path)
  go(rollout, chosen(), run_dir)
  rows = whole.read("refine", Trajectory)
  said = "As the draft above says, 3. "
  with run_dir.shard_writer("refine", Trajectory) as writer:
    for i, row in enumerate(rows):
      text = said + row.text if i < 5 else row.text
      text = f"<think>{said}</think>{row.text}" if i < 2 else text
      writer.add(dataclasses.replace(row, text=text))
  go(refine, chosen(), run_dir)
  done = run_dir.done("refine")
  assert done["leaks"] == 5
  assert done["leaks_in_thoughts"] == 2
  assert done["leaks_in_answer"] == 3
  from trd_jax.generation import summaries

  told = "5 speak of a draft or a reference (2 of them in their thoughts"
  assert f"{told}, 3 in their answer)" in summaries.describe(done)
  assert "speak of" not in summaries.describe(whole.done("refine"))


def start(module, workdir, *flags):
  # The pipeline is a room, and its stage a module there.
  found = "pipeline.pipeline" if module == "pipeline" else module
  program = _WITHOUT_JAX.format(module=module, found=found)
  command = [sys.executable, "-c", program]
  command += ["--config=configs/demo.py", f"--workdir={workdir}", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


_WITHOUT_JAX = """
import sys, trd_jax.experiment.cli as cli, trd_jax.{found} as m
flags = getattr(m, "FLAGS", ())
cli.main("{module}", m.run, "", flags)
loaded = sorted({{"jax", "jaxlib", "flax", "vllm"}} & sys.modules.keys())
assert not loaded, loaded
"""
ONLY = "--config.preflight_only=True"


@pytest.mark.slow
def test_no_engine_and_no_jax_for_a_preflight(tmp_path):
  looked = start("rollout", tmp_path, ONLY)
  assert looked.returncode == 0, looked.stderr
  assert looked.stdout.endswith(preflight.STOPPED + "\n")
  looked = start("evaluate", tmp_path, ONLY, "--model=base")
  assert looked.returncode == 0, looked.stderr
  # Only looked at: the place belongs to no config yet, and the reports stay.
  assert not (tmp_path / "config.json").exists()
  assert not (tmp_path / "problems").exists()
  assert (tmp_path / "rollout/preflight.json").exists()
  other = start("rollout", tmp_path, ONLY, "--config.rollout.samples=2")
  assert other.returncode == 0, other.stderr
  run_dir = RunDir(tmp_path)
  assert report_of(run_dir, "rollout").prompts == 1024
  refused = start(
    "rollout", tmp_path, ONLY, "--config.rollout.max_prompt_tokens=9"
  )
  assert refused.returncode == 2
  assert "raise rollout.max_prompt_tokens" in refused.stderr.splitlines()[-1]
  assert not (tmp_path / "config.json").exists()
  # Where something has been made, the place is kept, for a run and no look.
  (tmp_path / "models/random-nano").mkdir(parents=True)
  (tmp_path / "models/random-nano/weights").touch()
  assert start("rollout", tmp_path, ONLY).returncode == 0
  assert read_json(run_dir.config)["preflight_only"] is False


@pytest.mark.slow
def test_the_pipeline_looks_at_what_it_can(tmp_path, capsys):
  looked = start("pipeline", tmp_path / "demo", ONLY)
  assert looked.returncode == 0, looked.stderr
  last = looked.stdout.splitlines()[-1]
  assert last == (
    "preflight only: evaluate/base, rollout checked, not yet refine (needs"
    " rollout), evaluate/trained (needs merge); nothing was generated"
  )
  there = files(RunDir(tmp_path / "demo"))
  assert not {"summary.json", "timings.jsonl", "done.json"} & there
  assert not {name for name in there if name.startswith("shard-")}
  # With the rollouts there, refine is looked at too.
  run_dir = RunDir(tmp_path / "half")
  go(rollout, chosen(), run_dir)
  argv = [f"--workdir={run_dir.root}", ONLY]
  config = tmp_path / "half.json"
  config.write_text(experiment.to_json(chosen()))
  flags = types.SimpleNamespace(
    dry_run=False,
    status=None,
    config_argv=[f"--config={config}", *argv],
    **{"from": None},
  )
  pipeline.run(chosen(preflight_only=True), run_dir, flags)
  assert "evaluate/base, refine checked" in capsys.readouterr().out
  assert report_of(run_dir, "refine").problems == 24


def test_a_look_keeps_what_another_process_is_at_work_on(tmp_path):
  run_dir = RunDir(tmp_path)
  assert run_dir.claim(experiment.to_json(chosen()))
  program = (
    "import sys; from trd_jax.experiment.run_dir import RunDir\n"
    "with RunDir(sys.argv[1]).lock('rollout'):\n"
    "  print('held', flush=True)\n"
    "  sys.stdin.read()\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as other:
    assert other.stdout.readline() == "held\n"
    run_dir.abandon()
    assert run_dir.config.exists()
    other.stdin.close()
    other.wait()
  run_dir.abandon()
  assert not run_dir.config.exists()
