"""The documents say what is so: commands, keys, paths, links, tables, messages.

What a block marked `bash` runs of ours has to exist with its flags, a key's
value has to be one, and a table of measured numbers names the command that
printed them. CONTRIBUTING.md, "Documents", has the rules.
"""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trd_jax
from tests.support.places import ROOT
from trd_jax.data.problems import benchmarks
from trd_jax.experiment import cli, config_file, experiment, records, scopes
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.methods import METHODS

PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = (
  *(
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "BENCHMARKS.md",
    "SECURITY.md",
  ),
  *("benchmarks/README.md", "trd_jax/lab/README.md"),
)
DOCUMENTS = [*(ROOT / name for name in OTHERS), *PAGES]
MOST_LINES = 180  # of README, a front door

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = {name.split(".")[0] for name in KEYS if "." in name}
# What else the examples may run, besides our own.
OF_OTHERS = {".", "apt-get", "pip", "tensorboard", "wandb", "hf"}

# Names in the metadata of parquet files.
OF_PARQUET = {"trd_jax.record", "trd_jax.version"}
# Files that stand for the reader's.
PLACEHOLDERS = {"mine.py", "FILE.py"}

every_document = pytest.mark.parametrize(
  "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def prose(text: str) -> str:
  """A document without its code blocks."""
  return FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
  return [body for mark, body in FENCE.findall(text) if mark == language]


def commands(block: str) -> Iterator[list[str]]:
  """The words of each command of a block, comments left out."""
  for line in block.replace("\\\n", " ").splitlines():
    # An ellipsis stands for what is the reader's to say.
    words = shlex.split(line.replace(" …", ""), comments=True)
    if words:
      yield words


# -- what a command may be ---------------------------------------------------


@functools.cache
def own_flags(module: str) -> tuple[cli.Flag, ...]:
  """The flags of a stage, besides those that all have."""
  name = f"trd_jax.{module}"
  spec = importlib.util.find_spec(name)
  if spec is None:
    raise AssertionError(f"there is no module {name}")
  if spec.submodule_search_locations:
    name += ".__main__"
  return getattr(importlib.import_module(name), "FLAGS", ())


def check_config(spec: str, overrides: dict | None = None) -> None:
  """A config's file and variants, as far as no placeholder is in them."""
  name, _, arg = spec.partition(":")
  if name in PLACEHOLDERS or re.search("[A-Z]{3}", arg):
    return
  assert (ROOT / name).is_file(), spec
  values, source = config_file.load(f"{ROOT / name}:{arg}" if arg else name)
  experiment.from_config(values | (overrides or {}), source)


def check_module(module: str, arguments: list[str]) -> None:
  """`python -m trd_jax.MODULE ARGUMENTS`."""
  if module.startswith("grading."):
    parser = importlib.import_module(f"trd_jax.{module}.__main__")
    text = Path(parser.__file__ or "").parent
    known = "".join(path.read_text() for path in text.glob("*.py"))
    for flag in flags_of(arguments):
      assert f'"{flag}"' in known, flag
    return
  line = cli._CommandLine(own_flags(module), arguments)
  if line.config:
    check_config(line.config, line.overrides)


def flags_of(arguments: list[str]) -> list[str]:
  return [
    a.split("=")[0] for a in arguments if a.startswith("--") and a != "--"
  ]


def check_script(path: str, arguments: list[str]) -> None:
  """A script of ours, whose text names each of its flags."""
  script = ROOT / path
  assert script.is_file(), path
  known = script.read_text()
  if script.suffix == ".py":  # flags that scripts share stand beside them
    known = "".join(p.read_text() for p in script.parent.glob("*.py"))
  until = arguments.index("--") if "--" in arguments else len(arguments)
  for flag in flags_of(arguments[:until]):
    found = re.search(rf"{flag}(?![\w-])", known)
    assert found, f"{path} has no {flag}"
  if path == "launch/node.sh" and arguments:
    check_config(arguments[0])
  if path.startswith("launch/train"):
    check_module("train", arguments[until + 1 :])


def check_make(arguments: list[str]) -> None:
  """`make TARGET VARIABLE=VALUE …`."""
  makefile = (ROOT / "Makefile").read_text()
  variables = {}
  for word in arguments:
    name, equals, value = word.partition("=")
    if equals:
      assert re.search(rf"^{name} \?=", makefile, re.M), f"make has no {name}"
      variables[name] = value
    else:
      assert re.search(rf"^{name}:", makefile, re.M), f"no target {name}"
  check_config(variables.get("CONFIG", "configs/demo.py"))
  flags = shlex.split(variables.get("ARGS", "").replace("--config.…", ""))
  check_module("pipeline", flags)
  if "METHOD" in variables and variables["METHOD"].islower():
    assert variables["METHOD"] in METHODS


def check_command(words: list[str]) -> None:
  """One command of a document."""
  while "=" in words[0]:  # a variable before the command
    words = words[1:]
  program, *arguments = words
  is_python = Path(program).name.startswith("python")
  if is_python and arguments[:2] == ["-m", "pytest"]:
    assert (ROOT / arguments[2]).exists(), arguments[2]
  elif is_python and arguments[:1] == ["-m"]:
    module = arguments[1]
    if module == "trd_jax":
      assert not arguments[2:]
    elif module.startswith("trd_jax."):
      check_module(module.removeprefix("trd_jax."), arguments[2:])
    elif module.startswith("tests."):
      path = f"{module.replace('.', '/')}.py"
      check_script(path, arguments[2:])
    else:
      assert module in {"pip", "venv"}, module
  elif is_python:
    check_script(arguments[0], arguments[1:])
  elif program == "make":
    check_make(arguments)
  elif program.startswith(("launch/", "third_party/")):
    check_script(program, arguments)
  else:
    program = program.removeprefix(".venv/bin/")
    assert program in OF_OTHERS | {"pre-commit"}, program
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
      assert f'"{extra}":' in (ROOT / "setup.py").read_text(), extra


@every_document
def test_commands_are_there_with_their_flags_and_keys(path):
  for block in blocks(path.read_text(), "bash"):
    for words in commands(block):
      check_command(words)


@every_document
def test_every_block_of_commands_is_checked(path):
  marks = {mark for mark, _ in FENCE.findall(path.read_text())}
  assert marks <= {"", "bash", "python", "json"}


@every_document
def test_commands_in_the_text_are_there(path):
  """Spans that begin as a command of ours does, also in tables."""
  for span in SPAN.findall(prose(path.read_text())):
    if re.match("(ARGS|METHOD|CONFIG|ENGINE)=", span):
      span = f"make demo {span}"
    if re.search("…|<", span) or not re.match(
      r"(python|make) |launch/\w", span
    ):
      continue
    words = shlex.split(span, comments=True)
    if not any(re.fullmatch("[A-Z_]{3,}", word) for word in words):
      check_command(words)


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem
)
def test_commands_of_an_experiment_s_card_are_there(path):
  card = ast.get_docstring(ast.parse(path.read_text())) or ""
  found = re.findall(r"^    python (?:[^\n\\]|\\\n)*", card, re.M)
  assert found
  for command in found:
    for words in commands(command):
      check_command(words)


