"""Small workdirs, written by hand, that a report is made of."""

import json
import math

from tests.support.places import ROOT
from tests.support.stage_runs import chosen
from trd_jax.analyze.scoring import STAGE
from trd_jax.data.chat import Chat
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  TokenScores,
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir

LAB = ROOT / "trd_jax" / "lab" / "student"

HOSTILE = (
  "<script>window.hacked = 1</script></script><!-- <img src=x"
  ' onerror="window.hacked = 2"> javascript:window.hacked=3 &lt;b&gt;'
  " ${window.hacked = 4} `x` \\u003c \u2028 \x1b]0;title\x07 \x00 \x9b"
  " \u202eesrever\u202c \u2066iso\u2069 \u200b \U000e0041 ünï 😀"
)
LONG_LINE = "1234 " * 20_000  # 100,000 characters without an end of a line

# Problem, y_o with its verdict, y_r with its verdict.
TEXTS = (
  ("Start at 3, add 7.", "3+7=0\n\\boxed{0}", 0, "3+7=10\n\\boxed{10}", 1),
  ("Start at 3, add 8.", "3+8=11\n\\boxed{11}", 1, "3+8=11\n\\boxed{11}", 1),
  ("Start at 3, add 9.", "3+9=12\n\\boxed{12}", 1, "3+9=2\n\\boxed{2}", 0),
  (HOSTILE, HOSTILE, 0, HOSTILE + " more", 0),
  ("A long line.", LONG_LINE + "a", 0, LONG_LINE + "b", 0),
)
HOSTILE_ID = '</script><b>id\u202e&"'
IDS = ("p0", "p1", "p2", HOSTILE_ID, "p4")
LONG, SAME, WORSE = "p4", "p1", "p2"


def workdir(root, prefix: str = "", scored: bool = True) -> RunDir:
  """A finished run of `TEXTS`, with a prefix before each y_r."""
  run_dir = RunDir(root, to_json(chosen()))
  chat = Chat.load(LAB)
  problems, drafts, refined = [], [], []
  for name, (x, y_o, o_right, y_r, r_right) in zip(IDS, TEXTS, strict=True):
    problems.append(
      Problem(name, x, "10", "3+7=10", "arithmetic", "test", None, "{}")
    )
    drafts.append(trajectory(chat, name, "rollout", y_o, o_right))
    lost = 3 if name == WORSE else 0
    refined.append(
      trajectory(
        chat,
        name,
        "refine",
        prefix + y_r,
        r_right,
        draft_elided_tokens=lost,
      )
    )
  write(run_dir, "problems", Problem, problems)
  write(run_dir, "rollout", Trajectory, drafts)
  write(run_dir, "refine", Trajectory, refined)
  for model, right in (("base", 0), ("trained", 1)):
    rows = [sample(model, n, n == 0 or bool(right)) for n in range(3)]
    write(run_dir, f"evaluate/{model}", GradedSample, rows)
  if scored:
    rows = [
      scores(chat, row, kind, student)
      for kind, made in (("y_o", drafts), ("y_r", refined))
      for row in (made[0], made[3])
      for student in ("base", "trained")
    ]
    rows.append(scores(chat, drafts[4], "y_o", "base"))
    write(run_dir, STAGE, TokenScores, rows)
  return run_dir


def write(run_dir, stage, record, rows):
  """Writes a finished stage of some rows."""
  with run_dir.shard_writer(stage, record) as writer:
    for row in rows:
      writer.add(row)
  if not stage.startswith("evaluate/"):  # whose summary has figures
    run_dir.mark_done(stage, {})


def trajectory(chat, name, stage, text, right, **changes) -> Trajectory:
  """A trajectory of a text, judged by hand."""
  fields = {
    "key": f"{stage} {name}",
    "problem_id": name,
    "stage": stage,
    "prompt_ids": [0],
    "response_ids": [*chat.encode(text), chat.stop_ids[0]],
    "text": text,
    "finish_reason": "stop",
    "truncated": False,
    "seed": 0,
    "thinking": None,
    "sampling": "{}",
    "model": "lab:student",
    "model_revision": "r",
    "prompt_version": "v",
    "draft_key": f"rollout {name}" if stage == "refine" else None,
    "draft_elided_tokens": 0,
    "correct": bool(right),
    "reason": "match" if right else "mismatch",
    "extracted": text[-8:],
    "grader_version": "g",
  }
  return Trajectory(**(fields | changes))


def sample(model, number, right) -> GradedSample:
  """A sample of a benchmark question, one of three."""
  return GradedSample(
    key=f"{model} {number}",
    benchmark="arithmetic",
    problem_id="q",
    sample=number,
    prompt_sha256="",
    response_ids=[1, 2],
    text=f"{model} says {number} {HOSTILE}",
    num_tokens=2,
    finish_reason="stop",
    truncated=False,
    seed=0,
    thinking=None,
    sampling="{}",
    model="m",
    model_revision="r",
    prompt_version="v",
    correct=right,
    reason="match" if right else "mismatch",
    extracted="1",
    grader_version="g",
  )


def scores(chat, row: Trajectory, kind, student) -> TokenScores:
  """Made-up scores: of token i the divergence is i % 7, before training."""
  ids = row.response_ids
  count = len(ids)
  some = [(i % 7) * (1.0 if student == "base" else 0.5) for i in range(count)]
  likeliest = [i for one in ids for i in (one, ids[0])]
  return TokenScores(
    key=f"{row.key} {student}",
    trajectory_key=row.key,
    problem_id=row.problem_id,
    trajectory=kind,
    student=student,
    context="refine" if kind == "y_r" else "x_reference",
    divergence_name="forward_kl",
    student_model="lab:student",
    student_revision="r",
    teacher_model="lab:student",
    teacher_revision="r",
    response_ids=ids,
    divergence=some,
    loss_weight=[1.0] * count,
    clipped=[int(i == 1) for i in range(count)],
    student_nll=[0.25 * one for one in some],
    teacher_nll=[0.5 * one for one in some],
    student_entropy=[0.125] * count,
    teacher_entropy=[0.375] * count,
    student_onset_mass=[0.0] * count,
    teacher_onset_mass=[0.0625] * count,
    top_k=2,
    student_top_ids=likeliest,
    student_top_logprobs=[math.log(0.75), math.log(0.125)] * count,
    teacher_top_ids=likeliest,
    teacher_top_logprobs=[math.log(0.5), math.log(0.25)] * count,
  )


def piece_rows(path) -> tuple[str, str, list]:
  """What a piece says: the report it belongs to, its name and its rows."""
  content = path.read_text("utf-8")
  call = content[content.index("trdPiece(") + len("trdPiece(") :]
  build, name, rows = json.loads(f"[{call.rstrip().removesuffix(');')}]")
  return build, name, rows
