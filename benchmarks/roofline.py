"""What an update would take of eight H100s, read from XLA's own compiler.

    python benchmarks/roofline.py                       8B OPSD TRD
    python benchmarks/roofline.py --model 4b --regime opd
    python benchmarks/roofline.py --table               all sizes, OPD and OPSD
    python benchmarks/roofline.py --hlo DIR             keep the programs' texts

No card is needed, only its compiler: pip install 'jax[cuda12]'. Nothing is
measured: every figure is modelled.

1. Trajectories of the paper's lengths (or of a run's: --workdir) are planned by
   the trainer's own code: mesh, lengths of rows, packs of 128 an update.
2. The trainer's own programs (teach, learn, update) are compiled for eight
   H100s, with their collectives, for the packs that the plan has.
3. Of each optimised program every kernel is counted as often as its loops turn,
   and takes the longest of: its FLOPs at 80% of 989 TFLOP/s (1,979 where both
   operands have eight bits), its bytes at 3.0 TB/s, what it sends to other
   cards at 0.4 TB/s; and 2 us to start.

Exit code 1 where the FLOPs of a program are not those of `shapes.py` to 2%, 2
where a flag is wrong or the compiler is missing.
"""

import argparse
import dataclasses
import json
import sys
import textwrap
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import fit
import hlo_cost
import numpy as np
import results
import shapes
import training

sys.path.insert(0, str(results.ROOT))

from trd_jax.experiment import config_file
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import (
  KEYS,
  Experiment,
  from_config,
  unknown_key,
)
from trd_jax.experiment.methods import METHODS, REGIMES

MODELS = ("1.7b", "4b", "8b")
# Trajectories of the paper's training on mathematics.
TRAJECTORIES = 40_245
# Updates whose packs are counted; figures are of their mean.
UPDATES = 8
TOLERANCE = 0.02

ASSUMPTIONS = (
  f"products reach {hlo_cost.H100.reached:.0%} of {shapes.PEAK_TFLOPS:g}"
  " TFLOP/s, attention too; those of eight bits of"
  f" {hlo_cost.H100.flops8 / 1e12:g}",
  f"memory gives {hlo_cost.H100.bytes / 1e12:.1f} of"
  f" {shapes.PEAK_TBYTES:g} TB/s, links {hlo_cost.H100.link_bytes / 1e12:.1f}"
  " TB/s",
  f"a kernel starts in {hlo_cost.H100.start * 1e6:g} us; one runs after the"
  " other, collectives too",
  "a kernel's bytes are its operands and results once; of a slice, the slice",
  "attention has the causal half of a row's pairs, padding too; five products"
  " back, two forward; of a packed row, its segments' pairs",
  "XLA chose its kernels without a card to try them on",
  "the host keeps up: packs, and a cache of the teacher's, come in time",
)


