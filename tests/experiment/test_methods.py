"""The registries of methods are whole, and the documents' table is theirs."""

import itertools
import re

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import methods, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS, flat, from_config
from trd_jax.experiment.methods import DIVERGENCES, METHODS, TOKEN_WEIGHTS

READS = {
  "x": "x",
  "x_reference": "x and y\\*",
  "refine": "the refinement prompt",
  None: "no teacher",
}


def coordinates(name: str, regime: str) -> methods.Coordinates:
  return from_config({"method": name, "regime": regime}).coordinates


def row(name: str) -> str:
  """A method's row in docs/training.md."""
  method = METHODS[name]
  contexts = [
    READS[coordinates(name, r).teacher_context] for r in methods.REGIMES
  ]
  loss = DIVERGENCES[method.divergence].formula
  if method.clip:
    cuts = (f"{method.clip[r]} ({r.upper()})" for r in methods.REGIMES)
    loss += f", each token cut at {' or '.join(cuts)} nats"
  if method.token_weights:
    loss += f", tokens weighed {TOKEN_WEIGHTS[method.token_weights].formula}"
  reads = " or ".join(dict.fromkeys(contexts))
  return f"| `{name}` | {method.trajectory} | {reads} | {loss} |"


def test_the_documents_table_has_the_registrys_rows():
  lines = (ROOT / "docs/training.md").read_text().splitlines()
  begin = lines.index("| method | along | the teacher reads | divergence |") + 2
  table = lines[begin : lines.index("", begin)]
  assert table == [row(name) for name in METHODS]


def test_the_documents_list_every_coordinate():
  lines = (ROOT / "docs/training.md").read_text().splitlines()
  begin = lines.index("| key | value | is |") + 2
  table = lines[begin : lines.index("", begin)]
  values = {
    "trajectory": {k: v.meaning for k, v in methods.TRAJECTORIES.items()},
    "teacher_context": methods.TEACHER_CONTEXTS,
    "divergence": {k: v.formula for k, v in DIVERGENCES.items()},
    "loss.token_weights": {
      "none": "all the same",
      **{k: v.formula for k, v in TOKEN_WEIGHTS.items()},
    },
  }
  wanted = [
    f"| {'' if i else f'`{key}` '}| `{value}` | {meaning} |".replace("*", "\\*")
    for key, meanings in values.items()
    for i, (value, meaning) in enumerate(meanings.items())
  ]
  assert table == wanted


def point(**values):
  return from_config(config_of(values)).coordinates


def config_of(values):
  """A config of keys, those of loss and train as loss_… and train_…."""
  dotted = {re.sub("^(loss|train)_", r"\1.", k): v for k, v in values.items()}
  return unflatten(dotted)


def unflatten(values):
  nested = {}
  for name, value in values.items():
    section, _, key = name.rpartition(".")
    (nested.setdefault(section, {}) if section else nested)[key] = value
  return nested


def test_a_key_wins_over_what_the_method_says():
  assert point() == ("y_r", "forward_kl", "refine", None, None, "trajectory")
  assert point(teacher_context="x")[:3] == ("y_r", "forward_kl", "x")
  # What the teacher reads follows the trajectory, unless it is said.
  assert point(trajectory="y_o")[:3] == ("y_o", "forward_kl", "x_reference")
  assert point(trajectory="y_o", regime="opd").teacher_context == "x"
  moved = point(method="reverse_kl", trajectory="y_r")
  assert moved[:3] == ("y_r", "reverse_kl", "refine")
  assert point(method="forward_kl", trajectory="y_r") == point()
  assert point(method="tip", loss_token_weights="none").token_weights is None
  assert point(loss_token_weights="tip").token_weights == "tip"
  assert point(method="forward_kl_clip", loss_clip=0).clip is None
  assert point(divergence="cross_entropy").teacher_context is None
  assert point(loss_mean="token").describe() == (
    "y_r × forward_kl × refine × mean over tokens"
  )


