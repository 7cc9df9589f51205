"""The methods there are, and the coordinates of the space they are points of.

A method is a named point in the space trajectory x divergence x teacher
context x token weights x clip: an entry of `METHODS`. Each coordinate has a key
of the config, which replaces the method's own. A divergence, and a way to weigh
tokens, is an entry of `DIVERGENCES` or `TOKEN_WEIGHTS`, with the keys of the
config's section `loss` that are its parameters. Choices, help, checks and the
tables of docs/training.md follow from these registries.

In formulas p is the teacher's distribution and q the student's.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trd_jax.experiment.declarations import (
  Rule,
  at_least,
  key,
  one_of,
  within,
)

REGIMES = ("opd", "opsd")


class TrajectoryKind(NamedTuple):
  """What the student learns along.

  Attributes:
    meaning: for readers.
    stage: that writes it, or None where the problems hold it.
    writer: whose words it is: 'student', 'teacher' or 'reference'.
  """

  meaning: str
  stage: str | None
  writer: str


TRAJECTORIES: Mapping[str, TrajectoryKind] = {
  "y_o": TrajectoryKind("the student's rollout", "rollout", "student"),
  "y_r": TrajectoryKind(
    "the rollout as the teacher rewrote it", "refine", "teacher"
  ),
  "y_star": TrajectoryKind("the reference itself", None, "reference"),
  "teacher": TrajectoryKind(
    "the teacher's own answer to x", "refine", "teacher"
  ),
}

TEACHER_CONTEXTS: Mapping[str, str] = {
  "x": "x",
  "x_reference": "x and y*",
  "refine": "the prompt that y_r was written after",
}


class Term(NamedTuple):
  """A part of a loss, as far as a config knows it.

  Attributes:
    formula: for readers.
    parameters: keys of the section `loss` that it alone or others read, by
      name, each declared by `declarations.key`.
    contradiction: takes the parameters by name; what is wrong with their
      values where a method uses them, or None.
    signed: a token's value may be negative, so that nothing clips or weighs
      it.
    reads_teacher: whether it needs the teacher's distributions.
  """

  formula: str
  parameters: Mapping[str, Any] = {}
  contradiction: Callable[..., str | None] = lambda **parameters: None
  signed: bool = False
  reads_teacher: bool = True

  def read(self, loss: Any) -> dict[str, Any]:
    """Returns the parameters' values in a section `loss`, by name."""
    return {name: getattr(loss, name) for name in self.parameters}

  def check(self, parameters: Mapping[str, Any]) -> None:
    """Checks parameters that no config has checked.

    Raises:
      ValueError: a value out of its range, or values that make no sense.
    """
    for name, value in parameters.items():
      rule: Rule | None = self.parameters[name].metadata["rule"]
      if rule is not None and not rule.holds(value):
        raise ValueError(f"loss.{name} must be {rule.says}, not {value}")
    if problem := self.contradiction(**parameters):
      raise ValueError(problem)


def _compares_nothing(top_k: int, top_k_tail: str) -> str | None:
  del top_k_tail
  if top_k > 0:
    return None
  return "reverse_kl_topk compares loss.top_k tokens: set it above 0"


def _vanishes(beta: float) -> str | None:
  if 0 < beta < 1:
    return None
  return (
    f"jsd with loss.beta={beta} is 0 everywhere: choose a beta between 0 and 1,"
    " or forward_kl or reverse_kl, its limits"
  )


def _weighs_nothing(tip_entropy: float, tip_divergence: float) -> str | None:
  if tip_entropy + tip_divergence > 0:
    return None
  return "tip weighs no token: loss.tip_entropy and loss.tip_divergence are 0"


_CLIPPED_ENTRIES = {
  "clip_entries": key(
    0.0,
    "largest term of forward_kl's or reverse_kl's sum over the vocabulary, in"
    " nats, whose sum may then be negative; 0: none",
    at_least(0),
  )
}

# Why the mathematics is not here, beside its name: a config is checked at the
# start of every stage, and most stages run where there need be no JAX. So this
# room holds what a config has to know, and `distill/loss/divergences.py` the
# rest: a class that takes its name and its parameters from the entry here.
DIVERGENCES: Mapping[str, Term] = {
  "forward_kl": Term("KL(p‖q)", _CLIPPED_ENTRIES),
  "reverse_kl": Term("KL(q‖p)", _CLIPPED_ENTRIES),
  "reverse_kl_topk": Term(
    "KL(q‖p), both renormalised on the teacher's `loss.top_k` likeliest tokens",
    {
      "top_k": key(
        32, "teacher's top tokens that reverse_kl_topk compares", at_least(0)
      ),
      "top_k_tail": key(
        "renormalise",
        "what reverse_kl_topk makes of all other tokens: renormalise leaves"
        " them out; bucket counts them as one token",
        one_of("renormalise", "bucket"),
      ),
    },
    _compares_nothing,
  ),
  "jsd": Term(
    "β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q, β = `loss.beta`",
    {"beta": key(0.5, "jsd's weight of the teacher", within(0, 1))},
    _vanishes,
  ),
  "sampled_reverse_kl": Term(
    "log q(y_t) − log p(y_t), and its return with discount `loss.discount`",
    {
      "discount": key(
        0.0,
        "sampled_reverse_kl's discount: 0 a token's own, 1 the full"
        " return-to-go",
        within(0, 1),
      )
    },
    signed=True,
  ),
  "cross_entropy": Term("−log q(y_t)", reads_teacher=False),
}