class Side(NamedTuple):
  """A program's packs in the updates that were planned.

  Attributes:
    pack: the shapes of one, as host arrays.
    runs: how often it runs on a device, an update.
    real: tokens a device and update that are no padding.
    padded: tokens a device and update with padding.
    seen: share of the causal half of its rows' pairs that segments have; 1
      where a row is one segment.
  """

  pack: Any
  runs: float
  real: float
  padded: float
  seen: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the trainer's own code has made of lengths, models and devices.

  Attributes:
    experiment: the config.
    student: the student's shape.
    teacher: the teacher's.
    mesh: of the devices compiled for.
    attention: what computes it.
    sides: both models, abstract; see `models.Models`.
    distiller: their programs.
    programs: name -> packs; `teach LENGTH` and `learn LENGTH`.
    samples: trajectories a device, an update.
  """

  experiment: Experiment
  student: Any
  teacher: Any
  mesh: Any
  attention: str
  sides: Any
  distiller: Any
  programs: dict[str, Side]
  samples: float


def experiment_of(
  model: str, regime: str, method: str, changes: Sequence[str] = ()
) -> Experiment:
  """Returns a row of the paper as its config file has it, on H100s.

  Args:
    model: size of the student.
    regime: opd or opsd.
    method: of `METHODS`.
    changes: `KEY=VALUE` of the config, as a stage's flags have them.

  Raises:
    UserError: a key or a value that the config hasn't.
  """
  file = results.ROOT / "configs" / f"{regime}.py"
  # Which of its students the config is asked for decides nothing here: the
  # shape comes from `shapes`.
  known = {"opd": ("1.7b", "4b"), "opsd": ("4b", "8b")}[regime]
  name = model if model in known else known[-1]
  values, source = config_file.load(f"{file}:model={name},method={method}")
  values["mesh.memory_gib"] = fit.LIMIT_GB * 1e9 / 2**30
  for change in changes:
    key, equals, text = change.partition("=")
    if not equals:
      raise UserError(f"--set {change}: write KEY=VALUE")
    if key not in KEYS:
      raise unknown_key(key, "--set")
    try:
      values[key] = KEYS[key].parse(text)
    except ValueError as error:
      raise UserError(f"--set {change}: {error}") from None
  return from_config(values, source)


def paper_lengths(experiment: Experiment, seed: int) -> np.ndarray:
  """Draws lengths of trajectories around the paper's medians, log-normal.

  Args:
    experiment: says what is trained on and what the teacher reads.
    seed: of the draw.

  Returns:
    int `[N, 3]`: the student's prompt, the teacher's, the response.
  """
  rng = np.random.default_rng(seed)
  drawn = {
    name: np.maximum(
      2,
      np.rint(
        np.minimum(
          training.LONGEST,
          median * np.exp(training.SIGMA * rng.standard_normal(TRAJECTORIES)),
        )
      ),
    ).astype(int)
    for name, median in training.MEDIANS.items()
  }
  x, draft, y_star = (drawn[n] for n in ("prompt", "draft", "reference"))
  # What the teacher reads before the response.
  context = experiment.context_of_teacher or "x"
  teacher = {
    "x": x,
    "x_reference": x + y_star + training.INSTRUCTIONS,
    "refine": x
    + draft
    + training.INSTRUCTIONS
    + (y_star if experiment.regime == "opsd" else 0),
  }[context]
  response = {"y_o": draft, "y_star": y_star}.get(
    experiment.trains_on, drawn["response"]
  )
  return np.stack([x, teacher, response], axis=1)


def workdir_lengths(folder: Path) -> tuple[Experiment, np.ndarray]:
  """Reads the lengths that a run trains on, as its training stage does.

  Args:
    folder: its --workdir, in which what it trains on is finished.

  Returns:
    Its experiment, and lengths as `paper_lengths` gives them.

  Raises:
    UserError: there is no run, or its trajectories can't be read.
  """
  from trd_jax.distill import training_set
  from trd_jax.experiment.run_dir import RunDir
  from trd_jax.generation import chat_model

  run_dir = RunDir(folder)
  if not run_dir.config.is_file():
    raise UserError(f"--workdir={folder}: there is no run in it")
  values, source = config_file.load(str(run_dir.config))
  experiment = from_config(values, source)
  student = chat_model.open_chat(experiment.student, run_dir)
  teacher = student
  if experiment.regime == "opd" and experiment.reads_own_teacher:
    teacher = chat_model.open_chat(experiment.teacher, run_dir)
  data = training_set.build(experiment, run_dir, student, teacher)
  lengths = [
    (len(s.student_prompt), len(s.teacher_prompt), len(s.response))
    for s in data.samples
  ]
  return experiment, np.array(lengths)


def samples_of(lengths: np.ndarray) -> list[Any]:
  """Returns trajectories of these lengths, without memory for their ids."""
  from trd_jax.distill.packing.layout import Sample

  ids = np.zeros(int(lengths.max()), np.int32)
  return [
    Sample(f"s{number}", *(ids[:length] for length in row), correct=None)
    for number, row in enumerate(lengths)
  ]


def plan(
  model: str,
  experiment: Experiment,
  lengths: np.ndarray,
  seed: int,
  devices: Sequence[Any],
) -> Plan:
  """Plans a run as `trd_jax.train` does, for devices that need not be there.

  Args:
    model: size of the student; OPD's teacher is the 8B.
    experiment: the config.
    lengths: of all trajectories, see `paper_lengths`.
    seed: of the order of updates.
    devices: to compile for.

  Raises:
    UserError: the models don't fit into the devices' memory.
  """
  import steps

  from trd_jax.distill import mesh_and_packs
  from trd_jax.distill.distiller import Distiller
  from trd_jax.distill.model_pair import Pair
  from trd_jax.distill.packing import packing
  from trd_jax.distill.teacher.registry import source_of
  from trd_jax.distill.teacher.source import TeacherRun
  from trd_jax.distill.training_set import TrainingSet
  from trd_jax.model.attention import choice
  from trd_jax.model.weights.model_files import ModelFiles

  train = experiment.train
  student = shapes.MODELS[model]
  other = shapes.MODELS["8b"] if experiment.regime == "opd" else None
  sections = experiment.student, experiment.teacher_model
  chosen = choice.choose(
    train.attention,
    train.packing,
    platform=devices[0].platform,
    dtypes=[section.dtype for section in sections],
  )
  # Nobody reads a folder here. Of the tokenizer one thing is asked for: how
  # many ids open a doubt.
  chat: Any = types.SimpleNamespace(onset_ids=lambda: steps.ONSETS)
  pair = Pair(
    *(ModelFiles(s.path, Path(), "", s.dtype) for s in sections),
    chats=(chat, chat),
    configs=(student, other or student),
    attention=chosen,
  )
  data = TrainingSet(samples_of(lengths), [], {}, [], [])
  batches = data.batches(train, seed)
  teaching = source_of(experiment)
  mesh, layout, _ = mesh_and_packs.choose(
    experiment, pair, data.samples, teaching.weights, devices
  )
  sides = steps.abstract(student, other, experiment, mesh)
  # An automatic one would be that of the CPU that JAX runs on here.
  rows = steps.chunk_tokens(experiment, sides, mesh)
  experiment = dataclasses.replace(
    experiment, loss=dataclasses.replace(experiment.loss, chunk_tokens=rows)
  )
  source = teaching.prepare(
    TeacherRun(experiment, cast(Any, None), pair, batches, layout, mesh)
  )
  distiller = Distiller.for_run(
    experiment, pair, sides, source, mesh, len(batches)
  )
  updates = [
    packing.pack(batch, layout, experiment.loss.mean)
    for batch in batches[:UPDATES]
  ]
  return Plan(
    experiment=experiment,
    student=student,
    teacher=other or student,
    mesh=mesh,
    attention=chosen.implementation,
    sides=sides,
    distiller=distiller,
    programs=_programs(source.layout, updates),
    samples=sum(map(len, batches[:UPDATES])) / len(updates) / len(devices),
  )


def _programs(layout: Any, updates: Sequence[Any]) -> dict[str, Side]:
  """Counts the packs of each program in the updates.

  The longest of each side is always there: a run compiles and holds it.
  """
  from trd_jax.distill.packing import packing

  blank = packing.blank(layout)
  found = {}
  for side, empty in (("teach", blank.teacher), ("learn", blank.student)):
    packs = [
      pack
      for update in updates
      for micro in update
      for pack in (micro.teacher if side == "teach" else micro.student)
    ]
    for one in empty:
      shape = one.rows.tokens.shape
      same = [p.rows for p in packs if p.rows.tokens.shape == shape]
      if not same and one is not empty[-1]:
        continue
      each = len(updates) * layout.groups
      tokens = sum(np.count_nonzero(rows.segments) for rows in same)
      found[f"{side} {shape[-1]}"] = Side(
        one,
        runs=len(same) / len(updates),
        real=tokens / each,
        padded=sum(rows.tokens.size for rows in same) / each,
        seen=_seen(same) if layout.packing else 1.0,
      )
  return found


def _seen(packs: Sequence[Any]) -> float:
  """Returns the share of rows' pairs that lie within a segment."""
  pairs, most = 0.0, 0.0
  for rows in packs:
    for row in rows.segments.reshape(-1, rows.segments.shape[-1]):
      pairs += float((np.bincount(row)[1:].astype(float) ** 2).sum())
      most += float(row.size) ** 2
  return pairs / most if most else 1.0


