"""The losses of `loss.py` in torch: Liger's, TRL's, and plain whole logits.

Shape suffixes: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional


def prepare(
  variant: str, arrays: tuple[np.ndarray, ...], chunk: int
) -> tuple[Callable, Callable]:
  """As `loss_jax.prepare`; bfloat16 arrives as `ml_dtypes.bfloat16`."""
  hidden_ND, teacher_ND, head_VD = map(tensor, arrays)
  hidden_ND.requires_grad_()
  # Summed over the tokens, as the others are.
  loss = _LOSSES[variant](chunk)

  def run():
    hidden_ND.grad = None
    value = loss(hidden_ND, teacher_ND, head_VD)
    value.backward()
    return value.detach(), hidden_ND.grad

  def read(made):
    value, gradient_ND = made
    return float(value), gradient_ND.float().numpy()

  return run, read


def tensor(array: np.ndarray) -> torch.Tensor:
  """A tensor that owns a copy of an array."""
  if array.dtype.name == "bfloat16":
    copy = torch.from_numpy(array.view(np.int16).copy())
    return copy.view(torch.bfloat16)
  return torch.from_numpy(array.copy())


def _liger(compiled):
  def make(chunk):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(
      weight_hard_loss=0.0,
      weight_soft_loss=1.0,
      beta=0,  # KL(teacher, student)
      compiled=compiled,
      chunk_size=chunk,
    )

    def loss(hidden_ND, teacher_ND, head_VD):
      labels_N = torch.zeros(len(hidden_ND), dtype=torch.long)
      mean = fused(hidden_ND, head_VD, teacher_ND, head_VD, labels_N)
      return mean * len(hidden_ND)

    return loss

  return make


def _trl(chunk):
  del chunk
  from trl.experimental.gkd import GKDTrainer

  def loss(hidden_ND, teacher_ND, head_VD):
    student_NV = hidden_ND @ head_VD.T
    with torch.no_grad():
      teacher_NV = teacher_ND @ head_VD.T
    return GKDTrainer.generalized_jsd_loss(
      student_NV[None], teacher_NV[None], beta=0, reduction="sum"
    )

  return loss


def _full(chunk):
  del chunk

  def loss(hidden_ND, teacher_ND, head_VD):
    log_q_NV = functional.log_softmax(hidden_ND @ head_VD.T, dim=-1)
    with torch.no_grad():
      log_p_NV = functional.log_softmax(teacher_ND @ head_VD.T, dim=-1)
    return functional.kl_div(
      log_q_NV, log_p_NV, reduction="sum", log_target=True
    )

  return loss


_LOSSES = {
  "liger, compiled": _liger(True),
  "liger, eager": _liger(False),
  "trl": _trl,
  "torch, full logits": _full,
}
