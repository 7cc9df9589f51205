"""What reaches a terminal, in which characters, and how long its lines are."""

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import cli, findings, printing, tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.progress import Progress

COMMANDS = {
  "clear": "\x1b[2J",
  "title": "\x1b]0;mine\x07",
  "link": "\x1b]8;;http://there\x1b\\",
  "clipboard": "\x1b]52;c;cm0gLXJm\x07",
  "c1": "\x9b31m",
  "nul": "a\0b",
  "bell": "\a",
  "backspace": "rm\b\bls",
  "return": "done\rfailed",
  "delete": "\x7f",
  "backwards": "\u202egnp.exe\u202c",
  "isolated": "\u2066a\u2069",
  "another line": "a\u2028b\u2029c\x0bd\x0ce\x85f",
  "unseen": "a\U000e0041b",
  "bytes": b"\xff.jsonl".decode("utf-8", "surrogateescape"),
}


def _harmless(text: str) -> bool:
  return all(each.isprintable() or each in "\n\t" for each in text)


@pytest.mark.parametrize("text", COMMANDS.values(), ids=COMMANDS)
def test_what_commands_a_terminal_is_shown_and_not_sent(text, capsys):
  """In a message, a table, a finding, a progress line, a plain print."""

  def run(experiment, run_dir, flags):
    print(f"a file {text} it was")
    print(tables.columns([("what", text), (text, "else")]))
    print(findings.table([findings.Finding(text, "note", f"of {text}")]))
    with Progress(2, f"of {text}", text) as progress:
      progress.update(2, text)
    sys.stderr.write(f"{text}\n")
    raise UserError(f"there is no {text} here")

  with pytest.raises(SystemExit):
    cli.main("rollout", run, "does it", standalone=True, argv=[])
  out, err = capsys.readouterr()
  assert _harmless(out), ascii(out)
  assert _harmless(err), ascii(err)
  assert "a file " in out
  assert "else" in out
  assert "2/2" in err
  assert "there is no" in err


def test_an_unexpected_error_is_clean_too():
  program = (
    "from trd_jax.experiment import printing\n"
    "with printing.opened():\n"
    "  raise ValueError('\\x1b[2J\\u202e \\udcff')\n"
  )
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
  assert ended.returncode == 1
  assert rb"ValueError: \x1b[2J\u202e \udcff" in ended.stderr
  assert b"\x1b" not in ended.stderr


def test_text_of_people_stays_as_it_is(capsys):
  said = "Ünïcode → ≥ 中文 עברית العربية 👩‍🔬\tend\n"
  with printing.opened():
    sys.stdout.write(said)
  assert capsys.readouterr().out == said


def test_bars_of_other_packages_go_on_drawing(capsys, monkeypatch):
  with printing.opened():
    sys.stderr.write("\rfetch: 10%")
    sys.stderr.write("\rfetch: 20%")
  assert capsys.readouterr().err == "\rfetch: 10%\rfetch: 20%"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_what_an_encoding_lacks_is_spelt_otherwise(encoding):
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding=encoding)
  text = "loss 1 → 2, ≥ 3 … 中 \udc80 \x1b\n"
  printing.CleanStream(stream, None).write(text)
  stream.flush()
  shown = raw.getvalue().decode(encoding)
  assert shown.startswith("loss 1 ")
  assert "\\u4e2d \\udc80 \\x1b\n" in shown
  if encoding == "ascii":
    assert shown == "loss 1 -> 2, >= 3 ... \\u4e2d \\udc80 \\x1b\n"


