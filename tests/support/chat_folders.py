"""Tokenizer folders for tests: the real Qwen3 one, and small ones made here."""

import functools
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.places import SHARED
from trd_jax.data.chat import Chat

QWEN = SHARED / "data/qwen_tokenizer"
HYBRID = QWEN / "chat_template_qwen3.jinja"
INSTRUCT = QWEN / "chat_template_qwen3_instruct_2507.jinja"

needs_qwen = pytest.mark.skipif(
  not QWEN.exists(), reason=f"no real tokenizer at {QWEN}"
)

# Every way in which the paper's models are spoken to: template and switch.
REAL_MODES = [
  ("hybrid", None),
  ("hybrid", True),
  ("hybrid", False),
  ("instruct", None),
  ("instruct", False),
]


@functools.cache
def real_chat(name: str) -> Chat:
  """Qwen3's tokenizer under a template of `REAL_MODES`."""
  return Chat.load(QWEN, {"hybrid": HYBRID, "instruct": INSTRUCT}[name])


def real_ids(chat: Chat, message: str, mode: tuple[str, bool | None]):
  """Qwen3's prompt of one user message, put together by hand."""
  im_start, im_end, think, end_think = 151_644, 151_645, 151_667, 151_668
  user, assistant = chat.encode(f"user\n{message}"), chat.encode("assistant\n")
  line, gap = chat.encode("\n"), chat.encode("\n\n")
  ids = [im_start, *user, im_end, *line, im_start, *assistant]
  if mode == ("hybrid", False):
    ids += [think, *gap, end_think, *gap]
  return ids


CONTROLS = [
  "<|im_start|>",
  "<|im_end|>",
  "<|endoftext|>",
  "<think>",
  "</think>",
]

TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{{ message.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if enable_thinking is defined and not enable_thinking %}"
  "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

_CORPUS = [
  "Start at 3, add 7, times 4, minus 9. Wait, that is wrong. However",
  "Draft: Reference: Rewrite. Solve. the answer is \\boxed{11}\n\n",
  "# Problem # Draft # Reference # Task the the draft draft response\n",
] * 3


def small_tokenizer(merges: int = 60) -> tokenizers.Tokenizer:
  """A byte-level BPE with a few merges and the control tokens added."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=256 + merges,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_CORPUS, trainer)
  tokenizer.add_special_tokens(CONTROLS[:3])
  tokenizer.add_tokens(
    [tokenizers.AddedToken(c, normalized=False) for c in CONTROLS[3:]]
  )
  return tokenizer


def write_folder(
  folder: Path,
  *,
  tokenizer: tokenizers.Tokenizer | None = None,
  template: str | None = TEMPLATE,
  **config,
) -> Path:
  """A model folder's tokenizer files; `config` replaces config entries."""
  folder.mkdir(parents=True, exist_ok=True)
  (tokenizer or small_tokenizer()).save(str(folder / "tokenizer.json"))
  config = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "chat_template": template,
    **config,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder
