"""Every row of the paper's tables resolves, to the paper's values."""

import itertools
import os
import shutil
import subprocess
import sys
import types

import jax
import pytest
from flax import nnx

from tests.support.places import ROOT
from trd_jax.experiment import config_file, experiment, paper_recipe
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3
from trd_jax.pipeline import dry_run, pipeline

CONFIGS = ROOT / "configs"

# Tables 1 to 4 and 6 to 8: (regime, model, domain, method, subset).
ROWS = [
  *itertools.product(
    ["opd"], ["1.7b", "4b"], ["math", "code"], paper_recipe.METHODS, ["all"]
  ),
  *itertools.product(
    ["opsd"], ["8b", "4b"], ["math"], paper_recipe.METHODS, ["all"]
  ),
  *itertools.product(
    ["opsd"],
    ["8b"],
    ["math"],
    ["forward_kl", "reverse_kl", "trd"],
    ["fail", "succ", "fail_to_succ"],
  ),
]


def resolve(regime, **variant):
  arg = ",".join(f"{key}={value}" for key, value in variant.items())
  values, source = config_file.load(f"{CONFIGS / regime}.py:{arg}")
  return experiment.from_config(values, source)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_row_has_the_papers_values(row):
  regime, model, domain, method, subset = row
  e = resolve(regime, model=model, domain=domain, method=method, subset=subset)
  path = {
    "1.7b": "Qwen/Qwen3-1.7B",
    "4b": "Qwen/Qwen3-4B-Instruct-2507",
    "8b": "Qwen/Qwen3-8B",
  }
  math, opd, refines = domain == "math", regime == "opd", method == "trd"
  assert (e.regime, e.domain, e.method) == (regime, domain, method)
  assert e.student.path == path[model]
  assert e.teacher_model.path == path["8b" if opd else model]
  assert e.student.dtype == e.teacher_model.dtype == "bfloat16"
  # Hybrid models think in rollout and in mathematics, never while refining.
  hybrid = model in {"1.7b", "8b"}
  assert e.student.thinking == (True if hybrid else None)
  assert e.evaluate.thinking == (math if hybrid else None)
  assert e.refine.thinking is False
  assert e.teacher.thinking is e.train.student_thinking is None

  # Table 13: trajectory, divergence, clip, support, longest lengths.
  assert e.stages == (
    ("rollout", "refine", "train", "merge")
    if refines or subset == "fail_to_succ"
    else ("rollout", "train", "merge")
  )
  clips = {"opd": 0.1, "opsd": 0.06}
  assert e.coordinates.clip == (
    clips[regime] if method == "forward_kl_clip" else None
  )
  assert e.loss.top_k == 32
  on_draft, on_refined = (18_432, 34_816) if opd else (22_528, 38_912)
  assert e.train.max_teacher_tokens == (on_refined if refines else on_draft)
  assert e.train.max_student_tokens == on_draft
  assert e.train.subset == subset

  # Table 14.
  train = e.train
  assert (train.beta1, train.beta2, train.eps) == (0.9, 0.999, 1e-8)
  assert (train.learning_rate, train.final_lr_ratio) == (5e-6, 0.1)
  assert (train.warmup_ratio, train.weight_decay) == (0.1, 0.005)
  assert (train.grad_clip, train.epochs, train.batch_size) == (1.0, 1, 128)
  assert (train.truncated, train.remat) == ("keep", "full")
  assert (e.loss.temperature, e.loss.chunk_tokens) == (1.0, 512)
  assert (e.lora.rank, e.lora.alpha, e.lora.dropout) == (64, 128.0, 0.05)
  assert e.loss.diagnostics  # Figure 3

  # Tables 9 and 10: sampling and budgets.
  for stage in (e.rollout, e.refine, e.evaluate):
    assert (stage.temperature, stage.top_p, stage.top_k) == (0.6, 0.95, 20)
  prompt = 4_096 if math else 2_048
  assert e.rollout.max_prompt_tokens == prompt
  assert e.rollout.max_response_tokens == 16_384
  assert e.rollout.samples == 1
  assert e.refine.max_prompt_tokens == (18_432 if opd else 22_528)
  assert e.refine.max_response_tokens == 16_384
  assert e.evaluate.max_prompt_tokens == prompt
  assert e.evaluate.max_response_tokens == (38_912 if math else 16_384)
  assert e.evaluate.k == 16
  assert e.evaluate.benchmarks == (
    ("aime24", "aime25", "hmmt25", "beyondaime", "amobench")
    if math
    else ("humanevalplus", "mbppplus", "livecodebench")
  )
  assert e.data.source == ("deepscaler" if math else "taco")
  assert (e.engine.name, e.engine.vllm.data_parallel) == ("vllm", 8)


