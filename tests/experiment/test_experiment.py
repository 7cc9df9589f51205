import typing

import pytest

from trd_jax.experiment import declarations, experiment, methods, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS, Experiment, from_config
from trd_jax.experiment.schema import Model


def test_the_default_config_is_the_default_experiment():
  assert from_config(experiment.default_config()) == Experiment()


def test_defaults_of_every_key_obey_their_own_rules():
  for key in KEYS.values():
    assert key.check(key.default) == key.default


def test_every_key_has_a_line_of_documentation():
  for key in KEYS.values():
    assert key.doc
    assert "\n" not in key.doc


def test_json_brings_every_value_back(tmp_path):
  config = experiment.default_config()
  config.method = "jsd"
  config.student.thinking = True
  config.train.max_steps = 7
  config.evaluate.benchmarks = ("aime24", "aime25")
  changed = from_config(config)
  path = tmp_path / "config.json"
  path.write_text(experiment.to_json(changed))
  assert experiment.from_json(path) == changed != Experiment()
  again = experiment.to_json(experiment.from_json(path))
  assert again == path.read_text()


@pytest.mark.parametrize(
  ("config", "complaint"),
  [
    ({"methd": "trd"}, 'no key "methd"; did you mean "method"?'),
    (
      {"train": {"learning_rat": 1.0}},
      'no key "train.learning_rat"; did you mean "train.learning_rate"?',
    ),
    # In the wrong section: found by its last part.
    ({"train": {"rank": 8}}, 'did you mean "lora.rank"?'),
    ({"rollouts": {"temperature": 1.0}}, 'did you mean "rollout.temperature"?'),
    ({"learning_rat": 1.0}, 'did you mean "train.learning_rate"?'),
    ({"train": 3}, "it is a section"),
    ({"student": {"path": {"a": 1}}}, 'no key "student.path.a"'),
    ({"train": {"epochs": "2"}}, "train.epochs must be an integer"),
    ({"train": {"epochs": 2.0}}, "train.epochs must be an integer"),
    ({"train": {"epochs": True}}, "train.epochs must be an integer"),
    ({"train": {"epochs": None}}, "train.epochs must be an integer"),
    ({"train": {"epochs": 0}}, "at least 1, not 0"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate must be"),
    ({"train": {"learning_rate": 0}}, "greater than 0"),
    ({"train": {"remat": "ful"}}, "one of full, none, dots, attention"),
    ({"rollout": {"top_p": 0.0}}, "above 0 and at most 1"),
    ({"rollout": {"top_k": 0}}, "-1 or at least 1"),
    ({"lora": {"dropout": 1.0}}, "at least 0 and below 1"),
    ({"student": {"thinking": "no"}}, "true or false, or None"),
    ({"student": {"path": ""}}, "non-empty"),
    ({"evaluate": {"benchmarks": "aime24"}}, "list of names"),
    ({"evaluate": {"benchmarks": (1,)}}, "list of names"),
    # No single key is to blame for these.
    ({"method": "reverse_kl_topk", "loss": {"top_k": 0}}, "above 0"),
    ({"method": "sampled_reverse_kl", "loss": {"clip": 0.1}}, "loss.clip=0"),
    (
      {"method": "tip", "loss": {"tip_entropy": 0, "tip_divergence": 0}},
      "weighs no token",
    ),
    ({"train": {"pack_tokens": 1}}, "at least 2, or None, not 1"),
    ({"train": {"attention": "flash"}}, "auto, xla, cudnn, tokamax"),
    (
      {"train": {"attention": "tokamax", "packing": True}},
      "tokamax is given no segments",
    ),
    ({"train": {"attention": "tokamax"}}, "set student.dtype=bfloat16"),
    (
      {
        "regime": "opd",
        "student": {"dtype": "bfloat16"},
        "train": {"attention": "cudnn"},
      },
      "set teacher.dtype=bfloat16",
    ),
    ({"mesh": {"data": -1, "fsdp": -1}}, "mesh.data, mesh.fsdp"),
    ({"data": {"arithmetic": {"min_steps": 5, "max_steps": 4}}}, "more than"),
    ({"evaluate": {"benchmarks": ("a", "a")}}, "twice"),
  ],
)
def test_a_bad_config_is_told_in_one_line_with_its_file(config, complaint):
  with pytest.raises(UserError) as error:
    from_config(config, "configs/mine.py")
  assert complaint in str(error.value)
  assert str(error.value).startswith("configs/mine.py: ")
  assert "\n" not in str(error.value)


def test_an_integer_is_a_number_and_a_list_of_names_a_tuple():
  chosen = from_config(
    {"lora": {"alpha": 16}, "evaluate": {"benchmarks": ["a", "b"]}}
  )
  assert chosen.lora.alpha == 16.0
  assert type(chosen.lora.alpha) is float
  assert chosen.evaluate.benchmarks == ("a", "b")


@pytest.mark.parametrize(
  ("name", "text", "value"),
  [
    ("train.epochs", "3", 3),
    ("train.learning_rate", "1e-4", 1e-4),
    ("train.max_steps", "None", None),
    ("loss.clip", "none", None),
    ("student.thinking", "false", False),
    ("loss.diagnostics", "True", True),
    ("evaluate.benchmarks", "aime24, aime25", ("aime24", "aime25")),
    ("evaluate.benchmarks", "('aime24',)", ("aime24",)),
    ("student.path", "None", "None"),  # cannot be absent: it is a name
  ],
)
def test_keys_read_what_a_person_types(name, text, value):
  assert KEYS[name].parse(text) == value
  assert type(KEYS[name].parse(text)) is type(value)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("train.epochs", "1.5"),
    ("train.epochs", "None"),
    ("train.epochs", "0"),
    ("train.learning_rate", "inf"),
    ("loss.diagnostics", "maybe"),
    ("evaluate.benchmarks", ""),
  ],
)
def test_keys_refuse_what_is_no_value(name, text):
  with pytest.raises(ValueError, match=f"{name} must be .*, not"):
    KEYS[name].parse(text)


