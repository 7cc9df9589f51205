"""What is a user's survives: in workdirs, in targets, and behind links."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.support.stage_runs import chosen as small
from trd_jax import convert, rollout
from trd_jax.data.problems import store
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.distill.teacher.cache import Identity, TeacherCache
from trd_jax.experiment import cli, experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import ownership
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading.math import verifier
from trd_jax.lab import pretrain
from trd_jax.model.weights import hub
from trd_jax.model.weights.model_folder import atomic_folder, check_replaceable

MINE = b"the only copy of my thesis"


def everything(root: Path) -> dict[str, bytes | str]:
  """What lies below a folder: files with their bytes, links with their ends."""
  found: dict[str, bytes | str] = {}
  for path in sorted(root.rglob("*")):
    name = path.relative_to(root).as_posix()
    if path.is_symlink():
      found[name] = os.readlink(path)
    elif path.is_file():
      found[name] = path.read_bytes()
  return found


def ends(capsys, stage, *argv, run=None, flags=(), **options):
  """Runs a stage in this process: its exit code, and what it says of it."""
  module = {"convert": convert, "pretrain": pretrain, "rollout": rollout}[stage]
  try:
    cli.main(
      stage,
      run or module.run,
      "",
      flags or getattr(module, "FLAGS", ()),
      argv=[str(argument) for argument in argv],
      **options,
    )
    code = 0
  except SystemExit as end:
    code = end.code
  said = capsys.readouterr().err
  if code == 2:
    assert said.splitlines()[-1].startswith(f"trd-jax {stage}: ")
  return code, said


# -- run directories ---------------------------------------------------------


def spelt(run_dir: RunDir) -> list[Path]:
  """Every path that a run directory spells."""
  stages = (*ownership.STAGES, "evaluate")
  found = [
    *(run_dir.stage(name) for name in stages),
    run_dir.model_folder_for_random("nano"),
    run_dir.round(2).root,
    run_dir.round(2).config,
    run_dir.root / "locks",
    run_dir.root / "locks" / "rollout.lock",
  ]
  for name, member in inspect.getmembers(RunDir):
    if isinstance(member, property):
      found.append(getattr(run_dir, name))
    elif name in _OF_A_STAGE:
      found += [getattr(run_dir, name)(stage) for stage in stages]
  for stage in stages:
    found += [run_dir.stage(stage) / name for name in _FILES]
  return sorted(set(found))


_OF_A_STAGE = (
  *("metrics_file", "preflight", "stage_summary", "comparison", "rejected"),
)
_FILES = ("done.json", "shard-0-0-0.parquet", "notes.txt", "train.py")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A config of a few problems, and the flag that names it."""
  path = tmp_path_factory.mktemp("config") / "config.json"
  fields = {"data.arithmetic.num_problems": 4}
  path.write_text(experiment.to_json(small(**fields)))
  return f"--config={path}"


ONLY = "--config.preflight_only=True"
# No prompt is so short: the stage is refused after it has read its problems.
REFUSED = "--config.rollout.max_prompt_tokens=2"


def test_what_lies_under_a_name_of_ours_is_refused_and_stays(
  config, tmp_path, capsys
):
  """A file at every path that a run directory spells, one at a time."""
  paths = spelt(RunDir(tmp_path / "x"))
  assert len(paths) > 80
  for number, like in enumerate(paths):
    root = tmp_path / str(number)
    path = root / like.relative_to(tmp_path / "x")
    path.parent.mkdir(parents=True)
    path.write_bytes(MINE)
    before = everything(root)
    code, said = ends(capsys, "rollout", config, f"--workdir={root}", ONLY)
    # What is not in the way of a run is none of its business.
    free = path.parent.name in ("models", "teacher_cache")
    assert code == (0 if free else 2), path
    if free:
      assert ends(capsys, "rollout", config, f"--workdir={root}", REFUSED)[0]
      assert before.items() <= everything(root).items(), path
    else:
      assert str(path) in said
      assert everything(root) == before


