"""Stage 4: adds the trained adapter to the student's weights.

The sum is computed in float32 and cast once to the student's dtype. Then it is
measured. Its logits should differ little from those of base and adapter side by
side; that they differ from those of base proves that the adapter is in it. The
summary holds both differences. The adapter is always written, for tools that
load PEFT, and the merged weights where `engine.weights=merged` asks for them
(docs/training.md, "Afterwards").
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trd_jax.experiment import cli
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

STAGE = "merge"

# What the two forms are compared on.
_CONTEXTS = 4
_CONTEXT_TOKENS = 1024


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Merges the newest checkpoint of a finished training run.

  Raises:
    UserError: the training isn't finished; the student or the checkpoint can't
      be read or don't fit; what is written has the logits of base, or NaN;
      something foreign lies where the adapter or the weights will be written;
      JAX doesn't use the machine's GPUs; or their memory is too small or taken.
  """
  del flags
  from trd_jax.model import backend

  with backend.enough_memory(
    "end the server or engine that holds its memory, or merge on CPUs with"
    " JAX_PLATFORMS=cpu; the same command begins again"
  ):
    _merge(experiment, run_dir)


def _merge(experiment: Experiment, run_dir: RunDir) -> None:
  """Merges as `run` does, which turns out-of-memory into a `UserError`."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from trd_jax.distill.checkpoint import Checkpoints
  from trd_jax.experiment.errors import UserError
  from trd_jax.generation import chat_model, summaries
  from trd_jax.model import backend, sharding
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.weights import adapters, hf, hub, peft
  from trd_jax.model.weights.model_folder import check_replaceable, token_ids

  if summaries.skip_if_done(run_dir, STAGE, describe):
    return
  summaries.refuse_preflight(experiment, STAGE)
  if run_dir.done("train") is None:
    raise UserError(
      f"{run_dir.root}: the training is not finished; run trd_jax.train with"
      " the same --config and --workdir first"
    )

  # Before the minutes that loading takes: what lies where the adapter and the
  # weights will be written may be somebody's.
  check_replaceable(run_dir.adapter, compared_later=peft.FILES)
  if experiment.engine.weights == "merged":
    check_replaceable(run_dir.merged)
  backend.exact_products(backend.start(), [experiment.student.dtype])

  # 1. The student's weights, and the adapter as it is after training.
  student = chat_model.open_model(experiment.student, run_dir)
  # Split over the devices that this process has, however many trained: there is
  # little to compute, but the float32 sum takes more memory than training does.
  mesh = sharding.make_mesh(1, -1, 1)
  lora = LoraConfig(**vars(experiment.lora))
  model = hf.load(student.folder, dtype=student.dtype, mesh=mesh, lora=lora)
  graph, fresh, base = nnx.split(model, nnx.LoRAParam, ...)
  checkpoints = Checkpoints(
    run_dir.checkpoints, experiment.train.keep_checkpoints
  )
  step, found = checkpoints.restore(
    {"lora": nnx.to_pure_dict(fresh)}, partial=True
  )
  adapter = found["lora"]
  nnx.replace_by_pure_dict(fresh, adapter)
  adapted = nnx.merge(graph, fresh, base)
  plain = adapters.plain_model(model.config, nnx.to_pure_dict(base))
  source, *contexts = _contexts(run_dir, student.chat.vocab_size)
  idle = _without_update(_metrics(run_dir))

  # 2. The adapter on disk, which is all where engines apply it unmerged.
  adapters.save_peft(adapter, lora, run_dir.adapter, base=student.name)
  summary = {
    "step": step,
    "dtype": student.dtype,
    "merged": experiment.engine.weights == "merged",
    "without_update": idle,
    "adapter_is_zero": adapters.is_zero(adapter),
    "compared_on": source,
    "positions": int(np.sum(contexts[1])),
  }
  written = f"{run_dir.adapter}"
  if summary["merged"]:
    # 3. The sum, and how far it is from its parts.
    tree = adapters.merge(nnx.to_pure_dict(base), adapter, lora)
    merged = adapters.plain_model(model.config, tree)
    summary |= _distances(merged, adapted, plain, contexts)
    _check(summary, student.name)

    # 4. The sum on disk.
    tokenizer = student.folder
    if experiment.student.tokenizer is not None:
      tokenizer = hub.tokenizer_folder(experiment.student.tokenizer, run_dir)
    hf.save_hf(
      model.config,
      tree,
      run_dir.merged,
      tokenizer_from=tokenizer,
      chat_template=experiment.student.chat_template,
      special_ids=token_ids(student.folder),
      dtype=student.dtype,
    )
    written = f"{run_dir.merged} and {run_dir.adapter}"
  else:
    # An engine will load what is on disk, so that is read again and compared,
    # and the logits are those of what was read.
    _, again = adapters.load_peft(run_dir.adapter, model.config)
    placed = jax.tree.map(
      lambda x, y: jax.device_put(x, y.sharding), again, adapter
    )
    same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), placed, adapter)
    if not all(jax.tree.leaves(same)):
      raise UserError(
        f"{run_dir.adapter} doesn't hold what was trained, though it was just"
        " written: look at the disk, and give the same command again"
      )
    on_disk = jax.tree.map(lambda x: x, fresh)
    nnx.replace_by_pure_dict(on_disk, placed)
    read = nnx.merge(graph, on_disk, base)
    summary |= _distances(read, adapted, plain, contexts)
    _check(summary, student.name)
  # What an evaluation will open, in either form, by its name and fingerprint.
  applied = f"{student.name} with {run_dir.adapter}"
  weights = {
    student.name: student.fingerprint,
    applied: hub.fingerprint(student.folder, run_dir.adapter),
  }
  folders = [run_dir.adapter.name]
  if summary["merged"]:
    weights[str(run_dir.merged)] = hub.fingerprint(run_dir.merged)
    folders.append(run_dir.merged.name)
  run_dir.mark_done(STAGE, summary, folders, weights)
  print(f"{STAGE}: {describe(summary)}", flush=True)
  print(f"written: {written}", flush=True)


def describe(summary: dict) -> str:
  """Returns one line about a finished merge."""
  how = f"added in float32 and cast to {summary['dtype']}"
  if not summary["merged"]:
    how = "to be applied unmerged (engine.weights=adapter)"
  told = f"the adapter after update {summary['step']}, {how}"
  if "largest_logit_difference" in summary:  # an earlier version's may lack it
    told += (
      "; logits differ from adapter-on by at most"
      f" {summary['largest_logit_difference']:.2g}"
    )
    if (far := summary.get("largest_logit_distance_to_base")) is not None:
      told += f" and from base by up to {far:.2g}"
    told += (
      f" over {summary['positions']:,} positions of {summary['compared_on']}"
    )
    if far and summary["largest_logit_difference"] > far / 2:
      told += (
        f". WARNING: the cast to {summary['dtype']} takes much of the adapter;"
        " engine.weights=adapter keeps it whole"
      )
  if summary.get("without_update"):
    told += "; no update of the training had a gradient and a learning rate"
  return told


def _distances(written, adapted, plain, contexts) -> dict[str, float]:
  """Measures what is written against adapter-on and against base."""
  from trd_jax.model.weights import adapters

  return {
    name: adapters.logit_difference(one, other, *contexts)
    for name, one, other in (
      ("largest_logit_difference", adapted, written),
      ("largest_logit_distance_to_base", plain, written),
    )
  }


def _metrics(run_dir: RunDir) -> list[dict[str, Any]]:
  """Reads training's metrics, which no finished training is lost for."""
  from trd_jax.experiment.errors import UserError
  from trd_jax.experiment.metric_log import read_metrics

  try:
    return read_metrics(run_dir.metrics_file("train"))
  except UserError as error:
    print(f"note: {error}; merged without it", flush=True)
    return []