@pytest.mark.parametrize(
  ("method", "regime", "asked", "clip"),
  [
    ("forward_kl_clip", "opd", None, 0.1),
    ("forward_kl_clip", "opsd", None, 0.06),
    ("forward_kl_clip", "opsd", 0.5, 0.5),
    ("forward_kl", "opd", None, None),
    ("trd", "opsd", None, None),
    ("trd", "opsd", 0.2, 0.2),
  ],
)
def test_the_clip_is_the_methods_own_unless_asked(method, regime, asked, clip):
  config = {"method": method, "regime": regime, "loss": {"clip": asked}}
  assert from_config(config).coordinates.clip == clip


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_has_the_stages_that_its_trajectory_needs(method):
  chosen = from_config({"method": method})
  refines = method in ("trd", "sft")
  assert chosen.teacher_writes == ("y_r" if refines else None)
  assert chosen.trains_on == ("y_r" if refines else "y_o")
  assert chosen.trajectory_stage == ("refine" if refines else "rollout")
  assert ("refine" in chosen.stages) == refines
  assert chosen.trajectory_stage in chosen.stages


def test_the_opsd_teacher_is_the_student_in_the_teachers_thinking_mode():
  config = {
    "regime": "opsd",
    "student": {"path": "s", "thinking": True, "adapter": "a"},
    "teacher": {"path": "t", "thinking": False},
  }
  own = from_config(config)
  # The base teaches, whatever adapter the student has.
  assert own.teacher_model == Model(path="s", thinking=False)
  other = from_config(config | {"regime": "opd"})
  assert other.teacher_model == other.teacher
  assert other.teacher_model.path == "t"


def test_every_key_knows_what_depends_on_it():
  known = set(typing.get_args(declarations.Scope))
  for key in KEYS.values():
    assert key.scopes, key.name
    assert set(key.scopes) <= known
    assert "runtime" not in key.scopes or len(key.scopes) == 1, key.name