def test_a_workdir_with_other_things_in_it_is_a_workdir(
  config, tmp_path, capsys
):
  for name in ("thesis.tex", "code/main.py", "models/Qwen3/config.json"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(MINE)
  (tmp_path / "mine").symlink_to("nowhere")
  before = everything(tmp_path)
  for flag, code in ((REFUSED, 2), (ONLY, 0)):
    flags = (config, f"--workdir={tmp_path}", flag)
    assert ends(capsys, "rollout", *flags)[0] == code
    there = everything(tmp_path)
    assert there.pop("rollout/preflight.json")
    assert there == before
  # It is free for another config, and knows its own reports again.
  other = f"{REFUSED[:-1]}400"
  flags = (config, f"--workdir={tmp_path}", ONLY, other)
  assert ends(capsys, "rollout", *flags)[0] == 0


def test_a_refused_command_leaves_nothing_of_its_own(config, tmp_path, capsys):
  def refused(chosen, run_dir, flags):
    store.load(chosen, run_dir)
    raise UserError("that is no way to go on")

  argv = (config, f"--workdir={tmp_path / 'a/b/run'}")
  assert ends(capsys, "rollout", *argv, run=refused)[0] == 2
  assert not any(tmp_path.iterdir())
  # Folders that were there stay, and those that are links.
  run = tmp_path / "run"
  for name in ("locks", "rollout"):
    (run / name).mkdir(parents=True)
  (tmp_path / "big disk").mkdir()
  (run / "problems").symlink_to(tmp_path / "big disk")
  argv = (config, f"--workdir={run}")
  assert ends(capsys, "rollout", *argv, run=refused)[0] == 2
  assert everything(tmp_path) == {"run/problems": str(tmp_path / "big disk")}
  assert {path.name for path in run.iterdir()} == {
    "locks",
    "rollout",
    "problems",
  }


def test_what_comes_while_a_command_is_at_work_stays(config, tmp_path, capsys):
  mine = {"problems/notes.txt", "problems/shard-1.parquet", "rollout/a.txt"}

  def refused(chosen, run_dir, flags):
    store.load(chosen, run_dir)
    for name in mine:
      (run_dir.root / name).parent.mkdir(exist_ok=True)
      (run_dir.root / name).write_bytes(MINE)
    raise UserError("that is no way to go on")

  argv = (config, f"--workdir={tmp_path}")
  assert ends(capsys, "rollout", *argv, run=refused)[0] == 2
  assert everything(tmp_path) == dict.fromkeys(mine, MINE)


@pytest.mark.parametrize("name", ["problems", "rollout", "evaluate"])
def test_data_behind_a_link_stays(name, config, tmp_path, capsys):
  data = tmp_path / "data"
  data.mkdir()
  (data / "mine.jsonl").write_bytes(MINE)
  root = tmp_path / "run"
  root.mkdir()
  (root / name).symlink_to(data)
  code, said = ends(capsys, "rollout", config, f"--workdir={root}", ONLY)
  assert code == 2
  assert str(root / name / "mine.jsonl") in said
  assert everything(tmp_path) == {
    "data/mine.jsonl": MINE,
    f"run/{name}": str(data),
  }


@pytest.mark.parametrize(
  "text", [b"", b"{}", b"[1]", b'{"architectures": ["Qwen3"]}', b"{", None]
)
def test_a_config_json_that_is_no_runs_stays(text, config, tmp_path, capsys):
  path = tmp_path / "config.json"
  if text is None:
    path.symlink_to("nowhere")
  else:
    path.write_bytes(text)
  before = everything(tmp_path)
  code, said = ends(capsys, "rollout", config, f"--workdir={tmp_path}", ONLY)
  assert code == 2
  assert str(path) in said
  assert everything(tmp_path) == before


def test_rows_without_a_config_are_known_again(config, tmp_path, capsys):
  argv = (config, f"--workdir={tmp_path}")

  def run(chosen, run_dir, flags):
    store.load(chosen, run_dir)

  assert ends(capsys, "rollout", *argv, run=run)[0] == 0
  (tmp_path / "config.json").unlink()
  assert ends(capsys, "rollout", *argv, run=run)[0] == 0
  assert RunDir(tmp_path).done("problems")


def test_the_pipeline_refuses_what_is_in_its_way(tmp_path):
  """The real one, as node.sh starts it first."""
  (tmp_path / "problems").mkdir()
  (tmp_path / "problems" / "mine.jsonl").write_bytes(MINE)
  command = [sys.executable, "-m", "trd_jax.pipeline", ONLY]
  command += ["--config=configs/demo.py", f"--workdir={tmp_path}"]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 2
  assert "problems/mine.jsonl is there" in ended.stderr
  assert ended.stderr.count("\n") == 1
  assert everything(tmp_path) == {"problems/mine.jsonl": MINE}


def test_a_foreign_checkpoint_and_a_foreign_shard_stay(tmp_path):
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "checkpoints" / "3" / "mine").write_bytes(MINE)
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  for use in (lambda: checkpoints.save(9, {"step": 9}), checkpoints.latest):
    with pytest.raises(UserError, match="3 is no checkpoint of trd-jax"):
      use()
  cache = TeacherCache(tmp_path, Identity("r", "float32", "float32", 2))
  cache.folder.mkdir()
  (cache.folder / "notes.txt").write_bytes(MINE)
  (cache.folder / "hidden-000001.safetensors").write_bytes(b"half")
  with cache.filling():
    pass
  assert not (cache.folder / "hidden-000001.safetensors").exists()
  (cache.folder / "lock").write_bytes(MINE)
  with pytest.raises(UserError, match="lock is no lock"), cache.filling():
    pass
  mine = [path for path, text in everything(tmp_path).items() if text == MINE]
  assert len(mine) == 3


