"""Measures Section 4 of the paper on a run: prefix failure.

Of drafts whose prefix has failed (`failed_prefixes`), and of right ones beside
them, it takes the gradients that Section 4.2 compares (`GRADIENTS`), says how
they lie to g_ideal, and reads the teacher's two modes of Section 4.1 off its
distributions along the draft. docs/prefix-failure.md says what was found.

All is float32, of one model state (the student before training), and the same
at each call for the same workdir, number and seeds.
"""

import collections
import dataclasses
import functools
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trd_jax.analyze import failed_prefixes, prefix_result, prefix_summary
from trd_jax.analyze.failed_prefixes import Prefix
from trd_jax.analyze.prefix_gradients import (
  Kernels,
  Products,
  Read,
  Rows,
  Sides,
  Target,
  read,
  relate,
  relate_means,
)
from trd_jax.analyze.prefix_result import GRADIENTS, REFERENCES, VERSION
from trd_jax.data import vocabulary
from trd_jax.data.chat import Chat
from trd_jax.data.problems import store
from trd_jax.distill import models, training_set
from trd_jax.distill.packing.layout import Sample
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import write_json
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation import chat_model
from trd_jax.generation.chat_model import ChatModel
from trd_jax.model import backend, sharding
from trd_jax.model.weights import adapters, hf

_REMEDY = (
  "gradients of a dozen kinds are kept at once, each as large as the student's"
  " linear layers: measure on CPUs with JAX_PLATFORMS=cpu, or a smaller student"
)
_ROWS = 8  # trajectories of a batch; fewer where gradients are large
_MOST_NUMBERS = 2**26  # of one kind of gradient of a batch
_ROUND = 32  # lengths of rows, so that few shapes are compiled