def _without_update(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Returns whether training's own metrics say that the adapter never moved.

  That is so where in each row the gradient or the learning rate was zero.
  """
  names = ("grad_norm", "learning_rate")
  # A row that lacks one, or has none of it, says nothing of the kind.
  return bool(rows) and all(
    any(row.get(name) == 0 for name in names) for row in rows
  )


def _check(summary: Mapping[str, Any], name: str) -> None:
  """Refuses what would be evaluated as a trained model and isn't one.

  Raises:
    UserError: a logit is NaN or infinite, or no logit differs from base's
      though training had updates.
  """
  from trd_jax.experiment.errors import UserError

  far = summary["largest_logit_distance_to_base"]
  step = summary["step"]
  if not math.isfinite(far + summary["largest_logit_difference"]):
    raise UserError(
      f"{name} with the adapter after update {step}: its logits are NaN or"
      " infinite; train with a lower train.learning_rate in a new --workdir, or"
      " with student.dtype=float32"
    )
  # A run without any update, as one with a learning rate of zero, is an honest
  # baseline and passes.
  if far or summary["without_update"]:
    return
  what = f"the adapter after update {step}"
  if not summary["adapter_is_zero"]:
    # A cast to bfloat16 may swallow a small adapter, which still changes logits
    # when it is applied unmerged. So the two cases have different advice.
    how = "is too small to change a logit"
    advice = "train longer, or with a higher train.learning_rate"
    if summary["merged"]:
      how = (
        f"is lost in the sum, which is base's when cast to {summary['dtype']}"
      )
      advice = (
        "have the engine apply it unmerged with --config.engine.weights=adapter"
      )
    raise UserError(f"{what} {how}: {name} would be evaluated twice; {advice}")
  raise UserError(
    f"{what} is zero, so that {name} would be evaluated twice, though"
    " training's updates had gradients: its checkpoint is not what was trained;"
    " remove it to go on from the one before, or train in a new --workdir"
  )


def _contexts(run_dir: RunDir, vocab_size: int):
  """Returns the contexts on which logits are compared.

  Returns:
    What they are, for people; int32 ids `[B, T]`, right-padded; lengths `[B]`.
  """
  import numpy as np

  from trd_jax.experiment.records import Trajectory

  columns = ("prompt_ids", "response_ids")
  run_dir.done("rollout")  # refuses rows of which some are gone
  rows = run_dir.table("rollout", Trajectory, columns)
  rows = rows.slice(0, _CONTEXTS).to_pylist()
  source = "the student's rollouts"
  contexts = [row["prompt_ids"] + row["response_ids"] for row in rows]
  if not contexts:
    source = "random ids"
    generator = np.random.default_rng(0)
    contexts = generator.integers(0, vocab_size, (_CONTEXTS, 128)).tolist()
  contexts = [ids[:_CONTEXT_TOKENS] for ids in contexts]
  length_B = np.array([len(ids) for ids in contexts])
  tokens_BT = np.zeros((len(contexts), length_B.max()), np.int32)
  for row, ids in zip(tokens_BT, contexts, strict=True):
    row[: len(ids)] = ids
  return source, tokens_BT, length_B


if __name__ == "__main__":
  cli.main(STAGE, run, "adds the trained adapter to the student's weights")
