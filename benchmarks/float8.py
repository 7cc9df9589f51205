"""How far a teacher in float8 moves the divergence, on this machine's CPUs.

    python benchmarks/float8.py

Scores the same tokens with a teacher in float32, which is taken for exact, in
bfloat16, and with its linear layers in float8 (`train.teacher_dtype=float8`);
the student is in float32 throughout. D is the forward KL of a token.

`demo`: the laboratory's pair on the demo's refined trajectories, in OPSD and in
OPD, before the first update. `random`: a few layers of Qwen3-8B's widths with
random weights, a student that differs by a random adapter, and channels of the
norms that are many times larger than the others, as trained models have them.

`D` is the mean over tokens; `off` by how much of itself that is off; `token`
and `token p99` how far a token is off, the mean and the 99th percentile, over
the mean of D; `gradient` the distance of the gradients with respect to the
student's logits over the exact gradients' norm.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import shapes
import teacher
from flax import nnx

from trd_jax.distill import training_set
from trd_jax.distill.packing.layout import Sample
from trd_jax.experiment import config_file
from trd_jax.experiment.experiment import from_config
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation import chat_model
from trd_jax.model import float8
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.weights import hf, hub

ROWS = 32
LAYERS = 2
# Of random layers: rows, their tokens, and rows of the head.
RANDOM = (4, 64, 8192)
OUTLIERS = (1, 100)

# Hidden states `[R, D]` of tokens, and the head `[V, D]`.
Side = tuple[np.ndarray, jax.Array]


class Tokens(NamedTuple):
  """What one distribution a token was computed of.

  Attributes:
    divergence: nats a token, float64.
    gradient: squares of the gradient's error and of the exact gradient.
  """

  divergence: np.ndarray
  gradient: tuple[float, float]


def teachers(made: Qwen3) -> dict[str, Qwen3]:
  """Returns a float32 model in each of the dtypes that are compared."""
  config = made.config

  def cast(dtype) -> Qwen3:
    graph = nnx.graphdef(
      jax.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    state = nnx.to_pure_dict(nnx.state(made))
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))

  def rounded(one: Qwen3, dtype) -> Qwen3:
    graph = nnx.graphdef(float8.abstract(config, dtype))
    return nnx.merge(graph, float8.of_tree(nnx.to_pure_dict(nnx.state(one))))

  half = cast("bfloat16")
  return {
    "float32": made,
    "bfloat16": half,
    "float8, rest float32": rounded(made, "float32"),
    "float8, rest bfloat16": rounded(half, "bfloat16"),
  }


@jax.jit
def _hidden(model: Qwen3, tokens_BT, length_B) -> jax.Array:
  position_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
  return model(tokens_BT, position_BT, segment_BT)


def _rows(
  model: Qwen3, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> np.ndarray:
  """Returns hidden states `[R, D]` that predict all responses' tokens."""
  longest = max(map(len, map(np.append, prompts, responses)))
  found = []
  for start in range(0, len(prompts), ROWS):
    chosen = slice(start, start + ROWS)
    tokens_BT = np.zeros((ROWS, longest), np.int32)
    length_B = np.zeros(ROWS, np.int32)
    both = list(zip(prompts[chosen], responses[chosen], strict=True))
    for row, (prompt, response) in enumerate(both):
      length_B[row] = len(prompt) + len(response)
      tokens_BT[row, : length_B[row]] = np.append(prompt, response)
    hidden_BTD = np.asarray(
      _hidden(model, tokens_BT, length_B).astype(jnp.float32)
    )
    for row, (prompt, _) in enumerate(both):
      found.append(hidden_BTD[row, len(prompt) - 1 : length_B[row] - 1])
  return np.concatenate(found)


@jax.jit
def _compared(student_RV, exact_RV, other_RV):
  q, p, other = (
    jax.nn.log_softmax(x) for x in (student_RV, exact_RV, other_RV)
  )
  divergence_R = (jnp.exp(other) * (other - q)).sum(-1)
  # The gradient of the forward KL is q - p.
  off = ((jnp.exp(other) - jnp.exp(p)) ** 2).sum()
  return divergence_R, off, ((jnp.exp(q) - jnp.exp(p)) ** 2).sum()


def compare(student: Side, exact: Side, other: Side) -> Tokens:
  """Scores tokens under a student and one of the teachers.

  Args:
    student: hidden states `[R, D]`, and the head `[V, D]`.
    exact: of the teacher in float32.
    other: of the teacher that is on trial.
  """
  rows = min(len(head) for _, head in (student, exact, other))
  found, off, whole = [], 0.0, 0.0
  for start in range(0, len(student[0]), 4096):
    logits = (
      hidden[start : start + 4096] @ head[:rows].astype(jnp.float32).T
      for hidden, head in (student, exact, other)
    )
    one, more, all_ = _compared(*logits)
    found.append(np.float64(one))
    off, whole = off + float(more), whole + float(all_)
  return Tokens(np.concatenate(found), (off, whole))


