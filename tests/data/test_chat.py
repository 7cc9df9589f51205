import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_folders import (
  CONTROLS,
  HYBRID,
  INSTRUCT,
  QWEN,
  TEMPLATE,
  needs_qwen,
  small_tokenizer,
  write_folder,
)
from tests.support.places import ROOT
from trd_jax.data.chat import ONSET_WORDS, Chat
from trd_jax.experiment.errors import UserError

# What a template, a tokenizer or a model could trip over.
FRAGMENTS = [
  *CONTROLS,
  "<tool_call>",
  "<tool_response>",
  "</tool_response>",
  "<|fim_pad|>",
  "<|im_",
  "end|>",
  "<thi",
  "nk>",
  "{{ messages }}",
  "{% raw %}",
  "qqUserTextGoesHereqq",
  "user\n",
  " ",
  "\n",
  "\n\n",
  "\t",
  "\u00a0",
  "Ünï\u0301cødé",
  "e\u0301",
  "😀👩‍🔬",
  "解",
  "12345",
  "\\boxed{7}",
  "x",
  "'s",
]
texts = st.lists(
  st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=8
).map("".join)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  return Chat.load(write_folder(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def qwen():
  if not QWEN.exists():
    pytest.skip(f"no real tokenizer at {QWEN}")
  return {
    "hybrid": Chat.load(QWEN, HYBRID),
    "instruct": Chat.load(QWEN, INSTRUCT),
  }


@pytest.fixture(scope="module")
def theirs():
  """transformers' tokenizer on the same files."""
  transformers = pytest.importorskip("transformers")
  return transformers.AutoTokenizer.from_pretrained(QWEN)


def nfc(text):
  return tokenizers.normalizers.NFC().normalize_str(text)


def harmless(text, tokenizer):
  return not any(c in text for c in tokenizer.get_added_vocab())


MODES = [
  ("hybrid", None),
  ("hybrid", True),
  ("hybrid", False),
  ("instruct", None),
]


@pytest.mark.slow
@needs_qwen
@pytest.mark.parametrize(("name", "thinking"), MODES)
def test_equals_transformers_token_for_token(qwen, theirs, name, thinking):
  template = (HYBRID if name == "hybrid" else INSTRUCT).read_text("utf-8")
  extra = {} if thinking is None else {"enable_thinking": thinking}
  golden = json.loads((QWEN / "golden_encodings.json").read_text("utf-8"))
  seen = 0

  def check(text):
    nonlocal seen
    if not harmless(text, theirs):
      return
    seen += 1
    expected = theirs.apply_chat_template(
      [{"role": "user", "content": text}],
      chat_template=template,
      add_generation_prompt=True,
      tokenize=True,
      return_dict=False,
      **extra,
    )
    assert qwen[name].render(text, thinking) == expected

  for row in golden:
    for text in (row["text"], f"\n {row['text']}\n\n", f"{row['text']}  \t"):
      check(text)
  for text in ("", " ", "\n\n", "{{ 7 }}", "<tool_call", "< think >"):
    check(text)
  settings(max_examples=150, deadline=None, database=None, derandomize=True)(
    given(texts)(check)
  )()
  assert seen > 200


@needs_qwen
def test_golden_encodings(qwen, theirs):
  golden = json.loads((QWEN / "golden_encodings.json").read_text("utf-8"))
  plain = [row for row in golden if harmless(row["text"], theirs)]
  assert len(plain) > 40
  for row in plain:
    assert qwen["hybrid"].encode(row["text"]) == row["ids"]


@needs_qwen
@settings(max_examples=150, deadline=None)
@given(text=texts, mode=st.sampled_from(MODES))
def test_user_text_never_makes_a_control_token(qwen, text, mode):
  check_controls(qwen[mode[0]], text, mode[1])


@settings(max_examples=150, deadline=None)
@given(text=texts, thinking=st.sampled_from([None, True, False]))
def test_user_text_never_makes_a_control_token_small(small, text, thinking):
  check_controls(small, text, thinking)


@settings(max_examples=60, deadline=None)
@given(
  some=st.lists(texts, max_size=6), thinking=st.sampled_from([None, False])
)
def test_many_at_once_are_what_each_is_alone(small, some, thinking):
  many = small.render_many(iter(some), thinking)
  assert many == [small.render(text, thinking) for text in some]


@needs_qwen
@settings(max_examples=60, deadline=None)
@given(
  some=st.lists(texts, max_size=6), thinking=st.sampled_from([None, False])
)
def test_many_at_once_with_the_real_tokenizer(qwen, some, thinking):
  many = qwen["hybrid"].render_many(some, thinking)
  assert many == [qwen["hybrid"].render(text, thinking) for text in some]


THEN = st.sampled_from(["", "\n", "\n\nA:"])


@needs_qwen
@settings(max_examples=150, deadline=None)
@given(text=texts, then=THEN, mode=st.sampled_from(MODES))
def test_a_message_is_had_without_the_template(qwen, text, then, mode):
  check_plain(qwen[mode[0]], text, mode[1], then)


@settings(max_examples=150, deadline=None)
@given(text=texts, then=THEN, thinking=st.sampled_from([None, True, False]))
def test_a_message_is_had_without_the_template_small(
  small, text, then, thinking
):
  check_plain(small, text, thinking, then)


# What a template may write beside the message, in the message's own lines.
AROUND = ["", "\n", "Q: ", "\nQ: ", "two\nlines "], ["", "\n", " A:", "\nA:"]


@settings(max_examples=150, deadline=None)
@given(
  text=texts.filter(lambda text: text == text.strip() != ""),
  then=THEN,
  left=st.sampled_from(AROUND[0]),
  right=st.sampled_from(AROUND[1]),
)
def test_a_message_is_had_from_among_a_templates_words(
  small, text, then, left, right
):
  chat = plain_words(left, right)
  check_plain(chat, text, None, then)


@functools.cache
def plain_words(left, right):
  with tempfile.TemporaryDirectory() as folder:
    template = f"{left}{{{{ messages[0].content }}}}{right}"
    # Jinja drops one newline at a template's end.
    return Chat.load(write_folder(Path(folder), template=template + "\n"))


def check_plain(chat, text, thinking, then):
  ids = chat.render(text, thinking)
  assert chat.plain_message(ids, thinking, then) == chat.encode(text + then)


@settings(max_examples=200, deadline=None)
@given(
  text=texts.filter(lambda text: text == text.strip() != ""),
  system=texts.filter(lambda text: text == text.strip() != ""),
  then=THEN,
  controls=st.booleans(),
)
def test_a_message_is_had_from_behind_a_system_turn(
  small, text, system, then, controls
):
  chat = small if controls else both_turns()
  ids = chat.render(text, None, system)
  before = f"{system}\n\n"
  found = chat.plain_message(ids, None, then, before, system)
  assert found == chat.encode(before + text + then)


@functools.cache
def both_turns():
  with tempfile.TemporaryDirectory() as folder:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return Chat.load(write_folder(Path(folder), template=template))


def test_what_is_no_prompt_has_no_message(small):
  ids = small.render("two\nlines", None)
  for broken in (ids[1:], ids[:-1], [], small.encode("two\nlines")):
    with pytest.raises(UserError, match="none of this chat template"):
      small.plain_message(broken, None)
  with pytest.raises(UserError, match="in this thinking mode"):
    small.plain_message(ids, False)


def test_marks_that_are_spelt_out_are_told(small):
  assert small.control_marks("a <think>b</think> <think> <|im_") == {
    "<think>",
    "</think>",
  }
  for mark in CONTROLS:
    assert small.control_marks(f"x{mark}y") == {mark}
  assert small.control_marks("") == set()


def check_controls(chat, text, thinking):
  """The template's control ids and no others; and no letter is lost."""
  rendered = chat.render_with_offsets(text, thinking)
  assert rendered.ids == chat.render(text, thinking)

  def controls(ids):
    return [i for i in ids if i in chat.control_ids]

  assert controls(rendered.ids) == controls(chat.render("x", thinking))
  whole = chat.decode([*rendered.ids, chat.stop_ids[0]])
  assert nfc(text) in whole
  assert len(whole) - len(nfc(text)) == len(
    chat.decode([*chat.render("x", thinking), chat.stop_ids[0]])
  ) - len("x")


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_offsets_say_which_characters_an_id_covers(small, text):
  rendered = small.render_with_offsets(text, None)
  ranges = [r for r in rendered.offsets if r is not None]
  core = text.strip()
  if len(core) < len(core.encode()) or nfc(text) != text:
    assert all(0 <= a <= b <= len(text) for a, b in ranges)
    return  # several ids may share a character
  for i, found in zip(rendered.ids, rendered.offsets, strict=True):
    if found is not None:
      assert small.decode([i]) == text[slice(*found)]
  assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
  if not ranges:
    return
  # At each end at most one id is shared with the template.
  known = [k for k, found in enumerate(rendered.offsets) if found is not None]
  before, after = text[: ranges[0][0]].lstrip(), text[ranges[-1][1] :].rstrip()
  assert small.decode([rendered.ids[known[0] - 1]]).endswith(before)
  assert small.decode([rendered.ids[known[-1] + 1]]).startswith(after)


def test_offsets_of_an_accented_character(small):
  rendered = small.render_with_offsets("ab\U0001f600cd", None)
  shared = [r for r in rendered.offsets if r == (2, 3)]
  assert len(shared) == 4  # one character of four bytes


def test_thinking_modes(small):
  on, off = small.render("x", True), small.render("x", False)
  assert small.render("x", None) == on
  assert off[: len(on)] == on
  assert small.decode(off[len(on) :]) == "<think>\n\n</think>\n\n"
  assert [small.thinks(mode) for mode in (None, True, False)] == [
    True,
    True,
    False,
  ]


@needs_qwen
def test_a_model_without_thinking_refuses_it(qwen):
  instruct = qwen["instruct"]
  assert not instruct.supports_thinking
  assert instruct.render("x", False) == instruct.render("x", None)
  assert not instruct.thinks(None)
  with pytest.raises(UserError, match="no enable_thinking and never thinks"):
    instruct.render("x", True)
  assert qwen["hybrid"].supports_thinking


def test_a_model_that_always_thinks_refuses_not_to(tmp_path):
  template = TEMPLATE.split("{% if enable")[0] + "<think>\n{% endif %}"
  chat = Chat.load(write_folder(tmp_path, template=template))
  assert chat.thinks(None)
  assert chat.render("x", True) == chat.render("x", None)
  with pytest.raises(UserError, match="always thinks"):
    chat.render("x", False)


def test_a_template_that_trims_trims_user_text_too(tmp_path):
  template = TEMPLATE.replace("message.content", "message.content | trim")
  chat = Chat.load(write_folder(tmp_path, template=template))
  assert chat.render("  a b \n", None) == chat.render("a b", None)


def test_a_control_token_that_eats_white_space(tmp_path):
  tokenizer = small_tokenizer()
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken("<u>", rstrip=True),
      tokenizers.AddedToken("</u>", lstrip=True),
    ]
  )
  template = "<u>{% for m in messages %}{{ m.content }}{% endfor %}</u> go"
  chat = Chat.load(
    write_folder(tmp_path, tokenizer=tokenizer, template=template)
  )
  for text in ("hi", "  hi there\n ", ""):
    assert chat.render(text, None) == tokenizer.encode(f"<u>{text}</u> go").ids


