"""What a dry run says of a config before anything of it is run."""

import json

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import cli, config_file, experiment
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import choices, data_checks, example_prompts, pipeline

OPSD = str(ROOT / "configs/opsd.py")
DEMO = str(ROOT / "configs/demo.py")


def chosen(spec=DEMO, **overrides):
  """The experiment of a config file, changed by dotted keys."""
  config, source = config_file.load(spec)
  return experiment.from_config(config | overrides, source)


def rows_file(tmp_path, count=3):
  path = tmp_path / "own.jsonl"
  row = {"problem": "What is 6 times 7?", "answer": "42", "solution": "So 42."}
  path.write_text("".join(json.dumps(row) + "\n\n" for _ in range(count)))
  return path


def dry_run(capsys, tmp_path, *argv, spec=DEMO):
  cli.main(
    "pipeline",
    pipeline.run,
    "runs",
    pipeline.FLAGS,
    looks_only=True,
    argv=[
      *(f"--config={spec}", f"--workdir={tmp_path / 'run'}", "--dry_run"),
      *argv,
    ],
  )
  assert not (tmp_path / "run").exists()
  return capsys.readouterr().out


def test_the_keys_of_a_variant_stand_beside_what_they_were():
  spec = f"{OPSD}:model=8b,settings=authors"
  e = chosen(spec, **{"loss.mean": "trajectory"})
  head, *lines = choices.settings(e, spec)
  assert head.startswith("settings=authors has set")
  told = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
  assert told["train.context"] == "plain (without: chat)"
  assert told["lora.dropout"] == "0.0 (without: 0.05)"
  assert told["loss.mean"] == (
    "token (without: trajectory; the command says trajectory)"
  )
  # All that differ, and no other.
  plain = experiment.flat(chosen(f"{OPSD}:model=8b"))
  authors = experiment.flat(chosen(spec))
  assert told.keys() == {key for key in plain if plain[key] != authors[key]}
  for same in (f"{OPSD}:model=8b", OPSD, DEMO):
    assert list(choices.settings(chosen(same), same)) == []
  (nothing,) = choices.settings(chosen(OPSD), f"{OPSD}:settings=paper")
  assert nothing.startswith("settings=paper changes nothing")


def test_each_role_says_who_named_its_model():
  e = chosen(f"{DEMO}:regime=opd")
  student, teacher = choices.models(e, ["--config.student.path=lab:student"])
  assert student.split("(")[1] == "student.path of the command)"
  assert teacher.split("(")[1] == "the default)"
  student, teacher = choices.models(chosen(OPSD), [])
  assert student.split("(")[1] == "student.path of the config)"
  assert "the student's own base" in teacher


def test_rows_of_one_s_own_file_are_counted(tmp_path, monkeypatch, capsys):
  path = rows_file(tmp_path)
  mine = {"data.source": "jsonl", "data.root": str(path), "domain": "math"}
  assert data_checks.num_problems(chosen(**mine)) == 3
  assert data_checks.num_problems(chosen(**mine, **{"data.limit": 2})) == 2
  with path.open("a") as file:
    file.write('{"problem": "1 + 1?", "answer": "2"}\n')
  assert data_checks.num_problems(chosen(**mine)) == 4
  flags = [f"--config.{key}={value}" for key, value in mine.items()]
  said = dry_run(capsys, tmp_path, *flags)
  assert "problems         4, at most 1 update of 32" in said
  assert "What is 6 times 7?" in said
  # Large ones aren't, and that is said.
  monkeypatch.setattr(data_checks, "_MOST_BYTES", 100)
  assert data_checks.num_problems(chosen(**mine)) is None
  said = dry_run(capsys, tmp_path, *flags)
  assert "problems  not counted here" in said
  assert "<x: the problem>" in said
  # What isn't there is refused elsewhere, in a line of its own.
  path.unlink()
  assert data_checks.num_problems(chosen(**mine)) is None


def test_a_prompt_of_each_stage_is_shown_as_the_model_reads_it(
  tmp_path, capsys
):
  said = dry_run(capsys, tmp_path)
  part = said[said.index("a prompt of each stage:") : said.index("would run")]
  assert "  rollout, to the student:\n    <|im_start|>user\n" in part
  assert "<y_o: what the student will have answered>" in part
  assert "Reference:\n" in part
  assert "  evaluate, arithmetic:\n" in part
  assert part.count("<|im_start|>assistant") == 3


@pytest.mark.parametrize("width", [40, 76])
def test_long_prompts_lose_their_middle_and_keep_to_the_width(tmp_path, width):
  path = tmp_path / "own.jsonl"
  row = {"problem": "word " * 400, "answer": "1", "solution": "\\boxed{1}"}
  path.write_text(json.dumps(row) + "\n")
  mine = {"data.source": "jsonl", "data.root": str(path), "domain": "math"}
  e = chosen(method="forward_kl", **mine)
  lines = list(example_prompts.describe(e, RunDir(tmp_path / "run"), width))
  titles = [line for line in lines if not line.startswith("   ") and line]
  assert [title.partition(",")[0].strip() for title in titles] == [
    *("rollout", "train", "evaluate"),
  ]
  assert sum(line.endswith(" characters …]") for line in lines) == 2
  assert max(len(line) for line in lines if line not in titles) <= width
  assert sum(map(len, lines)) < 3_000


def test_without_a_tokenizer_the_message_stands_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(
    example_prompts.hub_look, "cached", lambda *arguments: None
  )
  e = chosen(f"{OPSD}:model=8b")
  told = "\n".join(example_prompts.describe(e, RunDir(tmp_path / "run"), 76))
  assert "(without its template: the tokenizer isn't here):" in told
  assert "<x: the problem>" in told
  assert "<y*: the reference solution>" in told
  assert "<|im_start|>" not in told
  # A benchmark's own tool isn't started for an example.
  e = chosen(f"{OPSD}:model=8b,domain=code")
  told = "\n".join(example_prompts.describe(e, RunDir(tmp_path / "run"), 76))
  assert "humanevalplus: no example (its own tool writes the prompt)" in told