TOKEN_WEIGHTS: Mapping[str, Term] = {
  "tip": Term(
    "by student entropy and divergence (`loss.tip_entropy`,"
    " `loss.tip_divergence`)",
    {
      "tip_entropy": key(
        1.0, "tip's weight of the student's entropy", at_least(0)
      ),
      "tip_divergence": key(1.0, "tip's weight of the divergence", at_least(0)),
    },
    _weighs_nothing,
  ),
  "entropy_gate": Term(
    "1 where the student's entropy is at least `loss.gate_entropy`, else 0,"
    " over their mean",
    {
      "gate_entropy": key(
        0.5,
        "entropy_gate's least entropy of the student, in nats",
        at_least(0),
      )
    },
  ),
}

# The keys that `schema.Loss` gets; terms may share one.
PARAMETERS: Mapping[str, Any] = {
  name: declared
  for term in (*DIVERGENCES.values(), *TOKEN_WEIGHTS.values())
  for name, declared in term.parameters.items()
}


class Method(NamedTuple):
  """What is distilled from what: a preset of the coordinates.

  Attributes:
    divergence: of `DIVERGENCES`.
    trajectory: of `TRAJECTORIES`.
    token_weights: of `TOKEN_WEIGHTS`, or None for equal ones.
    clip: by regime, the most that a token's divergence counts, in nats.
    in_paper: whether it is a row of the paper's Table 13.
  """

  divergence: str
  trajectory: str = "y_o"
  token_weights: str | None = None
  clip: Mapping[str, float] = {}
  in_paper: bool = False


METHODS: Mapping[str, Method] = {
  "trd": Method("forward_kl", trajectory="y_r", in_paper=True),
  "forward_kl": Method("forward_kl", in_paper=True),
  "forward_kl_clip": Method(
    "forward_kl", clip={"opd": 0.1, "opsd": 0.06}, in_paper=True
  ),
  "reverse_kl": Method("reverse_kl", in_paper=True),
  "reverse_kl_topk": Method("reverse_kl_topk", in_paper=True),
  "sampled_reverse_kl": Method("sampled_reverse_kl"),
  "jsd": Method("jsd"),
  "tip": Method("reverse_kl", token_weights="tip"),
  "sft": Method("cross_entropy", trajectory="y_r"),
}


def default_context(trajectory: str, regime: str) -> str:
  """Returns what the teacher reads where nothing else is asked for.

  Along y_r that is the prompt that it was written after. Otherwise a separate
  teacher reads x, and one that is the student's own base y* as well: without
  it, it would be the student.
  """
  if trajectory == "y_r":
    return "refine"
  return {"opd": "x", "opsd": "x_reference"}[regime]


class Coordinates(NamedTuple):
  """Where an experiment stands in the space of methods.

  Attributes:
    trajectory: of `TRAJECTORIES`.
    divergence: of `DIVERGENCES`.
    teacher_context: of `TEACHER_CONTEXTS`; None where no teacher is read.
    token_weights: of `TOKEN_WEIGHTS`, or None for equal ones.
    clip: the most that a token's divergence counts, in nats, or None.
    mean: over what the loss is a mean, see `schema.Loss`.
  """

  trajectory: str
  divergence: str
  teacher_context: str | None
  token_weights: str | None
  clip: float | None
  mean: str

  def describe(self) -> str:
    """Returns them in one line, as `y_r × forward_kl × refine`."""
    parts = [
      self.trajectory,
      self.divergence,
      self.teacher_context or "no teacher",
    ]
    if self.token_weights:
      parts.append(self.token_weights)
    if self.clip is not None:
      parts.append(f"clip {self.clip:g}")
    if self.mean != "trajectory":
      parts.append(f"mean over {self.mean}s")
    return " × ".join(parts)


def resolve(values: Mapping[str, Any]) -> Coordinates:
  """Returns the coordinates of a method with what the keys replace of it.

  Args:
    values: the values of `method`, `regime`, `trajectory`, `divergence`,
      `teacher_context` and `loss.…` by their dotted names.
  """
  # None means the preset's. What the teacher reads is settled after the
  # trajectory, as the refinement prompt goes with y_r and with nothing else.
  preset = METHODS[values["method"]]
  trajectory = values["trajectory"] or preset.trajectory
  divergence = values["divergence"] or preset.divergence
  context = values["teacher_context"]
  if context is None and DIVERGENCES[divergence].reads_teacher:
    context = default_context(trajectory, values["regime"])
  # 'none' and 0 say that there is to be nothing where a preset has something.
  weights = values["loss.token_weights"] or preset.token_weights
  clip = values["loss.clip"]
  if clip is None:
    clip = preset.clip.get(values["regime"])
  return Coordinates(
    trajectory,
    divergence,
    context,
    None if weights == "none" else weights,
    clip or None,
    values["loss.mean"],
  )