def test_commands_that_are_wrong_are_seen():
  for wrong in (
    "make demos",
    "make demo METHODS=jsd",
    "make demo METHOD=jds",
    'make demo ARGS="--config.train.learning_rat=1"',
    "python -m trd_jax.rolout --workdir=a",
    "python -m trd_jax.train --config.train.epochs=none",
    "python -m trd_jax.evaluate --workdir=a --regrades",
    "python -m trd_jax.train --config=configs/demo.py:regim=opd",
    "python -m trd_jax.grading.math a.jsonl --outt=b",
    "python benchmarks/fit.py --tarket h100",
    "launch/node.sh configs/nano.py runs/a",
    "launch/train_slurm.sh --node 2 -- --workdir=a",
    "launch/train_slurm.sh --nodes 2 -- --wokdir=a",
    "pip install '.[cuda14]'",
    "curl http://127.0.0.1",
  ):
    with pytest.raises((AssertionError, experiment.UserError)):
      check_command(shlex.split(wrong))


def test_make_demo_hands_its_arguments_on():
  shown = subprocess.run(
    ["make", "-n", "demo", "ARGS=--config.seed=1 --config.evaluate.k=4"],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  assert "--config.seed=1 --config.evaluate.k=4" in shown


def dry_runs() -> list[str]:
  """The documents' runs of the pipeline, as they stand there."""
  found = {}
  for path in DOCUMENTS:
    for block in blocks(path.read_text(), "bash"):
      for words in commands(block):
        line = " ".join(words)
        is_ours = "trd_jax.pipeline --config=configs/demo.py" in line
        if is_ours and "jsonl" not in line and "server" not in line:
          found[line.split("trd_jax.pipeline")[1]] = words
  return sorted(found)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("flags", dry_runs())
def test_runs_of_the_demo_pass_a_dry_run(flags, tmp_path):
  words = [w for w in shlex.split(flags) if not w.startswith("--workdir=")]
  # What generates with vLLM may not be installed here.
  words = [w for w in words if "python.generation" not in w]
  words = [w for w in words if w != "--config.engine.name=vllm"]
  # A run to take over from: one that has made nothing yet.
  donor = tmp_path / "donor"
  donor.mkdir()
  default = experiment.from_config({})
  (donor / "config.json").write_text(experiment.to_json(default))
  words = [f"--from={donor}" if w.startswith("--from=") else w for w in words]
  told = subprocess.run(
    [
      *(sys.executable, "-m", "trd_jax.pipeline", *words),
      *(f"--workdir={tmp_path / 'run'}", "--dry_run"),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert told.returncode == 0, told.stderr
  assert "would run, in this order" in told.stdout
  assert not (tmp_path / "run").exists()


# -- what is named -----------------------------------------------------------


@every_document
def test_config_keys_are_keys(path):
  """Spans such as `train.epochs`, `mesh.*` or `evaluate.k=4`."""
  for span in SPAN.findall(path.read_text()):
    name, equals, value = span.removeprefix("--config.").partition("=")
    if not re.fullmatch(r"[a-z]\w*(\.\w+)*\.(\w+|\*)", name):
      continue
    if name.split(".")[0] not in SECTIONS or "(" in span:
      continue
    if name.endswith((".py", ".md", ".json", ".jsonl", ".parquet")):
      continue
    start = name.removesuffix("*")
    known = [key for key in KEYS if key == start or key.startswith(f"{start}.")]
    if name.endswith("*"):
      known = [key for key in KEYS if key.startswith(start)]
    assert known, f"{path.name}: there is no key {name}"
    if equals and value and not re.search("[A-Z]{2}|^[A-Z]$|…| ", value):
      KEYS[name].parse(value)


@functools.cache
def files_of_ours() -> frozenset[str]:
  folders = ("trd_jax", "tests", "benchmarks", "configs", "examples", "docs")
  folders += ("launch", "third_party", ".ci")
  paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
  paths += ROOT.glob("*.py")
  return frozenset(str(p.relative_to(ROOT)) for p in paths) | frozenset(folders)


def missing_paths(text: str) -> list[str]:
  """Files and modules that a text names and that aren't there.

  A path with a line number is another project's, and one with a placeholder
  or a folder of a run is the reader's.
  """
  missing = []
  for span in SPAN.findall(text):
    words = span.split("(")[0].split()
    for word in words:
      word = word.strip(",.;:").removesuffix("/")
      if word in OF_PARQUET:
        continue
      if re.fullmatch(r"trd_jax(\.\w+)+", word):
        if not is_module_or_name(word):
          missing.append(word)
      elif re.fullmatch(
        r"(trd_jax|tests|benchmarks|configs|examples|docs|launch|third_party)"
        r"(/[\w.-]+)+",
        word,
      ):
        made = ("docs/scaling", "benchmarks/results")
        if word not in files_of_ours() and not word.startswith(made):
          missing.append(word)
      elif re.fullmatch(r"\w+\.py", word) and word not in PLACEHOLDERS:
        ours = files_of_ours()
        missing += (
          [] if any(f"/{p}".endswith(f"/{word}") for p in ours) else [word]
        )
  return missing


def is_module_or_name(dotted: str) -> bool:
  """Whether a dotted name is a module, or an attribute of one."""
  module, *names = dotted.split(".")
  found = importlib.import_module(module)
  for name in names:
    module += f".{name}"
    if hasattr(found, "__path__") and importlib.util.find_spec(module):
      found = importlib.import_module(module)
    elif hasattr(found, name):
      found = getattr(found, name)
    else:
      return False
  return True


@every_document
def test_modules_and_files_are_there(path):
  assert missing_paths(prose(path.read_text())) == []


def test_missing_modules_and_files_are_seen():
  text = "`trd_jax.rolout` `trd_jax/none.py` `nowhere.py` `docs/files.md`"
  assert len(missing_paths(text)) == 4
  assert (
    missing_paths("`trd_jax.run` `trd_jax.data.chat` `launch/serve.sh`") == []
  )


@functools.cache
def anchors(path: Path) -> frozenset[str]:
  """The names that GitHub gives a document's headings."""
  found = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.M)
  words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
  return frozenset(word.strip().replace(" ", "-") for word in words)


@every_document
def test_links_lead_somewhere(path):
  for target in LINK.findall(prose(path.read_text())):
    if target.startswith(("http://", "https://")):
      continue
    name, _, anchor = target.partition("#")
    there = (path.parent / name).resolve() if name else path
    assert there.exists(), f"{path.name} links to {target}"
    assert there.is_relative_to(ROOT)
    if anchor:
      assert anchor in anchors(there), f"{path.name} links to {target}"


def test_every_page_is_in_the_index():
  linked = LINK.findall((ROOT / "docs/index.md").read_text())
  pages = {path.name for path in PAGES} - {"index.md"}
  assert pages <= set(linked)


@every_document
def test_examples_in_python_and_json_are_whole(path):
  text = path.read_text()
  for block in blocks(text, "python"):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
          if node.module.startswith("trd_jax"):
            assert is_module_or_name(f"{node.module}.{alias.name}")
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "trd_jax":
          assert is_module_or_name(f"trd_jax.{node.attr}")
        if node.value.id == "config" and node.attr in SECTIONS:
          continue
  for block in blocks(text, "json"):
    for line in block.splitlines():
      json.loads(line)


def test_readme_s_config_of_one_s_own_is_a_config():
  text = (ROOT / "README.md").read_text()
  (block,) = [b for b in blocks(text, "python") if "def get_config" in b]
  names: dict = {}
  exec(compile(block, "README.md", "exec"), names)
  made = experiment.from_config(names["get_config"]())
  assert made.data.source == "jsonl"


def test_documents_that_name_a_version_name_this_one():
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {trd_jax.__version__}\n" in citation
  assert f"\n## {trd_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
  security = (ROOT / "SECURITY.md").read_text()
  assert f"newest version, which is {trd_jax.__version__}." in security


def test_readme_shows_the_pipeline_with_a_config_and_a_workdir():
  blocks_of_it = blocks((ROOT / "README.md").read_text(), "bash")
  shown = [words for block in blocks_of_it for words in commands(block)]
  assert any(
    {"trd_jax.pipeline", "--config=configs/demo.py"} <= set(words)
    and any(word.startswith("--workdir=") for word in words)
    for words in shown
  )


def test_readme_is_a_front_door():
  assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


# -- tables ------------------------------------------------------------------

NUMBER = re.compile(r"[-+~≤≥]?\d[\d,.:]*%?( [\[(].*[\])])?( \w+)?")


def tables(text: str) -> Iterator[tuple[list[list[str]], str]]:
  """Each table's rows of cells, its head left out, and the line after it."""
  lines = [*FENCE.sub("", text).splitlines(), "", ""]
  start = None
  for i, line in enumerate(lines):
    if line.startswith("|") and start is None:
      start = i
    elif start is not None and not line.startswith("|"):
      rows = [row.strip("|").split("|") for row in lines[start + 2 : i]]
      after = next((one for one in lines[i:] if one.strip()), "")
      yield [[cell.strip() for cell in row] for row in rows], after
      start = None


def is_measured(rows: list[list[str]]) -> bool:
  """Whether a third or more of a table's cells are numbers."""
  cells = [cell for row in rows for cell in row[1:] if cell]
  numbers = [cell for cell in cells if NUMBER.fullmatch(cell)]
  return bool(cells) and 3 * len(numbers) >= len(cells)


def unattributed(text: str) -> list[list[str]]:
  """The first row of each table of numbers that names no command."""
  if any("Written by `" in line for line in text.splitlines()[:10]):
    return []
  named = re.compile(r"(printed by: .*`[^`]+`|source: \S)")
  return [
    rows[0]
    for rows, after in tables(text)
    if is_measured(rows) and not named.match(after)
  ]


@every_document
def test_tables_of_numbers_name_the_command_that_printed_them(path):
  assert unattributed(path.read_text()) == []


def test_a_table_without_its_command_is_seen():
  table = "| a | b |\n|---|---|\n| x | 1.5 [1, 2] |\n"
  assert len(unattributed(table)) == 1
  assert unattributed(f"{table}\nprinted by: `make demo`\n") == []
  assert len(unattributed(f"{table}\nMore.\n\nprinted by: `make demo`")) == 1
  assert unattributed("| a | b |\n|---|---|\n| x | a word |\n") == []


def column(path: str, head: str) -> list[str]:
  """The spans in the first column of the table whose first title is `head`."""
  text = (ROOT / path).read_text()
  part = text[text.index(f"\n| {head} |") :].split("\n\n")[0]
  first = [line.split("|")[1] for line in part.strip().splitlines()[2:]]
  return [span for cell in first for span in SPAN.findall(cell)]


def test_the_table_of_methods_is_the_registry():
  assert column("docs/training.md", "method") == list(METHODS)
  text = (ROOT / "docs/training.md").read_text()
  for name, method in METHODS.items():
    assert f"\n| `{name}` | {method.trajectory} |" in text


def test_the_table_of_benchmarks_is_the_registry():
  named = set(column("docs/evaluation.md", "benchmark"))
  known = {
    name
    for name, entry in benchmarks.BENCHMARKS.items()
    if entry.part_of is None
  }
  assert named == known | set(experiment.LAB_BENCHMARKS)


@pytest.mark.parametrize(
  ("heading", "record"),
  [
    ("problems", records.Problem),
    ("rollout and refine", records.Trajectory),
    ("evaluate/base and evaluate/trained", records.GradedSample),
    ("analyze/scores", records.TokenScores),
    ("rejected", records.Rejected),
  ],
)
def test_the_columns_of_every_record_are_explained(heading, record):
  text = (ROOT / "docs/workdir.md").read_text()
  part = text[text.index(f"\n### {heading}\n") :]
  table = part[part.index("| column") :].split("\n\n")[0].splitlines()[2:]
  named = [span for line in table for span in SPAN.findall(line.split("|")[1])]
  assert sorted(named) == sorted(records.schema(record).names)


@pytest.mark.parametrize("last", ["rollout", "refine", "train"])
def test_the_table_of_what_may_still_change_is_the_scopes(last):
  """What docs/early_checks.md lists, and keys of how a run is carried out."""
  text = (ROOT / "docs/early_checks.md").read_text()
  (row,) = re.findall(rf"^\| `{last}`[^|]*\|(.*)\|$", text, re.M)
  listed = tuple(span.removesuffix("*") for span in SPAN.findall(row))
  made = ["problems", "rollout", "refine", "train"]
  made = made[: made.index(last) + 1]
  values = experiment.flat(experiment.from_config({"regime": "opd"}))
  bound = {name for one in made for name in scopes.identity(values, one)}
  named = {
    name
    for name in values
    if name in listed or name.startswith(tuple(x for x in listed if "." in x))
  }
  runtime = {name for name in values if scopes.is_runtime(name)}
  assert values.keys() - bound == named | runtime


# -- messages ----------------------------------------------------------------


@functools.cache
def messages() -> tuple[str, ...]:
  """Every text in the package's code, what is filled in as an ellipsis."""
  found = []
  for path in (ROOT / "trd_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = (
          part.value if isinstance(part, ast.Constant) else "…"
          for part in node.values
        )
        found.append("".join(map(str, parts)))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(re.sub(r"\{\w*\}", "…", node.value))
  return tuple(" ".join(text.split()) for text in found)


def test_the_messages_that_are_explained_are_in_the_code():
  text = (ROOT / "docs/troubleshooting.md").read_text()
  headings = re.findall(r"^### `(.*)`$", text, re.M)
  assert len(headings) > 30
  for heading in headings:
    parts = [part.strip() for part in heading.split("…") if part.strip()]
    assert any(
      all(part in message for part in parts) for message in messages()
    ), heading