# -- folders that are written whole ------------------------------------------


def converts(capsys, target, source="lab:student", to="hf"):
  flags = (f"--source={source}", f"--target={target}", f"--to={to}")
  return ends(capsys, "convert", *flags, standalone=True)


def is_whole(folder: Path) -> bool:
  """Whether a folder is the shipped student, and nothing lies beside it."""
  there, shipped = (
    everything(folder),
    everything(hub.model_folder("lab:student")),
  )
  there.pop(ownership.MARKER)
  shipped.pop(ownership.MARKER, None)
  beside = [p for p in folder.parent.iterdir() if ".trd-jax." in p.name]
  return there == shipped and not beside


def test_what_a_conversion_wrote_it_replaces(tmp_path, capsys):
  target = tmp_path / "out"
  assert converts(capsys, target)[0] == 0
  assert is_whole(target)
  assert converts(capsys, f"{target}/")[0] == 0
  assert is_whole(target)
  shutil.copytree(target, tmp_path / "copy")
  assert converts(capsys, tmp_path / "copy")[0] == 0


def _files(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(MINE)


def _changed(folder):
  text = (folder / "tokenizer_config.json").read_bytes()
  (folder / "tokenizer_config.json").write_bytes(
    text.replace(b"assistant", b"Assistant")
  )


_STRANGE = {
  "notes.txt": lambda folder: _files(folder, "notes.txt"),
  "sub/dir/notes.txt": lambda folder: _files(folder, "sub/dir/notes.txt"),
  "kept": lambda folder: (folder / "kept").mkdir(),
  "link": lambda folder: (folder / "link").symlink_to(folder.parent / "data"),
  "tokenizer_config.json": _changed,
}


@pytest.mark.parametrize("name", _STRANGE)
def test_what_a_user_has_put_into_a_target_stays(name, tmp_path, capsys):
  target = tmp_path / "out"
  (tmp_path / "data").mkdir()
  _files(tmp_path / "data", "mine")
  assert converts(capsys, target)[0] == 0
  _STRANGE[name](target)
  before = everything(tmp_path)
  code, said = converts(capsys, target)
  assert code == 2
  assert f"--target={target} holds {name}, which would be lost" in said
  assert said.count("\n") == 1
  assert everything(tmp_path) == before
  assert name != "kept" or (target / "kept").is_dir()


@pytest.mark.parametrize(
  "names",
  [
    ["model.safetensors", "config.json", "thesis.tex"],
    ["adapter_config.json"],
    ["orbax/0/mine"],
    [".trd-jax.json"],
  ],
)
def test_a_folder_of_known_names_is_no_target(names, tmp_path, capsys):
  _files(tmp_path / "out", *names)
  before = everything(tmp_path)
  code, said = converts(capsys, tmp_path / "out")
  assert (code, said.count("\n")) == (2, 1)
  assert everything(tmp_path) == before


def test_a_target_is_written_through_a_link(tmp_path, capsys):
  (tmp_path / "disk").mkdir()
  link = tmp_path / "link"
  link.symlink_to(tmp_path / "disk")
  for _ in range(2):
    assert converts(capsys, link)[0] == 0
    assert os.readlink(link) == str(tmp_path / "disk")
    assert is_whole(tmp_path / "disk")
  (tmp_path / "disk" / "mine").write_bytes(MINE)
  assert converts(capsys, link)[0] == 2
  assert (tmp_path / "disk" / "mine").read_bytes() == MINE


def test_targets_that_can_not_be_are_refused_by_name(
  tmp_path, capsys, monkeypatch
):
  assert converts(capsys, tmp_path / "source")[0] == 0
  _files(tmp_path, "file")
  (tmp_path / "lost").symlink_to("nowhere")
  (tmp_path / "again").symlink_to("source")
  monkeypatch.chdir(tmp_path)
  before = everything(tmp_path)
  source = tmp_path / "source"
  for target, told in (
    ("file", "is no folder"),
    ("file/below", "is no folder"),
    ("lost", "leads nowhere"),
    ("lost/below", "leads nowhere"),
    ("/", "would replace"),
    (".", "would replace"),
    ("source", "would replace"),
    ("again", "would replace"),
    ("source/below", "lies in --source"),
    ("again/below", "lies in --source"),
  ):
    code, said = converts(capsys, target, source, "orbax")
    assert code == 2, target
    assert told in said
    assert f"{target}" in said
    assert said.count("\n") == 1
    assert everything(tmp_path) == before


def test_a_target_in_the_home_makes_no_folder_of_that_name(
  tmp_path, capsys, monkeypatch
):
  (tmp_path / "home").mkdir()
  (tmp_path / "here").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "here")
  assert converts(capsys, "~/x")[0] == 0
  assert is_whole(tmp_path / "home" / "x")
  assert not any((tmp_path / "here").iterdir())


