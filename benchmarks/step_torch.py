"""The update of `step.py` in transformers + peft, with or without Liger.

Shape suffixes: B rows of a micro-batch, T tokens of a padded row, N response
tokens of a micro-batch, D width, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import training
import transformers
from peft import PeftModel
from torch.nn import functional


def prepare(folder: Path, samples, rows: int, liger: bool) -> Callable:
  """Loads the model and its adapter.

  Args:
    folder: what `training.save_model` wrote.
    samples: the trajectories of an update.
    rows: trajectories of a micro-batch, padded to its longest.
    liger: whether the loss is Liger's, compiled as it is by default.

  Returns:
    Does an update and returns its loss.
  """
  transformers.logging.set_verbosity_error()
  base = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "model", dtype=torch.float32, attn_implementation="sdpa"
  )
  base.config.use_cache = False
  model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
  model.gradient_checkpointing_enable({"use_reentrant": False})
  model.train()
  adapter = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    adapter,
    lr=training.ADAMW["lr"],
    betas=training.ADAMW["betas"],
    eps=training.ADAMW["eps"],
    weight_decay=training.ADAMW["decay"],
  )
  head_VD = base.get_output_embeddings().weight
  decoder = base.model
  loss_of = _liger() if liger else _plain
  batches = [
    [_padded(samples[i : i + rows], side) for side in ("student", "teacher")]
    for i in range(0, len(samples), rows)
  ]
  total = sum(len(s.response) for s in samples)

  def hidden(batch):
    ids_BT, mask_BT, row_N, column_N = batch
    made = decoder(input_ids=ids_BT, attention_mask=mask_BT)
    return made.last_hidden_state[row_N, column_N]

  def update() -> float:
    value = 0.0
    for student, teacher in batches:
      with torch.no_grad(), model.disable_adapter():
        teacher_ND = hidden(teacher)
      loss = loss_of(hidden(student), teacher_ND, head_VD) / total
      loss.backward()
      value += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(adapter, training.CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value

  return update


def _padded(samples, side):
  """Ids and mask `[B, T]`; row and column that predict each token `[N]`."""
  prompts = [getattr(s, f"{side}_prompt") for s in samples]
  rows = [
    np.concatenate([prompt, s.response[:-1]])
    for prompt, s in zip(prompts, samples, strict=True)
  ]
  width = max(map(len, rows))
  ids_BT = np.zeros((len(rows), width), np.int64)
  mask_BT = np.zeros_like(ids_BT)
  where = []
  for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
    ids_BT[number, : len(row)] = row
    mask_BT[number, : len(row)] = 1
    where += [(number, t) for t in range(len(prompt) - 1, len(row))]
  row_N, column_N = np.array(where).T
  return tuple(map(torch.from_numpy, (ids_BT, mask_BT, row_N, column_N)))


def _plain(student_ND, teacher_ND, head_VD):
  """Forward KL on whole logits, summed over the tokens."""
  log_q_NV = functional.log_softmax(student_ND @ head_VD.T, dim=-1)
  with torch.no_grad():
    log_p_NV = functional.log_softmax(teacher_ND @ head_VD.T, dim=-1)
  return functional.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def _liger():
  from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

  fused = LigerFusedLinearJSDLoss(
    weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0
  )

  def loss(student_ND, teacher_ND, head_VD):
    labels_N = torch.zeros(len(student_ND), dtype=torch.long)
    mean = fused(student_ND, head_VD, teacher_ND, head_VD, labels_N)
    return mean * len(student_ND)

  return loss