def table_of(
  name: str,
  student: Side,
  sides: Iterator[tuple[str, Side]],
) -> list[list[str]]:
  """Returns a row for each teacher but the first, which is exact."""
  _, exact = next(sides)
  wanted = compare(student, exact, exact).divergence
  mean = wanted.mean()
  rows = []
  for dtype, other in sides:
    got = compare(student, exact, other)
    apart = np.abs(got.divergence - wanted) / mean
    off, whole = got.gradient
    rows.append(
      [
        name,
        f"{len(wanted):,}",
        dtype,
        f"{got.divergence.mean():.4f}",
        f"{got.divergence.mean() / mean - 1:+.2%}",
        f"{apart.mean():.2%}",
        f"{np.percentile(apart, 99):.2%}",
        f"{(off / whole) ** 0.5:.2%}",
      ]
    )
  return rows


def demo(regime: str, workdir: Path) -> list[list[str]]:
  """Compares teachers on the demo's trajectories, which are made if need be."""
  for stage in ("rollout", "refine"):
    if RunDir(workdir).done(stage) is None:
      teacher.stage(stage, regime, workdir)
  run_dir = RunDir(workdir)
  experiment = from_config(*config_file.load(str(run_dir.config)))
  sections = experiment.student, experiment.teacher_model
  chats = [chat_model.open_chat(section, run_dir) for section in sections]
  samples: list[Sample] = training_set.build(
    experiment, run_dir, *chats
  ).samples
  student, scorer = (
    hf.load(hub.model_folder(section.path, run_dir), dtype="float32")
    for section in sections
  )
  responses = [sample.response for sample in samples]
  prompts = [sample.student_prompt for sample in samples]
  learns = _rows(student, prompts, responses), student.head_VD
  prompts = [sample.teacher_prompt for sample in samples]
  sides = (
    (name, (_rows(model, prompts, responses), model.head_VD))
    for name, model in teachers(scorer).items()
  )
  return table_of(f"demo, {regime.upper()}", learns, sides)


def random_layers(outlier: float, seed: int = 0) -> list[list[str]]:
  """Compares teachers of Qwen3-8B's widths with random weights.

  Args:
    outlier: how many times larger eight channels of each norm are.
    seed: of weights and tokens.
  """
  count, length, vocab = RANDOM
  config = dataclasses.replace(
    shapes.MODELS["8b"], num_layers=LAYERS, vocab_size=vocab
  )
  adapted = Qwen3(config, lora=LoraConfig(), rngs=nnx.Rngs(seed))
  rng = np.random.default_rng(seed)
  graph, lora, base = nnx.split(adapted, nnx.LoRAParam, ...)
  base = nnx.to_pure_dict(base)
  width = config.hidden_size
  channels = rng.choice(width, 8, replace=False)
  scale = np.exp(0.3 * rng.standard_normal(width)).astype(np.float32)
  scale[channels] *= outlier
  for name in ("input_norm", "post_norm"):
    base["layers"][name]["scale"] = jnp.tile(scale, (LAYERS, 1))
  # Logits of a few nats, as those of trained models.
  base["norm"]["scale"] = jnp.full(width, 2.5)
  lora = jax.tree.map(
    lambda x: 0.01 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
    nnx.to_pure_dict(lora),
  )
  tokens_BT = rng.integers(0, vocab, (count, length)).astype(np.int32)
  length_B = np.full(count, length, np.int32)

  def rows(model):
    hidden = _hidden(model, tokens_BT, length_B).astype(jnp.float32)
    return np.asarray(hidden).reshape(-1, width)

  student = nnx.merge(graph, lora, base)
  bare = nnx.graphdef(jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
  made = nnx.merge(bare, base)
  sides = (
    (name, (rows(model), model.head_VD))
    for name, model in teachers(made).items()
  )
  name = f"{LAYERS} random layers of the 8B's widths, channels x{outlier:g}"
  return table_of(name, (rows(student), student.head_VD), sides)


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/float8"))
  parser.add_argument(
    "--only", choices=("demo", "random"), help="one of the two parts"
  )
  args = parser.parse_args()
  head = ["", "tokens", "teacher", "D", "off", "token", "token p99", "gradient"]
  rows = [head, ["---"] * len(head)]
  if args.only != "random":
    for regime in ("opsd", "opd"):
      rows += demo(regime, args.workdir / regime)
  if args.only != "demo":
    for outlier in OUTLIERS:
      rows += random_layers(outlier)
  for row in rows:
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
  main()
