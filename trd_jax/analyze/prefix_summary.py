"""Makes tables of what was measured on prefixes: means with intervals.

A draft answers a problem of its own, so intervals are over problems: 95%
percentile bootstraps, from a fixed seed. `grading.estimators` has intervals for
scores that are 0 or 1 or between; here most numbers are cosines and ratios, and
probabilities that hardly differ from one problem to the next.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze.failed_prefixes import Prefix
from trd_jax.analyze.prefix_gradients import KINDS, Products
from trd_jax.analyze.prefix_result import REFERENCES

INTERVALS = "percentile bootstrap over problems, 2,000 draws"
_WHOLE = ("all", "adapter")
_DRAWS = 2000
_DIGITS = 6

# Tokens behind the failed line, from and up to.
DISTANCES = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))
_MOST_LINES = 6


class Group(NamedTuple):
  """What was measured of failed prefixes, or of right ones.

  Attributes:
    names: of the N gradients.
    prefixes: the drafts, as they were cut.
    seeds: the numbers of the seeds that drew each.
    products: of each draft's gradients, with respect to kernels and to the
      adapter.
    means: `Products.pairs` of the gradients' means, one a seed and then that of
      all drafts.
    along: by draft, arrays [slots] by name; see `prefix_failure`.
  """

  names: Sequence[str]
  prefixes: Sequence[Prefix]
  seeds: Sequence[tuple[int, ...]]
  products: tuple[Products, Products]
  means: tuple[np.ndarray, np.ndarray]
  along: Sequence[Mapping[str, np.ndarray]]


def summarize(groups: Mapping[str, Group]) -> dict[str, Any]:
  """Returns the tables of all groups, as JSON holds them."""
  return {
    "intervals": INTERVALS,
    "cosines": [
      row for name, one in groups.items() for row in _cosines(name, one)
    ],
    "means": [row for name, one in groups.items() for row in _means(name, one)],
    "modes": [row for name, one in groups.items() for row in _modes(name, one)],
    "divergence": [
      row for name, one in groups.items() for row in _regions(name, one)
    ],
    "paths": [row for name, one in groups.items() for row in _paths(name, one)],
  }


def interval(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
  """Returns n, mean, low and high of numbers, one a problem.

  Args:
    values: NaN or infinite where a problem has none: it is left out.
  """
  found = np.array([x for x in values if math.isfinite(x)], np.float64)
  if not found.size:
    return {"n": 0, "mean": None, "low": None, "high": None}
  low, high = bootstrap(found)
  mean = float(found.mean())
  return {
    "n": int(found.size),
    "mean": _short(mean),
    "low": _short(min(low, mean)),
    "high": _short(max(high, mean)),
  }


def bootstrap(values: np.ndarray) -> tuple[float, float]:
  """Returns the 95% percentile interval of a mean; the same at each call."""
  draws = np.random.default_rng(0).integers(
    0, values.size, (_DRAWS, values.size)
  )
  low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
  return float(low), float(high)


def _short(x: float) -> float:
  return float(f"{x:.{_DIGITS}g}")


# -- gradients ---------------------------------------------------------------

_Slice = Callable[[np.ndarray], np.ndarray]


def _parts(layers: int) -> Iterator[tuple[str, _Slice]]:
  """Yields parts of the weights, and how products [..., L, 7] are summed."""
  yield "all", lambda x: x.sum((-1, -2), dtype=np.float64)
  for layer in range(layers):
    yield (
      f"layer {layer}",
      lambda x, at=layer: x[..., at, :].sum(-1, dtype=np.float64),
    )
  for place, kind in enumerate(KINDS):
    yield kind, lambda x, at=place: x[..., at].sum(-1, dtype=np.float64)


def _cosines_of(pairs: np.ndarray, mine, other) -> np.ndarray:
  """Returns products over norms; NaN where a gradient is zero."""
  norms = np.sqrt(np.maximum(mine, 0)) * np.sqrt(np.maximum(other, 0))
  return np.divide(
    pairs, norms, out=np.full(pairs.shape, np.nan), where=norms > 0
  )


def _lie(one: Group, pairs, before) -> dict[str, np.ndarray]:
  """Returns how gradients lie to the references, [n, N, references].

  Args:
    one: whose gradients.
    pairs: products [n, N, N] of a part of the weights.
    before: with the references of the row before, [n, N, references]; None of
      means.
  """
  at = [one.names.index(name) for name in REFERENCES]
  squares = np.diagonal(pairs, axis1=1, axis2=2)
  found = {
    "cosine": _cosines_of(
      pairs[:, :, at], squares[:, :, None], squares[:, None, at]
    )
  }
  with np.errstate(divide="ignore", invalid="ignore"):
    logs = np.log(squares) / 2
    found["log_ratio"] = logs[:, :, None] - logs[:, None, at]
  if before is not None:
    earlier = np.concatenate([squares[:1] * 0, squares[:-1]])
    found["other"] = _cosines_of(
      before, squares[:, :, None], earlier[:, None, at]
    )
  return found


def _parts_of(
  one: Group, both: tuple[Any, Any]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Yields parts of the weights and how gradients lie there."""
  for products, is_adapter in zip(both, (False, True), strict=True):
    pairs, before = (
      products if isinstance(products, Products) else (products, None)
    )
    for part, of in _parts(pairs.shape[-2]):
      if is_adapter and part != "all":
        continue
      lie = _lie(one, of(pairs), None if before is None else of(before))
      yield ("adapter" if is_adapter else part), lie


