"""Finds chat templates, and compiles them as transformers does.

Their language is Jinja with what templates of public models expect besides:
`raise_exception`, `tojson` without escapes, `break` and `continue`,
`strftime_now`, and `{% generation %}`, which marks the assistant's words for
trainers and changes nothing in them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser

from trd_jax.data import bounded_jinja
from trd_jax.experiment import chat_templates
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import json_fields

# The day that models are told it is. With the real one a run that passes
# midnight would score its trajectories after prompts that nobody answered. It
# is the day that templates of Llama 3 name where they are told none.
TODAY = datetime.datetime(2024, 7, 26)


_NAMED = json_fields.object_of("name", "template")
_TEMPLATES = json_fields.either(
  json_fields.TEXT,
  json_fields.list_of(_NAMED, "a list of objects with name and template"),
)


class _Generation(jinja2.ext.Extension):
  """Reads `{% generation %}…{% endgeneration %}` as what is in it."""

  tags: ClassVar = {"generation"}

  def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
    """Returns the nodes between the tags."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


def environment() -> bounded_jinja.Environment:
  """Returns what chat templates run in."""
  made = bounded_jinja.Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  made.globals["raise_exception"] = _raise_exception
  made.globals["strftime_now"] = TODAY.strftime
  made.filters["tojson"] = _to_json
  return made


def compile_template(
  source: str, name: str, renderings: Sequence[Mapping[str, Any]] = ()
) -> tuple[jinja2.Template, set[str]]:
  """Compiles the template; also returns the names that it reads.

  Args:
    source: jinja text; it runs sandboxed and without access to files.
    name: how messages refer to it.
    renderings: variables of JSON's kinds that it is tried with first.

  Raises:
    UserError: it is no jinja template, or takes too much time, memory or room.
  """
  trial = [(source, renderings)]
  if found := bounded_jinja.objection(f"{__name__}:environment", trial):
    raise _refusal(name, found[1])
  made = environment()
  try:
    variables = jinja2.meta.find_undeclared_variables(made.parse(source))
    return made.from_string(source), variables
  # A template is turned into Python, whose compiler has complaints of its own,
  # as of blocks that are nested too deeply.
  except Exception as error:
    raise _refusal(name, one_line(error)) from error


def _refusal(name: str, problem: str) -> UserError:
  return UserError(
    f"chat template of {name}: {problem}; give another one with the key"
    " chat_template"
  )


def find_template(
  folder: Path, config: dict[str, Any], template: str | Path | None
) -> tuple[str, Path]:
  """Finds a chat template: `template`, the folder's file, or its config's.

  Args:
    folder: a model's.
    config: what its `tokenizer_config.json` holds.
    template: a jinja file, or a shipped template's name; None: the folder's.

  Returns:
    The jinja text, and the file that it stands in.

  Raises:
    UserError: there is none, or the file can't be read.
  """
  path = folder / "chat_template.jinja"
  if template is not None:
    path = chat_templates.file(template)
  if template is not None or path.exists():
    try:
      return path.read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f"{path}: the chat template can't be read ({one_line(error)}); give "
        "a jinja file"
      ) from error
  json_fields.check(
    config,
    {"chat_template": _TEMPLATES},
    str(folder / "tokenizer_config.json"),
    "give a template with the key chat_template",
  )
  found = config.get("chat_template")
  if isinstance(found, list):  # several templates, each with a name
    named = {each["name"]: each["template"] for each in found}
    found = named.get("default")
  if not isinstance(found, str):
    raise UserError(
      f"{folder}: no chat template; set the key chat_template of this model to"
      " plain, with which it reads the messages alone, as base models do, or to"
      " a jinja file"
    )
  return found, folder / "tokenizer_config.json"