def test_a_hard_link_to_what_is_replaced_keeps_its_bytes(tmp_path, capsys):
  assert converts(capsys, tmp_path / "out")[0] == 0
  linked, kept = tmp_path / "out" / "tokenizer.json", tmp_path / "kept"
  kept.hardlink_to(linked)
  before = kept.read_bytes()
  assert converts(capsys, tmp_path / "out")[0] == 0
  assert kept.read_bytes() == before
  assert not kept.samefile(linked)


_AS_NOBODY = """
import os, sys
from trd_jax.model.weights.model_folder import check_replaceable
if os.getuid() == 0:
  os.setuid(65534)  # root may write anywhere
check_replaceable(sys.argv[1], "--target")
"""


def test_a_target_that_may_not_be_written_is_reported(tmp_path):
  locked = tmp_path / "locked"
  (locked / "below").mkdir(parents=True)
  for folder in (locked / "below", locked):
    folder.chmod(0o555)
  for target in (locked, locked / "below", locked / "new" / "one"):
    command = [sys.executable, "-c", _AS_NOBODY, str(target)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be written" in ended.stderr
  locked.chmod(0o755)


def test_who_may_see_a_folder_stays_as_it_was(tmp_path, capsys):
  (tmp_path / "out").mkdir(mode=0o700)
  assert converts(capsys, tmp_path / "out")[0] == 0
  assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_of_three_conversions_at_once_all_that_end_well_are_whole(tmp_path):
  target = tmp_path / "out"
  command = [sys.executable, "-m", "trd_jax.convert", "--source=lab:student"]
  command += [f"--target={target}", "--to=hf"]
  pipe = subprocess.PIPE
  for _ in range(2):  # into nothing, and over what the first ones made
    started = [
      subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
      for _ in range(3)
    ]
    ended = [(one.communicate(timeout=300), one.returncode) for one in started]
    assert {code for _, code in ended} <= {0, 2}
    assert 0 in {code for _, code in ended}
    for (_, said), code in ended:
      assert code == 0 or (
        said.count("\n") == 1 and "another process is at work on" in said
      )
    assert is_whole(target)


def _written(folder: Path, **files: bytes) -> None:
  with atomic_folder(folder) as out:
    for name, text in files.items():
      (out / name).write_bytes(text)


def test_a_target_replaced_in_the_midst_of_a_look_is_looked_at_again(
  tmp_path, monkeypatch
):
  target, new = tmp_path / "out", tmp_path / "new"
  _written(target, one=b"1")
  _written(new, two=b"2")
  leaves = ownership._leaves

  def replaced(folder):
    if new.exists():  # after the mark was read, and before the files are
      target.rename(tmp_path / "former")
      new.rename(target)
    return leaves(folder)

  monkeypatch.setattr(ownership, "_leaves", replaced)
  assert check_replaceable(target) == target
  assert not new.exists()
  _files(target, "mine")
  with pytest.raises(UserError, match="holds mine"):
    check_replaceable(target)


@pytest.mark.parametrize("step", ["_leaves", "_content", "remove"])
def test_two_processes_may_remove_what_was_there(step, tmp_path, monkeypatch):
  """Who replaces a folder lets go of its lock before the former one is gone."""
  target, former = tmp_path / "out", tmp_path / ".out.trd-jax.old"
  for folder in (target, former):
    _written(folder, one=b"1", two=b"2")
  function = getattr(ownership, step)

  def other_is_faster(path, *args):
    if path == former:  # as a whole
      shutil.rmtree(former)
    elif path.parent == former:  # the file that is looked at
      path.unlink()
    return function(path, *args)

  monkeypatch.setattr(ownership, step, other_is_faster)
  _written(target, three=b"3")
  assert set(everything(tmp_path)) == {"out/three", f"out/{ownership.MARKER}"}


_HOLDER = """
import os, sys
from trd_jax.model.weights.model_folder import atomic_folder
with atomic_folder(sys.argv[1]) as out:
  (out / 'half').write_bytes(b'half')
  print('held', flush=True)
  sys.stdin.read()
"""


def test_who_comes_second_is_refused_until_the_first_is_gone(tmp_path, capsys):
  target = tmp_path / "out"
  command = [sys.executable, "-c", _HOLDER, str(target)]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe) as first:
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    (tmp_path / "link").symlink_to(target)
    for name in ("out", "out/"):
      code, said = converts(capsys, f"{tmp_path}/{name}")
      assert code == 2
      assert f"at work on {target}" in said
    assert not target.exists()
    first.kill()
  # What it left is cleared away.
  assert converts(capsys, target)[0] == 0
  assert is_whole(target)


