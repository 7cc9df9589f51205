"""Which trajectories are trained on, and in which contexts."""

import dataclasses
import shutil

import pytest

from tests.support import chat_folders, training_runs
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.distill import training_set
from trd_jax.distill.teacher import cache
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Trajectory


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  return Chat.load(chat_folders.write_folder(folder))


def keys(data):
  return [s.key for s in data.samples]


def build(root, chat, *, refine=None, rollout=None, **fields):
  run_dir = training_runs.workdir(root, chat, refine=refine, rollout=rollout)
  experiment = training_runs.experiment("unused", **fields)
  return training_set.build(experiment, run_dir, chat, chat)


def test_trd_is_taught_by_the_very_prompt_that_made_y_r(tmp_path, chat):
  odd = chat.render("a prompt with its middle left out", None)
  data = build(tmp_path, chat, refine={2: {"prompt_ids": odd}})
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  for n, s in enumerate(data.samples):
    problem = training_runs.problem(n)
    made = training_runs.trajectory(chat, problem, "refine", n)
    initial = chat.render(prompts.default().initial(problem), None)
    assert s.student_prompt.tolist() == initial
    assert s.teacher_prompt.tolist() == (odd if n == 2 else made.prompt_ids)
    assert s.response.tolist() == made.response_ids
    assert s.response[-1] == chat.stop_ids[0]


@pytest.mark.parametrize("regime", ["opsd", "opd"])
def test_raw_rollouts_are_taught_by_x_or_by_x_and_the_reference(
  tmp_path, chat, regime
):
  data = build(tmp_path, chat, method="forward_kl", regime=regime)
  assert keys(data) == [f"rollout-{n}" for n in range(6)]
  for n, s in enumerate(data.samples):
    problem = training_runs.problem(n)
    shown = {
      "opsd": prompts.default().privileged,
      "opd": prompts.default().initial,
    }[regime]
    assert s.teacher_prompt.tolist() == chat.render(shown(problem), None)
    assert (s.teacher_prompt.tolist() == s.student_prompt.tolist()) == (
      regime == "opd"
    )


def test_the_verdict_is_stage_ones(tmp_path, chat):
  refine = {n: {"correct": n % 2 == 1} for n in range(6)}
  rollout = {3: {"correct": None}}
  data = build(tmp_path, chat, refine=refine, rollout=rollout)
  assert [s.correct for s in data.samples] == [
    True,
    False,
    True,
    None,
    True,
    False,
  ]


@pytest.mark.parametrize("regime", ["opsd", "opd"])
@pytest.mark.parametrize("context", ["x", "x_reference"])
def test_y_r_may_be_scored_without_the_prompt_that_made_it(
  tmp_path, chat, context, regime
):
  data = build(tmp_path, chat, teacher_context=context, regime=regime)
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  shown = {
    "x": prompts.default().initial,
    "x_reference": prompts.default().privileged,
  }[context]
  for n, s in enumerate(data.samples):
    message = shown(training_runs.problem(n))
    assert s.teacher_prompt.tolist() == chat.render(message, None)


def test_a_reference_is_a_trajectory_that_nobody_sampled(tmp_path, chat):
  run_dir = training_runs.workdir(tmp_path, chat)
  for stage in ("rollout", "refine"):
    shutil.rmtree(run_dir.stage(stage))
  without = dataclasses.replace(
    training_runs.problem(6), solution=None, answer=""
  )
  with run_dir.shard_writer("problems", Problem) as writer:
    writer.add(without)
  run_dir.mark_done("problems", run_dir.record("problems"))
  chosen = training_runs.experiment("unused", trajectory="y_star")
  data = training_set.build(chosen, run_dir, chat, chat)
  assert len(set(keys(data))) == len(data.samples) == 6
  assert data.dropped == {"empty": 1}
  by_response = {chat.decode(s.response.tolist()): s for s in data.samples}
  for n in range(6):
    problem = training_runs.problem(n)
    s = by_response[problem.solution]
    assert s.response[-1] == chat.stop_ids[0]
    assert (s.correct, s.truncated) == (None, False)
    # It has no thoughts, so it is read in the mode without.
    initial = chat.render(prompts.default().initial(problem), False)
    assert s.student_prompt.tolist() == initial
    privileged = chat.render(prompts.default().privileged(problem), False)
    assert s.teacher_prompt.tolist() == privileged
  # A subset goes by the student's own verdict, which nobody has here.
  chosen = training_runs.experiment(
    "unused", trajectory="y_star", train={"subset": "fail"}
  )
  with pytest.raises(UserError, match="with the same --config"):
    training_set.build(chosen, run_dir, chat, chat)


