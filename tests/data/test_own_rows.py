"""Rows without an answer: what is asked of them, and when it is refused."""

import dataclasses
import json

import pytest

from trd_jax.data import problems, prompts
from trd_jax.data.problems import store
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Data


def row(number, **columns):
  return {"problem": f"Find {number}.", **columns}


def load(tmp_path, found, **changes):
  """What `store.load` keeps of rows, with its workdir."""
  file = tmp_path / "mine.jsonl"
  file.write_text("\n".join(map(json.dumps, found)))
  run_dir = RunDir(tmp_path / "run")
  source = {"data.source": "jsonl", "data.root": str(file), "domain": "math"}
  made = experiment.from_config(source | changes)
  return store.load(made, run_dir), made, run_dir


RICH = [row(1, solution="y*"), row(2, privileged="hint"), row(3, answer="3")]


def test_a_row_without_an_answer_is_one_of_the_run(tmp_path, capsys):
  found, _, _ = load(tmp_path, RICH)
  assert [p.has_gold for p in found].count(True) == 1
  said = capsys.readouterr().out
  assert "3 problems, 2 of them without an answer" in said


BARE = [*RICH, row(4), row(5)]


@pytest.mark.parametrize(
  ("found", "changes", "message"),
  [
    (BARE, {"regime": "opsd"}, "without answer, solution and pri"),
    (
      BARE,
      {"method": "forward_kl"},
      "and 1 more without",
    ),
    (
      BARE,
      {"regime": "opd", "teacher_context": "x_reference"},
      "to be shown",
    ),
    (
      RICH,
      {"trajectory": "y_star"},
      "solution: trajectory=y_star has",
    ),
    (
      BARE[:2],
      {"train.subset": "fail"},
      "none of the 2 problems",
    ),
    (BARE[:2], {"train.subset": "refined_succ"}, "set train.subset=all"),
  ],
)
def test_what_rows_without_an_answer_cannot_do_is_refused_first(
  tmp_path, found, changes, message
):
  with pytest.raises(UserError) as caught:
    load(tmp_path, found, **changes)
  line = str(caught.value)
  assert message in line
  assert "data.source=jsonl" in line
  assert "\n" not in line
  # Nothing is kept, so that the rows can be mended in the same workdir.
  assert RunDir(tmp_path / "run").done("problems") is None


@pytest.mark.parametrize(
  ("found", "changes"),
  [
    (BARE, {"regime": "opd"}),
    (BARE, {"method": "forward_kl", "teacher_context": "x"}),
    (RICH[::2], {"trajectory": "y_star"}),
    (RICH, {}),
  ],
)
def test_what_they_can_do_is_let_pass(tmp_path, found, changes):
  assert len(load(tmp_path, found, **changes)[0]) == len(found)


def test_a_mixed_file_says_what_a_subset_leaves_out(tmp_path, capsys):
  load(tmp_path, RICH, **{"train.subset": "succ"})
  assert (
    "2 of 3 have no answer, so that nothing of them is in train.subset=succ"
    in capsys.readouterr().out
  )


def test_a_key_that_changes_later_is_refused_by_the_next_stage(tmp_path):
  _, _, run_dir = load(tmp_path, BARE[3:], regime="opd")
  source = {"data.source": "jsonl", "data.root": str(tmp_path / "mine.jsonl")}
  later = experiment.from_config(source | {"domain": "math"})
  with pytest.raises(UserError, match="the teacher has nothing to be shown"):
    store.load(later, run_dir)


def test_a_privileged_text_alone_is_shown_in_both_contexts():
  meta = json.dumps({"privileged": "a hint"})
  p = Problem("p", "Find 1.", "", None, "math", "jsonl", None, meta)
  said = prompts.default()
  for message in (said.privileged(p), said.refinement(p, "draft", "opsd")):
    assert "# Reference\na hint\n" in message
  blank = dataclasses.replace(p, meta='{"privileged": " "}')
  assert prompts.privileged_text(blank) is None
  assert "a hint" not in said.initial(p)
  assert "a hint" not in said.refinement(p, "draft", "opd")


def read(tmp_path, found):
  file = tmp_path / "mine.jsonl"
  file.write_text("\n".join(map(json.dumps, found)))
  return problems.read(Data(source="jsonl", root=str(file)))


def turns(*pairs):
  return [{"role": role, "content": content} for role, content in pairs]


def test_messages_are_a_problem_and_its_system_turn(tmp_path):
  found, rejected = read(
    tmp_path,
    [
      {"messages": turns(("user", " What is 1 + 1?\n")), "answer": "2"},
      {"messages": turns(("system", "Be brief. "), ("user", "What is 1 + 1?"))},
      {"messages": turns(("system", "Be long."), ("user", "What is 1 + 1?"))},
      {"messages": turns(("system", " "), ("user", "What is 1 + 1?"))},
      {"messages": turns(("system", "Be  long."), ("user", "What is 1 + 1?"))},
    ],
  )
  said = prompts.default()
  assert [p.text for p in found] == 3 * ["What is 1 + 1?"]
  assert [said.system(p) for p in found] == [None, "Be brief.", "Be long."]
  assert len({p.problem_id for p in found}) == 3
  # Without a system turn it is the problem that a plain row would be.
  plain, _ = read(tmp_path, [{"problem": "What is 1 + 1?", "answer": "2"}])
  assert found[0] == plain[0]
  assert [r.reason for r in rejected] == [
    "mine.jsonl line 4: repeats mine.jsonl line 1",
    "mine.jsonl line 5: repeats mine.jsonl line 3",
  ]


@pytest.mark.parametrize(
  ("messages", "reason"),
  [
    ("What?", "messages is no list of turns with role and content"),
    (["What?"], "messages is no list of turns with role and content"),
    ([], "messages has the turns none; it may have one of the system"),
    (turns(("system", "s")), "messages has the turns system; it may"),
    (turns(("user", "x"), ("assistant", "y")), "the turns user, assistant;"),
    (turns(("user", "x"), ("user", "y")), "the turns user, user;"),
    (turns(("user", "x"), ("system", "s")), "the turns user, system;"),
    ([{"content": "x"}], "the turns None;"),
    (turns(("user", [{"type": "image"}])), "the user turn's content is a list"),
    (turns(("system", None), ("user", "x")), "system turn's content is a None"),
    (turns(("user", " ")), "no problem"),
    (
      turns(("system", "\ud800"), ("user", "x")),
      "the system turn is not valid",
    ),
  ],
)
def test_other_chats_are_set_aside_with_a_reason(tmp_path, messages, reason):
  found, rejected = read(tmp_path, [row(1), {"messages": messages}])
  assert [p.text for p in found] == ["Find 1."]
  assert len(rejected) == 1
  assert rejected[0].reason.startswith("mine.jsonl line 2: ")
  assert reason in rejected[0].reason


def test_messages_beside_a_problem_are_not_read(tmp_path):
  taught = turns(("user", "Find 1."), ("assistant", "1"))
  found, rejected = read(tmp_path, [row(1, messages=taught, answer="1")])
  assert [p.text for p in found] == ["Find 1."]
  assert rejected == []