@pytest.mark.parametrize(
  ("values", "named"),
  [
    (
      {"trajectory": "y_o", "teacher_context": "refine"},
      ["teacher_context=refine", "trajectory=y_o"],
    ),
    (
      {"method": "sft", "teacher_context": "x"},
      ["method=sft", "teacher_context=x"],
    ),
    (
      {"divergence": "jsd", "loss_clip_entries": 0.1},
      ["loss.clip_entries=0.1", "divergence=jsd"],
    ),
    (
      {"loss_clip": 0.2, "loss_clip_entries": 0.1},
      ["loss.clip=0.2", "loss.clip_entries=0.1"],
    ),
    (
      {"method": "forward_kl_clip", "loss_cross_entropy": 0.1},
      ["method=forward_kl_clip", "loss.cross_entropy=0.1", "loss.clip=0"],
    ),
    (
      {"method": "tip", "loss_clip_entries": 0.1},
      ["method=tip", "loss.clip_entries=0.1", "loss.token_weights=none"],
    ),
    (
      {"method": "sft", "loss_cross_entropy": 0.1},
      ["method=sft", "loss.cross_entropy=0"],
    ),
    (
      {"divergence": "reverse_kl_topk", "loss_token_weights": "tip"},
      ["tip", "divergence=reverse_kl_topk", "loss.top_k_tail=bucket"],
    ),
    (
      {"method": "sft", "train": {"teacher": "hidden_cache"}},
      ["train.teacher=hidden_cache", "method=sft"],
    ),
    (
      {
        "teacher_context": "x",
        "train": {"teacher": "topk_from_rollout"},
        "refine": {"teacher_top_k": 5},
      },
      ["train.teacher=topk_from_rollout", "teacher_context=refine"],
    ),
    (
      {
        "divergence": "jsd",
        "train": {"teacher": "topk_from_rollout"},
        "refine": {"teacher_top_k": 5},
      },
      ["train.teacher=topk_from_rollout", "divergence=jsd"],
    ),
  ],
)
def test_coordinates_that_contradict_each_other_are_named(values, named):
  with pytest.raises(UserError) as error:
    from_config(config_of(values))
  assert [one for one in named if one not in str(error.value)] == []


def test_all_combinations_that_mean_something_are_taken():
  taken = 0
  for regime, along, divergence, context in itertools.product(
    methods.REGIMES, methods.TRAJECTORIES, DIVERGENCES, methods.TEACHER_CONTEXTS
  ):
    asked = {
      "regime": regime,
      "trajectory": along,
      "divergence": divergence,
      "teacher_context": context,
    }
    if divergence == "cross_entropy" or (context == "refine" != along != "y_r"):
      with pytest.raises(UserError):
        from_config(asked)
      continue
    assert from_config(asked).coordinates[:3] == (along, divergence, context)
    taken += 1
  assert taken == 2 * 5 * (3 * 2 + 3)


def identity(stage, **values):
  return scopes.identity(flat(from_config(config_of(values))), stage)


def test_stages_depend_on_where_a_point_is_not_on_how_it_is_named():
  same = identity("train", method="forward_kl", trajectory="y_r")
  assert same == identity("train")
  assert identity("train", teacher_context="x") != same
  assert identity("train", loss_mean="token") != same
  assert identity("train", train_context="plain") != same
  for stage in ("rollout", "refine", "evaluate/base"):
    assert identity(stage, train_context="plain") == identity(stage)
  # The refined trajectories are the same, whatever is trained on.
  for values in ({"method": "jsd"}, {"trajectory": "y_star"}):
    assert identity("refine", **values) == identity("refine")
  assert identity("refine", trajectory="teacher") != identity("refine")
  for values in ({"trajectory": "teacher"}, {"loss_clip": 0.1}):
    assert identity("rollout", **values) == identity("rollout")


def test_stages_are_those_that_the_trajectory_needs():
  def stages(**values):
    return from_config(values).stages

  assert stages(trajectory="y_star") == ("train", "merge")
  assert stages(trajectory="teacher") == ("refine", "train", "merge")
  subset = {"train": {"subset": "fail"}}
  assert stages(trajectory="y_star", **subset) == ("rollout", "train", "merge")
  # By the verdict of y_r: it is written, whatever is trained on.
  every = ("rollout", "refine", "train", "merge")
  for name in ("fail_to_succ", "refined_succ"):
    subset = {"train": {"subset": name}}
    assert stages(method="reverse_kl", **subset) == every
  assert stages(trajectory="teacher", **subset) == ("refine", "train", "merge")


def test_methods_name_what_there_is():
  for name, method in METHODS.items():
    assert method.divergence in DIVERGENCES, name
    assert method.trajectory in methods.TRAJECTORIES
    for regime in methods.REGIMES:
      context = coordinates(name, regime).teacher_context
      assert context is None or context in methods.TEACHER_CONTEXTS
    assert method.clip.keys() <= set(methods.REGIMES)
    if method.token_weights is not None:
      assert method.token_weights in TOKEN_WEIGHTS


def test_parameters_are_keys_of_the_section_loss():
  for name, declared in methods.PARAMETERS.items():
    key = KEYS[f"loss.{name}"]
    assert (key.default, key.type) == (declared.default, type(declared.default))
    assert key.doc