def test_references_that_are_answers_alone_are_counted(tmp_path, chat):
  run_dir = training_runs.workdir(tmp_path, chat)
  problems = run_dir.read("problems", Problem)
  bare = [dataclasses.replace(p, solution=None) for p in problems[:2]]
  run_dir.replace("problems", Problem, bare + problems[2:])
  experiment = training_runs.experiment("unused", trajectory="y_star")
  data = training_set.build(experiment, run_dir, chat, chat)
  assert any(line.startswith("note: 2 of 6 references") for line in data.notes)


def test_the_teachers_own_answers_need_no_draft(tmp_path, chat):
  alone = {n: {"draft_key": None} for n in range(6)}
  data = build(tmp_path, chat, refine=alone, trajectory="teacher")
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  assert {s.correct for s in data.samples} == {None}
  # The rollouts are read for the subset alone.
  some = build(
    tmp_path / "fail",
    chat,
    refine=alone,
    trajectory="teacher",
    train={"subset": "fail"},
  )
  assert keys(some) == [f"refine-{n}" for n in (1, 3, 5)]
  assert {s.correct for s in some.samples} == {False}


def test_fine_tuning_has_no_teacher_whose_context_could_be_too_long(
  tmp_path, chat
):
  bounds = {"train": {"max_teacher_tokens": 2}}
  data = build(tmp_path, chat, method="sft", **bounds)
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  with pytest.raises(UserError, match="max_teacher_tokens=2"):
    build(tmp_path / "trd", chat, **bounds)


def test_fine_tuning_makes_another_familys_text_into_the_students_tokens(
  tmp_path, chat
):
  """The student's tokens of the text, and the end of the turn where it was."""
  other = Chat.load(
    chat_folders.write_folder(
      tmp_path / "other", tokenizer=chat_folders.small_tokenizer(merges=0)
    )
  )
  assert not chat.same_ids(other)
  cut = {2: {"finish_reason": "length", "truncated": True}}
  run_dir = training_runs.workdir(tmp_path / "run", other, refine=cut)
  kept = {"method": "sft", "train": {"truncated": "keep"}}
  # The rollouts are the student's own.
  rows = [
    dataclasses.replace(
      row,
      prompt_ids=chat.render(
        prompts.default().initial(training_runs.problem(row.seed)), None
      ),
    )
    for row in run_dir.read("rollout", Trajectory)
  ]
  run_dir.replace("rollout", Trajectory, rows)
  experiment = training_runs.experiment("unused", regime="opd", **kept)
  data = training_set.build(experiment, run_dir, chat, other)
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  for number, sample in enumerate(data.samples):
    assert chat.decode(sample.response) == f"draft {number}"
    ended = sample.response[-1] == chat.stop_ids[0]
    assert ended == (number != 2)
  assert any("tokens of the student's" in line for line in data.describe())
  # With one tokenizer the ids stay as they were sampled.
  same = training_set.build(experiment, run_dir, chat, chat)
  stored = {
    row.key: row.response_ids for row in run_dir.read("refine", Trajectory)
  }
  assert all(list(s.response) == stored[s.key] for s in same.samples)


@pytest.mark.parametrize("method", ["trd", "forward_kl"])
@pytest.mark.parametrize(
  ("subset", "chosen"),
  [
    ("all", [0, 1, 2, 3, 4, 5]),
    ("succ", [0, 2]),
    ("fail", [1, 3, 5]),
    ("fail_to_succ", [3]),
    ("refined_succ", [0, 2, 3, 4]),
  ],
)
def test_subsets_go_by_the_verdicts(tmp_path, chat, method, subset, chosen):
  data = build(
    tmp_path,
    chat,
    method=method,
    train={"subset": subset},
    rollout={4: {"correct": None}},
    refine={3: {"correct": True}, 4: {"correct": True}, 5: {"correct": None}},
  )
  stage = "refine" if method == "trd" else "rollout"
  assert keys(data) == [f"{stage}-{n}" for n in chosen]
  left_out = 6 - len(chosen)
  assert data.dropped == (
    {f"outside train.subset={subset}": left_out} if left_out else {}
  )