def test_a_folder_by_way_of_which_one_is_written_may_be_a_users(tmp_path):
  for name in (".out.trd-jax.tmp", ".out.trd-jax.old"):
    for file in ("mine", ownership.MARKER):
      _files(tmp_path, f"{name}/{file}")
      with (
        pytest.raises(UserError, match=f"holds {file}"),
        atomic_folder(tmp_path / "out"),
      ):
        pass
      assert everything(tmp_path) == {f"{name}/{file}": MINE}
      shutil.rmtree(tmp_path / name)


def test_what_comes_into_a_folder_while_it_is_replaced_stays(tmp_path):
  with atomic_folder(tmp_path / "out") as out:
    (out / "one").write_bytes(b"1")

  def write_and_add(text):
    with atomic_folder(tmp_path / "out") as out:
      (out / "one").write_bytes(text)
      (tmp_path / "out" / "mine").write_bytes(MINE)

  with pytest.raises(UserError, match=r"holds mine"):
    write_and_add(b"2")
  found = everything(tmp_path)
  found.pop("out/.trd-jax.json")
  assert found == {"out/one": b"1", "out/mine": MINE}


def test_a_folder_from_before_marks_is_replaced_by_the_same_only(tmp_path):
  """An older version was killed between an adapter and the end of merge."""
  _files(tmp_path / "out", "adapter_model.safetensors")
  known = ("adapter_model.safetensors",)
  check_replaceable(tmp_path / "out", compared_later=known)
  for text in (b"another", MINE):
    refused = text != MINE
    try:
      with atomic_folder(tmp_path / "out", known) as out:
        (out / known[0]).write_bytes(text)
    except UserError:
      assert refused
    assert (tmp_path / "out" / known[0]).read_bytes() == MINE
    assert (tmp_path / "out" / ownership.MARKER).exists() != refused


