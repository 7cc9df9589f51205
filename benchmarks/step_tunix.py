"""The update of `step.py` by Tunix's distillation trainer.

Shape suffixes: B rows of a micro-batch, T tokens of a row, R response slots of
a row, D width, V vocabulary.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import qwix
import training
from flax import nnx
from safetensors.numpy import load_file
from tunix.distillation import distillation_trainer, strategies
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.sft import utils

_ADAPTED = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def prepare(folder: Path, samples, rows: int) -> Callable:
  """Loads the model, puts the adapter on it and makes the trainer.

  Args:
    folder: what `training.save_model` wrote.
    samples: the trajectories of an update.
    rows: trajectories of a micro-batch; every one has the same static shape.

  Returns:
    Does an update and returns its loss.
  """
  config = _config(json.loads((folder / "model/config.json").read_text()))
  teacher, student = (
    params.create_model_from_safe_tensors(
      str(folder / "model"), config, dtype=jnp.float32
    )
    for _ in range(2)
  )
  batches = _batches(samples, rows)
  student = qwix.apply_lora_to_model(
    student,
    qwix.LoraProvider(
      module_path=_ADAPTED, rank=training.RANK, alpha=training.ALPHA
    ),
    **student.get_model_input(),
  )
  _set_adapter(student, load_file(folder / "adapter/adapter_model.safetensors"))

  # Its loss is the mean over all slots, padding among them, of micro-batches'
  # means; padded slots have no divergence.
  slots = batches[0]["mask"].size * len(batches)
  factor = slots / sum(len(s.response) for s in samples)
  optimizer = optax.chain(
    optax.scale(factor),
    optax.clip_by_global_norm(training.CLIP),
    optax.adamw(
      training.ADAMW["lr"],
      *training.ADAMW["betas"],
      eps=training.ADAMW["eps"],
      weight_decay=training.ADAMW["decay"],
    ),
  )
  strategy = strategies.LogitStrategy(
    student_forward_fn=_forward("student"),
    teacher_forward_fn=_forward("teacher"),
    labels_fn=lambda batch: jnp.zeros((1, 1, config.vocab_size)),
    temperature=1.0,
    alpha=1.0,
  )
  trainer = _Trainer(
    student_model=student,
    teacher_model=teacher,
    strategy=strategy,
    optimizer=optimizer,
    training_config=distillation_trainer.TrainingConfig(
      eval_every_n_steps=10**9, gradient_accumulation_steps=len(batches)
    ),
  ).with_gen_model_input_fn(lambda x: {"batch": x.input_tokens})
  trainer.is_managed_externally = True
  inputs = [
    distillation_trainer.TrainingInput(input_tokens=batch, input_mask=None)
    for batch in batches
  ]

  def update() -> float:
    trainer.divergences.clear()
    trainer.train(inputs)
    return float(np.mean([float(x) for x in trainer.divergences])) * factor

  return update


class _Trainer(distillation_trainer.DistillationTrainer):
  """Keeps each micro-batch's divergence."""

  def __init__(self, *arguments, **keywords):
    super().__init__(*arguments, **keywords)
    self.divergences: list[Any] = []

  def _post_process_train_step(self, aux):
    super()._post_process_train_step(aux)
    self.divergences.append(aux["distill/kl_div"])


def _config(fields: dict) -> qwen3.ModelConfig:
  rope = fields.get("rope_parameters") or fields
  return qwen3.ModelConfig(
    num_layers=fields["num_hidden_layers"],
    vocab_size=fields["vocab_size"],
    embed_dim=fields["hidden_size"],
    hidden_dim=fields["intermediate_size"],
    num_heads=fields["num_attention_heads"],
    head_dim=fields["head_dim"],
    num_kv_heads=fields["num_key_value_heads"],
    rope_theta=int(rope["rope_theta"]),
    norm_eps=fields["rms_norm_eps"],
    use_tied_embedding=fields["tie_word_embeddings"],
    remat_config=qwen3.RematConfig.DECODER,
  )


def _set_adapter(model, tensors: dict[str, np.ndarray]) -> None:
  """Puts PEFT's matrices into the model's adapter.

  Raises:
    ValueError: one has no place, or a place is left.
  """
  left = dict(tensors)
  for path, variable in nnx.iter_graph(model):
    if not isinstance(variable, nnx.LoRAParam):
      continue
    _, layer, block, linear, leaf = path
    block = {"attn": "self_attn"}.get(block, block)
    part = "A" if leaf.endswith("_a") else "B"
    key = f"base_model.model.model.layers.{layer}.{block}.{linear}"
    matrix = left.pop(f"{key}.lora_{part}.weight").T
    shape = variable.get_value().shape
    variable.set_value(jnp.asarray(matrix.reshape(shape)))
  if left:
    raise ValueError(f"no place for {min(left)}")


def _forward(side: str):
  """Logits of the response slots `[B, R, V]`, 0 in padding."""

  def forward(model, batch):
    ids_BT, valid_BT = batch[f"{side}_ids"], batch[f"{side}_valid"]
    logits_BTV, _ = model(
      ids_BT,
      utils.build_positions_from_mask(valid_BT),
      None,
      utils.make_causal_attn_mask(valid_BT),
    )
    index_BR = batch[f"{side}_index"]
    logits_BRV = jnp.take_along_axis(logits_BTV, index_BR[..., None], axis=1)
    return logits_BRV * batch["mask"][..., None]

  return forward


def _batches(samples, rows: int) -> list[dict[str, np.ndarray]]:
  """Micro-batches of one shape: ids, which are valid, response positions."""
  slots = max(len(s.response) for s in samples)
  widths = {
    side: max(getattr(s, f"{side}_length") for s in samples)
    for side in ("student", "teacher")
  }
  made = []
  for start in range(0, len(samples), rows):
    hand = samples[start : start + rows]
    batch = {"mask": np.zeros((len(hand), slots), np.float32)}
    for side, width in widths.items():
      ids = np.zeros((len(hand), width), np.int32)
      valid = np.zeros(ids.shape, bool)
      index = np.zeros((len(hand), slots), np.int32)
      for row, sample in enumerate(hand):
        prompt = getattr(sample, f"{side}_prompt")
        inputs = np.concatenate([prompt, sample.response[:-1]])
        ids[row, : len(inputs)] = inputs
        valid[row, : len(inputs)] = True
        count = len(sample.response)
        index[row, :count] = len(prompt) - 1 + np.arange(count)
        batch["mask"][row, :count] = 1
      batch |= {
        f"{side}_ids": ids,
        f"{side}_valid": valid,
        f"{side}_index": index,
      }
    made.append(batch)
  return made