def test_there_are_as_many_rows_as_the_tables_have():
  assert len(ROWS) == len(set(ROWS)) == 20 + 10 + 9


@pytest.mark.parametrize(
  ("regime", "arg", "told"),
  [
    ("opd", "model=8b", "choose from 1.7b, 4b, nano"),
    ("opsd", "model=1.7b", "choose from 8b, 4b, nano"),
    ("opsd", "domain=maths", "did you mean .math"),
    ("opsd", "method=trdd", "did you mean .trd"),
    ("opsd", "subset=failed", "fail_to_succ"),
    ("opsd", "modle=8b", 'no variant "modle"'),
    ("opsd", "settings=author", "did you mean .authors"),
    ("opd", "settings=authors,thinking=off", "chooses no thinking mode"),
    ("opd", "settings=authors,thinking=on", "settings=authors,thinking=on: "),
  ],
)
def test_what_no_row_has_is_refused(regime, arg, told):
  with pytest.raises(UserError, match=told) as caught:
    config_file.load(f"{CONFIGS / regime}.py:{arg}")
  assert str(caught.value).count("choose from") <= 1


def test_among_many_choices_of_which_none_is_near_there_is_no_hint():
  many = tuple(f"method_{number}" for number in range(13))
  with pytest.raises(UserError, match=r"x=zzz: choose from .*, method_12$"):
    paper_recipe._choose("x", "zzz", many)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_the_authors_code_differs_in_so_much_and_no_more(row):
  regime, model, domain, method, subset = row
  variant = {"model": model, "domain": domain, "method": method}
  paper = resolve(regime, **variant, subset=subset)
  theirs = resolve(regime, **variant, subset=subset, settings="authors")
  assert paper == resolve(regime, **variant, subset=subset, settings="paper")
  sides = experiment.flat(paper), experiment.flat(theirs)
  changed = {
    name: value for name, value in sides[1].items() if value != sides[0][name]
  }
  math, hybrid = domain == "math", model in {"1.7b", "8b"}
  expected = {
    "prompts.set": "authors",
    "data.decontaminate": "none",
    # The template's default: no switch is passed.
    "refine.thinking": None,
    "refine.overflow": "drop",
    "train.context": "plain",
    "train.beta2": 0.95,
    "lora.dropout": 0.0,
    "loss.mean": "token",
    "evaluate.top_k": -1,
    "evaluate.math_prompt": "card",
  }
  if hybrid:
    expected |= {"student.thinking": None, "evaluate.thinking": None}
  if math:
    budget = {"rollout.max_prompt_tokens", "evaluate.max_prompt_tokens"}
    expected |= dict.fromkeys(budget, 2048)
  if method == "forward_kl_clip":
    expected["loss.clip"] = 0.1
  assert changed == expected
  # What the two agree on.
  assert theirs.evaluate.code_prompt == "official"
  assert theirs.train.truncated == "keep"
  assert theirs.context_of_teacher == paper.context_of_teacher


def test_the_rest_of_the_methods_and_problems_are_reached_by_variants():
  e = resolve("opsd", method="jsd", cot="with_cot", gpus=4)
  assert (e.method, e.data.subset) == ("jsd", "with_cot")
  assert e.engine.vllm.data_parallel == 4


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_row_is_planned_to_its_last_command(row, tmp_path):
  regime, model, domain, method, subset = row
  e = resolve(regime, model=model, domain=domain, method=method, subset=subset)
  run_dir = RunDir(tmp_path / "run")
  steps = list(pipeline.commands(e))
  told = dry_run.describe(e, run_dir, [(a, [m], None) for a, m, _ in steps])
  assert "not known here" not in told
  sizes = {name: size for name, size, _ in dry_run.disk(e, run_dir)}
  assert all(size > 0 for size in sizes.values())
  # A subset that goes by the verdict of y_r needs it whatever is trained on.
  assert ("refine" in sizes) == (method == "trd" or subset == "fail_to_succ")
  # Bytes of bfloat16 weights, and the adapter in float32.
  shape = dry_run.KNOWN_MODELS[e.student.path]
  assert sizes["merge"] == 2 * shape.num_parameters() + sizes["train"] // 9