def _cosines(group: str, one: Group) -> Iterator[dict[str, Any]]:
  """Yields a row a gradient, reference and part: means over drafts."""
  seeds = sorted({seed for own in one.seeds for seed in own})
  for part, lie in _parts_of(one, one.products):
    for name, reference, at in _pairs(one):
      row: dict[str, Any] = {
        "group": group,
        "gradient": name,
        "reference": reference,
        "part": part,
        "cosine": interval(lie["cosine"][at]),
      }
      if part in _WHOLE:
        row["other"] = interval(lie["other"][at])
        row["norm_ratio"] = _exp(interval(lie["log_ratio"][at]))
        # Each seed's own draw, to see how far a draw of this size says.
        row["by_seed"] = [
          _mean_of(lie["cosine"][at], one.seeds, seed) for seed in seeds
        ]
      yield row


def _pairs(one: Group) -> Iterator[tuple[str, str, Any]]:
  """Yields gradient, reference, and where both stand in [n, N, references]."""
  for number, name in enumerate(one.names):
    for place, reference in enumerate(REFERENCES):
      if name != reference:
        yield name, reference, (slice(None), number, place)


def _exp(log: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an interval of logarithms as one of a geometric mean."""
  return {
    k: x if x is None or k == "n" else _short(math.exp(x))
    for k, x in log.items()
  }


def _mean_of(values, seeds, seed) -> float | None:
  mine = [
    x
    for x, own in zip(values, seeds, strict=True)
    if seed in own and math.isfinite(x)
  ]
  return _short(float(np.mean(mine))) if mine else None


def _means(group: str, one: Group) -> Iterator[dict[str, Any]]:
  """Yields the cosines of mean gradients: each seed's, and that of all."""
  for part, lie in _parts_of(one, one.means):
    if part not in _WHOLE:
      continue
    for name, reference, at in _pairs(one):
      cosines = [_or_none(x) for x in lie["cosine"][at]]
      ratio = math.exp(lie["log_ratio"][at][-1])
      yield {
        "group": group,
        "gradient": name,
        "reference": reference,
        "part": part,
        "cosine": cosines[-1],
        "norm_ratio": _or_none(ratio),
        "by_seed": cosines[:-1],
      }


def _or_none(x: float) -> float | None:
  return _short(float(x)) if math.isfinite(x) else None


# -- what the models say -----------------------------------------------------


def _modes(group: str, one: Group) -> Iterator[dict[str, Any]]:
  """Yields rows of masses by place and distance, for teacher and student."""
  for side in ("teacher", "student"):
    yield from _by_token(group, one, side)
    for kind, distance in sorted(
      {
        (mark.kind, mark.distance)
        for prefix in one.prefixes
        for mark in prefix.marks
        if mark.distance <= _MOST_LINES
      }
    ):
      yield from _at_marks(group, one, side, kind, distance)


def _by_token(group: str, one: Group, side: str) -> Iterator[dict[str, Any]]:
  for low, high in DISTANCES:
    found = collections.defaultdict(list)
    for prefix, along in zip(one.prefixes, one.along, strict=True):
      end = _length(along)
      at = slice(prefix.place + low, min(prefix.place + high + 1, end))
      if at.start >= end:
        continue
      for name, ours in (
        ("continue", "own"),
        ("onset", "onset"),
        ("entropy", "entropy"),
      ):
        found[name].append(float(along[f"y_o/{side}/{ours}"][at].mean()))
    if found:
      yield {
        "group": group,
        "side": side,
        "place": "token",
        "distance": [low, high],
        **_row(found),
      }


def _at_marks(
  group: str, one: Group, side: str, kind: str, distance: int
) -> Iterator[dict[str, Any]]:
  """Yields a row of the marks where going on and going right differ."""
  found = collections.defaultdict(list)
  for prefix, along in zip(one.prefixes, one.along, strict=True):
    for mark in prefix.marks:
      if (mark.kind, mark.distance) != (kind, distance):
        continue
      own = int(along["y_o/label"][mark.token])
      # Where both begin with the same token there is nothing to tell apart.
      same = mark.consistent_id == mark.right_id and distance > 0
      if own == mark.right_id or same:
        continue
      for name, ours in (
        ("continue", "own"),
        ("right", "right"),
        ("onset", "onset"),
        ("entropy", "entropy"),
      ):
        found[name].append(float(along[f"y_o/{side}/{ours}"][mark.token]))
      consistent = math.nan
      if mark.consistent_id is not None:
        consistent = float(along[f"y_o/{side}/consistent"][mark.token])
      found["consistent"].append(consistent)
  if found:
    yield {
      "group": group,
      "side": side,
      "place": kind,
      "distance": [distance, distance],
      **_row(found),
    }


def _row(found: Mapping[str, list[float]]) -> dict[str, Any]:
  return {name: interval(values) for name, values in found.items()}


def _length(along: Mapping[str, np.ndarray]) -> int:
  return int(along["y_o/length"])


def _regions(group: str, one: Group) -> Iterator[dict[str, Any]]:
  """Yields where along the draft the divergence lies."""
  for objective in ("forward_kl", "reverse_kl"):
    found = collections.defaultdict(list)
    for prefix, along in zip(one.prefixes, one.along, strict=True):
      each = along[f"y_o/{objective}"][: _length(along)].astype(np.float64)
      regions = {
        "before": each[: prefix.begin],
        "at": each[prefix.begin : prefix.place],
        "after": each[prefix.place :],
      }
      for name, values in regions.items():
        mean = float(values.mean()) if values.size else math.nan
        found[name, "mean"].append(mean)
        share = math.nan
        if each.sum() > 0:
          share = float(values.sum() / each.sum())
        found[name, "share"].append(share)
    for region in ("before", "at", "after"):
      yield {
        "group": group,
        "divergence": objective,
        "region": region,
        "nats": interval(found[region, "mean"]),
        "share": interval(found[region, "share"]),
      }


def _paths(group: str, one: Group) -> Iterator[dict[str, Any]]:
  """Yields what both sides give the right path, piece by piece.

  `weight` is the piece's share of Σ |δ_i|, what its pairs count in g_ideal.
  """
  pieces = {
    "first token": lambda one: (0, 1),
    "rest of the first step": lambda one: (1, one.first),
    "later steps": lambda one: (one.first, len(one.path_ids)),
  }
  for piece, span in pieces.items():
    found = collections.defaultdict(list)
    for prefix, along in zip(one.prefixes, one.along, strict=True):
      begin, end = span(prefix)
      k = len(prefix.path_ids)
      mass = {
        side: along[f"path/{side}/own"][:k].astype(np.float64)
        for side in ("student", "teacher")
      }
      with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.abs(np.log(mass["student"]) - np.log(mass["teacher"]))
      if begin >= end or not np.all(np.isfinite(delta)):
        continue
      for side, values in mass.items():
        found[side].append(float(values[begin:end].mean()))
      total = delta.sum()
      weight = float(delta[begin:end].sum() / total) if total > 0 else math.nan
      found["weight"].append(weight)
      found["tokens"].append(float(end - begin))
    yield {
      "group": group,
      "piece": piece,
      **{
        name: interval(found[name])
        for name in ("student", "teacher", "weight", "tokens")
      },
    }
