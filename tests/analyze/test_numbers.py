"""Every number of a table against plain sums over the parquet files.

Nothing of the package reads the rows here: pandas does, shard by shard.
"""

import math
from glob import glob
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from tests.support import made_runs
from tests.support.made_runs import BENCHMARKS, QUESTIONS, K
from trd_jax.analyze import analysis, runs
from trd_jax.analyze.analysis import Number, Table

MODELS = {"base": "evaluate/base", "trained": "evaluate/trained"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("numbers") / "run"
  return made_runs.workdir(root).root


@pytest.fixture(scope="module")
def tables(made):
  return made_tables([made])


def made_tables(workdirs) -> dict[str, Table]:
  """The tables of all analyses, by name."""
  opened = runs.open_runs(workdirs)
  results = [one.make(opened) for one in analysis.registry().values()]
  return {t.name: t for one in results if one for t in one.tables}


def frame(root, stage) -> pd.DataFrame:
  """A stage's rows: of those that were written twice the first ones."""
  shards = sorted(glob(f"{root}/{stage}/shard-*.parquet"))
  rows = pd.concat(map(pd.read_parquet, shards))
  key = "problem_id" if stage == "problems" else "key"
  return rows.drop_duplicates(key)


def rows_of(table: Table) -> list[dict]:
  names = [column.name for column in table.columns]
  assert len(set(names)) == len(names)
  return [dict(zip(names, row, strict=True)) for row in table.rows]


def value(cell):
  return cell.value if isinstance(cell, Number) else cell


def right(rows: pd.DataFrame) -> pd.Series:
  """Samples that count as right: no verdict isn't one."""
  return rows["correct"].fillna(False).astype(bool)


def by_question(root, stage, benchmark) -> pd.Series:
  rows = frame(root, stage)
  rows = rows[rows["benchmark"] == benchmark]
  return right(rows).groupby(rows["problem_id"]).sum().sort_index()


def chance_of_one(correct: int, k: int, samples: int = K) -> float:
  """Pass@k by looking at every choice of k samples."""
  marks = [place < correct for place in range(samples)]
  picks = list(combinations(marks, k))
  return sum(any(pick) for pick in picks) / len(picks)


# -- evaluations -------------------------------------------------------------


def test_results_are_means_over_questions(tables, made):
  for metric in ("avg", "pass"):
    found = rows_of(tables[f"results_{metric}"])
    assert [row["model"] for row in found] == list(MODELS)
    for name in BENCHMARKS:
      title = "Avg" if metric == "avg" else "Pass"
      wanted = {}
      for model, stage in MODELS.items():
        counts = by_question(made, stage, name)
        assert len(counts) == QUESTIONS
        solved = counts / K if metric == "avg" else (counts > 0).astype(float)
        wanted[model] = solved.mean()
      cells = {row["model"]: row[f"{name}, {title}@{K}"] for row in found}
      for model, cell in cells.items():
        assert cell.value == pytest.approx(wanted[model], abs=1e-12)
        assert cell.low <= cell.value <= cell.high
        assert cell.best == (wanted[model] == max(wanted.values()))
      assert cells["base"].change is None
      assert cells["trained"].change == pytest.approx(
        wanted["trained"] - wanted["base"], abs=1e-12
      )


def test_differences_are_paired(tables, made):
  found = rows_of(tables["results_differences"])
  assert len(found) == 2 * len(BENCHMARKS)
  for row in found:
    before, after = (
      by_question(made, stage, row["benchmark"]) for stage in MODELS.values()
    )
    if row["metric"] == f"Avg@{K}":
      before, after = before / K, after / K
    else:
      before, after = (before > 0) * 1.0, (after > 0) * 1.0
    assert row["questions"] == QUESTIONS
    assert row["base"] == pytest.approx(before.mean())
    assert row["trained"] == pytest.approx(after.mean())
    cell = row["difference"]
    assert cell.value == pytest.approx((after - before).mean())
    assert cell.low < cell.value < cell.high


def test_pass_curves_are_shares_of_choices(tables, made):
  found = rows_of(tables["pass_curves"])
  assert len(found) == len(BENCHMARKS) * len(MODELS) * 3  # k = 1, 2, 4
  for row in found:
    counts = by_question(made, MODELS[row["model"]], row["benchmark"])
    wanted = np.mean([chance_of_one(c, row["k"]) for c in counts])
    assert value(row["Pass@k"]) == pytest.approx(wanted)


def test_buckets_are_those_of_base(tables, made):
  found = rows_of(tables["difficulty"])
  seen = set()
  for row in found:
    base = by_question(made, MODELS["base"], row["benchmark"])
    counts = by_question(made, MODELS[row["model"]], row["benchmark"])
    low, _, high = row["bucket"][1:].partition("-")
    kept = base.between(int(low), int(high or low))
    assert row["questions"] == kept.sum() > 0
    assert value(row["Avg@K"]) == pytest.approx((counts[kept] / K).mean())
    assert value(row["Pass@K"]) == pytest.approx((counts[kept] > 0).mean())
    seen.add((row["benchmark"], row["model"], row["bucket"]))
  for name in BENCHMARKS:
    asked = sum(
      row["questions"]
      for row in found
      if (row["benchmark"], row["model"]) == (name, "trained")
    )
    assert asked == QUESTIONS


def test_questions_won_and_lost(tables, made):
  for row in rows_of(tables["question_flips"]):
    before, after = (
      by_question(made, stage, row["benchmark"]) for stage in MODELS.values()
    )
    assert [value(cell) for cell in list(row.values())[2:]] == [
      QUESTIONS,
      (before > 0).sum(),
      (after > 0).sum(),
      ((before == 0) & (after > 0)).sum(),
      ((before > 0) & (after == 0)).sum(),
      (after > before).sum(),
      (after == before).sum(),
      (after < before).sum(),
    ]
  for row in rows_of(tables["question_changes"]):
    before, after = (
      by_question(made, stage, row["benchmark"])[row["question"]]
      for stage in MODELS.values()
    )
    assert (row["right samples of base"], row["right samples after"]) == (
      before,
      after,
    )
    assert before != after


def verdict_of(rows: pd.DataFrame, called: str) -> pd.DataFrame:
  if called == "all":
    return rows
  if called == "unjudged":
    return rows[rows["correct"].isna()]
  return rows[rows["correct"] == (called == "right")]


def check_lengths(row: dict, tokens: pd.Series) -> None:
  quartiles = np.percentile(tokens, (25, 50, 75))
  assert (row["25th percentile"], row["median"], row["75th percentile"]) == (
    pytest.approx(tuple(quartiles))
  )
  assert row["mean"] == pytest.approx(tokens.mean())
  assert row["longest"] == tokens.max()


def test_lengths_of_samples(tables, made):
  found = rows_of(tables["sample_lengths"])
  number = 0
  for row in found:
    rows = frame(made, MODELS[row["model"]])
    rows = verdict_of(
      rows[rows["benchmark"] == row["benchmark"]], row["verdict"]
    )
    assert row["samples"] == len(rows)
    assert row["truncated"] == rows["truncated"].sum()
    check_lengths(row, rows["num_tokens"])
    number += len(rows)
  assert number == len(MODELS) * len(BENCHMARKS) * QUESTIONS * K


# -- trajectories ------------------------------------------------------------

STAGES = {"y_o": "rollout", "y_r": "refine"}


def of_references(made, rows: pd.DataFrame, kind: str) -> pd.DataFrame:
  if kind == "all":
    return rows
  problems = frame(made, "problems").set_index("problem_id")
  solved = problems["solution"].notna()
  wanted = (
    solved if kind == "solution" else ~solved & (problems["answer"] != "")
  )
  return rows[rows["problem_id"].map(wanted)]


def test_lengths_of_trajectories_by_verdict_and_reference(tables, made):
  found = rows_of(tables["trajectory_lengths"])
  kinds = {(row["references"], row["trajectory"]) for row in found}
  assert len(kinds) == 9
  counted = 0
  for row in found:
    if row["trajectory"] == "y*":
      continue
    rows = of_references(
      made, frame(made, STAGES[row["trajectory"]]), row["references"]
    )
    rows = verdict_of(rows, row["verdict"])
    assert row["number"] == len(rows) > 0
    assert row["truncated"] == rows["truncated"].sum()
    check_lengths(row, rows["response_ids"].map(len))
    counted += row["verdict"] == "all"
  assert counted == 6


def test_references_are_measured_in_the_student_s_tokens(tables, made):
  from trd_jax.data.chat import Chat
  from trd_jax.model.weights import hub

  chat = Chat.load(hub.tokenizer_folder("lab:student"))
  problems = frame(made, "problems")
  found = [
    row
    for row in rows_of(tables["trajectory_lengths"])
    if row["trajectory"] == "y*"
  ]
  assert {row["references"] for row in found} == {
    "all",
    "solution",
    "answer alone",
  }
  for row in found:
    rows = of_references(made, problems, row["references"])
    texts = rows["solution"].fillna(rows["answer"])
    tokens = pd.Series(
      [len(chat.encode(text.strip())) + 1 for text in texts if text]
    )
    assert row["unit"] == "tokens"
    assert row["number"] == len(tokens)
    check_lengths(row, tokens)


def test_accuracy_is_of_graded_trajectories(tables, made):
  found = rows_of(tables["verifier_accuracy"])
  assert len(found) == 6
  for row in found:
    rows = of_references(
      made, frame(made, STAGES[row["trajectory"]]), row["references"]
    )
    rows = rows[~rows["reason"].isin(["no_gold", "not_graded"])]
    assert (row["graded"], row["right"]) == (len(rows), right(rows).sum())
    share = row["accuracy"]
    assert share.value == pytest.approx(right(rows).mean())
    assert 0 <= share.low < share.value < share.high <= 1


def test_outcomes_pair_each_rewrite_with_its_draft(tables, made):
  drafts = frame(made, "rollout").set_index("key")
  refined = frame(made, "refine")
  refined = refined[~refined["reason"].isin(["no_gold", "not_graded"])]
  found = rows_of(tables["outcomes"])
  assert len(found) == 3 * 4
  for row in found:
    rows = of_references(made, refined, row["references"])
    before = right(drafts.loc[rows["draft_key"]]).to_numpy()
    after = right(rows).to_numpy()
    first, second = (word == "right" for word in row["outcome"].split(" → "))
    both = ((before == first) & (after == second)).sum()
    assert row["pairs"] == both
    assert value(row["of all"]) == pytest.approx(both / len(rows))
    same = (before == first).sum()
    if same:
      assert value(row["of such drafts"]) == pytest.approx(both / same)
    else:
      assert row["of such drafts"] is None


def test_reasons_and_leaks(tables, made):
  found = rows_of(tables["verdict_reasons"])
  for row in found:
    rows = frame(made, STAGES[row["trajectory"]])
    name = row["what"].removeprefix("verdict: ")
    counts = {
      "ended by the budget": rows["truncated"].sum(),
      "draft shortened": (rows["draft_elided_tokens"] > 0).sum(),
    }
    assert row["number"] == counts.get(name, (rows["reason"] == name).sum())
    assert row["share"] == pytest.approx(row["number"] / len(rows))
  (leaks,) = rows_of(tables["leaks"])
  speak = frame(made, "refine")["text"].str.contains("reference solution").sum()
  assert (leaks["anywhere"], leaks["in the answer"]) == (speak, speak)


def test_first_errors_are_of_the_texts(tables, made):
  # The made texts work their one step rightly and box nothing.
  for row in rows_of(tables["first_errors"]):
    assert row["right so far"] == 12
    assert row["first wrong here"] == 0


def test_first_errors_are_counted_by_step(tmp_path):
  run_dir = made_runs.workdir(tmp_path / "run", stages=("problems",))
  rows = []
  for number in range(12):
    right = f"{number}+7={number + 7}"
    text = right
    if number < 4:  # wrong at the first step, and not corrected
      text = f"{number}+7={number + 8}"
    elif number < 6:  # a slip that the next line corrects
      text = f"{number}+7={number + 8}\nWait, {right}"
    elif number < 9:  # wrong in the box, which is the second step
      text = f"{right}\n\\boxed{{19}}"
    rows.append(made_runs.trajectory("rollout", number, text=text))
  with run_dir.shard_writer("rollout", made_runs.Trajectory) as writer:
    for row in rows:
      writer.add(row)
  tables = made_tables([run_dir.root])
  found = [
    (row["step"], row["right so far"], row["first wrong here"], row["share"])
    for row in rows_of(tables["first_errors"])
  ]
  assert found == [(1, 12, 4, 4 / 12), (2, 8, 3, 3 / 8)]


# -- training and cost -------------------------------------------------------


def test_training_metrics_are_means_of_tenths(tables, made):
  rows = pd.read_json(made / "train/metrics.jsonl", lines=True)
  found = rows_of(tables["training_metrics"])
  assert {row["metric"] for row in found} >= {"D_incorrect", "loss", "ppl_gap"}
  for row in found:
    values = rows[row["metric"]].dropna()
    tenth = max(len(values) // 10, 1)
    assert row["updates"] == len(values)
    assert row["first tenth"] == pytest.approx(values.head(tenth).mean())
    assert row["last tenth"] == pytest.approx(values.tail(tenth).mean())
    assert row["lowest"] == pytest.approx(values.min())
    assert row["highest"] == pytest.approx(values.max())


def test_wall_clock_is_the_sum_of_its_rows(tables, made):
  rows = pd.read_json(made / "timings.jsonl", lines=True)
  spent = rows.groupby("stage")["seconds"].sum()
  found = {row["stage"]: row for row in rows_of(tables["wall_clock"])}
  assert found.keys() == set(spent.index)
  for stage, row in found.items():
    assert row["time"] == pytest.approx(spent[stage])
    assert row["of the run"] == pytest.approx(spent[stage] / spent.sum())
  tokens = frame(made, "rollout")["response_ids"].map(len).sum()
  assert found["rollout"]["tokens"] == tokens
  assert found["rollout"]["tokens a second"] == pytest.approx(
    tokens / spent["rollout"]
  )


# -- scores ------------------------------------------------------------------

SCORES = {
  "divergence": "divergence",
  "teacher's entropy": "teacher_entropy",
  "teacher's onset mass": "teacher_onset_mass",
  "student's NLL": "student_nll",
  "teacher's NLL": "teacher_nll",
}


def test_the_run_that_was_asked_for_stands_first_in_every_table(tmp_path):
  asked = ("z", "a")
  for name in asked:
    made_runs.write_scores(made_runs.workdir(tmp_path / name))
  tables = made_tables([tmp_path / name for name in asked])
  seen = 0
  for table in tables.values():
    labels = [row.get("run") for row in rows_of(table)]
    if set(labels) == set(asked):
      seen += 1
      assert labels == sorted(labels, key=asked.index), table.name
  assert seen > 4


def test_scores_are_means_over_tokens(tmp_path):
  root = tmp_path / "run"
  run_dir = made_runs.workdir(root, stages=("problems", "rollout", "refine"))
  made_runs.write_scores(run_dir)
  tables = made_tables([root])
  scores = frame(root, "analyze/scores")
  verdicts = {
    row.key: {True: "right", False: "wrong"}.get(row.correct, "unjudged")
    for stage in STAGES.values()
    for row in frame(root, stage).itertuples()
  }
  scores["verdict"] = scores["trajectory_key"].map(verdicts)
  found = rows_of(tables["token_scores"])
  assert sum(row["trajectories"] for row in found) == len(scores) == 32
  for row in found:
    mine = scores
    for name in ("trajectory", "verdict", "student"):
      mine = mine[mine[name] == row[name]]
    assert row["trajectories"] == len(mine) > 0
    assert row["tokens"] == mine["response_ids"].map(len).sum()
    for called, name in SCORES.items():
      values = np.concatenate(mine[name].tolist())
      assert row[called] == pytest.approx(values.mean(), rel=1e-6)
  by_key = scores.set_index(["problem_id", "trajectory", "student"])
  tokens = []
  for (problem, trajectory, student), row in by_key.iterrows():
    if trajectory != "y_o":
      continue
    other = by_key.loc[(problem, "y_r", student)]["response_ids"]
    differ = np.flatnonzero(row["response_ids"] != other)
    for place, divergence in enumerate(row["divergence"]):
      if len(differ):
        distance = place - differ[0]
        tokens.append((row["verdict"], student, distance, divergence))
  tokens = pd.DataFrame(
    tokens, columns=["verdict", "student", "distance", "divergence"]
  )
  found = rows_of(tables["scores_by_distance"])
  assert sum(row["tokens"] for row in found) == len(tokens) > 100
  starts = [*(-(2**n) for n in range(10, -1, -1)), 0]
  starts += [2**n for n in range(11)]
  for row in found:
    start = row["distance from"]
    end = dict(zip(starts, [*starts[1:], math.inf], strict=True))[start]
    mine = tokens[tokens["distance"].between(start, end, inclusive="left")]
    for name in ("verdict", "student"):
      mine = mine[mine[name] == row[name]]
    assert row["tokens"] == len(mine)
    assert row["divergence"] == pytest.approx(mine["divergence"].mean())


# -- other runs --------------------------------------------------------------


def test_several_runs_and_subsets_stand_side_by_side(tmp_path):
  runs_of = {"all": {}, "failed": {"train__subset": "fail"}}
  for seed, (name, config) in enumerate(runs_of.items()):
    made_runs.workdir(tmp_path / name, seed=seed, **config)
  tables = made_tables([tmp_path / name for name in runs_of])
  found = rows_of(tables["results_avg"])
  assert [row["model"] for row in found] == ["base", "all", "failed"]
  (name,) = [name for name in tables if name.startswith("subsets_")]
  whole, part = rows_of(tables[name])
  column = f"{BENCHMARKS[0]}, Avg@{K}"
  counts = [
    by_question(tmp_path / run, MODELS["trained"], BENCHMARKS[0])
    for run in runs_of
  ]
  means = [one.mean() / K for one in counts]
  assert (whole["subset"], part["subset"]) == ("all", "fail")
  assert value(whole[column]) == pytest.approx(means[0])
  assert part[column].change == pytest.approx(means[1] - means[0])
  points = rows_of(tables["points"])
  assert [row["train.subset"] for row in points] == ["all", "fail"]


def test_rounds_are_those_of_their_summaries(tmp_path):
  from trd_jax.experiment.files.json_files import write_json

  root = tmp_path / "run"
  first = made_runs.workdir(root, pipeline__rounds=3)
  second = made_runs.workdir(root / "rounds" / "2", seed=2)
  for run_dir in (first, second):  # as the pipeline does; round 3 is to come
    base, trained = map(run_dir.done, MODELS.values())
    pairs = {
      name: {"base": base[name], "trained": trained[name]} for name in base
    }
    write_json(run_dir.summary, {"benchmarks": pairs})
  found = rows_of(made_tables([root])["rounds"])
  assert [row["round"] for row in found] == [0, 0, 1, 1, 2, 2]
  places = {0: (root, "base"), 1: (root, "trained")}
  places[2] = (root / "rounds" / "2", "trained")
  for row in found:
    where, model = places[row["round"]]
    counts = by_question(where, MODELS[model], row["benchmark"])
    assert value(row["Avg@K"]) == pytest.approx(counts.mean() / K)
    assert value(row["Pass@K"]) == pytest.approx((counts > 0).mean())
  (result,) = [
    result
    for one in analysis.registry().values()
    if one.name == "rounds" and (result := one.make([runs.Run(root)]))
  ]
  assert "still to come" in result.partial


def test_a_run_without_rewrites_and_without_verdicts(tmp_path):
  root = tmp_path / "run"
  made_runs.workdir(root, stages=("problems", "rollout"), method="forward_kl")
  tables = made_tables([root])
  assert "outcomes" not in tables
  assert "leaks" not in tables
  found = rows_of(tables["verifier_accuracy"])
  assert {row["trajectory"] for row in found} == {"y_o"}
  other = tmp_path / "ungraded"
  run_dir = made_runs.workdir(other, stages=("problems",))
  rows = [
    made_runs.trajectory("rollout", n, correct=None, reason="not_graded")
    for n in range(6)
  ]
  made_runs.write(run_dir, "rollout", rows)
  tables = made_tables([other])
  assert "verifier_accuracy" not in tables
  kinds = {row["verdict"] for row in rows_of(tables["trajectory_lengths"])}
  assert kinds == {"all", "unjudged"}


def test_half_an_evaluation_counts_whole_questions_only(tmp_path):
  root = tmp_path / "run"
  made_runs.workdir(root, unfinished=("evaluate/trained", "refine"))
  rows = frame(root, "evaluate/trained")
  tables = made_tables([root])
  for row in rows_of(tables["results_differences"]):
    mine = rows[rows["benchmark"] == row["benchmark"]]
    sizes = mine.groupby("problem_id").size()
    whole = sizes[sizes == K].index
    assert row["questions"] == len(whole)
    if row["metric"] == f"Avg@{K}":
      kept = mine[mine["problem_id"].isin(whole)]
      assert row["trained"] == pytest.approx(right(kept).mean())
  (leaks,) = rows_of(tables["leaks"])  # counted, as no summary says it
  refined = frame(root, "refine")
  assert leaks["y_r"] == len(refined)
  assert (
    leaks["anywhere"] == refined["text"].str.contains("reference").sum() > 0
  )


def test_intervals_of_shares_are_wilson_s_with_student_s_t(tables, made):
  """Known to the last digit for one share: Wilson's formula by hand."""
  row = next(
    row
    for row in rows_of(tables["verifier_accuracy"])
    if (row["references"], row["trajectory"]) == ("all", "y_o")
  )
  n, p, t = row["graded"], row["accuracy"].value, 2.228138851964939
  assert n == 11  # whose t has 10 degrees of freedom
  middle = (p + t * t / (2 * n)) / (1 + t * t / n)
  arm = t / (1 + t * t / n) * math.sqrt(p * (1 - p) / n + (t / (2 * n)) ** 2)
  assert row["accuracy"].low == pytest.approx(middle - arm, abs=1e-6)
  assert row["accuracy"].high == pytest.approx(middle + arm, abs=1e-6)
