"""Prompt sets: what the models are asked, as Jinja templates in a folder.

A set has a file `<role>_<domain>.jinja` for each role and domain, and may have
a system prompt `system_<domain>.jinja`. What a folder lacks is the default
set's. Templates see text alone and run sandboxed:
no file, no Python object and nothing random is within their reach, so that
equal templates and equal texts give equal prompts.

A file is checked whole when it is read, so that a wrong name in it is refused
before a model is opened.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.nodes

from trd_jax.data import bounded_jinja
from trd_jax.experiment.errors import UserError, did_you_mean, one_line
from trd_jax.experiment.prompt_sets import DEFAULT, FOLDER, shipped

DOMAINS = ("arithmetic", "math", "code")


class Role(NamedTuple):
  """What a message is for.

  Attributes:
    shows: the fields that its templates have to show.
    may_show: further ones, which can be None.
  """

  shows: tuple[str, ...]
  may_show: tuple[str, ...]

  @property
  def fields(self) -> tuple[str, ...]:
    """Returns all names that its templates may use."""
    return *self.shows, *self.may_show


# The roles that a set has a message for. The student's own prompt knows no
# reference: a template can't give it away.
ROLES: Mapping[str, Role] = {
  "initial": Role(("problem",), ("starter_code",)),
  "privileged": Role(("problem", "privileged"), ("reference", "starter_code")),
  # In OPD there is neither a reference nor anything else that is privileged.
  "refinement": Role(
    ("problem", "draft"), ("reference", "privileged", "starter_code")
  ),
}


# The system prompt that stands before all of these messages: the same text for
# all problems of a domain, where the set has one.
SYSTEM = "system"
_FILES: Mapping[str, Role] = {**ROLES, SYSTEM: Role((), ())}
# About as long as a long draft, in characters.
_LONG = "Then 2 + 2 = 4.\n" * 4096


@dataclasses.dataclass(frozen=True)
class Templates:
  """The templates of a set, checked.

  Attributes:
    name: the set's, as `prompts.set` says it.
    version: tells wordings apart: the default set's own, else a hash of all
      templates.
    brought: the templates, as `<role>_<domain>`, that a folder brings which
      doesn't ship with the program.
  """

  name: str
  version: str
  brought: frozenset[str]
  _compiled: Mapping[str, jinja2.Template] = dataclasses.field(repr=False)
  _versions: Mapping[str, str] = dataclasses.field(repr=False)

  @classmethod
  def load(cls, name: str, default_version: str) -> Templates:
    """Reads a set.

    Args:
      name: a shipped set's, or a folder.
      default_version: what a set with the default wording is called.

    Raises:
      UserError: there is no such set, a file isn't one of a set's, or a
        template is broken, shows a field that its role hasn't, or doesn't show
        one that it must. The message names file and line.
    """
    default = _sources(FOLDER / DEFAULT)
    named = default if name == DEFAULT else _named(name)
    files = {**default, **named}
    own = {
      key: text
      for key, (_, text) in files.items()
      if key not in default or text != default[key][1]
    }
    brought = {} if name in shipped() else named
    _check_bounds(brought)
    version = default_version
    if own:
      texts = {key: text for key, (_, text) in files.items()}
      version = _digest(json.dumps(texts, sort_keys=True))
    compiled = {
      key: _compiled(path, text, _FILES[key.partition("_")[0]])
      for key, (path, text) in files.items()
    }
    versions = {key: _digest(text) for key, text in own.items()}
    versions = {key: versions.get(key, default_version) for key in files}
    return cls(name, version, frozenset(brought), compiled, versions)

  def version_of(self, role: str, domain: str) -> str:
    """Returns what tells one message's wording from others.

    A system prompt before it is part of that.
    """
    version = self._versions[f"{role}_{domain}"]
    system = self._versions.get(f"{SYSTEM}_{domain}")
    if system is None or role == SYSTEM:
      return version
    return _digest(f"{system} {version}")

  def system(self, domain: str) -> str | None:
    """Returns the system prompt of a domain, or None: the set has none.

    White space at its ends isn't part of it.

    Raises:
      UserError: the template can't be rendered.
    """
    template = self._compiled.get(f"{SYSTEM}_{domain}")
    if template is None:
      return None
    return _rendered(template, _FILES[SYSTEM], {}).strip() or None

  def message(self, role: str, domain: str, **fields: str | None) -> str:
    """Returns a message; fields of the role that aren't given are None.

    Raises:
      UserError: the template can't be rendered with these fields.
    """
    template = self._compiled[f"{role}_{domain}"]
    return _rendered(template, ROLES[role], fields)

  def around_draft(self, domain: str, **fields: str | None) -> tuple[str, str]:
    """Returns a refinement message before and after the draft.

    Args:
      domain: of the problem.
      **fields: all but the draft.

    Raises:
      UserError: with these fields the template shows the draft not once.
    """
    # What stands for the draft is in no other text, or it were found there.
    texts = "".join(text for text in fields.values() if text)
    mark = next(
      mark
      for n in itertools.count()
      if (mark := f"\ue000{n}\ue001") not in texts
    )
    message = self.message("refinement", domain, draft=mark, **fields)
    parts = message.split(mark)
    if len(parts) != 2:
      raise _drafts(self._compiled[f"refinement_{domain}"], len(parts) - 1)
    return parts[0], parts[1]


def _digest(text: str) -> str:
  """Returns the version of a wording that isn't the default one."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(name: str) -> dict[str, tuple[Path, str]]:
  """Returns the files of a shipped set or of a folder."""
  if name in shipped():
    return _sources(FOLDER / name)
  folder = Path(name)
  if not folder.is_dir():
    raise UserError(
      f"prompts.set={name}: there is no such folder, nor a shipped set of that"
      f" name ({', '.join(shipped())})"
    )
  files = _sources(folder)
  if not files:
    raise UserError(
      f"prompts.set={name}: {folder} has no template; name its files"
      " <role>_<domain>.jinja, as refinement_math.jinja"
    )
  return files