def programs_of(plan: Plan) -> Iterable[tuple[str, Any]]:
  """Compiles the plan's programs, one after the other, and names them."""
  import steps

  by_side = {
    side: [
      (name, steps.shape_of(one.pack))
      for name, one in plan.programs.items()
      if name.startswith(side)
    ]
    for side in ("teach", "learn")
  }
  _answer_for_the_target()
  done = set()
  # `lower` takes a pack of each side; the shorter list's last one comes again.
  for number in range(max(map(len, by_side.values()))):
    names, packs = zip(
      *(found[min(number, len(found) - 1)] for found in by_side.values()),
      strict=True,
    )
    lowered = plan.distiller.lower(plan.sides.lora, *packs)
    for name, key in zip(names, ("teach", "learn"), strict=True):
      if name not in done:
        done.add(name)
        yield name, lowered[key].compile()
    if not number:
      yield "update", lowered["update"].compile()


def _answer_for_the_target() -> None:
  """Answers for an H100 when JAX asks what GPU this machine has.

  It asks the local device whether cuDNN's packed rows can be used, even where
  it compiles for another.
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused

  def at_least(capability: str) -> bool:
    return tuple(map(int, capability.split("."))) <= (9, 0)

  fused.check_compute_capability = at_least
  fused.is_cuda_compute_capability_equal = lambda c: c == "9.0"


def expected_flops(plan: Plan, name: str) -> float | None:
  """Returns a program's FLOPs by `shapes`; None where that has no formula."""
  if name == "update":
    return None
  one = plan.programs[name]
  _, rows, length = one.pack.rows.tokens.shape
  lengths = shapes.Lengths(length, length, length)
  if name.startswith("teach"):
    whole = shapes.teacher_flops(plan.teacher, lengths)
    unseen = shapes.attention_flops(plan.teacher, length)
    return rows * (whole - (1 - one.seen) * unseen)
  full = METHODS[plan.experiment.method].divergence in ("forward_kl", "jsd")
  if plan.experiment.train.remat != "full" or not full:
    return None
  rank = plan.experiment.lora.rank
  whole = shapes.student_flops(plan.student, lengths, rank)
  unseen = 4.5 * shapes.attention_flops(plan.student, length)
  slots = one.pack.slots.label[0].size
  return rows * (whole - (1 - one.seen) * unseen) + shapes.head_flops(
    plan.student, plan.teacher, slots
  )


