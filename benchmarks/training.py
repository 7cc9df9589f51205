"""What the benchmarks of training share: trajectories, a model, a distiller.

The lengths are those of the paper's TRD on Qwen3-8B, divided by a scale: its
medians of y_o (7.7K tokens), y_r (0.88K) and y* (0.49K), with prompts of 200
tokens and 150 of instructions around the draft. The paper gives no spread; here
lengths are log-normal with sigma 0.6, cut at the budget of 16,384 tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEDIANS = {"prompt": 200, "draft": 7700, "reference": 490, "response": 880}
INSTRUCTIONS = 150
LONGEST = 16_384
SIGMA = 0.6
RANK, ALPHA = 16, 32.0
# As in the paper, but for a rate that shows in a few updates.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.005}
CLIP = 1.0
ONSETS = tuple(range(40))


def make_samples(count: int, scale: int, vocab: int) -> list:
  """Trajectories of random ids with the paper's lengths over `scale`."""
  from trd_jax.distill.packing.layout import Sample

  rng = np.random.default_rng(0)

  def ids(median):
    length = np.exp(np.log(median) + SIGMA * rng.standard_normal())
    size = max(2, round(min(length, LONGEST) / scale))
    return rng.integers(0, vocab, size).astype(np.int32)

  samples = []
  for number in range(count):
    parts = {name: ids(median) for name, median in MEDIANS.items()}
    around = rng.integers(0, vocab, max(1, INSTRUCTIONS // scale))
    teacher = [parts["prompt"], parts["draft"], parts["reference"], around]
    samples.append(
      Sample(
        key=str(number),
        student_prompt=parts["prompt"],
        teacher_prompt=np.concatenate(teacher).astype(np.int32),
        response=parts["response"],
        correct=None,
      )
    )
  return samples


def save_samples(samples: Sequence, path: Path) -> None:
  """Writes trajectories as one .npz."""
  names = ("student_prompt", "teacher_prompt", "response")
  np.savez(
    path,
    **{f"{s.key}/{name}": getattr(s, name) for s in samples for name in names},
  )


def load_samples(path: Path) -> list:
  """What `save_samples` wrote."""
  from trd_jax.distill.packing.layout import Sample

  fields: dict[str, dict[str, Any]] = {}
  with np.load(path) as file:
    for name, array in file.items():
      key, _, field = name.partition("/")
      fields.setdefault(key, {})[field] = array
  return [Sample(key=key, correct=None, **x) for key, x in fields.items()]


def lengths(samples: Sequence) -> dict[str, list[int]]:
  """Shortest, median and longest of each side and of the responses."""
  sides = {
    "student": [s.student_length for s in samples],
    "teacher": [s.teacher_length for s in samples],
    "response": [len(s.response) for s in samples],
  }
  return {
    side: [min(x), int(np.median(x)), max(x)] for side, x in sides.items()
  }


def tokens(samples: Sequence) -> int:
  """Tokens of both sides that are no padding."""
  return sum(s.student_length + s.teacher_length for s in samples)


def save_model(folder: Path, sizes: dict) -> None:
  """Writes a random Qwen3 as a Hugging Face folder and an adapter in PEFT's.

  Args:
    folder: gets `model` and `adapter`.
    sizes: of `ModelConfig`.
  """
  from flax import nnx

  from trd_jax.model.config import ModelConfig
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.qwen3 import Qwen3
  from trd_jax.model.weights import adapters, hf

  config, lora = ModelConfig(**sizes), LoraConfig(RANK, ALPHA, 0.0)
  model = Qwen3(config, lora=lora, rngs=nnx.Rngs(0))
  _, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
  # An adapter that is some way from its start: both its factors learn.
  rng = np.random.default_rng(0)
  scattered = nnx.map_state(
    lambda _, x: np.asarray(
      x[...] + 0.02 * rng.standard_normal(x.shape), np.float32
    ),
    adapter,
  )
  hf.save_hf(config, nnx.to_pure_dict(base), folder / "model")
  adapters.save_peft(
    nnx.to_pure_dict(scattered), lora, folder / "adapter", base="random"
  )


class Run:
  """Our distiller on a saved model, ready for updates.

  Args:
    folder: what `save_model` wrote.
    buffer_slots: of the teacher's buffer.
    remat: what the student's backward pass keeps.
  """

  def __init__(self, folder: Path, buffer_slots: int, remat: Any = "full"):
    import jax
    import optax
    from flax import nnx

    from trd_jax.distill.distiller import Distiller
    from trd_jax.distill.loss import objective
    from trd_jax.distill.step import Setup
    from trd_jax.distill.teacher.source import hidden_slot
    from trd_jax.model import sharding
    from trd_jax.model.qwen3 import Qwen3
    from trd_jax.model.weights import adapters, hf

    config = hf.read_config(folder / "model")
    lora, tree = adapters.load_peft(folder / "adapter", config)
    mesh = sharding.make_mesh(1, 1, 1)
    model = hf.load(folder / "model", dtype="float32", mesh=mesh, lora=lora)
    graph, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    places = nnx.to_pure_dict(sharding.shardings(adapter, mesh))
    adapter = jax.device_put(tree, places)
    base = nnx.to_pure_dict(base)
    bare = jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
    setup = Setup(
      student=graph,
      teacher=nnx.graphdef(bare),
      loss=objective.slot_loss(objective.Objective(), ONSETS),
      optimizer=optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
          ADAMW["lr"],
          *ADAMW["betas"],
          eps=ADAMW["eps"],
          weight_decay=ADAMW["decay"],
        ),
      ),
      schedule=lambda step: step * 0.0 + ADAMW["lr"],
      mesh=mesh,
      remat=remat,
      dropout=False,
    )
    slot = hidden_slot(config.hidden_size, "float32")
    self._distiller = Distiller(setup, adapter, base, base, buffer_slots, slot)
    self._state = self._distiller.init(adapter, seed=0)

  def update(self, batches: Sequence) -> float:
    """One update, waited for; returns its loss."""
    import jax

    from trd_jax.distill.loss import metrics as loss_metrics

    self._state, metrics = self._distiller.update(self._state, batches)
    return loss_metrics.finish(jax.device_get(metrics))["loss"]
