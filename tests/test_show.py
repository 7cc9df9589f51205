"""The inspector of a terminal, on rows written by hand."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.support.places import ROOT
from trd_jax import show
from trd_jax.experiment import cli, excerpts, experiment
from trd_jax.experiment.records import GradedSample, Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir

X = "Start at 3, add 7, times 4."
RIGHT = "3+7=10\n10*4=0\n\\boxed{0}"
SLIPS = "3+7=0\nWait, 3+7=10\n10*4=10\n\\boxed{10}"
HOSTILE = "<script>\x1b[2J\u202egnp\u202c\u200f\x9b31m</script>\r\n\\boxed{0}"

# By problem: y_o and y_r, as text, verdict and whether they were cut off.
RUN = {
  "a-fail-succ": ((SLIPS, False, False), (RIGHT, True, False)),
  "b-succ-fail": ((RIGHT, True, False), (SLIPS, False, False)),
  "c-fail-fail": ((SLIPS, False, True), (SLIPS, False, False)),
  "d-succ-succ": ((RIGHT, True, False), (RIGHT, True, False)),
  "e-hostile": ((HOSTILE, True, False), (RIGHT + HOSTILE, True, True)),
  "f-leak": ((RIGHT, True, False), (f"The draft is wrong.\n{RIGHT}", True, 0)),
  "g-ungraded": ((SLIPS, None, False), (SLIPS, None, False)),
}
CHOICES = {
  "all": "abcdefg",
  "fail": "ac",
  "succ": "bdef",
  "fail_to_succ": "a",
  "succ_to_fail": "b",
  "fail_to_fail": "c",
  "succ_to_succ": "def",
  "truncated": "ce",
  "leak": "f",
}


def common(text, correct, truncated):
  reason = {True: "match", False: "mismatch", None: "not_graded"}[correct]
  boxes = re.findall(r"\\boxed{(\d+)}", text)
  return {
    "response_ids": [1] * len(text),
    "text": text,
    "finish_reason": "length" if truncated else "stop",
    "truncated": bool(truncated),
    "seed": 0,
    "thinking": False,
    "sampling": "{}",
    "model": "lab:student",
    "model_revision": "1",
    "prompt_version": "1",
    "correct": correct,
    "reason": reason,
    "extracted": boxes[-1] if boxes else None,
    "grader_version": "1",
  }


def trajectory(problem_id, stage, text, correct, truncated):
  return Trajectory(
    key=f"{stage}-{problem_id}",
    problem_id=problem_id,
    stage=stage,
    prompt_ids=[1],
    draft_key=f"rollout-{problem_id}" if stage == "refine" else None,
    draft_elided_tokens=0,
    **common(text, correct, truncated),
  )


def write(run_dir, stage, record, rows, is_done=True):
  with run_dir.shard_writer(stage, record, rows_per_shard=3) as writer:
    for row in rows:
      writer.add(row)
  if is_done:
    run_dir.mark_done(stage, {})


def make(root, stages=("rollout", "refine"), done=True, run=RUN, **config):
  run_dir = RunDir(root, experiment.to_json(experiment.from_config(config)))
  problems = [
    Problem(key, X, "0", RIGHT, "arithmetic", "test", None, "{}") for key in run
  ]
  write(run_dir, "problems", Problem, problems)
  for side, stage in enumerate(("rollout", "refine")):
    if stage in stages:
      rows = [trajectory(key, stage, *pair[side]) for key, pair in run.items()]
      write(run_dir, stage, Trajectory, rows, done)
  return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  """A finished run, of all outcomes; and a benchmark of two questions."""
  found = make(tmp_path_factory.mktemp("show") / "run")
  for model, rights in (("base", 1), ("trained", 3)):
    rows = [
      GradedSample(
        key=f"{model}-{question}-{number}",
        benchmark="arithmetic",
        problem_id=question,
        sample=number,
        prompt_sha256="0",
        num_tokens=9,
        **common(*((RIGHT, True) if number < rights else (SLIPS, False)), 0),
      )
      for question in ("q1", "q2")
      for number in range(4)
    ]
    write(found, f"evaluate/{model}", GradedSample, rows)
  return found


def shown(capsys, run_dir, *argv):
  """What a command prints, in this process."""
  cli.main(
    "show",
    show.run,
    "shows",
    show.FLAGS,
    standalone=True,
    looks_only=True,
    argv=[f"--workdir={run_dir.root}", *argv],
  )
  return capsys.readouterr().out


def refused(capsys, *argv):
  """The line with which a command refuses."""
  with pytest.raises(SystemExit) as ended:
    cli.main(
      "show",
      show.run,
      "shows",
      show.FLAGS,
      standalone=True,
      looks_only=True,
      argv=argv,
    )
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.count("\n") == 1
  return err


def test_the_marks_stand_where_the_texts_differ_and_the_step_is_wrong(
  capsys, run_dir
):
  out = shown(capsys, run_dir, "--problem=a")
  draft, refined = out[out.index("y_o  ") :].split("y_r  ")
  assert draft.splitlines() == [
    f"y_o  wrong (mismatch), answered 10, {len(SLIPS)} tokens",
    "  >  3+7=0",
    "     ^ first line that differs from y_r",
    "     Wait, 3+7=10",
    "  !  10*4=10",
    "     ^ first wrong step: 10*4=0 is right",
    "     \\boxed{10}",
  ]
  assert refined.splitlines()[:3] == [
    f"right (match), answered 0, {len(RIGHT)} tokens",
    "  >  3+7=10",
    "     ^ first line that differs from y_o",
  ]
  assert "!" not in refined
  assert X in out
  assert "right answer: 0" in out
  same = shown(capsys, run_dir, "--problem=d-succ-succ")
  assert "y_r is y_o, letter for letter" in same
  assert ">" not in same


def test_where_one_text_ends_the_other_goes_on(tmp_path, capsys):
  run = {"cut": (("3+7=10", False, True), (RIGHT, True, False))}
  out = shown(capsys, make(tmp_path / "run", run=run))
  assert "  >  3+7=10\n     ^ ends here; y_r goes on\n" in out
  assert "     3+7=10\n  >  10*4=0\n     ^ first line that differs" in out


def test_what_could_not_be_judged_counts_as_figure_7_counts_it():
  verdicts = {
    ("match", True): "succ",
    ("mismatch", False): "fail",
    ("error", None): "fail",
    ("no_gold", None): None,
    ("not_graded", None): None,
  }
  for (reason, correct), verdict in verdicts.items():
    assert show._verdict({"reason": reason, "correct": correct}) == verdict


@pytest.mark.parametrize("only", show.ONLY)
def test_a_choice_shows_what_its_rows_say_and_nothing_else(
  only, capsys, run_dir
):
  out = shown(capsys, run_dir, f"--only={only}", "--n=99", "--json")
  found = json.loads(out)
  assert (
    "".join(one["problem_id"][0] for one in found["shown"]) == (CHOICES[only])
  )
  assert found["matching"] == len(CHOICES[only])
  if only != "leak":
    assert found["outcomes"][only] == len(CHOICES[only])


def test_json_holds_the_texts_as_they_were_written(capsys, run_dir):
  (one,) = json.loads(shown(capsys, run_dir, "--problem=e", "--json"))["shown"]
  assert one["y_o"]["text"] == HOSTILE
  assert one["y_r"]["truncated"] is True
  assert one["y_star"] == RIGHT
  (two,) = json.loads(shown(capsys, run_dir, "--problem=c", "--json"))["shown"]
  wrong = two["y_o"]["first_wrong_step"]
  assert wrong["line"] == 3
  assert SLIPS[wrong["offset"] :].startswith(wrong["text"])


def test_a_seed_draws_the_same_ones_and_another_seed_others(capsys, run_dir):
  draws = {
    seed: shown(capsys, run_dir, "--n=2", f"--seed={seed}") for seed in range(5)
  }
  assert draws[3] == shown(capsys, run_dir, "--n=2", "--seed=3")
  assert len(set(draws.values())) > 1
  assert draws[0].count("== ") == 2
  assert "1 of 2 drawn from 7" in draws[0]


def test_what_a_model_wrote_commands_no_terminal(capsys, run_dir):
  out = shown(capsys, run_dir, "--problem=e")
  assert all(each.isprintable() or each == "\n" for each in out), ascii(out)
  assert r"<script>\x1b[2J\u202egnp" in out
  assert r"\u200f\x9b31m</script>\r" in out


def test_a_benchmark_shows_answers_and_a_right_and_a_wrong_sample(
  capsys, run_dir
):
  flags = ("--benchmark=arithmetic", "--n=1")
  out = shown(capsys, run_dir, *flags)
  assert "arithmetic, trained: 2 questions, 8 samples, 75.0% right" in out
  assert "right  base 1 of 4, trained 3 of 4" in out
  assert re.search(r"0 +3  right\n +10 +1\n", out)
  assert "sample 0  right (match), answered 0" in out
  assert "sample 3  wrong (mismatch), answered 10" in out
  base = json.loads(shown(capsys, run_dir, *flags, "--model=base", "--json"))
  assert [s["correct"] for s in base["shown"][0]["samples"]] == (
    [True, False, False, False]
  )
  for only, count in (("fail_to_succ", 2), ("succ", 2), ("fail", 0)):
    found = shown(capsys, run_dir, *flags, f"--only={only}", "--json")
    assert json.loads(found)["matching"] == count


def on_a_terminal(run_dir, *argv, size=(24, 60), **variables):
  """What a command prints on a terminal of so many lines and columns."""
  main, side = pty.openpty()
  fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
  unset = ("COLUMNS", "LINES", "NO_COLOR")
  environment = {k: v for k, v in os.environ.items() if k not in unset}
  environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", **variables}
  process = subprocess.Popen(
    [sys.executable, "-m", "trd_jax.show", f"--workdir={run_dir.root}", *argv],
    stdout=side,
    env=environment,
  )
  os.close(side)
  read = b""
  while True:
    try:
      part = os.read(main, 1 << 16)
    except OSError:  # nobody is on the other side any more
      break
    if not part:
      break
    read += part
  os.close(main)
  assert process.wait() == 0
  return read.decode().replace("\r\n", "\n")


COLOUR = re.compile("\x1b\\[[0-9]+m")


def test_a_terminal_gets_no_more_than_its_width_and_its_share(tmp_path):
  # Shown, each of these characters takes six.
  long = "word " * 20_000 + "\u202e" * 500
  text = "\n".join(f"line {n}" for n in range(200)) + f"\n{SLIPS}\n" + long
  run = {"long": ((text, False, False), (f"{text}!", False, False))}
  run_dir = make(tmp_path / "run", run=run)
  out = on_a_terminal(run_dir)
  plain = COLOUR.sub("", out)
  assert "\x1b" in out
  assert "\x1b" not in plain
  # But for the path of the run, which stays whole to be copied.
  first, *lines = plain.splitlines()
  assert first == f"{run_dir.root}:"
  assert max(map(len, lines)) < 60
  assert len(lines) < 3 * 24
  assert "rows left out; --full shows all" in plain
  # What is marked is seen, wherever it stands.
  assert "  !  10*4=10" in plain
  assert "first wrong step: 10*4=0 is right" in plain
  assert "     line 0" in lines
  whole = COLOUR.sub("", on_a_terminal(run_dir, "--full", NO_COLOR="1"))
  assert "left out" not in whole
  assert re.sub(r"\s", "", whole).count("word") == 40_000
  assert max(map(len, whole.splitlines()[1:])) < 60


@pytest.mark.parametrize("count", range(5, 14))
def test_what_is_left_out_is_counted_and_never_one_row(count):
  text = "\n".join(f"line {n}" for n in range(count))
  rows = list(excerpts.block(text, {count // 2: [("!", "here")]}, 5))
  said = ["".join(piece for piece, _ in one).strip() for one in rows]
  left = [int(one.split()[1]) for one in said if "left out" in one]
  kept = [one for one in said if "line " in one]
  assert sum(left) + len(kept) == count
  assert 1 not in left
  assert kept[0] == "line 0"
  assert kept[-1] == f"line {count - 1}"
  assert said[said.index(f"!  line {count // 2 - 1}") + 1] == "^ here"


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_asks_for_no_colours_gets_none(variables, run_dir):
  assert "\x1b" not in on_a_terminal(run_dir, "--problem=e", **variables)


def files(root):
  return {
    (str(path), path.stat().st_mtime_ns) for path in [root, *root.rglob("*")]
  }


def test_an_unfinished_run_is_shown_as_partial_and_left_as_it_is(
  tmp_path, capsys
):
  run_dir = make(tmp_path / "run", stages=("rollout",), done=False)
  before = files(run_dir.root)
  out = shown(capsys, run_dir)
  assert "partial: rollout has 7 rows so far, refine has no rows yet" in out
  assert "y_o  " in out
  assert "y_r" not in out
  assert files(run_dir.root) == before
  line = refused(capsys, f"--workdir={run_dir.root}", "--only=fail_to_succ")
  assert "there is no y_r here" in line


def test_a_run_along_references_shows_what_there_is(tmp_path, capsys):
  run_dir = make(tmp_path / "run", stages=(), method="sft", trajectory="y_star")
  out = shown(capsys, run_dir, "--n=1")
  assert "no trajectory of it yet" in out
  assert "partial" not in out
  assert RIGHT.splitlines()[0] in out


def test_what_cant_be_shown_is_one_line(tmp_path, capsys, run_dir):
  here = f"--workdir={run_dir.root}"
  new = RunDir(
    tmp_path / "new", experiment.to_json(experiment.from_config({}))
  ).root
  sweep = RunDir(
    tmp_path / "sweep", experiment.to_json(experiment.from_config({}))
  ).root
  (sweep / "points" / "one").mkdir(parents=True)
  for argv, said in {
    (): "--workdir=DIR is missing",
    (f"--workdir={tmp_path}",): "it holds no config.json",
    (f"--workdir={tmp_path / 'none'}",): "it is not there",
    (f"--workdir={new}",): "there is nothing to show yet",
    (f"--workdir={sweep}",): "points/one",
    (here, "--only=fail_to_such"): 'did you mean "--only=fail_to_succ"?',
    (here, "--problem=a-fail-suck"): 'did you mean "--problem=a-fail-succ"?',
    (here, "--problem="): "there is no such problem",
    (here, "--n=0"): "has to be at least 1",
    (here, "--model=base"): "name one with --benchmark=NAME",
    (here, "--benchmark=aritmetic"): 'did you mean "--benchmark=arithmetic"?',
    (here, "--benchmark=arithmetic", "--model=bse"): "choose base or trained",
    (here, "--benchmark=arithmetic", "--only=leak"): "of refined trajectories",
    (f"--workdir={new}", "--benchmark=arithmetic"): "no benchmark has samples",
  }.items():
    assert said in refused(capsys, *argv), argv
  twice = make(tmp_path / "twice", run={"a1": RUN["d-succ-succ"]} | RUN)
  line = refused(capsys, f"--workdir={twice.root}", "--problem=a")
  assert "2 ids begin so, as a-fail-succ and a1" in line


@pytest.mark.parametrize("stage", ["problems", "rollout", "refine"])
def test_a_damaged_shard_is_named(stage, tmp_path, capsys):
  run_dir = make(tmp_path / "run")
  shard = next(run_dir.stage(stage).glob("shard-*"))
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  assert shard.name in refused(capsys, f"--workdir={run_dir.root}")