def test_a_pretrained_model_replaces_nothing_of_a_users(tmp_path, capsys):
  _files(tmp_path / "out", "model.safetensors")
  # So many steps would not end.
  flags = (f"--out={tmp_path / 'out'}", "--steps=100000")
  code, said = ends(capsys, "pretrain", *flags, standalone=True)
  assert code == 2
  assert "holds model.safetensors, which would be lost" in said
  assert everything(tmp_path) == {"out/model.safetensors": MINE}


# -- files that a user names -------------------------------------------------


def test_verdicts_replace_verdicts_alone(tmp_path, capsys, monkeypatch):
  answers = tmp_path / "answers.jsonl"
  row = {"completion": r"\boxed{3}", "gold": "3"}
  answers.write_text(json.dumps(row) + "\n")
  (tmp_path / "same").hardlink_to(answers)
  (tmp_path / "link").symlink_to(answers)
  (tmp_path / "lost").symlink_to("nowhere")
  for name, text in (("notes", MINE), ("rows", b'{"a": 1}\n'), ("list", b"[]")):
    (tmp_path / name).write_bytes(text)
  (tmp_path / "empty").touch()
  before = everything(tmp_path)

  def grade(out):
    try:
      verifier.main([str(answers), f"--out={out}"])
    except SystemExit as end:
      return end.code, capsys.readouterr().err
    return 0, ""

  for name in (
    "answers.jsonl",
    "same",
    "link",
    "lost",
    "notes",
    "rows",
    "list",
  ):
    code, said = grade(tmp_path / name)
    assert (code, said.count("\n")) == (2, 1), name
    assert str(tmp_path / name) in said
    assert everything(tmp_path) == before
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "through").symlink_to("out")
  assert grade("~/out")[0] == 0
  for name in ("out", "empty", "through"):
    assert grade(tmp_path / name)[0] == 0
    found = [json.loads(s) for s in (tmp_path / name).read_text().splitlines()]
    assert [one["correct"] for one in found] == [True]
  assert os.readlink(tmp_path / "through") == "out"
  assert not (tmp_path / "~").exists()
  assert answers.read_bytes() == before["answers.jsonl"]