def test_decode_leaves_out_the_final_stop_token_only(small):
  stop = small.stop_ids[0]
  think = small.encode("a")
  marks = small.render("", False)[-4:]  # holds <think> and </think>
  assert "</think>" in small.decode(marks)
  assert small.decode([*think, stop]) == "a"
  assert small.decode([stop, *think, stop, stop]) == "<|im_end|>a<|im_end|>"
  assert small.decode([*think, small.vocab_size + 7]) == "a"
  assert small.decode([]) == ""


def test_stop_and_pad_ids(tmp_path):
  folder = write_folder(tmp_path)
  chat = Chat.load(folder)
  end, text = (small_tokenizer().token_to_id(c) for c in CONTROLS[1:3])
  assert chat.stop_ids == (end,)
  assert chat.pad_id == text
  generation = folder / "generation_config.json"
  generation.write_text(json.dumps({"eos_token_id": [end, text]}))
  assert Chat.load(folder).stop_ids == (end, text)
  generation.write_text(json.dumps({"eos_token_id": text}))
  assert Chat.load(folder).stop_ids == (text,)
  write_folder(folder, pad_token=None, eos_token={"content": "<|im_end|>"})
  assert Chat.load(folder).pad_id == text  # then the stop id
  generation.unlink()
  assert Chat.load(folder).stop_ids == (end,)