def planned(tmp_path, **changes):
  """The paper's OPSD on 8B, changed: bytes by stage, and the experiment."""
  values, source = config_file.load(f"{CONFIGS}/opsd.py:model=8b")
  e = experiment.from_config(values | changes, source)
  return {n: s for n, s, _ in dry_run.disk(e, RunDir(tmp_path))}, e


def test_what_is_kept_of_the_teacher_is_planned(tmp_path):
  plain, e = planned(tmp_path)
  responses = dry_run.num_problems(e) * e.refine.max_response_tokens
  recorded = {"refine.teacher_top_k": 20, "train.teacher": "topk_from_rollout"}
  top, _ = planned(tmp_path, **recorded)
  # Ids, log-probabilities and their mass, for each token of a response.
  assert top == plain | {
    "refine": plain["refine"] + responses * (20 * (4 + 4) + 4)
  }
  cached, _ = planned(tmp_path, **{"train.teacher": "hidden_cache"})
  assert cached == plain | {"teacher_cache": responses * 4096 * 2}
  raw = {"train.teacher": "hidden_cache", "method": "jsd"}
  assert planned(tmp_path, **raw)[0]["teacher_cache"] == responses * 4096 * 2
  # The larger teacher's width, in the dtype that it is stored in.
  other = {"regime": "opd", "teacher.path": "Qwen/Qwen3-4B-Instruct-2507"}
  other |= {"train.teacher": "hidden_cache", "train.max_student_tokens": 9000}
  found, _ = planned(tmp_path, **other)
  assert found["teacher_cache"] == 40_308 * 9000 * 2560 * 2


def test_rounds_are_planned_to_the_last(tmp_path):
  once, _ = planned(tmp_path)
  rounds = {"pipeline.rounds": 3}
  thrice, e = planned(tmp_path, **rounds)
  # The base is evaluated once.
  assert thrice.pop("evaluate") == 2 * once.pop("evaluate")
  assert thrice == {stage: 3 * size for stage, size in once.items()}
  assert "in all 3 rounds" in dry_run.describe(e, RunDir(tmp_path), [])


@pytest.mark.parametrize(
  ("every", "evaluated"), [(None, 1), (1, 7), (2, 4), (3, 3), (7, 1), (9, 1)]
)
def test_split_rounds_have_the_rows_of_one(tmp_path, every, evaluated):
  once, _ = planned(tmp_path)
  split = {"pipeline.rounds": 7, "pipeline.split": True}
  found, e = planned(tmp_path, **split, **{"pipeline.evaluate_every": every})
  graded = once.pop("evaluate") // 2
  assert found.pop("evaluate") == (1 + evaluated) * graded
  per_round = {"train": 7, "merge": 7}
  assert found == {n: per_round.get(n, 1) * s for n, s in once.items()}
  told = dry_run.describe(e, RunDir(tmp_path), [])
  assert "315 updates of 128, each problem in one of 7 rounds" in told
  assert "in all 7 rounds" in told


@pytest.mark.parametrize(
  ("changes", "generate", "train"),
  [
    ({}, "8: vllm, 8 copies on 1 each", "chosen from sizes"),
    (
      {
        "engine.vllm.data_parallel": 1,
        "engine.vllm.tensor_parallel": 4,
        "engine.ray.actors": 3,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "distributed.processes": 2,
      },
      "12: vllm, 1 copy on 4 each, in each of 3 Ray actors",
      "8: mesh.data=2, mesh.fsdp=4, mesh.tensor=1, in 2 processes",
    ),
    (
      {
        "engine.name": "server",
        "engine.server.urls": ("http://a", "http://b"),
        "mesh.tensor": 2,
      },
      "none here: 2 servers",
      "a multiple of 2: mesh.data=-1, mesh.fsdp=1, mesh.tensor=2",
    ),
  ],
)
def test_the_devices_that_a_config_asks_for_are_reported(
  tmp_path, changes, generate, train
):
  _, e = planned(tmp_path, **changes)
  told = dry_run.describe(e, RunDir(tmp_path), [])
  lines = told.splitlines()
  at = lines.index("devices that the config asks for:")
  assert lines[at + 1].endswith(f" {generate}")
  assert lines[at + 2].startswith("  train ")
  assert lines[at + 2].endswith(train)


def test_the_hours_of_the_card_are_reported(tmp_path):
  spec = f"{CONFIGS}/opsd.py:model=8b"
  card = config_file.expected(spec)
  assert "Expected on 8xH100, hours:minutes" in card
  assert card.endswith("AMOBench.")
  _, e = planned(tmp_path)
  told = dry_run.describe(e, RunDir(tmp_path), [], card)
  assert card in " ".join(told.split())
  assert config_file.expected(f"{CONFIGS}/demo.py") is None
  assert config_file.expected("run/config.json") is None


