"""What the laboratory's models are trained on before any distillation.

A document is a user's turn and its response, of four kinds: a problem solved
alone (with slips), a draft rewritten without and with the reference solution
(into a clean chain), and a problem solved beside its reference. A model so
trained knows every step, slips when it writes alone, and can refine: the
situation that trajectory refinement is about.
"""

import dataclasses
import random
from collections.abc import Iterator

from trd_jax.data import prompts
from trd_jax.data.problems import arithmetic
from trd_jax.experiment.records import Problem


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which documents a model sees, and by whom they are written.

  Attributes:
    solver: the writer of solutions to a bare problem: the model's own habits.
    drafter: the writer of the drafts that refinement documents start from.
    beside_reference: the writer of solutions beside a reference.
    mix: shares of solve, refine without reference, refine with reference,
      solve beside the reference.
    facts: probability that a step applies `f`, in a third of the documents.
    min_steps: shortest chain.
    max_steps: longest chain.
  """

  solver: arithmetic.Writer
  drafter: arithmetic.Writer
  beside_reference: arithmetic.Writer
  mix: tuple[float, float, float, float] = (0.45, 0.2, 0.2, 0.15)
  facts: float = 0.3
  min_steps: int = 2
  max_steps: int = 10


_STUDENT_SLIP = (("+", 0.22), ("-", 0.32), ("*", 0.36))
_RARE_SLIP = tuple((op, rate / 3) for op, rate in _STUDENT_SLIP)
_SLIPPING = arithmetic.Writer(slip=_STUDENT_SLIP, caught=0.3, misremembers=0.5)

RECIPES = {
  "student": Recipe(
    solver=_SLIPPING,
    drafter=_SLIPPING,
    beside_reference=arithmetic.Writer(slip=_RARE_SLIP, caught=0.6),
  ),
  "teacher": Recipe(
    solver=arithmetic.Writer(slip=_RARE_SLIP, caught=0.6),
    drafter=_SLIPPING,
    beside_reference=arithmetic.Writer(slip=_RARE_SLIP, caught=0.6),
  ),
}


def documents(recipe: Recipe, seed: int) -> Iterator[tuple[str, str]]:
  """Yields endless `(user turn, response)` pairs; none is a held-out chain."""
  # One generator for all: the draws follow one another, so a document depends
  # on all before it, and the corpus on the seed alone.
  rng = random.Random(f"corpus/{seed}")
  while True:
    facts = recipe.facts if rng.random() < 1 / 3 else 0.0
    chain = arithmetic.draw(rng, recipe.min_steps, recipe.max_steps, facts)
    # By the problem's text, in all four kinds: its solution is never seen,
    # neither as a response nor inside a prompt.
    if arithmetic.is_held_out(chain.text):
      continue
    problem = Problem(
      problem_id="",
      text=chain.text,
      answer=str(chain.answer),
      solution=chain.solution,
      domain="arithmetic",
      source="corpus",
      tests=None,
      meta="{}",
    )
    kind = rng.choices(range(4), recipe.mix)[0]
    if kind == 0:
      response = arithmetic.write(chain, recipe.solver, rng)
      yield prompts.default().initial(problem), response
      continue
    if kind == 3:
      response = arithmetic.write(chain, recipe.beside_reference, rng)
      yield prompts.default().privileged(problem), response
      continue
    draft = arithmetic.write(chain, recipe.drafter, rng)
    if kind == 1:
      # Without the reference a rewrite is only as good as the solver's facts.
      clean = arithmetic.Writer(misremembers=recipe.solver.misremembers)
      response = arithmetic.write(chain, clean, rng)
      yield prompts.default().refinement(problem, draft, "opd"), response
    else:
      yield prompts.default().refinement(problem, draft, "opsd"), chain.solution