def test_vocab_size_bounds_every_id(small):
  assert small.vocab_size == max(small.control_ids) + 1
  assert max(small.encode("any text at all")) < small.vocab_size


@needs_qwen
def test_qwen_sizes_and_ids(qwen):
  chat = qwen["hybrid"]
  assert chat.vocab_size == 151_669
  assert chat.stop_ids == (151_645,)
  assert chat.pad_id == 151_643
  assert {151_667, 151_668} <= chat.control_ids


@needs_qwen
def test_onset_ids_are_the_first_sub_words(qwen, theirs):
  expected = {
    theirs.encode(prefix + word, add_special_tokens=False)[0]
    for word in ONSET_WORDS
    for prefix in ("", " ")
  }
  assert len(ONSET_WORDS) == 16
  assert qwen["hybrid"].onset_ids() == tuple(sorted(expected))


def test_onset_ids_leave_out_a_bare_space(tmp_path):
  bytes_only = Chat.load(
    write_folder(tmp_path, tokenizer=small_tokenizer(merges=0))
  )
  found = [bytes_only.decode([i]) for i in bytes_only.onset_ids()]
  assert sorted(found) == sorted({word[0] for word in ONSET_WORDS})


def test_same_ids(tmp_path, small):
  again = Chat.load(write_folder(tmp_path / "a", template=TEMPLATE + "\n"))
  other = Chat.load(
    write_folder(tmp_path / "b", tokenizer=small_tokenizer(merges=61))
  )
  assert small.same_ids(again)
  assert not small.same_ids(other)
  assert not other.same_ids(small)


