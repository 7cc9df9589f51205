"""Makes the laboratory's models: `python -m trd_jax.lab.pretrain`.

Trains a small Qwen3 from scratch on the documents of `problems.corpus`: next-
token cross-entropy on the responses, packed rows, Muon for the stacked kernels
and Adam for the rest. The package ships what this made; run it again to get
another world (another modulus, other habits) under the same pipeline.

Shape key: B rows, T tokens a row.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.model.config import ModelConfig

ROW_TOKENS = 384
ROWS = 11

# About 1M and 3M parameters; the vocabulary's size is the tokenizer's.
_STUDENT = ModelConfig(
  vocab_size=0,
  hidden_size=128,
  intermediate_size=448,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_positions=1024,
  rope_theta=10_000.0,
  tie_embeddings=True,
)
SIZES = {
  "student": _STUDENT,
  "teacher": dataclasses.replace(
    _STUDENT,
    hidden_size=192,
    intermediate_size=640,
    num_layers=6,
    num_heads=6,
  ),
}

FLAGS = (
  cli.Flag("model", "student", "which model to make: student or teacher"),
  cli.Flag(
    "out",
    None,
    "the folder to write; one that trd-jax has written is replaced; absent:"
    " lab/<model> beside you",
    is_path=True,
  ),
  cli.Flag("steps", 1000, "optimizer steps of about 4,000 tokens"),
  cli.Flag("peak", 0.02, "peak learning rate of Muon"),
  cli.Flag("seed", 0, "seed of the initial weights and the documents"),
)


def packed_rows(encode, recipe, seed: int) -> Iterator[tuple]:
  """Yields endless batches of packed documents.

  Args:
    encode: a document's `(user, response)` to prompt ids and response ids.
    recipe: which documents (`corpus.Recipe`).
    seed: seed of the documents.

  Yields:
    int32 `tokens_BT`, `position_BT`, `segment_BT` and `label_BT`; a label is
    the next token where that belongs to a response, else -1.
  """
  import numpy as np

  from trd_jax.lab import corpus

  documents = corpus.documents(recipe, seed)
  waiting: list[tuple[list[int], list[int]]] = []
  while True:
    rows: list[list] = [[] for _ in range(ROWS)]
    room = [ROW_TOKENS] * ROWS

    def place(document, rows=rows, room=room):
      length = len(document[0]) + len(document[1])
      for row, left in enumerate(room):
        if length <= left:
          rows[row].append(document)
          room[row] -= length
          return True
      return False

    # First fit, with up to a batch's rows of documents waiting: those that fit
    # nowhere come first in the next batch, so that long ones are not lost.
    waiting = [document for document in waiting if not place(document)]
    while len(waiting) < ROWS:
      document = encode(*next(documents))
      if not place(document):
        waiting.append(document)
    tokens = np.zeros((ROWS, ROW_TOKENS), np.int32)
    position, segment = np.zeros_like(tokens), np.zeros_like(tokens)
    label = np.full_like(tokens, -1)
    for row, held in enumerate(rows):
      start = 0
      for number, (prompt, response) in enumerate(held, 1):
        ids = prompt + response
        stop = start + len(ids)
        tokens[row, start:stop] = ids
        position[row, start:stop] = np.arange(len(ids))
        segment[row, start:stop] = number
        # Shifted by one: the last token of the prompt predicts the first of the
        # response, and nothing predicts across documents.
        label[row, start + len(prompt) - 1 : stop - 1] = response
        start = stop
    yield tokens, position, segment, label


def run(experiment, run_dir, flags) -> None:
  """Trains one model and writes its Hugging Face folder.

  Raises:
    UserError: an unknown model, or a folder that can't be written or holds
      what would be lost.
  """
  del experiment, run_dir
  if flags.model not in SIZES:
    raise UserError(
      f"--model={flags.model} is neither student nor teacher;"
      f" {did_you_mean(flags.model, SIZES)}"
    )
  from trd_jax.model.weights.model_folder import check_replaceable

  out = Path(flags.out or Path("lab") / flags.model)
  check_replaceable(out, f"--out={out}")
  import tempfile

  from trd_jax.model import backend

  with (
    tempfile.TemporaryDirectory() as files,
    backend.enough_memory("give the same command with JAX_PLATFORMS=cpu"),
  ):
    _pretrain(flags, out, Path(files))


def _pretrain(flags, out: Path, files: Path) -> None:
  """Trains a model from scratch.

  Args:
    flags: the stage's.
    out: the folder to write.
    files: an empty folder, for the tokenizer's files.
  """
  import functools
  import json

  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from flax import nnx
  from optax.contrib import MuonDimensionNumbers, muon

  from trd_jax.data.chat import Chat
  from trd_jax.experiment.progress import Progress
  from trd_jax.lab import corpus, tokenizer
  from trd_jax.model import backend
  from trd_jax.model.qwen3 import Qwen3, logits
  from trd_jax.model.weights import hf

  backend.exact_products(backend.start(), ["float32"])

  # 1. The tokenizer, and documents as ids.
  tokenizer.write(files)
  chat = Chat.load(files)
  special = {"eos_token_id": chat.stop_ids[0], "pad_token_id": chat.pad_id}
  for name in ("config.json", "generation_config.json"):
    (files / name).write_text(json.dumps(special) + "\n")

  def encode(user: str, response: str) -> tuple[list[int], list[int]]:
    return chat.render(user, None), [*chat.encode(response), chat.stop_ids[0]]

  # 2. The model.
  config = dataclasses.replace(
    SIZES[flags.model], vocab_size=-(-chat.vocab_size // 32) * 32
  )
  model = Qwen3(config, rngs=nnx.Rngs(flags.seed))
  graph, state = nnx.split(model)
  params = nnx.to_pure_dict(state)
  print(f"{flags.model}: {config.num_parameters():,} parameters", flush=True)

  # 3. Muon on the kernels, layer by layer of the stack; Adam elsewhere.
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, flags.peak, flags.steps // 10, flags.steps, flags.peak / 50
  )

  def dimensions(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: (
        MuonDimensionNumbers(1, 2) if path[-1].key == "kernel" else None
      ),
      tree,
    )

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    muon(
      schedule,
      adam_learning_rate=lambda count: 0.3 * schedule(count),
      muon_weight_dimension_numbers=dimensions,
      weight_decay=0.0,
      consistent_rms=0.2,
    ),
  )

  def loss_of(params, batch):
    tokens, position, segment, label = batch
    tree = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(tree, params)
    network = nnx.merge(graph, tree)
    hidden = network(tokens, position, segment)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits(hidden, network.head_VD), jnp.maximum(label, 0)
    )
    counts = label >= 0
    return jnp.sum(losses * counts) / jnp.sum(counts)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, moments, batch):
    loss, gradient = jax.value_and_grad(loss_of)(params, batch)
    change, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, change), moments, loss

  # 4. Training.
  batches = packed_rows(encode, corpus.RECIPES[flags.model], flags.seed)
  moments = optimizer.init(params)
  recent: list = []
  with Progress(flags.steps, f"pretrain {flags.model}", "steps") as progress:
    for step in range(flags.steps):
      params, moments, loss = update(params, moments, next(batches))
      # Kept on the device: a float() at each step would wait for it.
      recent = [*recent[-49:], loss]
      progress.update(1)
      if step % 50 == 49:
        mean = np.mean([float(x) for x in recent])
        print(f"step {step + 1}: cross-entropy {mean:.4f} nats", flush=True)

  # 5. The folder that every other stage reads.
  hf.save_hf(config, params, out, tokenizer_from=files, dtype="bfloat16")
  print(f"written: {out}")


if __name__ == "__main__":
  cli.main(
    "lab.pretrain",
    run,
    "trains one of the laboratory's two models from scratch",
    FLAGS,
    standalone=True,
    examples=("--model=student --steps=800 --out=lab/student",),
  )