_LOCALES = {
  "encoding": {"PYTHONIOENCODING": "ascii"},
  "locale": {
    **{"LC_ALL": "C", "LANG": "C"},
    **{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  },
}


@pytest.mark.parametrize("name", _LOCALES)
@pytest.mark.parametrize(
  "argv",
  [
    ["-m", "trd_jax"],
    ["-m", "trd_jax.pipeline", "--help"],
    ["-m", "trd_jax.pipeline", "--help_config"],
    ["-m", "trd_jax.pipeline", "--config=configs/opsd.py", "--dry_run"],
    ["-m", "trd_jax.doctor", "--list"],
    ["-m", "trd_jax.grading.code", "--help"],
    ["-m", "trd_jax.grading.math", "--help"],
  ],
  ids=" ".join,
)
def test_a_locale_without_our_characters_ends_nothing(name, argv, tmp_path):
  if "--dry_run" in argv:
    # Its own name has a letter that the locale lacks, too.
    argv = [*argv, f"--workdir={tmp_path / 'été'}"]
  ended = subprocess.run(
    [sys.executable, *argv],
    env=os.environ | _LOCALES[name] | {"PYTHONPATH": str(ROOT)},
    cwd=ROOT,
    capture_output=True,
  )
  # A dry run may find fault with the machine, in one line.
  assert ended.returncode in ((0, 2) if "--dry_run" in argv else (0,))
  assert b"Traceback" not in ended.stderr, ended.stderr.decode()
  assert ended.stdout.isascii()
  assert ended.stderr.isascii()
  assert ended.stdout or ended.stderr


@pytest.mark.parametrize("name", _LOCALES)
def test_grading_prints_json_in_any_locale(name, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(
    json.dumps({"completion": "\\boxed{→ \x1b é}", "gold": "→ é"}) + "\n"
  )
  ended = subprocess.run(
    [sys.executable, "-m", "trd_jax.grading.math", str(rows)],
    env=os.environ | _LOCALES[name] | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
  )
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.isascii()


def _on_a_terminal(argv, columns, **variables):
  """Returns what a command prints on a terminal of so many columns."""
  main, side = pty.openpty()
  size = struct.pack("HHHH", 24, columns, 0, 0)
  fcntl.ioctl(side, termios.TIOCSWINSZ, size)
  environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
  process = subprocess.Popen(
    [sys.executable, *argv],
    stdout=side,
    stderr=side,
    cwd=ROOT,
    env=environment | {"PYTHONPATH": str(ROOT)} | variables,
  )
  os.close(side)
  said = b""
  while True:
    try:
      block = os.read(main, 1 << 16)
    except OSError:  # the other end is closed
      break
    if not block:
      break
    said += block
  os.close(main)
  process.wait()
  return said.decode().replace("\r\n", "\n")


def test_a_message_is_wrapped_at_words_on_a_terminal_alone(tmp_path):
  argv = [
    *("-m", "trd_jax.rollout", "--config=configs/demo.py"),
    *(f"--workdir={tmp_path / 'run'}", "--config.lora.rnk=3"),
  ]
  for said in (
    _on_a_terminal(argv, 40),
    _on_a_terminal(argv, 200, COLUMNS="40"),
  ):
    lines = said.splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 40 for line in lines)
    assert lines[0].startswith("trd-jax rollout: ")
    assert all(line.startswith("  ") for line in lines[1:])
  plain = subprocess.run(
    [sys.executable, *argv],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40"},
    capture_output=True,
    text=True,
  )
  assert plain.stderr.count("\n") == 1
  assert " ".join(said.split()) == plain.stderr.strip()


def test_a_finding_goes_on_below_where_it_began_on_a_terminal_alone(
  monkeypatch,
):
  found = [
    findings.Finding("student", "ok", "a folder " * 9),
    findings.Finding("data", "note", "short"),
  ]
  plain = findings.table(found)
  assert plain.count("\n") == 1
  monkeypatch.setenv("COLUMNS", "40")
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  lines = findings.table(found).splitlines()
  assert len(lines) > 2
  assert all(len(line) <= 40 for line in lines)
  assert lines[0].startswith("  student  a folder")
  assert lines[1].startswith(11 * " " + "folder") or lines[1].startswith(
    11 * " " + "a folder"
  )
  assert " ".join(" ".join(lines).split()) == " ".join(plain.split())
