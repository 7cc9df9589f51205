"""No trajectory is scored in another thinking mode than it was written in.

What is looked at are the ids that training packs, for every variant of both
configs of the paper, with Qwen3's tokenizer and its two templates.
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.experiment.test_paper_recipe import CONFIGS, resolve
from tests.generation.test_preflight import go
from tests.support.chat_folders import QWEN, needs_qwen, real_chat
from tests.support.stage_runs import chosen
from trd_jax import evaluate, refine, rollout
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import questions
from trd_jax.distill import training_set
from trd_jax.experiment import config_file, methods
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  Trajectory,
  Verdict,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation.chat_model import ChatModel
from trd_jax.generation.engines.engine import Completion
from trd_jax.generation.samples import GradedCompletion, Prompt
from trd_jax.generation.sampling_stage import SamplingStage
from trd_jax.model.weights import hub

STUDENTS = {"opd": ("1.7b", "4b", "nano"), "opsd": ("8b", "4b", "nano")}
THINKING = ("default", "on", "off")
VARIANTS = [
  variant
  for regime, students in STUDENTS.items()
  for variant in itertools.product(
    [regime], students, ["math", "code"], THINKING
  )
  if variant[1::2] != ("4b", "on")
]
INSTRUCT = "Qwen/Qwen3-4B-Instruct-2507"

IM_START, IM_END, THINK, END_THINK = 151_644, 151_645, 151_667, 151_668
HANDOVER = [IM_START, 77_091, 198]  # <|im_start|>assistant and a line's end
GAP = 271  # two line ends
EMPTY_BLOCK = [THINK, GAP, END_THINK, GAP]


def mode_of(ids, path):
  """The mode that a prompt's last ids put a model in."""
  at = len(ids) - 1 - list(reversed(ids)).index(IM_START)
  tail = list(ids[at:])
  if path == INSTRUCT:
    assert tail == HANDOVER
    return "off"
  assert tail in (HANDOVER, HANDOVER + EMPTY_BLOCK)
  return "on" if tail == HANDOVER else "off"


def chat_of(path):
  return real_chat("instruct" if path == INSTRUCT else "hybrid")


def written(e, root):
  """A workdir whose trajectories the config's own stages have prompted."""
  run_dir = RunDir(root)
  problems = [
    Problem(f"p{n}", f"What is {n} + 4?", "7", "7", e.domain, "t", "{}", "{}")
    for n in range(2)
  ]
  sides = {
    side: ChatModel(
      model.path, Path("-"), "0", "bfloat16", chat=chat_of(model.path)
    )
    for side, model in (("student", e.student), ("teacher", e.teacher_model))
  }

  def rows(model, stage, section, switch, asked):
    sampling = SamplingStage(e, run_dir, stage, model, section, switch)
    for problem, ids, draft in asked:
      key = f"{stage}-{problem.problem_id}"
      prompt = Prompt(key, problem, ids, 0, draft_key=draft)
      response = (*model.chat.encode("It is 7."), IM_END)
      yield sampling.trajectory(
        GradedCompletion(
          prompt,
          Completion(key, response, "stop"),
          "It is 7.",
          Verdict(True, "match", "7"),
          "0",
        )
      )

  def write(stage, made):
    with run_dir.shard_writer(stage, type(made[0])) as writer:
      for row in made:
        writer.add(row)
    run_dir.mark_done(stage, {})

  write("problems", problems)
  student, teacher = sides["student"], sides["teacher"]
  first = prompts.default().fit_initials(
    student.chat, problems, e.student.thinking, e.rollout.max_prompt_tokens
  )
  drafts = list(
    rows(
      student,
      "rollout",
      e.rollout,
      e.student.thinking,
      ((p, ids, None) for p, ids in zip(problems, first, strict=True)),
    )
  )
  write("rollout", drafts)
  second = prompts.default().fit_refinements(
    teacher.chat,
    [(p, d.text) for p, d in zip(problems, drafts, strict=True)],
    e.regime,
    e.refine.thinking,
    e.refine.max_prompt_tokens,
  )
  refined = rows(
    teacher,
    "refine",
    e.refine,
    e.refine.thinking,
    (
      (p, fitted.ids, d.key)
      for p, fitted, d in zip(problems, second, drafts, strict=True)
    ),
  )
  write("refine", list(refined))
  return run_dir


def variant_of(regime, model, domain, thinking, **more):
  extra = {"tokenizer": QWEN} if model == "nano" else {}
  return resolve(
    regime, model=model, domain=domain, thinking=thinking, **more, **extra
  )


