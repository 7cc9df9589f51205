"""The tokenizer and the chat template: text in, prompt ids out.

A model folder's `tokenizer.json` is read with the `tokenizers` library and its
chat template is rendered with a sandboxed jinja2; `transformers` is left out
because every stage pays for this import. For text without control marks the
ids are those of `transformers.apply_chat_template`, token for token.

What a message says can never become a control token. The template is rendered
around placeholders for the user's text and the system prompt, the result is
split at the template's own control tokens, and the text between them, messages
included, is encoded by a tokenizer that knows the base vocabulary only. A draft
that quotes `<think>` or `<|im_end|>` is therefore plain letters to the model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from trd_jax.data import bounded_jinja, chat_language
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import json_fields
from trd_jax.experiment.files.json_files import read_object

_ONSETS = (
  "Wait Actually However Alternatively Oops Wrong Error Incorrect Correction "
  "Sorry Hmm Oh Hold Pause Uh Um"
)
ONSET_WORDS = tuple(_ONSETS.split())
"""Words that open a doubt (Appendix C.5); see `Chat.onset_ids`."""

# Stand for the texts while the template runs; plain letters, so that no filter
# of a template changes them.
_PLACEHOLDER = "qqUserTextGoesHereqq"
_SYSTEM = "qqSystemTextGoesHereqq"
_PROBE = "Probe: 1 + 2 = 3,\nthen stop."
_MOST_FRAMES = 64  # that a chat keeps

# What tokenizer_config.json and generation_config.json may hold.
_SPECIAL: Mapping[str, json_fields.Kind] = dict.fromkeys(
  ("bos_token", "eos_token", "pad_token", "unk_token"),
  json_fields.either(json_fields.TEXT, json_fields.object_of("content")),
)
_STOP_IDS = json_fields.either(
  json_fields.ID, json_fields.list_of(json_fields.ID, "a list of ids")
)


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Prompt ids and where each came from in the user's text.

  Attributes:
    ids: the prompt, generation prompt included.
    offsets: for each id the half-open character range of the user's text that
      it covers, or None where any of it comes from the template.
  """

  ids: list[int]
  offsets: list[tuple[int, int] | None]


class _Piece(NamedTuple):
  """Part of a prompt: plain text, or the ids of a control token.

  Attributes:
    text: is encoded with the base vocabulary; '' beside `ids`.
    core_at: where the user's text begins in it, or None.
    ids: the control token's, else nothing.
  """

  text: str
  core_at: int | None
  ids: tuple[int, ...] = ()


class _Frame(NamedTuple):
  """What stands around any user text without a space at its ends.

  Attributes:
    head: the ids before the piece that the text is in.
    left: how this piece begins.
    right: how this piece ends.
    tail: the ids after it.
  """

  head: _Piece
  left: str
  right: str
  tail: _Piece


