"""The report's files: what they hold, replace and refuse."""

import collections
import itertools
import json

import numpy as np
import pytest

from tests.support import report_runs
from tests.support.report_runs import HOSTILE, HOSTILE_ID, LAB, piece_rows
from tests.support.stage_runs import chosen
from trd_jax.analyze import report
from trd_jax.analyze.analysis import Result
from trd_jax.analyze.report import (
  card,
  catalogue,
  escaping,
  pieces,
  token_scores,
)
from trd_jax.analyze.report.catalogue import Catalogue, Entry
from trd_jax.analyze.runs import Run
from trd_jax.analyze.scoring import STAGE
from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.records import Problem, TokenScores, Trajectory
from trd_jax.experiment.run_dir import RunDir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
  made = report_runs.workdir(tmp_path_factory.mktemp("files") / "run")
  report.write([Run(made.root)], {}, folder(made))
  return made


def folder(run_dir):
  return run_dir.root / "analyze" / "report"


def data_of(run_dir) -> dict:
  page = (folder(run_dir) / "index.html").read_text("utf-8")
  begin = page.index('id="data">') + len('id="data">')
  return json.loads(page[begin : page.index("</script>", begin)])


def families(run_dir) -> dict[str, list]:
  """All rows of the pieces by their family, in order."""
  found = collections.defaultdict(list)
  for path in sorted((folder(run_dir) / "pieces").glob("*.js")):
    _, name, rows = piece_rows(path)
    found[name[:-4]] += rows
  return found


def test_text_in_a_script_can_end_nothing_and_hides_nothing():
  made = escaping.json_text([HOSTILE, "\u2028", {"nan": float("nan")}])
  assert json.loads(made) == [HOSTILE, "\u2028", {"nan": None}]
  for mark in ("<", ">", "&", "\u2028", "\u202e", "\x1b", "\x9b", "\u200b"):
    assert mark not in made
  shown = escaping.text(HOSTILE)
  assert "<script" not in shown
  assert "U+202E" in shown
  assert "\u202e" not in shown


def test_the_card_says_all_that_a_run_is_judged_by(run_dir):
  rose, fell = "Avg@2 on a rose.", "Avg@2 on b fell."
  results = {
    "results": Result([rose, fell]),
    "lengths": Result(["First of lengths.", "Second of lengths."]),
  }
  said = card.html(Run(run_dir.root), results)
  assert said.index(rose) < said.index(fell) < said.index("First of lengths.")
  assert "Second of lengths." not in said


def test_pieces_hold_what_the_rows_say(run_dir):
  found, data = families(run_dir), data_of(run_dir)
  run = data["runs"][0]
  problems = {p.problem_id: p for p in run_dir.read("problems", Problem)}
  entries = run["columns"]["problem"]
  ids = run["columns"]["ids"]
  assert sorted(ids) == sorted(problems)
  for stage, letter, side in (
    ("rollout", "o", "draft"),
    ("refine", "r", "refined"),
  ):
    rows = {row.problem_id: row for row in run_dir.read(stage, Trajectory)}
    where = run["texts"][side]
    assert len(where) == len(rows)
    for entry, row in where.items():
      name = ids[entries[int(entry)]]
      text, correct, reason, extracted = found[f"r0-{letter}"][row][:4]
      expected = rows[name]
      assert (text, correct) == (expected.text, expected.correct)
      assert (reason, extracted) == (expected.reason, expected.extracted)
      lengths = run["columns"][side]
      assert lengths[int(entry)] == len(expected.response_ids)
  texts = [problems[name].text for name in ids]
  assert [row[0] for row in found["r0-x"]] == texts


def test_scores_are_those_of_the_rows_and_tokens_join_to_the_text(run_dir):
  found, run = families(run_dir)["r0-k"], data_of(run_dir)["runs"][0]
  rows = {
    (row.problem_id, row.trajectory, row.student): row
    for row in run_dir.read(STAGE, TokenScores)
  }
  part, chat = token_scores.PART, Chat.load(LAB)
  columns = run["columns"]
  assert len(run["scores"]["rows"]) == len(rows)
  for kind, of, student, _, tokens, mean, first in run["scores"]["rows"]:
    key = (
      columns["ids"][columns["problem"][of]],
      token_scores.KINDS[kind],
      token_scores.STUDENTS[student],
    )
    row = rows[key]
    assert tokens == len(row.response_ids)
    assert mean == pytest.approx(sum(row.divergence) / tokens, rel=1e-3)
    mine = found[first : first + -(-tokens // part)]
    for n, name in enumerate(token_scores.NUMBERS):
      values = [value for one in mine for value in one[2][n]]
      np.testing.assert_allclose(values, getattr(row, name), rtol=1e-3)
    text = "".join(one[0] for one in mine)
    assert text == chat.decode(row.response_ids)
    for one in mine:
      assert sum(one[1]) == len(one[0].encode("utf-16-le")) // 2
      names, k = one[3], one[4]
      assert k == row.top_k
      assert all(0 <= i < len(names) for i in one[5] + one[7])


def test_a_first_wrong_step_is_counted_as_browsers_count(run_dir):
  steps = {row[0]: row[5] for row in families(run_dir)["r0-o"]}
  assert steps["3+7=0\n\\boxed{0}"] == [0, 5, "3+7=10"]
  assert steps["3+8=11\n\\boxed{11}"] is None


def test_what_a_prompt_left_out_of_a_draft_is_its_middle(run_dir):
  cuts = {row[0]: row[7] for row in families(run_dir)["r0-o"] if row[7]}
  ((text, (start, end)),) = cuts.items()
  assert text == "3+9=12\n\\boxed{12}"
  chat = Chat.load(LAB)
  ids = chat.encode(text)
  assert abs(len(chat.encode(text[:start])) - (len(ids) - 3) / 2) <= 1
  assert len(chat.encode(text[start:end])) == 3


@pytest.mark.parametrize("trajectory", ["y_star", "teacher"])
def test_runs_without_drafts_have_a_list(tmp_path, trajectory):
  run_dir = RunDir(tmp_path, to_json(chosen(trajectory=trajectory)))
  problem = Problem(
    "p", "Start at 3.", "3", "y*", "arithmetic", "t", None, "{}"
  )
  report_runs.write(run_dir, "problems", Problem, [problem])
  if trajectory == "teacher":
    row = report_runs.trajectory(
      Chat.load(LAB), "p", "refine", "of its own", 1, draft_key=None
    )
    report_runs.write(run_dir, "refine", Trajectory, [row])
  report.write([Run(run_dir.root)], {}, folder(run_dir))
  run, found = data_of(run_dir)["runs"][0], families(run_dir)
  assert run["columns"]["cell"] == [2 if trajectory == "teacher" else 0]
  assert found["r0-s"] == [["y*", None]]
  assert [row[0] for row in found["r0-r"]] == (
    ["of its own"] if trajectory == "teacher" else []
  )


def test_a_report_replaces_an_earlier_one_and_nothing_else(run_dir):
  where = folder(run_dir) / "pieces"
  before = set(where.iterdir())
  mine = where / "notes.js"
  mine.write_text("my own")
  report.write([Run(run_dir.root)], {}, folder(run_dir))
  after = set(where.iterdir())
  assert mine.read_text() == "my own"
  assert not before & after
  build = data_of(run_dir)["build"]
  made = after - {mine}
  assert {piece_rows(path)[0] for path in made} == {build}
  mine.unlink()


def test_a_page_of_somebodys_is_not_written_over(run_dir, tmp_path):
  (tmp_path / "index.html").write_text("my own page")
  with pytest.raises(UserError, match="no report of trd-jax"):
    report.write([Run(run_dir.root)], {}, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_few_texts_are_spread_over_outcomes_and_scored_ones_come_first(
  tmp_path, run_dir
):
  report.write([Run(run_dir.root)], {}, tmp_path / "report", inspect=2)
  page = (tmp_path / "report" / "index.html").read_text("utf-8")
  begin = page.index('id="data">') + len('id="data">')
  run = json.loads(page[begin : page.index("</script>", begin)])["runs"][0]
  columns = run["columns"]
  has = [
    columns["ids"][columns["problem"][int(e)]] for e in run["texts"]["draft"]
  ]
  assert set(has) <= {HOSTILE_ID, "p0", "p4"}  # those that were scored
  assert len(has) == 2
  assert len(columns["cell"]) == 5


def test_cells_get_equal_shares():
  def entry(n, right):
    row = {"correct": right, "reason": "match", "truncated": False}
    return Entry(n, draft=row, refined=row)

  entries = [entry(n, n % 10 == 0) for n in range(1000)]
  found = Catalogue([], [], [], entries, {}, {}, {})
  chosen = catalogue.choose(found, 100, [7, 13])
  assert len(chosen) == 100
  assert {7, 13} <= chosen
  right = sorted(n for n in chosen if n % 10 == 0)
  assert len(right) == 49
  assert max(b - a for a, b in itertools.pairwise(right)) <= 30
  assert catalogue.choose(found, None, []) == set(range(1000))


def test_a_piece_stays_below_a_megabyte(tmp_path):
  family = pieces.Family(tmp_path, "build", "x")
  for n in range(40):
    assert family.add(["é<" * 20_000, n]) == n
  family.flush()
  assert len(family.files) > 2
  assert all(path.stat().st_size < 1_000_000 for path in family.files)
  rows = [row for path in family.files for row in piece_rows(path)[2]]
  assert [n for _, n in rows] == list(range(40))
  counts = [len(piece_rows(path)[2]) for path in family.files]
  assert family.starts == [sum(counts[:n]) for n in range(len(counts))]


def test_an_unfinished_run_has_a_report(tmp_path):
  run_dir = report_runs.workdir(tmp_path / "run", scored=False)
  for stage in ("refine", "evaluate/base", "evaluate/trained"):
    for path in run_dir.stage(stage).iterdir():
      path.unlink()
  report.write([Run(run_dir.root)], {}, folder(run_dir))
  page = (folder(run_dir) / "index.html").read_text("utf-8")
  assert "partial: refine" in page
  run = data_of(run_dir)["runs"][0]
  assert run["columns"]["refined"] == [-1] * 5
  assert run["samples"] is None


@pytest.mark.parametrize(
  "text", ["", "Start at 3", HOSTILE, "😀" * 3 + "é", "a\ufffdb \ufffd"]
)
def test_texts_of_tokens_join_to_the_text(text):
  chat = Chat.load(LAB)
  ids = [*chat.encode(text), chat.stop_ids[0]]
  texts = chat.token_texts(ids)
  assert len(texts) == len(ids)
  assert texts[-1] == ""
  assert "".join(texts) == chat.decode(ids) == text
  if "\ufffd" not in text:
    assert not any("\ufffd" in one for one in texts)


def test_texts_of_half_a_character_join_too():
  chat = Chat.load(LAB)
  ids = chat.encode("a😀b")
  for cut in range(len(ids) + 1):
    for part in (ids[:cut], ids[cut:]):
      assert "".join(chat.token_texts(part)) == chat.decode(part)