def test_importing_chat_brings_no_heavy_library():
  code = (
    "import sys, trd_jax.data.chat; "
    "print([m for m in ('jax', 'torch', 'transformers', 'pyarrow') "
    "if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "[]"


def test_plain_text_of_a_template_after_the_users_stays(tmp_path):
  folder = ROOT / "trd_jax" / "lab" / "student"
  template = tmp_path / "plain.jinja"
  template.write_text("{{ '7 + ' + messages[0]['content'] + ' = 3' }}")
  chat = Chat.load(folder, template)
  for text in ("1 + 2", "4"):
    assert chat.render(text, None) == chat.encode(f"7 + {text} = 3")


@pytest.mark.slow
@needs_qwen
@pytest.mark.parametrize(("name", "thinking"), MODES)
def test_a_system_turn_equals_transformers_token_for_token(
  qwen, theirs, name, thinking
):
  template = (HYBRID if name == "hybrid" else INSTRUCT).read_text("utf-8")
  extra = {} if thinking is None else {"enable_thinking": thinking}
  qwen[name].check_system()
  for system in ("Be brief.", "Two\n\nlines {{ 1 }} é", "qqUserTextGoesHereqq"):
    for text in ("What is 1 + 1?", " and\nmore \n", ""):
      expected = theirs.apply_chat_template(
        [
          {"role": "system", "content": system},
          {"role": "user", "content": text},
        ],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **extra,
      )
      assert qwen[name].render(text, thinking, system) == expected


@settings(max_examples=150, deadline=None)
@given(text=texts, system=texts, thinking=st.sampled_from([None, False]))
def test_a_system_turn_never_makes_a_control_token(
  small, text, system, thinking
):
  system = system.strip()
  ids = small.render(text, thinking, system)
  controls = [i for i in ids if i in small.control_ids]
  plain = small.render("", thinking)
  turn = [*small._tokenizer.encode("<|im_start|>").ids]
  turn += small._tokenizer.encode("<|im_end|>").ids
  assert controls == turn + [i for i in plain if i in small.control_ids]
  # Offsets are the user's text's alone.
  whole = small.render_with_offsets(text, thinking, system)
  ends = [r for r in whole.offsets if r is not None]
  assert all(0 <= a <= b <= len(text) for a, b in ends)
  without = small.render_with_offsets(text, thinking)
  assert ends == [r for r in without.offsets if r is not None]


def test_many_at_once_have_each_its_own_system_turn(small):
  some = [(f"x{n}", None if n % 3 == 0 else f"s{n % 70}") for n in range(150)]
  many = small.render_many(
    (text for text, _ in some), False, (system for _, system in some)
  )
  assert many == [small.render(text, False, system) for text, system in some]
  assert len({tuple(ids) for ids in many}) == len(many)


def test_what_templates_of_public_models_use_is_there(tmp_path):
  """The generation tag, the date, as transformers has them but for the day."""
  marked = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{%- else %}<|im_start|>{{ m.content }}"
    "<|im_end|>{%- endif %}{%- endfor %}<|im_start|>"
  )
  plain = marked.replace("{% generation %}", "").replace(
    "{% endgeneration %}", ""
  )
  folders = [
    write_folder(tmp_path / str(n), template=template)
    for n, template in enumerate((marked, plain))
  ]
  one, other = (Chat.load(folder) for folder in folders)
  assert one.render("hi", None) == other.render("hi", None)
  dated = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
  chat = Chat.load(write_folder(tmp_path / "d", template=dated))
  # Not today's: a run that passes midnight has one prompt all the same.
  assert chat.decode(chat.render("!", None)) == "26 Jul 2024!"