class Chat:
  """One model's tokenizer, chat template, stop ids and thinking modes."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    *,
    name: str,
    special: dict[str, str],
    stop_ids: Sequence[int],
    pad_id: int,
    digest: str = "",
    template_name: str | None = None,
  ):
    """Prefer `Chat.load`.

    Args:
      tokenizer: with its added tokens.
      template: jinja source of the chat template.
      name: how messages refer to this chat.
      special: variables such as `eos_token` that templates may read.
      stop_ids: ids that end a response.
      pad_id: an id to fill up with; masks never depend on it.
      digest: hash of the tokenizer's file, a short cut for `same_ids`.
      template_name: how messages refer to the template; None: by `name`.

    Raises:
      UserError: the template is broken, has no place for a user message, or
        the tokenizer can't keep user text and control tokens apart.
    """
    self.name = name
    self.stop_ids = tuple(stop_ids)
    self.pad_id = pad_id
    self._tokenizer = tokenizer
    self._digest = digest
    self._special = special
    added = tokenizer.get_added_tokens_decoder()
    unknown = getattr(tokenizer.model, "unk_token", None)
    self.control_ids = frozenset(
      i for i, token in added.items() if token.content != unknown
    )
    self._controls = {t.content: (i, t) for i, t in added.items()}
    longest_first = sorted(self._controls, key=len, reverse=True)
    self._control_pattern = re.compile(
      "|".join(map(re.escape, longest_first)) or r"(?!)"
    )
    self._plain = tokenizers.Tokenizer(tokenizer.model)  # shares the model
    if tokenizer.normalizer is not None:
      self._plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
      self._plain.pre_tokenizer = tokenizer.pre_tokenizer
    where = template_name or name
    self._template, variables = chat_language.compile_template(
      template,
      where,
      [
        self._variables("", "", thinking, system)
        for thinking in (None, False, True)
        for system in (False, True)
      ],
    )
    self._template_name = where
    self._frames: dict[tuple[bool | None, str | None], _Frame] = {}
    self._tails: dict[bool | None, str] = {}
    self.supports_thinking = "enable_thinking" in variables
    self._check()

  @classmethod
  def load(cls, folder: str | Path, template: str | Path | None = None) -> Chat:
    """Reads a model folder's tokenizer.

    Args:
      folder: holds `tokenizer.json` and `tokenizer_config.json`, perhaps
        `generation_config.json` (its `eos_token_id` gives the stop ids) and
        `chat_template.jinja` (which wins over the config's own template).
      template: a jinja file, or a shipped template's name, to use instead of
        the folder's template.

    Raises:
      UserError: a file is missing or unreadable, or names no template or no
        end token.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    try:
      content = path.read_bytes()
      tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
      raise UserError(
        f"{path}: can't be read ({error.strerror}); a model folder needs the "
        "Hugging Face files tokenizer.json and tokenizer_config.json"
      ) from error
    except Exception as error:  # the library raises bare Exception
      raise UserError(
        f"{path}: not a tokenizer ({one_line(error)}); fetch the file again"
      ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    json_fields.check(config, _SPECIAL, str(path))
    path = folder / "generation_config.json"
    generation = read_object(path) if path.exists() else {}
    json_fields.check(generation, {"eos_token_id": _STOP_IDS}, str(path))
    special = _special_tokens(config)

    def to_id(key: str) -> int | None:
      if key not in special:
        return None
      found = tokenizer.token_to_id(special[key])
      if found is None:
        raise UserError(
          f"{folder / 'tokenizer_config.json'}: {key} {special[key]!r} is not "
          "in tokenizer.json; the two files belong to different tokenizers"
        )
      return found

    eos = generation.get("eos_token_id")
    stop_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    stop_ids = stop_ids or [i for i in [to_id("eos_token")] if i is not None]
    if not stop_ids:
      raise UserError(
        f"{folder}: no end token; set eos_token in tokenizer_config.json or "
        "eos_token_id in generation_config.json"
      )
    for i in stop_ids:
      if tokenizer.id_to_token(i) is None:
        raise UserError(
          f"{folder / 'generation_config.json'}: eos_token_id {i!r} is not an "
          "id of tokenizer.json; the two files belong to different models"
        )
    pad_id = to_id("pad_token")
    text, file = chat_language.find_template(folder, config, template)
    return cls(
      tokenizer,
      text,
      name=str(folder),
      special=special,
      stop_ids=stop_ids,
      pad_id=stop_ids[0] if pad_id is None else pad_id,
      digest=hashlib.sha256(content).hexdigest(),
      template_name=str(file),
    )

  def render(
    self, user_text: str, thinking: bool | None, system: str | None = None
  ) -> list[int]:
    """Returns a user message's prompt ids, generation prompt included.

    Args:
      user_text: any text; its control marks stay plain text.
      thinking: True or False passes `enable_thinking`; None leaves the
        template's default.
      system: the text of a system turn before it, without white space at its
        ends; its control marks stay plain text, too. None: there is no such
        turn but what the template puts there itself.

    Raises:
      UserError: the template has no such mode, or no system turn.
    """
    return self.render_with_offsets(user_text, thinking, system).ids

  def render_many(
    self,
    user_texts: Iterable[str],
    thinking: bool | None,
    systems: Iterable[str | None] | None = None,
    begun: str = "",
  ) -> list[list[int]]:
    """Renders each text like `render`, encoded on all cores at once.

    Args:
      user_texts: the messages.
      thinking: as in `render`.
      systems: the system prompt of each; None: there is none.
      begun: how all responses begin: the prompts end with it, as plain text,
        and the model goes on from there.
    """
    # Zipped in this order: the texts say how many there are.
    pairs = zip(
      user_texts,
      itertools.repeat(None) if systems is None else systems,
      strict=False,
    )
    prompts = [
      self._pieces(text, thinking, system, begun) for text, system in pairs
    ]
    plain = [p.text for pieces in prompts for p in pieces if p.text]
    encoded = iter(
      self._plain.encode_batch_fast(plain, add_special_tokens=False)
    )
    return [
      [i for p in pieces for i in (next(encoded).ids if p.text else p.ids)]
      for pieces in prompts
    ]

  def render_with_offsets(
    self, user_text: str, thinking: bool | None, system: str | None = None
  ) -> Rendered:
    """Renders like `render`, and says which characters each id covers."""
    lead = len(user_text) - len(user_text.lstrip())
    size = len(user_text.strip())
    ids: list[int] = []
    offsets: list[tuple[int, int] | None] = []
    for piece in self._pieces(user_text, thinking, system):
      ids.extend(piece.ids)
      offsets.extend([None] * len(piece.ids))
      encoding = self._plain.encode(piece.text, add_special_tokens=False)
      ids.extend(encoding.ids)
      for a, b in encoding.offsets:
        if piece.core_at is None:
          offsets.append(None)
          continue
        a, b = a - piece.core_at, b - piece.core_at
        inside = a >= 0 and b <= size
        offsets.append((a + lead, b + lead) if inside else None)
    return Rendered(ids, offsets)

  def check_system(self) -> None:
    """Checks that the template has a system turn.

    Raises:
      UserError: it has none, or a prompt with one can't be split.
    """
    before, between, after = self._around("", "", None, system=True)
    whole = before + _PROBE + between + _PROBE + after
    self._check_split(whole, None, _PROBE)

  def _pieces(
    self,
    user_text: str,
    thinking: bool | None,
    system: str | None,
    begun: str = "",
  ) -> list[_Piece]:
    """Splits a prompt at the template's control tokens."""
    # White space stays outside the placeholder: a template that trims a
    # message trims it here too.
    core = user_text.strip()
    lead = user_text[: len(user_text) - len(user_text.lstrip())]
    trail = user_text[len(lead) + len(core) :]
    if lead or trail or not core or begun:
      *pieces, last = self._split(lead, core, trail, thinking, system)
      # With the template's last words before it: a token may reach over both.
      return [*pieces, last._replace(text=last.text + begun)]
    head, left, right, tail = self._frame(thinking, system)
    return [head, _Piece(left + core + right, len(left)), tail]

  def _frame(self, thinking: bool | None, system: str | None) -> _Frame:
    """Returns the frame in a mode and after a system prompt.

    What the template says is split and encoded but once, and so is a system
    prompt that many messages have.
    """
    key = thinking, system
    if key not in self._frames:
      if len(self._frames) >= _MOST_FRAMES:
        self._frames.clear()
      self._frames[key] = self._made_frame(thinking, system)
    return self._frames[key]

  def _made_frame(self, thinking: bool | None, system: str | None) -> _Frame:
    pieces = self._split("", _PLACEHOLDER, "", thinking, system)
    (at,) = (n for n, p in enumerate(pieces) if p.core_at is not None)
    text, start = pieces[at].text, pieces[at].core_at or 0
    head, tail = (
      _Piece("", None, tuple(i for p in some for i in self._ids(p)))
      for some in (pieces[:at], pieces[at + 1 :])
    )
    end = start + len(_PLACEHOLDER)
    return _Frame(head, text[:start], text[end:], tail)

  def _ids(self, piece: _Piece) -> Sequence[int]:
    return self.encode(piece.text) if piece.text else piece.ids

  def _split(
    self,
    lead: str,
    core: str,
    trail: str,
    thinking: bool | None,
    system: str | None,
  ) -> list[_Piece]:
    """Returns `_pieces` of a text and the white space on its sides."""
    parts = self._around(lead, trail, thinking, system is not None)
    # What follows each part of the template: nothing follows the last.
    follows = [core, ""] if system is None else [system, core, ""]
    pieces: list[_Piece] = []
    strip_left = False  # a control token with rstrip eats what follows it
    text, core_at = "", None

    def flush(strip_right: bool) -> None:
      nonlocal text, core_at
      start = len(text) - len(text.lstrip()) if strip_left else 0
      end = len(text.rstrip()) if strip_right else len(text)
      at = None if core_at is None else core_at - start
      pieces.append(_Piece(text[start:end], at))
      text, core_at = "", None

    for number, (part, told) in enumerate(zip(parts, follows, strict=True)):
      at = 0
      for match in self._control_pattern.finditer(part):
        text += part[at : match.start()]
        i, token = self._controls[match.group()]
        flush(token.lstrip)
        pieces.append(_Piece("", None, (i,)))
        strip_left = token.rstrip
        at = match.end()
      text += part[at:]
      if number == len(parts) - 2:
        core_at = len(text)
      text += told
    flush(False)
    return pieces

  def control_marks(self, text: str) -> set[str]:
    """Returns the control tokens that are spelt out in a text.

    In a user message they are plain text (see the module's head); a reader of
    the prompt sees no difference.
    """
    found = set(self._control_pattern.findall(text))
    return {
      mark for mark in found if self._controls[mark][0] in self.control_ids
    }

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text` as plain text: never a control id."""
    return self._plain.encode(text, add_special_tokens=False).ids

  def plain_message(
    self,
    prompt_ids: Sequence[int],
    thinking: bool | None,
    then: str = "",
    before: str = "",
    system: str | None = None,
  ) -> list[int]:
    """Returns the ids of a prompt's message, without the template around it.

    They are those of `encode(before + message + then)`, but with nothing before
    it only the message's first and last lines are encoded for it: a refinement
    prompt has up to 20,000 tokens, and there are 40,000 of them.

    Args:
      prompt_ids: of `render`; the message may have lost its middle since.
      thinking: the mode in which it was rendered.
      then: text behind the message.
      before: text before it.
      system: the system prompt that it was rendered with, which is no part of
        the message.

    Raises:
      UserError: the ids are no prompt of this template in this mode.
    """
    head, left, right, tail = self._frame(thinking, system)
    if system is not None:
      left = self._text(self.encode(left))  # as the tokenizer normalises it
    at, end = len(head.ids), len(prompt_ids) - len(tail.ids)
    inner = list(prompt_ids[at:end])
    # No token reaches from one line into the next (see `_starts_line`), so that
    # whole lines have the same ids whatever stands around them:
    #
    #   left line \n line \n line \n line right
    #                first          last
    first = last = 0
    if left and not before:
      starts = (n for n in range(1, len(inner)) if self._starts_line(inner, n))
      covering = (n for n in starts if self._text(inner[:n]).startswith(left))
      first = next(covering, 0)
    if first or not (left or before):  # never where all is encoded
      backwards = range(len(inner) - 1, first, -1)
      starts = (n for n in backwards if self._starts_line(inner, n))
      covering = (n for n in starts if self._text(inner[n:]).endswith(right))
      last = next(covering, first)
    # A message of one line, with a template's lines beside it.
    if last == first and not self._text(inner[first:]).endswith(right):
      first = last = 0
    opening, closing = self._text(inner[:first]), self._text(inner[last:])
    if (
      [*prompt_ids[:at]] != [*head.ids]
      or [*prompt_ids[max(end, 0) :]] != [*tail.ids]
      or not (opening or closing).startswith(left)
      or not closing.endswith(right)
    ):
      raise UserError(
        f"{self.name}: a stored prompt is none of this chat template in this"
        " thinking mode, so that its message can't be told from the template;"
        " make it again in a new --workdir"
      )
    closing = closing[: len(closing) - len(right)]
    if opening:
      opening = opening.removeprefix(left)
    else:
      closing = closing.removeprefix(left)
    if before:
      return self.encode(before + closing + then)
    middle = inner[first:last]
    return [*self.encode(opening), *middle, *self.encode(closing + then)]

  def _starts_line(self, ids: Sequence[int], at: int) -> bool:
    """Returns whether an id is the first of a line, right after a full one.

    A byte-level tokenizer cuts text into pieces before it merges letters. None
    goes on behind the end of a line, but one may hold several ends of lines, or
    white space at a line's beginning.
    """
    before = self._text(ids[max(at - 2, 0) : at])
    after = self._text(ids[at : at + 1])
    # What isn't a whole character may be white space.
    unclear = before[-2:-1], after[:1]
    return before.endswith("\n") and not any(
      not one or one.isspace() or one == "\ufffd" for one in unclear
    )

  def _text(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of a response.

    Only a final stop id is left out; `<think>` and every other mark that the
    model wrote stays. Ids without a token (left-over head rows) give no text.
    """
    ids = [int(i) for i in ids]
    if ids and ids[-1] in self.stop_ids:
      ids.pop()
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def token_texts(self, ids: Sequence[int]) -> list[str]:
    """Returns what each id of a response adds to its text.

    The texts join to what the tokenizer makes of all ids. A character whose
    bytes several ids share stands whole with the last of them, and the others
    add nothing.

    Args:
      ids: of a response, a final stop id included, which adds nothing.
    """
    ids = [int(i) for i in ids]
    stop = bool(ids) and ids[-1] in self.stop_ids
    if stop:
      ids.pop()
    distinct = sorted(set(ids))
    alone = dict(
      zip(
        distinct,
        self._tokenizer.decode_batch(
          [[i] for i in distinct], skip_special_tokens=False
        ),
        strict=True,
      )
    )
    texts: list[str] = []
    part: list[int] = []  # ids since the last whole character
    for number, i in enumerate(ids):
      if not part and "\ufffd" not in alone[i]:
        texts.append(alone[i])
        continue
      part.append(i)
      text = self._text(part)
      ends = number + 1 == len(ids) or "\ufffd" not in alone[ids[number + 1]]
      is_whole = ends or "\ufffd" not in text
      texts.append(text if is_whole else "")
      if is_whole:
        part = []
    whole = self._text(ids)
    if "".join(texts) != whole:  # a decoder that looks at what stands before
      texts = self._grown(ids, whole)
    return [*texts, ""] if stop else texts

  def token_name(self, i: int) -> str:
    """Returns an id's own text, or how the vocabulary spells part of one."""
    text = self._text([i])
    if text and "\ufffd" not in text:
      return text
    return self._tokenizer.id_to_token(i) or f"#{i}"

  def _grown(self, ids: Sequence[int], whole: str) -> list[str]:
    """Returns `token_texts` by decoding ever longer beginnings."""
    texts, said = [], ""
    for end in range(1, len(ids) + 1):
      now = whole if end == len(ids) else self._text(ids[:end])
      # What a later id changes is said by the later one.
      if not whole.startswith(now) or not now.startswith(said):
        now = said
      texts.append(now[len(said) :])
      said = now
    return texts

  @functools.cached_property
  def vocab_size(self) -> int:
    """Returns the largest id plus one: the rows that a head needs."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  def onset_ids(self) -> tuple[int, ...]:
    """Returns ids that open an `ONSET_WORDS` word, for epistemic mass.

    The first sub-word id of each word, bare and after a space, sorted and
    without repeats. A first id that is white space or unknown tells nothing
    about the word and is left out (small vocabularies).
    """
    unknown = getattr(self._tokenizer.model, "unk_token", None)
    found = set()
    for word in ONSET_WORDS:
      for text in (word, " " + word):
        encoding = self._plain.encode(text, add_special_tokens=False)
        if not encoding.ids or encoding.tokens[0] == unknown:
          continue
        if self._tokenizer.decode(encoding.ids[:1]).strip():
          found.add(encoding.ids[0])
    return tuple(sorted(found))

  def same_ids(self, other: Chat) -> bool:
    """Returns whether both map every id to the same token."""
    if self._digest and self._digest == other._digest:
      return True
    return self._tokenizer.get_vocab(True) == other._tokenizer.get_vocab(True)

  def thinks(self, thinking: bool | None) -> bool:
    """Returns whether a response in this mode may open a thinking block.

    False for a model without one and for a prompt that closes an empty block.

    Raises:
      UserError: the template has no such mode.
    """
    if self.opens_thoughts(thinking):
      return True
    return self.supports_thinking and "<think>" not in self._tails[thinking]

  def without_thoughts(self) -> bool | None:
    """Returns the switch under which a response opens no thinking block.

    Raises:
      UserError: the template opens one in every prompt.
    """
    switch = False if self.supports_thinking else None
    if self.opens_thoughts(switch):
      raise UserError(
        f"{self.name}: its chat template opens a thinking block in every"
        " prompt, so that an answer can't be begun for the model"
      )
    return switch

  def opens_thoughts(self, thinking: bool | None) -> bool:
    """Returns whether the prompt opens the block, so no response does."""
    if thinking not in self._tails:
      self._tails[thinking] = self._around("", "", thinking)[-1]
    tail = self._tails[thinking]
    return tail.count("<think>") > tail.count("</think>")

  def _around(
    self, lead: str, trail: str, thinking: bool | None, system: bool = False
  ) -> list[str]:
    """Renders the template before and after the user's text.

    With a system prompt: before that, between the two, and after both.
    """
    switch = thinking if self.supports_thinking else None
    try:
      text = bounded_jinja.render(
        self._template, self._variables(lead, trail, switch, system)
      )
    # A template is a program: it divides by zero, recurses, or asks a text for
    # a role.
    except Exception as error:
      if system:
        raise self._no_system(f" ({one_line(error)})") from error
      raise UserError(
        f"chat template of {self._template_name}: {one_line(error)}; give"
        " another one with the key chat_template"
      ) from error
    if system and (
      text.count(_SYSTEM) != 1
      or text.count(_PLACEHOLDER) != 1
      or text.index(_SYSTEM) > text.index(_PLACEHOLDER)
    ):
      raise self._no_system()
    if text.count(_PLACEHOLDER) != 1:
      raise UserError(
        f"chat template of {self._template_name}: writes the user message "
        f"{text.count(_PLACEHOLDER)} times, not once; give another one with "
        "the key chat_template"
      )
    before, after = text.split(_PLACEHOLDER)
    parts = [*before.split(_SYSTEM), after] if system else [before, after]
    if thinking is not None and not self.supports_thinking:
      # Where the template decides, asking for what it does anyway is fine.
      always = after.count("<think>") > after.count("</think>")
      if thinking != always:
        raise UserError(
          f"{self.name}: its chat template has no enable_thinking and "
          f"{'always' if always else 'never'} thinks; set this model's "
          f"thinking key to None or {always}"
        )
    return parts

  def _variables(
    self, lead: str, trail: str, thinking: bool | None, system: bool
  ) -> dict[str, Any]:
    """Returns what a template is rendered with."""
    variables: dict[str, Any] = dict(self._special)
    if thinking is not None:
      variables["enable_thinking"] = thinking
    messages = [{"role": "user", "content": lead + _PLACEHOLDER + trail}]
    if system:
      messages.insert(0, {"role": "system", "content": _SYSTEM})
    return {
      **variables,
      "messages": messages,
      "tools": None,
      "documents": None,
      "add_generation_prompt": True,
    }

  def _no_system(self, why: str = "") -> UserError:
    return UserError(
      f"chat template of {self._template_name}: has no system turn{why}, and a"
      " system prompt is to be given; leave that out of the prompt set and the"
      " rows, or give another template with the key chat_template"
    )

  def _check(self) -> None:
    """Proves first that to split the prompt changes nothing."""
    for content, (i, _) in self._controls.items():
      if i in self.control_ids and i in self.encode(content):
        raise UserError(
          f"{self.name}: the base vocabulary spells the control token "
          f"{content!r}, so user text could produce it; rebuild tokenizer.json "
          "with it as an added token only"
        )
    for thinking in (None, False, True) if self.supports_thinking else (None,):
      before, after = self._around("", "", thinking)
      self._check_split(before + _PROBE + after, thinking)

  def _check_split(
    self, text: str, thinking: bool | None, system: str | None = None
  ) -> None:
    """Proves that the probe's prompt, split, has the ids of the whole text."""
    whole = self._tokenizer.encode(text, add_special_tokens=False).ids
    if self.render(_PROBE, thinking, system) != whole:
      raise UserError(
        f"{self.name}: this tokenizer encodes text differently between "
        "control tokens (a prefix added to the first piece?); only "
        "byte-level tokenizers such as Qwen3's are supported"
      )


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
  """Returns the bos, eos, pad and unk tokens of a config, as texts."""
  special = {}
  for key in _SPECIAL:
    value = config.get(key)
    if isinstance(value, dict):
      value = value.get("content")
    if isinstance(value, str):
      special[key] = value
  return special
