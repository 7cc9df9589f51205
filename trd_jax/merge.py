"""Stage 4: the trained adapter is added to the student's weights.

In float32, cast once to the student's dtype (SPEC §5.6), and measured: the
summary says by how much the merged model's logits differ from those of base
and adapter side by side. Both forms are written, for tools that read merged
Hugging Face weights and for tools that load PEFT adapters.
"""

from trd_jax import cli
from trd_jax.experiment import Experiment
from trd_jax.run_dir import RunDir

STAGE = "merge"

# What the two forms are compared on.
_CONTEXTS = 4
_CONTEXT_TOKENS = 1024


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Merges the newest checkpoint of a finished training run.

  Raises:
    UserError: the training isn't finished, the student or the checkpoint can't
      be read or don't fit, something foreign is where the adapter or the
      weights will be written, JAX doesn't use the machine's GPUs, or their
      memory is too small or another's.
  """
  del flags
  from trd_jax import backend

  with backend.enough_memory(
    "end the server or engine that holds its memory, or merge on CPUs with"
    " JAX_PLATFORMS=cpu; the same command begins again"
  ):
    _merge(experiment, run_dir)


def _merge(experiment: Experiment, run_dir: RunDir) -> None:
  """As `run`."""
  import numpy as np
  from flax import nnx

  from trd_jax import (
    adapters,
    backend,
    generation,
    hub,
    outcomes,
    sharding,
    weights,
  )
  from trd_jax.checkpoint import Checkpoints
  from trd_jax.errors import UserError
  from trd_jax.model.lora import LoraConfig
  from trd_jax.model_folder import check_replaceable, token_ids

  if outcomes.skip_if_done(run_dir, STAGE, describe):
    return
  outcomes.refuse_preflight(experiment, STAGE)
  if run_dir.done("train") is None:
    raise UserError(
      f"{run_dir.root}: the training is not finished; run trd_jax.train with"
      " the same --config and --workdir first"
    )

  # What lies where they will be written may be somebody's.
  check_replaceable(run_dir.adapter, compared_later=adapters.FILES)
  if experiment.engine.weights == "merged":
    check_replaceable(run_dir.merged)
  backend.exact_products(backend.start(), [experiment.student.dtype])

  # 1. The student's weights, and the adapter as it is after training.
  student = generation.speaker(experiment.student, run_dir)
  # Split over this process's devices, however many trained: it is no work to
  # speak of, and the sum in float32 takes more memory than training does.
  mesh = sharding.make_mesh(1, -1, 1)
  lora = LoraConfig(**vars(experiment.lora))
  model = weights.load(
    student.folder, dtype=student.dtype, mesh=mesh, lora=lora
  )
  graph, fresh, base = nnx.split(model, nnx.LoRAParam, ...)
  checkpoints = Checkpoints(
    run_dir.checkpoints, experiment.train.keep_checkpoints
  )
  step, found = checkpoints.restore(
    {"lora": nnx.to_pure_dict(fresh)}, partial=True
  )
  adapter = found["lora"]

  # 2. The adapter on disk, and that is all where engines wear it unmerged.
  adapters.save_peft(adapter, lora, run_dir.adapter, base=student.name)
  summary = {"step": step, "dtype": student.dtype, "merged": False}
  written = f"{run_dir.adapter}"
  if experiment.engine.weights == "merged":
    # 3. The sum, and how far it is from its parts.
    nnx.replace_by_pure_dict(fresh, adapter)
    adapted = nnx.merge(graph, fresh, base)
    tree = adapters.merge(nnx.to_pure_dict(base), adapter, lora)
    merged = adapters.plain_model(model.config, tree)
    source, tokens_BT, length_B = _contexts(run_dir, student.chat.vocab_size)
    gap = adapters.logit_difference(adapted, merged, tokens_BT, length_B)

    # 4. The sum on disk.
    tokenizer = student.folder
    if experiment.student.tokenizer is not None:
      tokenizer = hub.tokenizer_folder(experiment.student.tokenizer, run_dir)
    weights.save_hf(
      model.config,
      tree,
      run_dir.merged,
      tokenizer_from=tokenizer,
      chat_template=experiment.student.chat_template,
      special_ids=token_ids(student.folder),
      dtype=student.dtype,
    )
    summary |= {
      "merged": True,
      "largest_logit_difference": gap,
      "compared_on": source,
      "positions": int(np.sum(length_B)),
    }
    written = f"{run_dir.merged} and {run_dir.adapter}"
  run_dir.mark_done(STAGE, summary)
  print(f"{STAGE}: {describe(summary)}", flush=True)
  print(f"written: {written}", flush=True)


def describe(summary: dict) -> str:
  """One line about a finished merge."""
  if not summary["merged"]:
    return (
      f"the adapter after update {summary['step']}, to be worn unmerged"
      " (engine.weights=adapter)"
    )
  return (
    f"the adapter after update {summary['step']}, added in float32 and cast to"
    f" {summary['dtype']}; logits differ from adapter-on by at most"
    f" {summary['largest_logit_difference']:.2g} over"
    f" {summary['positions']:,} positions of {summary['compared_on']}"
  )


def _contexts(run_dir: RunDir, vocab_size: int):
  """Where the logits are compared: what they are, padded ids, lengths."""
  import numpy as np

  from trd_jax.records import Trajectory

  columns = ("prompt_ids", "response_ids")
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