@pytest.mark.parametrize(
  "broken",
  [
    "{{ 1 / 0 }}",
    "{{ messages[7].content }}",
    "{{ messages.role.name() }}",
    "{{ nothing }} {% if %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[0].content.encode('idna-').x }}",
    "{{ raise_exception('no user turn') }}",
  ],
)
def test_a_broken_template_is_one_line_that_names_its_file(tmp_path, broken):
  folder = write_folder(tmp_path / "model")
  mine = tmp_path / "mine.jinja"
  mine.write_text(broken)
  with pytest.raises(UserError, match="key chat_template") as caught:
    Chat.load(folder, mine)
  assert str(mine) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "template",
  [
    # It refuses the role, as Gemma's does; leaves it out; repeats it.
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}"
    "{% endif %}{{ messages[0].content }}",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{{ messages[0].content if messages[0].role == 'system' }}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
  ],
)
def test_a_template_without_a_system_turn_is_one_clear_line(tmp_path, template):
  chat = Chat.load(write_folder(tmp_path, template=template))
  assert chat.render("x", None)
  for ask in (chat.check_system, lambda: chat.render("x", None, "s")):
    with pytest.raises(UserError, match="has no system turn") as caught:
      ask()
    assert "\n" not in str(caught.value)
    assert "the key chat_template" in str(caught.value)


def test_a_system_prompt_may_be_put_into_the_user_turn(tmp_path):
  template = (
    "<|im_start|>{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ messages[-1].content }}"
    "<|im_end|>"
  )
  chat = Chat.load(write_folder(tmp_path, template=template))
  chat.check_system()
  text = chat._tokenizer.decode(
    chat.render("x", None, "s"), skip_special_tokens=False
  )
  assert text == "<|im_start|>s\n\nx<|im_end|>"


# An answer that is begun for the model


@needs_qwen
@pytest.mark.parametrize("name", ["hybrid", "instruct"])
def test_a_begun_answer_is_the_templates_assistant_turn(qwen, theirs, name):
  """As tools make it that split the rendered conversation at a mark."""
  path = {"hybrid": HYBRID, "instruct": INSTRUCT}[name]
  begun, mark = "Here is a program:\n```python\n", "qqMarkqq"
  conversation = [
    {"role": "system", "content": "Program."},
    {"role": "user", "content": "Add:\n```\n1 + 1\n```\n"},
    {"role": "assistant", "content": f"{begun}{mark}\n```\n"},
  ]
  text = theirs.apply_chat_template(
    conversation, chat_template=path.read_text(), tokenize=False
  ).split(mark)[0]
  expected = theirs(text, add_special_tokens=False)["input_ids"]
  chat = qwen[name]
  texts_ = [conversation[1]["content"]]
  switch = chat.without_thoughts()
  assert chat.render_many(texts_, switch, ["Program."], begun) == [expected]


@settings(max_examples=60, deadline=None)
@given(text=texts, begun=texts)
def test_what_begins_an_answer_is_plain_text(small, text, begun):
  (ids,) = small.render_many([text], None, begun=begun)
  frame = small.render("x", None)
  controls = [i for i in ids if i in small.control_ids]
  assert controls == [i for i in frame if i in small.control_ids]
  said = small.decode([*ids, small.stop_ids[0]])
  before = small.decode([*small.render(text, None), small.stop_ids[0]])
  assert nfc(said) == nfc(before + begun)


def test_an_answer_is_not_begun_inside_thoughts(tmp_path, small):
  assert small.without_thoughts() is False
  always = TEMPLATE.split("{% if enable")[0] + "<think>\n{% endif %}"
  chat = Chat.load(write_folder(tmp_path / "always", template=always))
  with pytest.raises(UserError, match="opens a thinking block in every"):
    chat.without_thoughts()
