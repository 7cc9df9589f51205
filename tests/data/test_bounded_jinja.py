"""Templates that take too much time, memory or room: refused, and at once."""

import json
import time

import pytest

from tests.support.chat_folders import TEMPLATE, write_folder
from trd_jax.data import bounded_jinja, chat_language
from trd_jax.data.chat import Chat
from trd_jax.data.templates import Templates
from trd_jax.experiment.errors import UserError

# What is in front of a template that is fine without it.
_CHAT = {
  "{% for i in range(10**9) %}{% endfor %}": "Range too big",
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
  "{% endfor %}": "turns of loops|doesn't end within 2 s",
  "{{ 'a' * 10**10 }}": "more than 1 GiB",  # as it is compiled
  "{{ 'a' * (messages|length * 10**10) }}": "more than 1 GiB",
  "{{ [1]|slice(10**10)|list }}": "doesn't end within 2 s",
  "{% set n = namespace(x='a') %}{% for i in range(60) %}"
  "{% set n.x = n.x ~ n.x %}{% endfor %}": "more than 1 GiB",
  "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "recursion",
  "{% macro f(n) %}{% if n < 30 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}"
  "{% endmacro %}{{ f(0) }}": "turns of loops|doesn't end within 2 s",
  "{% for x in [1, 2] recursive %}{% if loop.depth < 30 %}{{ loop([1, 2]) }}"
  "{% endif %}{% endfor %}": "turns of loops|doesn't end within 2 s",
  "{% block a %}{{ self.a() }}{% endblock %}": "recursion",
  "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
  "{% for i in [1] %}" * 50 + "{% endfor %}" * 50: "nested blocks",
  "{{ '{:10000000000}'.format(1) }}": "more than 1 GiB",
  "{{ lipsum(n=10**9) }}": "doesn't end within 2 s",
  "{{ 'x' * 5000000 }}": "writes 5,000",
  "{{ raise_exception(7) }}": "7",
  "{{ 1 // 0 }}": "division",
  "{% include 'other' %}": "loader",
  "{% import 'other' as other %}": "loader",
  "{% extends 'other' %}": "loader",
  "{{ ''.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("start", _CHAT, ids=range(len(_CHAT)))
def test_a_chat_template_that_takes_too_much(tmp_path, start):
  """Names its file, on one line, whatever it does."""
  path = tmp_path / "mine.jinja"
  path.write_text(start + TEMPLATE)
  folder = write_folder(tmp_path / "model")
  began = time.monotonic()
  with pytest.raises(UserError, match=_CHAT[start]) as raised:
    Chat.load(folder, path)
  assert str(path) in str(raised.value)
  assert len(str(raised.value).splitlines()) == 1
  assert time.monotonic() - began < 15  # 2 s of processor time


def test_the_template_of_a_tokenizer_is_bounded_too(tmp_path):
  folder = write_folder(tmp_path, template="{{ 'a' * 10**10 }}" + TEMPLATE)
  with pytest.raises(UserError, match=r"tokenizer_config\.json: takes more"):
    Chat.load(folder)


_PROMPTS = {
  "{{ problem }}{{ (problem * 10**6)|length }}": "more than 1 GiB",
  "{{ problem * 10**6 }}": "writes [0-9,]* characters",
  "{{ problem }}{{ 'a' * 10**10 }}": "more than 1 GiB",
  "{{ problem }}{% for a in problem %}{% for b in problem %}{% endfor %}"
  "{% endfor %}": "turns of loops|doesn't end within 2 s",
  "{{ problem }}{{ problem.replace('', problem) }}": "GiB|characters|2 s",
  "{{ problem }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
  "{{ problem }}{% include 'other' %}": "loader",
}


@pytest.mark.parametrize("text", _PROMPTS, ids=range(len(_PROMPTS)))
def test_a_prompt_template_that_takes_too_much(tmp_path, text):
  path = tmp_path / "initial_math.jinja"
  path.write_text(text)
  (tmp_path / "system_math.jinja").write_text("Be brief.")
  with pytest.raises(UserError, match=_PROMPTS[text]) as raised:
    Templates.load(str(tmp_path), "v1")
  assert str(path) in str(raised.value)
  assert len(str(raised.value).splitlines()) == 1


def test_turns_are_counted_where_a_text_is_longer_than_the_trial_s(tmp_path):
  """Each rendering has all of them."""
  (tmp_path / "initial_math.jinja").write_text(
    "{% for letter in problem %}{{ letter }}{% endfor %}{{ problem }}"
  )
  templates = Templates.load(str(tmp_path), "v1")
  for _ in range(2):
    templates.message("initial", "math", problem="a" * 200_000)
  with pytest.raises(UserError, match="250,000 turns of loops"):
    templates.message("initial", "math", problem="a" * 300_000)


def test_loops_and_macros_write_what_they_write_without_being_counted():
  text = (
    "{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}"
    "{% for one in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}"
    "{% if loop.last %}!{% endif %}{% else %}none{% endfor %}"
    "{% for tree in [[1, [2]]] recursive %}"
    "{{ tree if tree is number else loop(tree) }}{% endfor %}"
    "{% call f(1) %}in{% endcall %}{{ problem }}"
  )
  template = chat_language.environment().from_string(text)
  message = bounded_jinja.render(template, {"problem": "p"})
  assert message == "1/32/33/3!12<1in>p"


def test_json_keeps_a_template_s_letters(tmp_path):
  """A trial's template and texts go through a pipe."""
  folder = write_folder(tmp_path, template="é\u2028\ud7ff" + TEMPLATE)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  assert config["chat_template"].startswith("é")
  assert Chat.load(folder).render("x", None)
