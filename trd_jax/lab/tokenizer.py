"""The laboratory's tokenizer: byte-level BPE of the kind that Qwen3 has.

It splits text by the same kinds of pieces (words with their leading space,
single digits, punctuation, line ends), so that whatever holds for the real
tokenizer holds here: any text can be encoded, control tokens exist once, and
each onset word of the diagnostics is one token with and without a space.
"""

import itertools
import json
from pathlib import Path

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  trainers,
)

from trd_jax.data.chat import ONSET_WORDS
from trd_jax.lab import corpus

_PIECES = Regex(
  r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROLES = ("system", "user", "assistant")
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As in Qwen3: marks of a model's thinking, added but not special.
_MARKS = ("<think>", "</think>")
_TEMPLATE = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message.role + '\\n' + message.content"
  " + '<|im_end|>\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DOCUMENTS = 2000


def build() -> Tokenizer:
  """Trains the tokenizer on the laboratory's own text; always the same."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(_PIECES, "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  documents = corpus.documents(corpus.RECIPES["student"], seed=0)
  texts = [
    f"{user}\n{response}"
    for user, response in itertools.islice(documents, _DOCUMENTS)
  ]
  # Often enough that every one of them ends up as a token of its own.
  texts += [f"{word} {word}" for word in (*ONSET_WORDS, *_ROLES)] * 50
  trainer = trainers.BpeTrainer(
    vocab_size=2048,  # an upper bound: merges run out long before
    min_frequency=20,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in _CONTROL]
  )
  tokenizer.add_tokens(
    [AddedToken(mark, special=False, normalized=False) for mark in _MARKS]
  )
  return tokenizer


def write(folder: Path) -> None:
  """Writes `tokenizer.json` and `tokenizer_config.json` with the template."""
  folder.mkdir(parents=True, exist_ok=True)
  build().save(str(folder / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "bos_token": None,
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
    "chat_template": _TEMPLATE,
  }
  text = json.dumps(config, indent=2)
  (folder / "tokenizer_config.json").write_text(text + "\n")
