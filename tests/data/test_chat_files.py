"""Templates wherever they come from, and folders that are broken."""

import json

import pytest
import tokenizers

from tests.support.chat_folders import TEMPLATE, write_folder
from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError

LAID_OUT = """\
{% for message in messages %}
  {% if message.role == 'user' %}
<|im_start|>user
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
  {% set role = 'assistant' %}
<|im_start|>{{ role }}
  {% if enable_thinking is defined and enable_thinking is false %}
<think>

</think>

  {% endif %}
{% endif %}
"""


def test_a_template_may_be_laid_out_over_lines(tmp_path):
  flat = Chat.load(write_folder(tmp_path / "flat"))
  laid_out = Chat.load(write_folder(tmp_path / "lines", template=LAID_OUT))
  for thinking in (None, False):
    assert laid_out.render("x", thinking) == flat.render("x", thinking)


def test_a_template_file_in_the_folder_wins_over_the_config(tmp_path):
  folder = write_folder(tmp_path / "m", template="no place for a message")
  with pytest.raises(UserError, match="writes the user message 0 times"):
    Chat.load(folder)
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  inside = Chat.load(folder).render("x", None)
  given_file = tmp_path / "mine.jinja"
  given_file.write_text("Q " + TEMPLATE)
  assert Chat.load(folder, given_file).render("x", None) != inside
  named = [{"name": "default", "template": TEMPLATE}]
  listed = Chat.load(write_folder(tmp_path / "l", template=named))
  assert listed.render("x", None) == inside


def break_json(folder):
  (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


def remove(name):
  return lambda folder: (folder / name).unlink()


def nest(folder):
  (folder / "tokenizer_config.json").write_text(100_000 * "[")


def wrong_eos(folder):
  (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')


def spelled_control(folder):
  vocab = {"<think>": 0, "a": 1}
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "a"))
  word.add_tokens(["<think>"])
  write_folder(folder, tokenizer=word, eos_token="a", pad_token=None)


@pytest.mark.parametrize(
  ("damage", "config", "message"),
  [
    (remove("tokenizer.json"), {}, "tokenizer.json: can't be read"),
    (remove("tokenizer_config.json"), {}, "can't be read as JSON"),
    (nest, {}, "tokenizer_config.json: can't be read as JSON (nested too"),
    (break_json, {}, "tokenizer.json: not a tokenizer"),
    (wrong_eos, {}, "eos_token_id 99999"),
    (None, {"eos_token": "<eos>"}, "eos_token '<eos>' is not in"),
    (None, {"eos_token": None}, "no end token"),
    (None, {"template": None}, "no chat template"),
    (None, {"template": "{% if %}"}, "Expected an expression"),
    (
      None,
      {"template": "{{ raise_exception('only tools here') }}"},
      "only tools here",
    ),
    (spelled_control, {}, "spells the control token '<think>'"),
  ],
)
def test_a_broken_folder_is_one_clear_line(tmp_path, damage, config, message):
  folder = write_folder(tmp_path / "model", **config)
  if damage:
    damage(folder)
  with pytest.raises(UserError) as caught:
    Chat.load(folder)
  line = str(caught.value)
  assert message in line
  assert str(folder) in line
  assert "\n" not in line


_WRONG = {
  "tokenizer_config.json": [
    {"eos_token": 7},
    {"eos_token": ["<|im_end|>"]},
    {"pad_token": {"id": 1}},
    {"bos_token": {"content": 1}},
    {"chat_template": 7},
    {"chat_template": [7]},
    {"chat_template": [{"name": ["default"], "template": "x"}]},
    {"chat_template": [{"name": "default"}]},
  ],
  "generation_config.json": [
    {"eos_token_id": value}
    for value in ("1", 1.0, True, -1, 2**31, 10**30, {}, [[1]], [1, "2"], [-1])
  ],
}


@pytest.mark.parametrize(
  ("file", "fields"),
  [(file, fields) for file, every in _WRONG.items() for fields in every],
)
def test_a_field_of_another_type_is_named(tmp_path, file, fields):
  folder = write_folder(tmp_path)
  path = folder / file
  before = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(before | fields))
  (name,) = fields
  with pytest.raises(UserError, match=f"{file}: the field '{name}' is"):
    Chat.load(folder)


def test_half_a_character_in_a_template_is_named(tmp_path):
  folder = write_folder(tmp_path, template="\ud800{{ messages[0].content }}")
  with pytest.raises(UserError, match="writes what is not valid Unicode"):
    Chat.load(folder)


def test_a_missing_template_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"gone\.jinja: the chat template can't"):
    Chat.load(write_folder(tmp_path), tmp_path / "gone.jinja")
