"""What the project holds itself to, and the figure that each row is judged by.

Figures are computed from the documents of the parts (`results.py`), by part's
name.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

import gpu_table
import loss
import packing
import results
import rollout_overhead
import roofline

Documents = Mapping[str, dict]


@dataclasses.dataclass(frozen=True)
class Target:
  """A row of the table.

  Attributes:
    key: names it in notes.toml.
    what: what is measured.
    limit: the number that the figure is compared with.
    at_most: whether the figure must be at most the limit, or at least.
    form: format of both numbers.
    unit: stands behind both numbers.
    figure: the measured number from the documents; None where it isn't there.
  """

  key: str
  what: str
  limit: float
  figure: Callable[[Documents], float | None] = dataclasses.field(kw_only=True)
  at_most: bool = True
  form: str = ".3f"
  unit: str = ""

  def met(self, figure: float) -> bool:
    """Whether the figure keeps to the limit, before it is rounded."""
    compare = operator.le if self.at_most else operator.ge
    return compare(figure, self.limit)

  def number(self, figure: float) -> str:
    """A figure as it is printed."""
    return f"{figure:{self.form}}{self.unit}"


def _loss_cases(documents, dtype, nth=0) -> results.Cases:
  """The nth group of that dtype, by its number of tokens."""
  groups = documents.get("loss", {}).get("groups", {}).values()
  found = [g for g in groups if g["settings"]["dtype"] == dtype]
  found.sort(key=lambda group: group["settings"]["tokens"])
  return found[nth]["cases"] if nth < len(found) else {}


def _cpu(above, below):
  def figure(documents):
    cases = _loss_cases(documents, "float32")
    return results.median(results.ratios(cases, above, below, "cpu_s"))

  return figure


def _extra_mb(documents, variant, nth=0) -> float | None:
  case = _loss_cases(documents, "float32", nth).get(variant, {})
  return max(results.values(case, "extra_mb"), default=None)


def _memory(other):
  def figure(documents):
    ours, peer = (_extra_mb(documents, name) for name in (loss.OURS, other))
    return ours / peer if ours and peer else None

  return figure


def _growth(documents):
  once, twice = (_extra_mb(documents, loss.OURS, nth) for nth in (0, 1))
  return twice / once if once and twice else None


def _error(dtype):
  def figure(documents):
    case = _loss_cases(documents, dtype).get(loss.OURS, {})
    return case.get("about", {}).get("error")

  return figure


def _round_ratio(part, above, below, key):
  def figure(documents):
    for group in documents.get(part, {}).get("groups", {}).values():
      return results.median(results.ratios(group["cases"], above, below, key))
    return None

  return figure


def _modelled(name, factor=1.0):
  """A figure of the 8B's OPSD TRD that no card has been asked for."""

  def figure(documents):
    group = documents.get("roofline", {}).get("groups", {}).get("8b opsd trd")
    if group is None:
      return None
    return roofline.sums(group["settings"], group["cases"])[name] * factor

  return figure