@needs_qwen
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_no_variant_scores_in_another_mode_than_it_wrote(variant, tmp_path):
  run_dir = written(variant_of(*variant), tmp_path)
  for method in methods.METHODS:
    e = variant_of(*variant, method=method)
    paths = e.student.path, e.teacher_model.path
    data = training_set.build(e, run_dir, *map(chat_of, paths))
    rows = run_dir.read(e.trajectory_stage, Trajectory)
    assert [s.key for s in data.samples] == [row.key for row in rows]
    writer = paths[e.trains_on == "y_r"]
    for row, sample in zip(rows, data.samples, strict=True):
      mode = mode_of(row.prompt_ids, writer)
      assert row.thinking == (mode == "on")
      contexts = sample.student_prompt.tolist(), sample.teacher_prompt.tolist()
      read = paths
      if e.context_of_teacher is None:  # no teacher reads a context
        read = paths[:1]
      sides = zip(contexts, read, strict=False)
      assert {mode_of(*side) for side in sides} == {mode}
      if paths[0] == paths[1] or INSTRUCT not in paths:
        size = 7 if mode == "off" else 3
        tail = row.prompt_ids[-size - 2 :]
        assert contexts[0][-size - 2 :] == contexts[1][-size - 2 :] == tail
    # One line that tells the modes, and nothing to warn of.
    (note,) = data.notes
    assert note.startswith(f"2 written and scored with thinking {mode}")


@needs_qwen
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_stages_are_in_the_modes_that_the_cards_name(variant):
  _, model, domain, thinking = variant
  e = variant_of(*variant)
  chat = chat_of(e.student.path)
  stages = {
    "rollout": chat.thinks(e.student.thinking),
    "refine": chat_of(e.teacher_model.path).thinks(e.refine.thinking),
    "evaluate": chat.thinks(e.evaluation_thinking),
  }
  wanted = {
    "default": {"rollout": True, "refine": False, "evaluate": domain == "math"},
    "on": dict.fromkeys(stages, True),
    "off": dict.fromkeys(stages, False),
  }[thinking]
  if model == "4b":
    wanted = dict.fromkeys(stages, False)
  assert stages == wanted
  assert e.teacher.thinking is e.train.student_thinking is None


@pytest.mark.parametrize("regime", STUDENTS)
def test_a_student_that_cannot_think_is_not_told_to(regime):
  with pytest.raises(UserError, match=r"model=4b .*2507\) has no thinking"):
    config_file.load(f"{CONFIGS / regime}.py:model=4b,thinking=on")
  with pytest.raises(UserError, match=r"thinking=of: .* off"):
    config_file.load(f"{CONFIGS / regime}.py:thinking=of")


# The laboratory's student under a template with the switch.
SWITCH = (
  "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' +"
  " message.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt"
  " %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not"
  " enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.slow
def test_stages_prompt_in_their_modes_and_record_them(tmp_path, capsys):
  template = tmp_path / "switch.jinja"
  template.write_text(SWITCH)

  def changed(**more):
    return chosen(
      **{
        "data.arithmetic.num_problems": 4,
        "evaluate.num_problems": 4,
        "evaluate.k": 1,
        "student.chat_template": str(template),
        "student.thinking": True,
        "train.truncated": "keep",
        "evaluate.thinking": False,
      }
      | {f"{name}.max_response_tokens": 24 for name in stages}
      | more
    )

  stages = ("rollout", "refine", "evaluate")
  e, run_dir = changed(), RunDir(tmp_path / "run")
  go(rollout, e, run_dir)
  go(refine, e, run_dir)
  go(evaluate, e, run_dir, model="base")
  chat = Chat.load(hub.model_folder("lab:student"), template)
  on, off = (chat.render("x", mode)[-3:] for mode in (True, False))
  assert on != off
  for stage, mode, tail in (("rollout", True, on), ("refine", False, off)):
    rows = run_dir.read(stage, Trajectory)
    assert {row.thinking for row in rows} == {mode}
    assert all(row.prompt_ids[-3:] == tail for row in rows)
  data = training_set.build(e, run_dir, chat, chat)
  assert all(s.student_prompt[-3:].tolist() == off for s in data.samples)

  # Benchmarks: in their own mode, wherever that is said.
  asked = questions.load(e, "arithmetic").problems
  hashes = {
    hashlib.sha256(np.asarray(chat.render(p.text, False), "<i4")).hexdigest()
    for p in asked
  }
  rows = run_dir.read("evaluate/base", GradedSample)
  assert {row.prompt_sha256 for row in rows} == hashes
  assert {row.thinking for row in rows} == {False}
  assert run_dir.done("evaluate/base")["arithmetic"]["thinking"] is False
  summary = read_json(run_dir.stage_summary("evaluate/base"))
  assert summary["arithmetic"]["thinking"] is False
  told = capsys.readouterr().out
  assert "off (evaluate.thinking=False)" in told
  assert "off (refine.thinking=False); rollout on; evaluate off" in told

  # Another mode's base says nothing about how hard questions are in this one.
  named = changed(
    **{"evaluate.thinking": True, "evaluate.buckets_from": str(run_dir.root)}
  )
  with pytest.raises(
    UserError, match="its arithmetic was sampled with thinking"
  ):
    go(evaluate, named, RunDir(tmp_path / "other"), model="base")
