"""Randomly initialised models, to try a path without weights: random:<size>.

Such a model knows nothing. It has the real tokenizer, the real template and
the real vocabulary, so that every stage does on it what it does on Qwen3.
"""

import dataclasses
from pathlib import Path

from flax import nnx

from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.model.known import QWEN3_VOCABULARY, SIZES
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.weights.hf import save_hf


def random_folder(
  size: str,
  out: Path | str,
  tokenizer_folder: Path | str,
  chat_template: Path | str | None = None,
  seed: int = 0,
  vocab_size: int = QWEN3_VOCABULARY,
) -> None:
  """Writes a Hugging Face folder with random bfloat16 weights.

  Args:
    size: a name of `SIZES`.
    out: the folder to write; it appears whole or not at all.
    tokenizer_folder: its tokenizer files are copied.
    chat_template: a jinja file in the place of the folder's own template.
    seed: of the weights.
    vocab_size: rows of the embedding, at least the tokenizer's ids.

  Raises:
    UserError: the size is unknown, the tokenizer can't be read, or it has
      more ids than the embedding has rows.
  """
  if size not in SIZES:
    raise UserError(
      f"there is no random model of size {size!r};"
      f" {did_you_mean(size, SIZES) or 'sizes: ' + ', '.join(SIZES)}"
    )
  chat = Chat.load(tokenizer_folder, chat_template)
  if chat.vocab_size > vocab_size:
    raise UserError(
      f"{tokenizer_folder}: the tokenizer has ids up to {chat.vocab_size - 1}"
      f" and the model {vocab_size} rows; ask for more rows"
    )
  config = dataclasses.replace(SIZES[size], vocab_size=vocab_size)
  model = Qwen3(config, rngs=nnx.Rngs(seed))
  save_hf(
    config,
    nnx.to_pure_dict(nnx.state(model)),
    out,
    tokenizer_from=tokenizer_folder,
    chat_template=chat_template,
    special_ids={
      "eos_token_id": list(chat.stop_ids),
      "pad_token_id": chat.pad_id,
    },
  )
