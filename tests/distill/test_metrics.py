"""Metrics of an update: each its figure, its row in the page, its spread."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.test_objective import (
  CORRECT,
  LENGTHS,
  SLOTS,
  FlatSlots,
  make_stats,
  score,
)
from tests.support.places import ROOT
from trd_jax.distill.loss import metrics
from trd_jax.distill.loss.metrics import finish
from trd_jax.distill.loss.objective import Objective, token_loss


def test_metrics_are_token_means_by_outcome_and_perplexities():
  stats = make_stats()
  _, sums, _ = score(stats, SLOTS, Objective())
  found = finish(sums)
  correct = np.repeat(CORRECT, LENGTHS)
  first = np.concatenate([np.arange(n) < 5 for n in LENGTHS])
  wanted = {
    "D": stats.divergence.mean(),
    "D_correct": stats.divergence[correct == 1].mean(),
    "D_incorrect": stats.divergence[correct == 0].mean(),
    "D_first_5": stats.divergence[first].mean(),
    "response_length": np.mean(LENGTHS),
    "tokens": sum(LENGTHS),
    "nll_student": stats.student_nll.mean(),
    "nll_teacher": stats.teacher_nll.mean(),
    "ppl_student": math.exp(stats.student_nll.mean()),
    "ppl_teacher": math.exp(stats.teacher_nll.mean()),
    "ppl_gap": math.exp(stats.student_nll.mean())
    - math.exp(stats.teacher_nll.mean()),
    "entropy_student": stats.student_entropy.mean(),
    "epistemic_mass_student": stats.student_onset_mass.mean(),
    "epistemic_mass_teacher": stats.teacher_onset_mass.mean(),
    "top16_mass_student": stats.student_top16_mass.mean(),
    "top16_mass_teacher": stats.teacher_top16_mass.mean(),
  }
  spread = {
    name: found.pop(name) for name in ("D_p50", "D_p95", "D_p99", "D_max")
  }
  assert found == pytest.approx(wanted, rel=1e-5)
  assert spread["D_max"] == stats.divergence.max()
  for share in (50, 95, 99):
    # A quantile of 25 tokens lies at one of them or beside it.
    exact = np.quantile(stats.divergence, share / 100, method="inverted_cdf")
    assert spread[f"D_p{share}"] == pytest.approx(exact, rel=0.022)


def test_every_metric_is_explained():
  """The table of docs/workdir.md has all that a token's statistics give."""
  page = (ROOT / "docs/workdir.md").read_text().partition("\n## Metrics\n")[2]
  _, sums, _ = score(make_stats(), SLOTS, Objective(clip=1.5))
  assert {"D", "clipped_share"} <= finish(sums).keys()
  assert [name for name in finish(sums) if f"`{name}`" not in page] == []


def test_a_spread_is_of_all_tokens_and_of_none_beside_them():
  rng = np.random.default_rng(3)
  values = np.exp(rng.normal(-4, 3, 4000)).astype(np.float32)
  values[:800] = 0
  weight = np.ones(4000, np.float32)
  weight[100:140] = 0  # padding
  values[100:140] = 1e6
  slots = FlatSlots(*(np.zeros(4000, np.int32),) * 5)._replace(weight=weight)
  one = metrics.Spread.of(jnp.asarray(values), slots)
  found = one.quantiles()
  kept = values[weight > 0]
  assert found["D_max"] == kept.max()
  for share in (50, 95, 99):
    wanted = np.quantile(kept, share / 100, method="inverted_cdf")
    assert found[f"D_p{share}"] == pytest.approx(wanted, rel=0.022)
  # A negative value counts by its size; nothing at all has no quantile.
  same = metrics.Spread.of(jnp.asarray(-values), slots)
  np.testing.assert_array_equal(same.counts, one.counts)
  none = slots._replace(weight=np.zeros(4000, np.float32))
  assert metrics.Spread.of(jnp.asarray(values), none).quantiles() == {}
  assert metrics.Spread.of(jnp.zeros(4000), slots).quantiles() == {
    "D_p50": 0,
    "D_p95": 0,
    "D_p99": 0,
    "D_max": 0,
  }


def test_finish_leaves_out_what_nothing_was_counted_for():
  stats = make_stats()
  slots = SLOTS._replace(correct=np.ones_like(SLOTS.correct))
  absent = stats._replace(student_nll=None, student_top16_mass=None)
  found = finish(token_loss(absent, slots, Objective())[1])
  assert "D_correct" in found
  assert "D_incorrect" not in found
  assert not {"ppl_student", "ppl_gap", "top16_mass_student"} & found.keys()
  assert finish({"nll_student": np.array([5e3, 1.0])})["ppl_student"] < math.inf
  assert finish({"grad_norm": np.array([3.0, 2.0])}) == {"grad_norm": 1.5}