def _sources(folder: Path) -> dict[str, tuple[Path, str]]:
  """Returns path and text of each template in a folder, by its name."""
  keys = [f"{role}_{domain}" for role in _FILES for domain in DOMAINS]
  found = {}
  for path in sorted(folder.glob("*.jinja")):
    if path.stem not in keys:
      raise UserError(
        f"{path}: no role and domain has this name;"
        f" {did_you_mean(path.stem, keys)}"
      )
    try:
      found[path.stem] = path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f"{path}: the template can't be read ({one_line(error)})"
      ) from error
  return found


@functools.cache
def environment() -> bounded_jinja.Environment:
  """Returns what templates run in.

  The newline that ends a file isn't part of its message, as editors put it
  there. White space around a block tag is dropped as in chat templates.
  """
  made = bounded_jinja.Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=False,
    autoescape=False,
    undefined=jinja2.StrictUndefined,
    finalize=_no_none,
  )
  # What is left is a function of the fields: nothing random, no object that a
  # template could hold on to.
  made.globals.clear()
  del made.filters["random"]
  return made


def _check_bounds(files: Mapping[str, tuple[Path, str]]) -> None:
  """Raises a UserError for a template that takes too much time or memory."""
  trials = []
  for key, (_, text) in files.items():
    role = _FILES[key.partition("_")[0]]
    # A long text, too: loops over it, or copies of it, are what may take much.
    renderings = [*_trials(role), *_trials(role, _LONG)]
    trials.append((text, renderings))
  found = bounded_jinja.objection(f"{__name__}:environment", trials)
  if found is not None:
    path, _ = list(files.values())[found[0]]
    raise UserError(f"{path}: {found[1]}; write a simpler template")