_F32 = "loss, CPU, float32"
_8B = "8 H100s, modelled, 8B OPSD TRD"
TARGETS = (
  Target(
    "loss_floor",
    f"{_F32}: time / three products alone",
    1.25,
    figure=_cpu(loss.OURS, loss.FLOOR),
  ),
  Target(
    "loss_floor_diagnostics",
    "the same with all diagnostics",
    1.25,
    figure=_cpu(loss.ALL, loss.FLOOR),
  ),
  Target(
    "loss_liger",
    f"{_F32}: CPU-s / Liger compiled",
    0.85,
    figure=_cpu(loss.OURS, loss.LIGER),
  ),
  Target(
    "loss_trl",
    f"{_F32}: CPU-s / TRL",
    0.80,
    figure=_cpu(loss.OURS, loss.TRL),
  ),
  Target(
    "loss_growth",
    "loss: extra memory of 2N tokens / of N",
    1.05,
    figure=_growth,
  ),
  Target(
    "loss_memory_liger",
    "loss: extra memory / Liger compiled",
    0.40,
    figure=_memory(loss.LIGER),
  ),
  Target(
    "loss_memory_trl",
    "loss: extra memory / TRL",
    0.20,
    figure=_memory(loss.TRL),
  ),
  Target(
    "error_float32",
    "gradient error against float64, float32",
    1e-5,
    form=".1e",
    figure=_error("float32"),
  ),
  Target(
    "error_bfloat16",
    "gradient error against float64, bfloat16",
    5e-3,
    form=".1e",
    figure=_error("bfloat16"),
  ),
  Target(
    "packing",
    "packed / padded training, tokens/s, CPU",
    2.5,
    at_most=False,
    figure=_round_ratio("packing", packing.PACKED, packing.PADDED, "rate"),
  ),
  Target(
    "rollout",
    "rollout stage / bare vLLM, wall time",
    1.03,
    figure=_round_ratio(
      "rollout_overhead",
      rollout_overhead.STAGE,
      rollout_overhead.BARE,
      "wall_s",
    ),
  ),
  Target(
    "h100_head",
    "H100: head time / three products, 8B",
    1.35,
    figure=gpu_table.figure("head", "/ products"),
  ),
  Target(
    "h100_head_rate",
    "H100: head, 8B",
    550,
    at_most=False,
    form=".0f",
    unit=" TFLOP/s",
    figure=gpu_table.figure("head", "TFLOP/s"),
  ),
  Target(
    "h100_step",
    "H100: TRD step, 8B, teacher recomputed, of peak",
    45,
    at_most=False,
    form=".1f",
    unit="%",
    figure=gpu_table.figure("step", "of 989", factor=100),
  ),
  Target(
    "h100_step_peer",
    "H100: the same / transformers + peft + Liger, tokens/s",
    1.5,
    at_most=False,
    figure=gpu_table.figure("ratio", "times as fast", case="Liger"),
  ),
  Target(
    "h100_sample",
    "H100: GPU-seconds a sample, TRD 8B, recomputed",
    0.6,
    unit=" s",
    figure=gpu_table.figure("step", "s a sample"),
  ),
  Target(
    "h100_sample_cached",
    "H100: the same, teacher cached",
    0.2,
    unit=" s",
    figure=gpu_table.figure("step", "s a sample", case="cached"),
  ),
  Target(
    "h100_memory",
    "H100: peak memory, 16K student pack, 8B",
    40,
    form=".1f",
    unit=" GB",
    figure=gpu_table.figure("step-pack", "peak GB so far"),
  ),
  Target(
    "modelled_student_fill",
    f"{_8B}: student tokens that are no padding",
    92,
    at_most=False,
    form=".0f",
    unit="%",
    figure=_modelled("student fill", 100),
  ),
  Target(
    "modelled_teacher_fill",
    f"{_8B}: teacher tokens that are no padding",
    92,
    at_most=False,
    form=".0f",
    unit="%",
    figure=_modelled("teacher fill", 100),
  ),
  Target(
    "modelled_sample",
    f"{_8B}: GPU-seconds a sample, teacher recomputed",
    0.45,
    form=".2f",
    unit=" s",
    figure=_modelled("sample"),
  ),
  Target(
    "modelled_sample_cached",
    f"{_8B}: the same, teacher cached",
    0.13,
    form=".2f",
    unit=" s",
    figure=_modelled("cached"),
  ),
  Target(
    "modelled_learn",
    f"{_8B}: `learn`, of peak",
    58,
    at_most=False,
    form=".0f",
    unit="%",
    figure=_modelled("learn, of peak", 100),
  ),
  Target(
    "modelled_weight_copies",
    f"{_8B}: weights copied, of `learn`'s time",
    3,
    form=".0f",
    unit="%",
    figure=_modelled("copied", 100),
  ),
  Target(
    "modelled_memory",
    f"{_8B}: peak memory",
    60,
    form=".0f",
    unit=" GB",
    figure=_modelled("peak", 1e-9),
  ),
)
