"""Every variant of configs/opd.py and configs/opsd.py is what a user can run.

All of them resolve, and the pipeline's dry run has nothing to warn of, with the
real tokenizer and the real chat templates.
"""

import functools
import itertools
import runpy
import types

import pytest

from tests.support.chat_folders import needs_qwen, real_chat
from tests.support.places import ROOT
from trd_jax.data import contexts, prompts
from trd_jax.data.problems import benchmarks
from trd_jax.experiment import experiment, paper_recipe
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.methods import METHODS
from trd_jax.experiment.processes import interpreters
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading.sandbox import sandbox
from trd_jax.model.known import KNOWN_MODELS, SIZES
from trd_jax.pipeline import data_checks, dry_run, model_checks, pipeline

STUDENTS = [
  *(("opd", model) for model in ("1.7b", "4b", "nano")),
  *(("opsd", model) for model in ("8b", "4b", "nano")),
]
MODES = ("default", "on", "off")
INSTRUCT = "Qwen/Qwen3-4B-Instruct-2507"

every_student = pytest.mark.parametrize(
  ("regime", "model"), STUDENTS, ids=lambda value: value
)


def variants(model):
  """All that can be asked of a student, but for what is refused."""
  settings = [
    ("paper", mode) for mode in MODES if (model, mode) != ("4b", "on")
  ]
  settings.append(("authors", "default"))
  cots = {"math": ("all", "with_cot", "answer_only"), "code": ("all",)}
  for domain in paper_recipe.BENCHMARKS:
    for chosen, thinking in settings:
      modes = {"model": model, "domain": domain}
      modes |= {"settings": chosen, "thinking": thinking}
      for method, subset, cot in itertools.product(
        paper_recipe.METHODS, paper_recipe.SUBSETS, cots[domain]
      ):
        yield modes | {"method": method, "subset": subset, "cot": cot}
      # The methods that the paper has no row of.
      for method in METHODS.keys() - set(paper_recipe.METHODS):
        yield modes | {"method": method, "subset": "all", "cot": "all"}


# Hundreds of variants ask in the same words.
prompt_set = functools.cache(prompts.load)


@functools.cache
def card(regime):
  return runpy.run_path(str(ROOT / "configs" / f"{regime}.py"))["get_config"]


def argument(variant):
  return ",".join(f"{name}={value}" for name, value in variant.items())


def resolve(regime, variant, **keys):
  config = card(regime)(argument(variant))
  config.update_from_flattened_dict(keys)
  return experiment.from_config(config, f"configs/{regime}.py")


@every_student
def test_every_variant_resolves(regime, model):
  """The paper's own values of rows are in `test_paper_recipe`."""
  seen = set()
  for variant in variants(model):
    e = resolve(regime, variant)
    seen.add(e)
    assert (e.regime, e.domain) == (regime, variant["domain"])
    assert (e.method, e.train.subset) == (variant["method"], variant["subset"])
    assert e.data.subset == variant["cot"]
  # Three ways to think and the authors' are four experiments, and two of a
  # student that can't.
  ways = 2 if model == "4b" else 4
  rows = 5 * len(paper_recipe.SUBSETS) * (3 + 1) + 2 * (len(METHODS) - 5)
  assert len(seen) == ways * rows


@every_student
def test_variants_that_contradict_each_other_are_refused(regime, model):
  refused = [
    {"settings": "authors", "thinking": mode} for mode in ("on", "off")
  ]
  refused += [{"thinking": "on"}] * (model == "4b")
  for variant in refused:
    with pytest.raises(UserError) as error:
      resolve(regime, {"model": model, **variant})
    assert "\n" not in str(error.value)


@pytest.fixture
def a_fit_machine(tmp_path, monkeypatch):
  """What a dry run asks of the hub and of the machine is there.

  The models, but for their weights; interpreters, a sandbox, room on the disk;
  and files of the data's names, as a dry run opens none.

  Returns:
    The keys that name the data.
  """
  data, asked = tmp_path / "data", tmp_path / "benchmarks"
  for folder, stems in (
    (data, ["deepscaler"]),
    (asked, [s for b in benchmarks.BENCHMARKS.values() for s in b.stems]),
  ):
    for stem in stems:
      path = folder / f"{stem}.jsonl"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()

  def open_model(side, model, *_):
    size = model.path.removeprefix("random:")
    shape = KNOWN_MODELS.get(model.path) or SIZES[size]
    chat = real_chat("instruct" if model.path == INSTRUCT else "hybrid")
    return model_checks.Opened(side, model.path, shape, chat)

  monkeypatch.setattr(model_checks, "open_model", open_model)
  monkeypatch.setattr(interpreters, "check", lambda *_: "3.11.0")
  monkeypatch.setattr(sandbox, "open", lambda **_: None)
  monkeypatch.setattr(
    data_checks, "of_run", lambda e, _: prompt_set(e.prompts.set)
  )
  monkeypatch.setattr(dry_run, "free_bytes", lambda _: 2**60)
  return {"data.root": str(data), "evaluate.root": str(asked)}


@needs_qwen
@pytest.mark.slow
@every_student
def test_the_dry_run_of_every_variant_warns_of_nothing(
  regime, model, tmp_path, a_fit_machine, capsys, caplog
):
  """But for one note, which is about the paper's budgets."""
  run_dir = RunDir(tmp_path / "run")
  for variant in variants(model):
    spec = f"{ROOT}/configs/{regime}.py:{argument(variant)}"
    e = resolve(regime, variant, **a_fit_machine)
    own = [f"--config={spec}", f"--workdir={run_dir.root}"]
    flags = {"dry_run": True, "status": None, "from": None}
    pipeline.run(e, run_dir, types.SimpleNamespace(**flags, config_argv=own))
    told = capsys.readouterr()
    assert told.err == "", spec
    looked, _, planned = told.out.partition("would run, in this order:")
    assert f"trd_jax.train --config={spec}" in planned
    for sign in ("WARNING", "WRONG", "not checked", "not known here"):
      assert sign not in told.out, spec
    expected = []
    positions = KNOWN_MODELS.get(e.student.path, SIZES["nano"]).max_positions
    # Table 10's response beside the longest prompt of Table 9: no question of a
    # benchmark is nearly so long.
    if (
      e.evaluate.max_prompt_tokens + e.evaluate.max_response_tokens > positions
    ):
      assert (variant["domain"], variant["settings"]) == ("math", "paper")
      expected.append(
        "note: evaluate: after prompts of 2,048 tokens or more a response of"
        f" 38,912 passes the 40,960 positions of {e.student.path} and is cut"
        " there"
      )
    notes = [line for line in looked.splitlines() if "note: " in line]
    assert [one.removeprefix("  budgets").strip() for one in notes] == expected
    student, teacher = (
      model_checks.open_model("", side).chat
      for side in (e.student, e.teacher_model)
    )
    # What the preflight of rollout and refine will say of the modes.
    modes = contexts.outlook(e, student, teacher)
    assert modes.warnings == [], spec
    theirs = variant["settings"] == "authors"
    how = "scored after plain text" if theirs else "written and scored with"
    assert how in modes.scoring, spec
  assert caplog.records == []
  assert not run_dir.root.exists()