def _compiled(path: Path, text: str, role: Role) -> jinja2.Template:
  """Compiles a template and checks it.

  Raises:
    UserError: see `Templates.load`.
  """
  made = environment()
  try:
    tree = made.parse(text, filename=str(path))
    code = made.compile(tree, filename=str(path))
  # Python compiles it in the end, and has complaints of its own, as of blocks
  # that are nested too deeply.
  except Exception as error:
    syntax = isinstance(error, jinja2.TemplateSyntaxError)
    line = f", line {error.lineno}" if syntax else ""
    raise UserError(f"{path}{line}: {one_line(error)}") from error
  _check_names(path, tree, role)
  template = jinja2.Template.from_code(made, code, {})
  template.filename = str(path)
  _check_messages(template, role)
  return template


def _check_names(path: Path, tree: jinja2.nodes.Template, role: Role) -> None:
  """Raises a UserError for a name that is no field, or a draft that is cut."""
  names = list(tree.find_all(jinja2.nodes.Name))
  own = {name.name for name in names if name.ctx != "load"}
  for name in names:
    if name.name not in role.fields and name.name not in own:
      raise UserError(
        f"{path}, line {name.lineno}: there is no field `{name.name}` here;"
        f" this role has {', '.join(role.fields) or 'none'}"
      )
  shown = {
    id(node)
    for output in tree.find_all(jinja2.nodes.Output)
    for node in output.nodes
  }
  for name in names:
    # What a filter made of the draft couldn't be cut as the draft is.
    if name.name == "draft" and id(name) not in shown:
      raise UserError(
        f"{path}, line {name.lineno}: the draft is shown as it is, as"
        " `{{ draft }}`; take away what is done with it here"
      )


def _check_messages(template: jinja2.Template, role: Role) -> None:
  """Raises a UserError where a message lacks what it has to show.

  Whatever may be None is tried with and without.
  """
  for fields in _trials(role):
    missing = [field for field, text in fields.items() if text is None]
    message = _rendered(template, role, fields)
    for field in role.shows:
      count = message.count(f"\ue000{field}\ue001")
      without = f" where there is no {', '.join(missing)}" if missing else ""
      if not count:
        raise UserError(
          f"{template.filename}: its message has no `{{{{ {field} }}}}`"
          f"{without}; put it in"
        )
      if field == "draft" and count > 1:
        raise _drafts(template, count)


def _trials(role: Role, then: str = "") -> Iterator[dict[str, str | None]]:
  """Yields fields to try templates of a role with: a mark each, or None.

  Args:
    role: whatever may be None in it is there, and isn't, in all combinations.
    then: text behind the marks.
  """
  for given in itertools.product((True, False), repeat=len(role.may_show)):
    there = {*role.shows, *itertools.compress(role.may_show, given)}
    yield {
      field: f"\ue000{field}\ue001{then}" if field in there else None
      for field in role.fields
    }


def _drafts(template: jinja2.Template, count: int) -> UserError:
  """Returns the complaint about a message that hasn't one draft."""
  return UserError(
    f"{template.filename}: shows the draft {count} times; a refinement prompt"
    " has it once, so that it can lose its middle there"
  )


def _no_none(value: object) -> object:
  """Returns a value to be shown, or refuses one that isn't there."""
  if value is None:
    raise jinja2.TemplateError(
      "what is shown here can be None; put it between {% if ... %} and"
      " {% endif %}"
    )
  return value


def _rendered(
  template: jinja2.Template, role: Role, fields: Mapping[str, str | None]
) -> str:
  """Returns the message of a template, or a UserError with file and line."""
  try:
    variables = {**dict.fromkeys(role.fields), **fields}
    return bounded_jinja.render(template, variables)
  except Exception as error:  # a template may divide by zero, too
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == template.filename
    ]
    line = f", line {lines[-1]}" if lines else ""
    raise UserError(f"{template.filename}{line}: {one_line(error)}") from error