class Wrong(Exception):
  """The text of a program has other FLOPs than the arithmetic."""


def evaluate(plan: Plan, keep: Path | None = None) -> dict[str, dict]:
  """Compiles a plan's programs and models what each costs.

  Args:
    plan: what is compiled.
    keep: a folder that gets the programs' texts, or None.

  Returns:
    By name, a case of `results`: one run with seconds, FLOPs, bytes, scratch
    memory, seconds by kind, and how often it runs on how many tokens.

  Raises:
    Wrong: FLOPs are not those of `shapes`.
    ValueError: a text that can't be read.
  """
  cases = {}
  for name, program in programs_of(plan):
    text = program.as_text()
    if keep is not None:
      (keep / file_of(name)).write_text(text)
    one = plan.programs.get(name, Side(None, 1.0, 0.0, 0.0, 1.0))
    cost = hlo_cost.cost(text, seen=one.seen, vocab=plan.student.vocab_size)
    wanted = expected_flops(plan, name)
    if wanted and abs(cost.flops() / wanted - 1) > TOLERANCE:
      raise Wrong(
        f"{name}: {cost.flops() / 1e12:.2f} TFLOP in the program,"
        f" {wanted / 1e12:.2f} by shapes.py"
      )
    rows = 0 if one.pack is None else one.pack.rows.tokens.shape[1]
    run = {
      "s": cost.seconds(),
      "flops": cost.flops(),
      "bytes": cost.bytes(),
      "scratch": fit.scratch_bytes(program),
      "rows": rows,
      "runs": one.runs,
      "real": one.real,
      "padded": one.padded,
      "kinds": cost.by_kind(),
    }
    cases[name] = {"about": {"notes": cost.notes}, "runs": [run]}
    print(
      f"{name}: {run['s'] * 1e3:.1f} ms modelled", file=sys.stderr, flush=True
    )
  if keep is not None:
    manifest = {
      "samples_a_device": plan.samples,
      "tokens": "of all runs of an update on a device",
      "programs": [
        {
          "program": name,
          "file": file_of(name),
          "count": run["runs"],
          "real_tokens": run["real"],
          "padded_tokens": run["padded"],
        }
        for name, run in _runs(cases)
      ],
    }
    (keep / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
  return cases


def file_of(program: str) -> str:
  """Returns the file name of a program's text."""
  return f"{program.replace(' ', '-')}.txt"


def settings_of(plan: Plan, model: str) -> dict[str, Any]:
  """Returns what a group of the document says of a plan."""
  from trd_jax.distill.packing.packing import MicroBatch

  experiment = plan.experiment
  longest = {
    side: one.pack
    for name, one in plan.programs.items()
    for side in [name.split()[0]]
  }
  held = fit.stays(
    plan.sides,
    plan.distiller,
    MicroBatch(*map(longest.get, ("teach", "learn"))),
  )
  return {
    "model": model,
    "regime": experiment.regime,
    "method": experiment.method,
    "attention": plan.attention,
    "packing": any(one.seen < 1 for one in plan.programs.values()),
    "remat": experiment.train.remat,
    "dropout": experiment.lora.dropout,
    "mesh": dict(plan.mesh.shape),
    "samples": plan.samples,
    "held": held,
  }


def _runs(cases: dict[str, dict]) -> list[tuple[str, dict]]:
  return [(name, case["runs"][0]) for name, case in cases.items()]


def sums(settings: dict[str, Any], cases: dict[str, dict]) -> dict[str, float]:
  """Returns the figures of an update, by name.

  Seconds are a device's, `sample` and `cached` GPU-seconds a trajectory with
  the teacher recomputed or known; `peak` is bytes.
  """
  runs = _runs(cases)

  def total(side: str, key: str) -> float:
    return sum(
      run[key] * (1 if key in ("real", "padded") else run["runs"])
      for name, run in runs
      if name.startswith(side)
    )

  def fill(side: str) -> float:
    padded = total(side, "padded")
    return total(side, "real") / padded if padded else 1.0

  seconds = {side: total(side, "s") for side in ("teach", "learn", "update")}
  kinds = {
    kind: sum(
      run["kinds"][kind] * run["runs"]
      for name, run in runs
      if name.startswith("learn")
    )
    for kind in hlo_cost.KINDS
  }
  share = {
    side: total(side, "flops") / (seconds[side] or 1) / hlo_cost.H100.flops
    for side in ("teach", "learn")
  }
  return {
    **seconds,
    **{f"learn, {kind}": value for kind, value in kinds.items()},
    "copied": kinds["weight copies"] / seconds["learn"],
    **{f"{side}, of peak": value for side, value in share.items()},
    "student fill": fill("learn"),
    "teacher fill": fill("teach"),
    "sample": sum(seconds.values()) / settings["samples"],
    "cached": (seconds["learn"] + seconds["update"]) / settings["samples"],
    "peak": sum(settings["held"].values())
    + max(run["scratch"] for _, run in runs),
  }


def _title(settings: dict[str, Any]) -> str:
  regime, method = settings["regime"].upper(), settings["method"]
  return f"{settings['model'].upper()} {regime} {method}"


def _words(settings: dict[str, Any]) -> str:
  """Returns what a plan is, in a sentence."""
  mesh = ", ".join(f"{k}={n}" for k, n in settings["mesh"].items() if n > 1)
  rows = "several samples" if settings["packing"] else "one sample"
  return (
    f"Modelled, not measured: eight H100s ({mesh}),"
    f" {fit.DEVICES * settings['samples']:g} trajectories an update,"
    f" attention {settings['attention']}, {rows} a row,"
    f" remat {settings['remat']}, dropout {settings['dropout']:g}."
  )


def summary(groups: Iterable[dict]) -> results.Table:
  """Returns a row a model and regime: what an update takes."""
  rows = []
  for group in groups:
    found = sums(group["settings"], group["cases"])
    rows.append(
      (
        _title(group["settings"]),
        f"{found['sample']:.2f}",
        f"{found['cached']:.2f}",
        f"{found['student fill']:.0%} / {found['teacher fill']:.0%}",
        f"{found['teach'] * 1e3:,.0f}",
        f"{found['teach, of peak']:.0%}",
        f"{found['learn'] * 1e3:,.0f}",
        f"{found['learn, of peak']:.0%}",
        *(
          f"{found[f'learn, {kind}'] / found['learn']:.0%}"
          for kind in hlo_cost.KINDS
        ),
        f"{found['update'] * 1e3:.0f}",
        f"{found['peak'] / 1e9:.1f}",
      )
    )
  columns = (
    "modelled",
    "GPU-s a sample",
    "teacher cached",
    "fill, student / teacher",
    "teach ms",
    "of 989",
    "learn ms",
    "of 989",
    *(f"learn: {kind}" for kind in hlo_cost.KINDS),
    "update ms",
    "peak GB",
  )
  text = (
    "Eight H100s, modelled, not measured. ms are a device's, an update;"
    f" `of {shapes.PEAK_TFLOPS:g}` counts padding as tokens. What stands"
    " behind `learn:` are shares of its time."
  )
  return results.Table("Modelled: an update", text, columns, rows)


def programs_table(settings: dict[str, Any], cases: dict) -> results.Table:
  """Returns a row a program of one model and regime."""
  rows = []
  order = ("teach", "learn", "update")
  for name, run in sorted(
    _runs(cases), key=lambda one: order.index(one[0].split()[0])
  ):
    fill = f"{run['real'] / run['padded']:.0%}" if run["padded"] else "-"
    rows.append(
      (
        name,
        f"{run['rows'] or '-'}",
        f"{run['runs']:.2f}",
        fill,
        f"{run['flops'] / 1e12:.1f}",
        f"{run['bytes'] / 1e9:.1f}",
        f"{run['s'] * 1e3:.1f}",
        f"{run['flops'] / run['s'] / hlo_cost.H100.flops:.0%}",
        *(f"{run['kinds'][kind] * 1e3:.1f}" for kind in hlo_cost.KINDS),
        f"{run['scratch'] / 1e9:.2f}",
      )
    )
  columns = (
    "modelled",
    "rows",
    "runs",
    "fill",
    "TFLOP",
    "GB",
    "ms",
    "of 989",
    *(f"{kind} ms" for kind in hlo_cost.KINDS),
    "scratch GB",
  )
  title = f"Modelled: {_title(settings)}"
  return results.Table(title, _words(settings), columns, rows)


def tables(document: dict) -> list[results.Table]:
  """Returns the summary, and a table of programs a group."""
  groups = list(document["groups"].values())
  return [
    summary(groups),
    *(programs_table(g["settings"], g["cases"]) for g in groups),
  ]


class _Parser(argparse.ArgumentParser):
  """Says in one line what is wrong with the flags."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"roofline.py: {message}; see --help\n")


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = _Parser(
    description=__doc__,
    formatter_class=argparse.RawTextHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--model",
    choices=MODELS,
    help="the student's size (8b); OPD's teacher is the 8B",
  )
  parser.add_argument(
    "--regime",
    choices=REGIMES,
    help="opd: a larger model teaches; opsd: its own base (opsd)",
  )
  parser.add_argument(
    "--method",
    choices=tuple(METHODS),
    metavar="NAME",
    help=f"what is trained on and how, as in the config (trd):\n{_names()}",
  )
  parser.add_argument(
    "--workdir",
    type=Path,
    metavar="DIR",
    help="take lengths, regime and method from this run, whose\n"
    "trajectories are there, instead of the paper's medians",
  )
  parser.add_argument(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="of lengths and of the updates' order (0)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="change a key of the config, as lora.dropout=0; may be\nrepeated",
  )
  parser.add_argument(
    "--table",
    action="store_true",
    help="1.7b, 4b and 8b, each in OPSD and OPD: half an hour or more",
  )
  parser.add_argument(
    "--hlo",
    type=_folder,
    metavar="DIR",
    help="write each program's optimised text and a manifest.json\nthere",
  )
  parser.add_argument(
    "--json", type=results.output, metavar="FILE", help="write the results here"
  )
  args = parser.parse_args(arguments)
  if args.seed < 0:
    parser.error(f"--seed {args.seed}: it is at least 0")
  if args.table and (args.model or args.regime or args.workdir or args.hlo):
    parser.error(
      "--table goes through models and regimes by itself: leave --model,"
      " --regime, --workdir and --hlo out"
    )
  if args.workdir and (args.regime or args.method):
    parser.error("--workdir brings its own regime and method: leave them out")
  return args


def _names() -> str:
  """Returns the methods' names, a few a line."""
  return textwrap.fill(", ".join(METHODS), 55)


def _folder(text: str) -> Path:
  """Reads a folder to write into, empty or with a manifest of ours.

  Raises:
    argparse.ArgumentTypeError: it is a file, or holds something else.
  """
  path = Path(text).expanduser()
  if not text.strip() or path.is_file():
    raise argparse.ArgumentTypeError(f"{text!r} is no folder")
  theirs = path.is_dir() and any(path.iterdir())
  if theirs and not (path / "manifest.json").is_file():
    raise argparse.ArgumentTypeError(f"{path} holds something else")
  return path


def _evaluate(args: argparse.Namespace, devices: Sequence[Any]) -> int:
  """Goes through what the flags ask for; returns the exit code."""
  import jax

  document = results.Document("roofline", args.json, quick=False)
  document.fields["versions"]["jax"] = jax.__version__
  asked = [(args.model or "8b", args.regime or "opsd")]
  if args.table:
    # The largest first: what everything else is compared with.
    asked = [(m, r) for m in reversed(MODELS) for r in reversed(REGIMES)]
  if args.hlo:
    args.hlo.mkdir(parents=True, exist_ok=True)
  for model, regime in asked:
    method = args.method or "trd"
    lengths = None
    if args.workdir:
      own, lengths = workdir_lengths(args.workdir)
      regime, method = own.regime, own.method
    experiment = experiment_of(model, regime, method, args.set)
    if lengths is None:
      lengths = paper_lengths(experiment, args.seed)
    planned = plan(model, experiment, lengths, args.seed, devices)
    cases = evaluate(planned, args.hlo)
    settings = settings_of(planned, model) | {"seed": args.seed}
    document.add(f"{model} {regime} {method}", settings, cases)
    print(f"\n{programs_table(settings, cases)}", flush=True)
    for case_name, case in cases.items():
      for note in case["about"]["notes"]:
        print(f"note: {case_name}: {note}")
    jax.clear_caches()
  print(f"\n{summary(document.fields['groups'].values())}\n\nAssumed:")
  for line in ASSUMPTIONS:
    print(f"- {line}")
  return 0


def main(arguments: Sequence[str] | None = None) -> int:
  """Compiles, models and prints; returns the exit code."""
  args = _flags(arguments)
  try:
    # A slip in --set is said at once, with a compiler or without one.
    experiment_of("8b", args.regime or "opsd", args.method or "trd", args.set)
    devices = fit.h100s()
  except UserError as error:
    return _refuse(error, 2)
  except (NotImplementedError, RuntimeError) as error:
    return _refuse(
      "it needs XLA's GPU compiler, though no GPU: pip install 'jax[cuda12]'"
      f" ({error})",
      2,
    )
  try:
    return _evaluate(args, devices)
  except UserError as error:
    return _refuse(error, 2)
  except (Wrong, ValueError) as error:
    return _refuse(error, 1)


def _refuse(error: object, code: int) -> int:
  """Says in one line what is wrong, and returns the exit code."""
  print(f"roofline.py: {' '.join(str(error).split())}", file=sys.stderr)
  return code


if __name__ == "__main__":
  sys.exit(main())