def test_nothing_is_cut_and_all_that_falls_out_is_counted(tmp_path, chat):
  plain = training_runs.trajectory(chat, training_runs.problem(0), "refine", 0)
  long = {"response_ids": list(range(3, 103))}
  bound = len(plain.prompt_ids) + 50
  data = build(
    tmp_path,
    chat,
    refine={
      0: {"finish_reason": "length", "truncated": True},
      1: {"response_ids": [chat.stop_ids[0]], "text": ""},
      2: long,
      3: {"prompt_ids": list(range(3, 3 + bound))},
    },
    train={"max_student_tokens": 100, "max_teacher_tokens": bound},
  )
  assert keys(data) == ["refine-4", "refine-5"]
  assert data.dropped == {
    "truncated": 1,
    "empty": 1,
    "over train.max_student_tokens=100": 1,
    f"over train.max_teacher_tokens={bound}": 1,
  }
  assert [(r.problem_id, r.reason) for r in data.rejected] == [
    (f"p{n}", reason) for n, reason in enumerate(data.dropped)
  ]


def test_what_speaks_of_a_draft_can_be_left_out(tmp_path, chat):
  told = {2: {"text": "The draft above is wrong.\n\\boxed{9}"}}
  data = build(tmp_path / "kept", chat, refine=told)
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  drop = {"train": {"leaks": "drop"}}
  data = build(tmp_path / "dropped", chat, refine=told, **drop)
  assert keys(data) == [f"refine-{n}" for n in (0, 1, 3, 4, 5)]
  assert data.dropped == {"speaks of a draft or a reference": 1}
  # A student's rollout has seen neither: it can't speak of them.
  data = build(
    tmp_path / "rollout", chat, rollout=told, method="forward_kl", **drop
  )
  assert not data.dropped


def test_a_truncated_trajectory_can_be_kept_as_it_is(tmp_path, chat):
  cut = {"finish_reason": "length", "truncated": True, "response_ids": [7, 8]}
  data = build(tmp_path, chat, refine={0: cut}, train={"truncated": "keep"})
  assert data.samples[0].response.tolist() == [7, 8]
  assert data.samples[0].truncated
  # Counted and told either way.
  assert data.truncated == 1
  first, *_ = data.describe()
  assert first == "6 trajectories, 1 of them truncated"
  data = build(tmp_path / "drop", chat, refine={0: cut})
  assert data.truncated == 0
  first, *_ = data.describe()
  assert first == ("5 trajectories, 0 of them truncated; left out: 1 truncated")


def test_contexts_follow_the_rows_and_not_the_config(tmp_path, chat):
  """Two rows written without thinking among others that were with it."""
  off = {"thinking": False}
  made = {}
  for n in (1, 4):
    message = prompts.default().refinement(
      training_runs.problem(n), "d", "opsd"
    )
    made[n] = off | {"prompt_ids": chat.render(message, False)}
  data = build(tmp_path, chat, refine=made)
  block = chat.render("x", False)[len(chat.render("x", True)) :]
  for n, s in enumerate(data.samples):
    on = n not in made
    assert (s.student_prompt.tolist()[-len(block) :] == block) != on
    assert (s.teacher_prompt.tolist()[-len(block) :] == block) != on
    initial = prompts.default().initial(training_runs.problem(n))
    assert s.student_prompt.tolist() == chat.render(initial, on)
  assert data.thinking == [
    dict.fromkeys(("written", "student", "teacher"), on)
    | {"trajectories": count}
    for on, count in ((True, 4), (False, 2))
  ]
  assert [note.split(",")[0] for note in data.notes] == [
    "4 written and scored with thinking on",
    "2 written and scored with thinking off",
  ]


PLAIN = {"train": {"context": "plain"}}


@pytest.mark.parametrize("regime", ["opsd", "opd"])
@pytest.mark.parametrize("context", ["x", "x_reference", "refine"])
def test_in_plain_text_there_is_a_message_and_no_turn(
  tmp_path, chat, context, regime
):
  cut = {"finish_reason": "length", "truncated": True, "response_ids": [7, 8]}
  data = build(
    tmp_path,
    chat,
    refine={3: cut},
    teacher_context=context,
    regime=regime,
    train={"context": "plain", "truncated": "keep"},
  )
  assert keys(data) == [f"refine-{n}" for n in range(6)]
  asked = prompts.default()
  for n, s in enumerate(data.samples):
    problem = training_runs.problem(n)
    message = {
      "x": asked.initial(problem),
      "x_reference": asked.privileged(problem),
      # The prompt that is stored is OPSD's.
      "refine": asked.refinement(problem, f"draft {n}", "opsd"),
    }[context]
    assert s.student_prompt.tolist() == chat.encode(
      asked.initial(problem) + "\n"
    )
    assert s.teacher_prompt.tolist() == chat.encode(message + "\n")
    assert (context == "x") == (
      s.student_prompt.tolist() == s.teacher_prompt.tolist()
    )
    # What ended itself loses the token that ended it, and nothing else.
    made = training_runs.trajectory(chat, problem, "refine", n)
    whole = made.response_ids[:-1] if n != 3 else [7, 8]
    assert s.response.tolist() == whole
  on = {"written": True, "student": None, "teacher": None}
  assert data.thinking == [on | {"trajectories": 6}]
  assert data.notes == ["6 written with thinking on, scored after plain text"]