def measure(
  experiment: Experiment,
  run_dir: RunDir,
  number: int = 64,
  seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
  """Measures prefix failure on the drafts of a run, and writes what it finds.

  Args:
    experiment: the workdir's. Its method decides nothing: y_o and y_r are
      scored as the methods of the paper do.
    run_dir: holds finished rollouts; y_r is read where it has them.
    number: how many failed drafts each seed draws, and how many right ones;
      all where there are fewer.
    seeds: of the draws.

  Returns:
    What is written: `made_of`, `counts`, and the tables of `prefix_summary`.

  Raises:
    UserError: the domain has no verifier of prefixes; the rollouts aren't
      there or another student's; no draft has failed; a device has no memory
      for the gradients; or as `training_set.build` and `hf.load`.
  """
  failed_prefixes.verifier(experiment.domain)
  if number < 1 or not seeds or len(set(seeds)) < len(seeds):
    raise UserError(
      f"prefix failure of {number} drafts with seeds {list(seeds)}: it takes at"
      " least one draft, and seeds that differ"
    )
  began = time.monotonic()
  backend.exact_products(backend.start(), ["float32"])
  student = chat_model.open_learner(experiment, run_dir)
  teacher = student
  if experiment.regime == "opd" or student.adapter or _is_later(experiment):
    teacher = chat_model.open_model(experiment.teacher_model, run_dir)
    vocabulary.check_same(
      [student.name, teacher.name], [student.chat, teacher.chat]
    )
  drafts, counts = _drafts(experiment, run_dir, student, teacher)
  chosen = {
    group: _draw(prefixes, number, seeds)
    for group, prefixes in drafts.by_group.items()
  }
  every = [row.prefix for rows in chosen.values() for row in rows]
  with (
    backend.enough_memory(_REMEDY),
    Progress(
      sum(map(len, chosen.values())), "prefix failure", "drafts"
    ) as progress,
  ):
    sides, lora_a = _load(experiment, student, teacher)
    found = _Measured(sides, lora_a, student.chat, drafts, every, len(seeds))
    for group, rows in chosen.items():
      found.add(group, rows, progress.update)
  result = {
    "version": VERSION,
    "made_of": {
      "regime": experiment.regime,
      "student": student.name,
      "student_revision": student.revision,
      "teacher": teacher.name,
      "teacher_revision": teacher.revision,
      "teacher_contexts": drafts.contexts,
      "onset": failed_prefixes.ONSET,
      "number": number,
      "seeds": list(seeds),
      "rollouts": run_dir.rows_left("rollout").get("digest"),
    },
    "counts": counts | {group: len(rows) for group, rows in chosen.items()},
    "gradients": dict(GRADIENTS),
    **found.summary(),
    "seconds": round(time.monotonic() - began, 1),
  }
  write_json(prefix_result.path(run_dir), result)
  return result


def _is_later(experiment: Experiment) -> bool:
  return experiment.pipeline.round > 1


# -- which drafts ------------------------------------------------------------


class _Drafts(NamedTuple):
  """The drafts that can be measured.

  Attributes:
    by_group: `failed` and `right`: prefixes by ascending key.
    y_o: the draft with both contexts, by its key.
    y_r: the refined draft with both contexts, by the draft's key; empty where
      the run has none.
    contexts: what the teacher reads beside y_o and y_r.
  """

  by_group: dict[str, list[Prefix]]
  y_o: dict[str, Sample]
  y_r: dict[str, Sample]
  contexts: dict[str, str | None]


def _drafts(
  experiment: Experiment,
  run_dir: RunDir,
  student: ChatModel,
  teacher: ChatModel,
) -> tuple[_Drafts, dict[str, Any]]:
  """Reads the drafts, and counts what becomes of them."""
  samples, contexts = {}, {}
  chats = student.chat, teacher.chat
  for trajectory, method in (("y_o", "forward_kl"), ("y_r", "trd")):
    as_in_paper = _along(experiment, trajectory, method)
    contexts[trajectory] = None
    samples[trajectory] = {}
    if trajectory == "y_r" and not _has_refined(experiment, run_dir):
      continue
    built = training_set.build(as_in_paper, run_dir, *chats)
    samples[trajectory] = {one.key: one for one in built.samples}
    contexts[trajectory] = as_in_paper.context_of_teacher
  y_r = {}
  if samples["y_r"]:
    table = run_dir.table("refine", Trajectory, ["key", "draft_key"])
    y_r = {
      row["draft_key"]: samples["y_r"][row["key"]]
      for row in table.to_pylist()
      if row["key"] in samples["y_r"]
    }
  problems = {p.problem_id: p for p in store.load(experiment, run_dir)}
  columns = ["key", "problem_id", "text", "response_ids", "correct"]
  rows = run_dir.table("rollout", Trajectory, [*columns, "model_revision"])
  groups: dict[str, list[Prefix]] = {"failed": [], "right": []}
  total: collections.Counter[str] = collections.Counter()
  left_out: dict[str, collections.Counter[str]] = {
    group: collections.Counter() for group in groups
  }
  for row in rows.to_pylist():
    if row["model_revision"] != student.revision:
      raise UserError(
        f"{run_dir.stage('rollout')}: draft {row['key']} was written by"
        f" revision {row['model_revision']} of the student, and {student.name}"
        f" is now {student.revision}: give back the student that wrote it"
      )
    if row["correct"] is None or row["problem_id"] not in problems:
      total["unjudged"] += 1
      continue
    group = "right" if row["correct"] else "failed"
    total[group] += 1
    cut = failed_prefixes.failed_prefix
    if row["correct"]:
      cut = failed_prefixes.right_prefix
    prefix = cut(
      problems[row["problem_id"]],
      row["key"],
      row["text"],
      row["response_ids"],
      student.chat,
    )
    if isinstance(prefix, Prefix):
      if row["key"] not in samples["y_o"]:
        prefix = "the teacher has no reference to read"
      elif samples["y_r"] and row["key"] not in y_r:
        prefix = "it has no refined draft"
    if isinstance(prefix, str):
      left_out[group][prefix] += 1
    else:
      groups[group].append(prefix)
  if not groups["failed"]:
    raise UserError(
      f"{run_dir.stage('rollout')}: none of {total['failed']} wrong drafts has"
      " a first wrong step that is followed by more"
      f" ({_told(left_out['failed'])}): there is no failed prefix to measure"
    )
  groups = {
    name: sorted(found, key=lambda one: one.key)
    for name, found in groups.items()
    if found
  }
  counts = {
    "drafts": sum(total.values()),
    "wrong_drafts": total["failed"],
    "right_drafts": total["right"],
    "failed_prefixes": len(groups["failed"]),
    "left_out": {name: dict(why) for name, why in left_out.items()},
  }
  return _Drafts(groups, samples["y_o"], y_r, contexts), counts


def _told(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{n} {why}" for why, n in counts.items()) or "none there"


def _has_refined(experiment: Experiment, run_dir: RunDir) -> bool:
  return experiment.teacher_writes == "y_r" and run_dir.finished("refine")


def _along(experiment: Experiment, trajectory: str, method: str) -> Experiment:
  """Returns the experiment that trains on a trajectory with a paper's method.

  What a teacher reads is the run's own where the run trains on the trajectory.
  Nothing is left out for its length or its verdict.
  """
  context = None
  if experiment.trains_on == trajectory:
    context = experiment.context_of_teacher
  return dataclasses.replace(
    experiment,
    method=method,
    trajectory=trajectory,
    divergence=None,
    teacher_context=context,
    train=dataclasses.replace(
      experiment.train,
      subset="all",
      truncated="keep",
      leaks="keep",
      max_student_tokens=2**31 - 1,
      max_teacher_tokens=2**31 - 1,
    ),
  )


class _Drawn(NamedTuple):
  """A prefix and the seeds that drew it, by their number."""

  prefix: Prefix
  seeds: tuple[int, ...]


def _draw(
  prefixes: Sequence[Prefix], number: int, seeds: Sequence[int]
) -> list[_Drawn]:
  """Draws prefixes for each seed; a prefix that several draw comes once."""
  drawn: dict[str, list[int]] = {}
  for place, seed in enumerate(seeds):
    rng = random.Random(f"prefix_failure/{seed}")
    keys = [prefix.key for prefix in prefixes]
    for key in rng.sample(keys, min(number, len(keys))):
      drawn.setdefault(key, []).append(place)
  return [
    _Drawn(prefix, tuple(drawn[prefix.key]))
    for prefix in prefixes
    if prefix.key in drawn
  ]


# -- models ------------------------------------------------------------------


def _load(
  experiment: Experiment, student: ChatModel, teacher: ChatModel
) -> tuple[Sides, Kernels]:
  """Loads both models in float32, and draws the A of a new adapter."""
  model = hf.load(student.folder, dtype="float32")
  tree = nnx.to_pure_dict(nnx.state(model))
  # As `lora.Linear` draws it, but without the program that draws the very one
  # of training: to compile that takes longer than anything here.
  rng = np.random.default_rng(experiment.seed)
  layers, rank = model.config.num_layers, experiment.lora.rank
  lora_a = {
    name: jnp.asarray(
      rng.uniform(-(ins**-0.5), ins**-0.5, (layers, ins, rank)), jnp.float32
    )
    for name, (ins, _) in model.config.linear_layers().items()
  }
  if student.adapter is not None:
    size, adapter = adapters.load_peft(student.adapter, model.config)
    tree = adapters.merge(tree, adapter, size)
  config, other_config, other = model.config, model.config, tree
  if teacher is not student:
    loaded = hf.load(teacher.folder, dtype="float32")
    other_config = loaded.config
    other = nnx.to_pure_dict(nnx.state(loaded))
  rows, _ = vocabulary.shared_rows([config.vocab_size, other_config.vocab_size])
  mesh = sharding.make_mesh(1, 1, 1)
  tree, other = (models.with_head_rows(x, rows, mesh) for x in (tree, other))
  return Sides.of(
    adapters.plain_model(config, tree),
    adapters.plain_model(other_config, other),
  ), lora_a


# -- one batch after the other -----------------------------------------------


class _Measured:
  """Collects what batches of prefixes give, for `prefix_summary`."""

  def __init__(
    self,
    sides: Sides,
    lora_a: Kernels,
    chat: Chat,
    drafts: _Drafts,
    prefixes: Sequence[Prefix],
    num_seeds: int,
  ):
    self._sides, self._lora_a = sides, lora_a
    self._shape = _shape(prefixes, drafts)
    self._names = [n for n in GRADIENTS if n != "trd" or drafts.y_r]
    self._onset_ids = chat.onset_ids()
    self._drafts, self._num_seeds = drafts, num_seeds
    size = sum(x.size for x in sides.kernels.values())
    self._batch = max(1, min(_ROWS, _MOST_NUMBERS // size))
    self._groups: dict[str, prefix_summary.Group] = {}

  def add(self, group: str, rows: Sequence[_Drawn], advance) -> None:
    """Measures a group's prefixes."""
    prefixes = [row.prefix for row in rows]
    # What each prefix counts in the mean of each seed, and in that of all.
    weight = np.zeros((self._num_seeds + 1, len(rows)), np.float32)
    for place, row in enumerate(rows):
      weight[[*row.seeds, -1], place] = 1
    weight /= weight.sum(1, keepdims=True)
    zeros = {
      k: jnp.zeros((len(self._names), *x.shape), jnp.float32)
      for k, x in self._sides.kernels.items()
    }
    before = {k: x[None, : len(REFERENCES)] for k, x in zeros.items()}
    references = tuple(map(self._names.index, REFERENCES))
    sums = {k: jnp.stack([x] * len(weight)) for k, x in zeros.items()}
    products: list[tuple[Products, Products]] = []
    along: list[dict[str, Any]] = []
    for first in range(0, len(rows), self._batch):
      part = prefixes[first : first + self._batch]
      count = len(part)
      # The last batch is filled up with rows that count nowhere.
      part = part + [part[-1]] * (self._batch - count)
      grads, said = self._read(part)
      own = np.zeros((len(weight), self._batch), np.float32)
      own[:, :count] = weight[:, first : first + count]
      *both, before, sums = relate(
        references, grads, before, own, sums, self._lora_a
      )
      products.append(_first(both, count))
      along += [{name: x[i] for name, x in said.items()} for i in range(count)]
      advance(count)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *products)
    means = jax.device_get(relate_means(sums, self._lora_a))
    self._groups[group] = prefix_summary.Group(
      self._names, prefixes, [row.seeds for row in rows], whole, means, along
    )

  def summary(self) -> dict[str, Any]:
    """Returns the tables of everything that was added."""
    return prefix_summary.summarize(self._groups)

  def _read(
    self, part: Sequence[Prefix]
  ) -> tuple[list[Kernels], dict[str, np.ndarray]]:
    """Runs the models along the drafts, the paths and the refined drafts.

    Returns:
      Gradients in the order of `_names`, and what is said by name.
    """
    drafts = [self._drafts.y_o[one.key] for one in part]
    responses = [sample.response for sample in drafts]
    slots = self._shape.slots

    # 1. Along the draft: dense KL and g_frag.
    labels = _padded(responses, slots)
    whole = [(0, len(y)) for y in responses]
    line = [(one.begin, one.place) for one in part]
    behind = [
      (one.place, len(y)) for one, y in zip(part, responses, strict=True)
    ]
    # The paper's pairs (y_o[:t+i], onset), i = 0 … k−1, as far as the draft
    # goes: k is the length of the path.
    pairs = [
      (begin, min(end, begin + len(one.path_ids)))
      for one, (begin, end) in zip(part, behind, strict=True)
    ]
    onset = np.array([one.path_ids[0] for one in part], np.int32)
    onset = np.repeat(onset[:, None], slots, 1)
    targets = {
      name: (kind, Target(ids, _weights(spans, slots)))
      for name, kind, ids, spans in (
        ("forward", "forward_kl", labels, whole),
        ("reverse", "reverse_kl", labels, whole),
        ("forward_at", "forward_kl", labels, line),
        ("forward_after", "forward_kl", labels, behind),
        ("reverse_after", "reverse_kl", labels, behind),
        ("frag", "equation_3", onset, pairs),
        ("frag_certain", "equation_3_certain", onset, pairs),
      )
    }
    own = {"own": labels, **_marked(part, slots)}
    along_y_o = self._run("y_o", drafts, responses, targets, own)
    grads = along_y_o.grads

    # 2. Along the right path from the same prefix.
    paths = [np.array(one.path_ids, np.int32) for one in part]
    labels = _padded(paths, slots)
    weight = _weights([(0, len(path)) for path in paths], slots)
    first = _weights([(0, one.first) for one in part], slots)
    targets = {
      "ideal": ("equation_3", Target(labels, weight)),
      "ideal_certain": ("equation_3_certain", Target(labels, weight)),
      "ideal_first": ("equation_3", Target(labels, first)),
    }
    places = [one.place for one in part]
    along_path = self._run(
      "y_o", drafts, paths, targets, {"own": labels}, places
    )
    grads |= along_path.grads

    # 3. Along the right path from before the wrong line.
    paths = [np.array(one.avoid_ids, np.int32) for one in part]
    labels = _padded(paths, slots)
    weight = _weights([(0, len(path)) for path in paths], slots)
    targets = {"avoid": ("equation_3_certain", Target(labels, weight))}
    places = [one.begin for one in part]
    along = self._run("y_o", drafts, paths, targets, {"own": labels}, places)
    grads |= along.grads

    # 4. Along the refined draft: TRD.
    if self._drafts.y_r:
      refined = [self._drafts.y_r[one.key] for one in part]
      responses = [sample.response for sample in refined]
      labels = _padded(responses, slots)
      weight = _weights([(0, len(y)) for y in responses], slots)
      targets = {"trd": ("forward_kl", Target(labels, weight))}
      along = self._run("y_r", refined, responses, targets, {"own": labels})
      grads |= along.grads

    said: dict[str, Any] = {
      f"{name}/{side}/{what}": x
      for name, run in (("y_o", along_y_o), ("path", along_path))
      for side, values in zip(("student", "teacher"), run.said, strict=True)
      for what, x in values.items()
    }
    said["y_o/forward_kl"] = along_y_o.divergence["forward"]
    said["y_o/reverse_kl"] = along_y_o.divergence["reverse"]
    said["y_o/label"] = own["own"]
    said["y_o/length"] = np.array([len(one.response) for one in drafts])
    return [grads[name] for name in self._names], jax.device_get(said)

  def _run(
    self,
    context: str,
    samples: Sequence[Sample],
    responses: Sequence[np.ndarray],
    targets: Mapping[str, tuple[str, Target]],
    queries: Mapping[str, np.ndarray],
    places: Sequence[int] | None = None,
  ) -> Read:
    """Reads along responses.

    Args:
      context: `y_o` or `y_r`, of the samples.
      samples: bring the prompts.
      responses: what follows them, or, with `places`, so many tokens of the
        samples' own responses.
      targets: as `prefix_gradients.read`.
      queries: as there.
      places: tokens of the samples' responses that stand before; none.
    """
    places = places or [0] * len(samples)
    rows = []
    for prompt, width in (
      ("student_prompt", self._shape.student),
      ("teacher_prompt", self._shape.teacher[context]),
    ):
      before = [
        np.concatenate([getattr(one, prompt), one.response[:place]])
        for one, place in zip(samples, places, strict=True)
      ]
      rows.append(_rows(before, responses, width))
    ids = self._onset_ids
    return read(self._sides, rows[0], rows[1], targets, queries, ids)


def _first(
  products: Sequence[Products], count: int
) -> tuple[Products, Products]:
  """Returns the first rows' products, on the host."""
  of_kernels, of_adapter = jax.device_get(products)
  cut = functools.partial(jax.tree.map, lambda x: x[:count])
  return cut(of_kernels), cut(of_adapter)


class _Shape(NamedTuple):
  """The one shape that all rows have.

  Attributes:
    student: tokens of the student's rows.
    teacher: tokens of the teacher's rows, beside y_o and beside y_r.
    slots: of a row.
  """

  student: int
  teacher: Mapping[str, int]
  slots: int


def _shape(prefixes: Sequence[Prefix], drafts: _Drafts) -> _Shape:
  """Returns the shape that everything along some prefixes fits."""
  slots, student = [1], [1]
  teacher: dict[str, list[int]] = {"y_o": [1], "y_r": [1]}

  def add(context: str, sample: Sample, before: int, response: int) -> None:
    slots.append(response)
    student.append(len(sample.student_prompt) + before + response)
    teacher[context].append(len(sample.teacher_prompt) + before + response)

  for one in prefixes:
    y_o, y_r = drafts.y_o[one.key], drafts.y_r.get(one.key)
    add("y_o", y_o, 0, len(y_o.response))
    add("y_o", y_o, one.place, len(one.path_ids))
    add("y_o", y_o, one.begin, len(one.avoid_ids))
    if y_r is not None:
      add("y_r", y_r, 0, len(y_r.response))

  def up(lengths: Sequence[int]) -> int:
    return math.ceil(max(lengths) / _ROUND) * _ROUND

  return _Shape(up(student), {k: up(x) for k, x in teacher.items()}, up(slots))


def _rows(
  before: Sequence[np.ndarray], responses: Sequence[np.ndarray], width: int
) -> Rows:
  rows = [np.concatenate(pair) for pair in zip(before, responses, strict=True)]
  return Rows(
    _padded(rows, width),
    np.array([len(row) for row in rows], np.int32),
    np.array([len(x) - 1 for x in before], np.int32),
  )


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
  out = np.zeros((len(rows), width), np.int32)
  for line, row in zip(out, rows, strict=True):
    line[: len(row)] = row
  return out


def _weights(spans: Sequence[tuple[int, int]], slots: int) -> np.ndarray:
  """Returns what each slot counts in a mean over a span of each row."""
  out = np.zeros((len(spans), slots), np.float32)
  for line, (begin, end) in zip(out, spans, strict=True):
    line[begin:end] = 1 / (end - begin)
  return out


def _marked(part: Sequence[Prefix], slots: int) -> dict[str, np.ndarray]:
  """Returns the ids that are asked for at marks, 0 elsewhere."""
  right = np.zeros((len(part), slots), np.int32)
  consistent = right.copy()
  for row, one in enumerate(part):
    for mark in one.marks:
      right[row, mark.token] = mark.right_id
      if mark.consistent_id is not None:
        consistent[row, mark.token] = mark.consistent_id
  return {"right": right, "consistent": consistent}