def test_a_key_has_its_own_scope_before_its_sections():
  of = {name: key.scopes for name, key in KEYS.items()}
  assert of["train.epochs"] == ("train",)
  assert of["train.remat"] == ("runtime",)
  assert of["engine.jax.slots"] == ("runtime",)  # of the section around it
  # One class, three sections.
  for stage in ("rollout", "refine", "evaluate"):
    assert of[f"{stage}.temperature"] == (stage,)
  assert of["teacher.path"] == ("refine", "train")
  assert of["teacher.thinking"] == ("train",)


@pytest.mark.parametrize(
  "name",
  [
    "train.remat",
    "train.rows_per_device",
    "train.pack_tokens",
    "train.teacher_pack_tokens",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "loss.chunk_tokens",
  ],
)
def test_what_a_full_device_needs_changes_no_artifact(name):
  values = experiment.flat(Experiment())
  assert scopes.is_runtime(name)
  for stage in scopes.STAGES:
    assert name not in scopes.identity(values, stage)
  other = values | {name: "other"}
  assert scopes.differences(values, other) == {}
  assert scopes.obstacles(values, other, scopes.STAGES) == {}


def test_a_name_that_is_no_key_has_the_scopes_of_its_section():
  assert scopes.of("train.novel") == {"train"}
  assert scopes.of("sandbox.novel") == {"rollout", "evaluate"}
  assert scopes.of("engine.novel") == {"runtime"}
  values = experiment.flat(Experiment())
  for stage in scopes.STAGES:
    assert "novel.key" in scopes.identity(values | {"novel.key": 3}, stage)


def test_a_key_that_was_dropped_keeps_a_workdir_open():
  now = experiment.flat(experiment.Experiment())
  was = {**now, "evaluate.bootstrap": 10_000}
  assert not scopes.differences(was, now)
  assert not scopes.obstacles(was, now, list(scopes.STAGES))


def test_variants_take_the_types_of_their_defaults():
  variant = experiment.parse_arg(
    "model=8b,rank=4,quick", model="nano", rank=8, quick=False, seed=0
  )
  assert vars(variant) == {"model": "8b", "rank": 4, "quick": True, "seed": 0}
  assert vars(experiment.parse_arg(None, model="nano")) == {"model": "nano"}
  with pytest.raises(UserError, match=r'"modle".*did you mean "model"'):
    experiment.parse_arg("modle=8b", model="nano")
  with pytest.raises(UserError, match="rank must be an integer"):
    experiment.parse_arg("rank=big", rank=8)
  with pytest.raises(UserError, match="model must be"):
    experiment.parse_arg("model", model="nano")


def test_training_on_a_benchmark_is_refused():
  changed = {
    "data.arithmetic.split": "hard",
    "evaluate.benchmarks": ("arithmetic_hard",),
  }
  with pytest.raises(UserError, match="train on train or train_hard"):
    experiment.from_config(changed)
  experiment.from_config(changed | {"data.arithmetic.split": "train_hard"})


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_jsd_that_vanishes_is_refused(beta):
  changed = {"method": "jsd", "loss.beta": beta}
  with pytest.raises(UserError, match=r"jsd with loss\.beta="):
    experiment.from_config(changed)
  experiment.from_config(changed | {"method": "forward_kl"})


def test_servers_are_named_where_they_are_used_and_nowhere_else():
  served = {"engine.name": "server"}
  urls = {"engine.server.urls": ("http://127.0.0.1:8000",)}
  with pytest.raises(UserError, match=r"needs engine\.server\.urls"):
    experiment.from_config(served)
  with pytest.raises(UserError, match=r"is for engine\.name=server, not jax"):
    experiment.from_config(urls)
  chosen = experiment.from_config(served | urls)
  assert chosen.engine.server.urls == urls["engine.server.urls"]
  # Budgets can be looked at before there is any server.
  experiment.from_config(served | {"preflight_only": True})


def test_a_file_that_no_source_reads_is_refused():
  with pytest.raises(UserError, match=r"data\.root=mine\.jsonl is read by"):
    experiment.from_config({"data.root": "mine.jsonl"})
  chosen = {"data.root": "mine.jsonl", "data.source": "jsonl"}
  assert experiment.from_config(chosen).data.root == "mine.jsonl"