@pytest.mark.parametrize("along", ["y_o", "y_star", "teacher"])
def test_all_trajectories_can_be_scored_in_plain_text(tmp_path, chat, along):
  empty = {0: {"response_ids": [chat.stop_ids[0]], "text": ""}}
  made = {"rollout": empty, "refine": empty} if along != "y_star" else {}
  data = build(tmp_path, chat, trajectory=along, **made, **PLAIN)
  count = 6 - len(made) // 2
  assert len(data.samples) == count
  initial = {
    tuple(chat.encode(prompts.default().initial(p) + "\n"))
    for p in map(training_runs.problem, range(6))
  }
  for s in data.samples:
    assert tuple(s.student_prompt.tolist()) in initial
    assert set(chat.stop_ids).isdisjoint(s.response.tolist())
    assert len(s.response) > 1


def test_bounds_count_what_plain_text_has(tmp_path, chat):
  short = build(tmp_path / "a", chat, method="forward_kl", **PLAIN).samples[0]
  bounds = {
    "max_student_tokens": len(short.student_prompt) + len(short.response),
    "max_teacher_tokens": len(short.teacher_prompt) + len(short.response),
  }
  for form, kept in (("plain", True), ("chat", False)):
    train = bounds | {"context": form, "subset": "succ"}
    rollout = {n: {"correct": n == 0} for n in range(6)}
    fields = {"method": "forward_kl", "rollout": rollout, "train": train}
    if kept:
      data = build(tmp_path / form, chat, **fields)
      assert keys(data) == ["rollout-0"]
      continue
    with pytest.raises(UserError, match="no trajectory is left"):
      build(tmp_path / form, chat, **fields)


def test_a_cache_of_one_form_has_nothing_of_the_other(tmp_path, chat):
  """The teacher's hidden states are named after the ids that they are of."""
  names = [
    {cache.entry_key(s) for s in build(tmp_path / form, chat, train=t).samples}
    for form, t in (("chat", {}), ("plain", {"context": "plain"}))
  ]
  assert names[0].isdisjoint(names[1])


def test_a_key_overrides_the_mode_and_is_warned_of(tmp_path, chat):
  data = build(
    tmp_path,
    chat,
    method="forward_kl",
    train={"student_thinking": False},
    teacher={"thinking": False},
  )
  problem = training_runs.problem(0)
  for ids, message in (
    (data.samples[0].student_prompt, prompts.default().initial),
    (data.samples[0].teacher_prompt, prompts.default().privileged),
  ):
    assert ids.tolist() == chat.render(message(problem), False)
  (told, *warnings) = data.notes
  assert told.startswith("6 written with thinking on, scored by the student")
  assert ["mixed thinking modes" in line for line in warnings] == [True, True]
  assert "train.student_thinking=False" in warnings[0]
  assert "teacher.thinking=False" in warnings[1]


def test_stages_that_are_missing_or_do_not_fit_are_named(tmp_path, chat):
  experiment = training_runs.experiment("unused")
  empty = training_runs.RunDir(tmp_path / "empty")
  with pytest.raises(UserError, match="refine: this stage has not finished"):
    training_set.build(experiment, empty, chat, chat)
  with pytest.raises(UserError, match="rollout-2: its stored prompt is not"):
    build(tmp_path / "prompt", chat, rollout={2: {"prompt_ids": [5, 6]}})
  with pytest.raises(UserError, match="draft rollout-9 is not among"):
    build(tmp_path / "draft", chat, refine={2: {"draft_key": "rollout-9"}})
  with pytest.raises(UserError, match=r"no trajectory is left .*6 over train"):
    build(tmp_path / "none", chat, train={"max_student_tokens": 2})


@pytest.mark.parametrize(
  ("batch_size", "epochs", "told"),
  [(32, 1, "it is 1 update;"), (7, 3, "it is 3 updates;"), (6, 1, None)],
)
def test_less_than_one_batch_is_noted(tmp_path, chat, batch_size, epochs, told):
  train = {"batch_size": batch_size, "epochs": epochs}
  section = training_runs.experiment("unused", train=train).train
  data = build(tmp_path, chat)
  note = data.less_than_a_batch(section, len(data.batches(section, 0)))
  assert (note is None) == (told is None)
  if note is not None:
    assert note.startswith("note: there are 6 trajectories to train on, less")
    assert f"(train.batch_size={batch_size})" in note
    assert told in note
