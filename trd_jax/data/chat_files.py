"""What `chat.py` reads beside the vocabulary: templates and JSON configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import json_text


def compile_template(
  source: str, name: str
) -> tuple[jinja2.Template, set[str]]:
  """The template and the names of the variables that it reads.

  Args:
    source: jinja text; it runs sandboxed and without access to files.
    name: how messages refer to it.

  Raises:
    UserError: it is no jinja template.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols],
  )

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment.globals["raise_exception"] = raise_exception
  environment.filters["tojson"] = to_json
  try:
    variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), variables
  except jinja2.TemplateError as error:
    raise UserError(
      f"chat template of {name}: {one_line(error)}; give another one with "
      "the key chat_template"
    ) from error


def find_template(
  folder: Path, config: dict[str, Any], template: str | Path | None
) -> str:
  """The jinja text: `template`, else the folder's file, else its config's.

  Raises:
    UserError: there is none, or the file can't be read.
  """
  path = folder / "chat_template.jinja" if template is None else Path(template)
  if template is not None or path.exists():
    try:
      return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f"{path}: the chat template can't be read ({one_line(error)}); give "
        "a jinja file"
      ) from error
  found = config.get("chat_template")
  if isinstance(found, list):  # several templates, each with a name
    named = {t.get("name"): t.get("template") for t in found}
    found = named.get("default")
  if not isinstance(found, str):
    raise UserError(
      f"{folder}: no chat template; give a jinja file with the key "
      "chat_template"
    )
  return found


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
  """The texts of the bos, eos, pad and unk tokens that a config names."""
  special = {}
  for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
    value = config.get(key)
    if isinstance(value, dict):
      value = value.get("content")
    if isinstance(value, str):
      special[key] = value
  return special


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
  """A JSON object; an absent file is an empty one unless `required`.

  Raises:
    UserError: the file can't be read or holds something else.
  """
  if not required and not path.exists():
    return {}
  try:
    value = json_text.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path}: can't be read as JSON ({one_line(error)}); fetch the file again"
    ) from error
  if not isinstance(value, dict):
    raise UserError(f"{path}: not a JSON object; fetch the file again")
  return value