def test_too_little_free_disk_is_warned_of(tmp_path, monkeypatch):
  _, e = planned(tmp_path)
  sizes = {n: s for n, s, _ in dry_run.disk(e, RunDir(tmp_path))}
  asked = []

  def told(free, done=(), **changes):
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(
      shutil, "disk_usage", lambda p: asked.append(p) or usage
    )
    _, e = planned(tmp_path, **changes)
    steps = [
      (s, ["run"], "done before" if s in done else None)
      for s in ("rollout", "train", "merge")
    ]
    return dry_run.describe(e, RunDir(tmp_path / "not" / "yet"), steps)

  total = sum(sizes.values())
  assert "WARNING" not in told(total)
  assert "WARNING" in told(total - 1)
  assert "name a --workdir elsewhere" in told(total - 1)
  assert asked[0] == tmp_path
  # What is written needs no more room, nor here what goes elsewhere.
  assert "WARNING" not in told(total - sizes["rollout"], done=["rollout"])
  assert "WARNING" in told(total - sizes["rollout"] - 1, done=["rollout"])
  cache = {"train.teacher": "hidden_cache"}
  assert "WARNING" in told(total, **cache)
  elsewhere = {"train.cache_dir": "/big"}
  assert "WARNING" in told(total, **cache, **elsewhere)
  monkeypatch.setattr(dry_run, "_device", lambda path: str(path) == "/big")
  apart = told(total, **cache, **elsewhere)
  assert "WARNING" not in apart.partition("where /big is")[0]


def test_what_finished_rounds_have_written_needs_no_room(tmp_path, monkeypatch):
  one = planned(tmp_path)[0]
  one["evaluate"] //= 2  # base and trained
  _, e = planned(tmp_path, **{"pipeline.rounds": 3})
  run_dir = RunDir(tmp_path)

  def is_enough(free, *done):
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    names = [name for name, _, _ in pipeline.commands(e)]
    names += [f"round {n}, unless the student has collapsed" for n in (2, 3)]
    steps = [
      (name, ["run"], "done before" if name.startswith(done) else None)
      for name in names
    ]
    return "WARNING" not in dry_run.describe(e, run_dir, steps)

  left = 3 * sum(one.values()) + one["evaluate"]
  assert is_enough(left, "none")
  assert not is_enough(left - 1, "none")
  left -= one["evaluate"] + one["rollout"]
  first = ("evaluate/base", "rollout")
  assert is_enough(left, *first)
  assert not is_enough(left - 1, *first)
  left = sum(one.values())  # all but the third
  whole = ("evaluate", "rollout", "refine", "train", "merge", "round 2")
  assert is_enough(left, *whole)
  assert not is_enough(left - 1, *whole)


def test_planned_adapters_are_as_large_as_real_ones():
  for shape in dry_run.KNOWN_MODELS.values():
    made = jax.eval_shape(
      lambda c=shape: Qwen3(c, lora=LoraConfig(rank=64), rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.state(made, nnx.LoRAParam))
    assert shape.adapter_parameters(64) == sum(x.size for x in leaves)


@pytest.mark.slow
def test_a_dry_run_prints_a_row_and_leaves_nothing(tmp_path):
  workdir = tmp_path / "run"
  told = subprocess.run(
    [
      *(CONFIGS.parent / "launch" / "node.sh", "configs/opsd.py:model=8b"),
      *(workdir, "--dry-run", "--", "--config.train.epochs=2"),
      "--config.pipeline.rounds=2",
    ],
    env=os.environ
    | {"TRD_PYTHON": sys.executable, "PYTHONPATH": str(CONFIGS.parent)},
    capture_output=True,
    text=True,
  )
  assert told.returncode == 0, told.stderr
  stages = ("evaluate", "rollout", "refine", "train", "merge")
  for stage in stages:
    assert (
      f"-m trd_jax.{stage} --config=configs/opsd.py:model=8b" in told.stdout
    )
  assert "at most 630 updates of 128 a round" in told.stdout
  assert "8b rollout 4:20" in told.stdout
  student = f"--config.student.path={workdir}/merge/model"
  (second,) = [s for s in told.stdout.splitlines() if student in s]
  assert second.endswith(f"--workdir={workdir}/rounds/2")
  assert not workdir.exists()
