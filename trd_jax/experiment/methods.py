"""The methods there are, and the divergences and token weights they name.

A method is a named point in the space trajectory x divergence x teacher
context x token weights x clip: an entry of `METHODS`. A divergence, and a way
to weigh tokens, is an entry of `DIVERGENCES` or `TOKEN_WEIGHTS`, with the keys
of the config's section `loss` that are its parameters. Choices, help, checks
and the table of docs/training.md follow from these three registries.

In formulas p is the teacher's distribution and q the student's.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trd_jax.experiment.declarations import Rule, at_least, key, within

REGIMES = ("opd", "opsd")


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
  """

  formula: str
  parameters: Mapping[str, Any] = {}
  contradiction: Callable[..., str | None] = lambda **parameters: None
  signed: bool = False

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


def _compares_nothing(top_k: int) -> str | None:
  if top_k > 0:
    return None
  return "method reverse_kl_topk compares loss.top_k tokens: set it above 0"


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


# Why the mathematics is not here, beside its name: a config is checked at the
# start of every stage, and most stages run where there need be no JAX. So this
# room holds what a config has to know, and `distill/loss/divergences.py` the
# rest: a class that takes its name and its parameters from the entry here.
DIVERGENCES: Mapping[str, Term] = {
  "forward_kl": Term("KL(p‖q)"),
  "reverse_kl": Term("KL(q‖p)"),
  "reverse_kl_topk": Term(
    "KL(q‖p), both renormalised on the teacher's `loss.top_k` likeliest tokens",
    {
      "top_k": key(
        32, "teacher's top tokens that reverse_kl_topk compares", at_least(0)
      )
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
  )
}

# The keys that `schema.Loss` gets; terms may share one.
PARAMETERS: Mapping[str, Any] = {
  name: declared
  for term in (*DIVERGENCES.values(), *TOKEN_WEIGHTS.values())
  for name, declared in term.parameters.items()
}


class Method(NamedTuple):
  """What is distilled from what.

  Attributes:
    divergence: of `DIVERGENCES`.
    trajectory: 'y_o', the student's rollout, or 'y_r', what the teacher made
      of it.
    teacher_context: by regime, what the teacher reads before the trajectory:
      'x', 'x_reference' (x and y*) or 'refine', the prompt that y_r was
      written after.
    token_weights: of `TOKEN_WEIGHTS`, or None for equal ones.
    clip: by regime, the most that a token's divergence counts, in nats.
    in_paper: whether it is a row of the paper's Table 13.
  """

  divergence: str
  trajectory: str = "y_o"
  teacher_context: Mapping[str, str] = {"opd": "x", "opsd": "x_reference"}
  token_weights: str | None = None
  clip: Mapping[str, float] = {}
  in_paper: bool = False

  @property
  def refines(self) -> bool:
    """Whether the second stage writes what is trained on."""
    return self.trajectory == "y_r"


METHODS: Mapping[str, Method] = {
  "trd": Method(
    "forward_kl",
    trajectory="y_r",
    teacher_context={"opd": "refine", "opsd": "refine"},
    in_paper=True,
  ),
  "forward_kl": Method("forward_kl", in_paper=True),
  "forward_kl_clip": Method(
    "forward_kl", clip={"opd": 0.1, "opsd": 0.06}, in_paper=True
  ),
  "reverse_kl": Method("reverse_kl", in_paper=True),
  "reverse_kl_topk": Method("reverse_kl_topk", in_paper=True),
  "sampled_reverse_kl": Method("sampled_reverse_kl"),
  "jsd": Method("jsd"),
  "tip": Method("reverse_kl", token_weights="tip"),
}


def refining() -> str:
  """Returns the methods that train on y_r, for errors that name them."""
  return " or ".join(name for name, m in METHODS.items() if m.refines)
