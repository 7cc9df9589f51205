"""The update of `gpu.py` in transformers and peft, with or without Liger.

One trajectory at a time, without padding: the paper's micro-batch. The base is
bfloat16 and so is autocast, the adapter float32; gradient checkpointing; the
teacher is the base with the adapter off; attention is flash-attn where it is
installed and torch's scaled_dot_product_attention otherwise. The loss is
forward KL over the whole vocabulary, on response tokens alone.

Shape key: T tokens, R response tokens, C of them a chunk, D model width,
V vocabulary.
"""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import shapes
import steps
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

REPEATS = 5
_CHUNK = 512
_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def cases(
  name: str,
  lengths: shapes.Lengths,
  count: int,
  end: float,
) -> Iterator[tuple[str, Callable[[], dict[str, float] | str]]]:
  """Each loss as a case.

  Args:
    name: the model's, student and teacher in one.
    lengths: of every trajectory.
    count: trajectories of an update.
    end: when to stop, by `time.monotonic`.
  """
  for with_liger in (True, False):
    peer = "transformers + peft" + (" + Liger" if with_liger else "")
    yield (
      f"{peer}, {name}, medians",
      functools.partial(_measure, name, lengths, count, end, with_liger),
    )


def _measure(name, lengths, count, end, with_liger) -> dict[str, float] | str:
  if with_liger and not importlib.util.find_spec("liger_kernel"):
    return "liger_kernel is not installed"
  update = _prepare(name, lengths, count, with_liger)
  on_gpu = torch.cuda.is_available()

  def once():
    start = time.perf_counter()
    update()
    if on_gpu:
      torch.cuda.synchronize()
    return time.perf_counter() - start

  once()
  taken: list[float] = []
  while len(taken) < REPEATS and (
    not taken or end - time.monotonic() > taken[-1]
  ):
    taken.append(once())
  seconds = statistics.median(taken)
  model = shapes.MODELS[name]
  rank = steps.experiment_with().lora.rank
  rate = count * shapes.step_flops(model, model, lengths, rank) / seconds / 1e12
  measures = {"s a sample": seconds / count, "TFLOP/s": rate}
  if on_gpu and "H100" in torch.cuda.get_device_name():
    measures["of 989"] = rate / shapes.PEAK_TFLOPS
  if on_gpu:
    measures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
  return measures | {"runs": len(taken)}


def _prepare(name, lengths, count, with_liger) -> Callable[[], Any]:
  """The model on the device, and a function that does one update."""
  transformers.logging.set_verbosity_error()
  experiment = steps.experiment_with()
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  flash = device.type == "cuda" and importlib.util.find_spec("flash_attn")
  config = transformers.Qwen3Config(**shapes.MODELS[name].to_hf())
  config.use_cache = False
  with device:
    base = transformers.AutoModelForCausalLM.from_config(
      config,
      dtype=torch.bfloat16,
      attn_implementation="flash_attention_2" if flash else "sdpa",
    )
  lora = experiment.lora
  model = get_peft_model(
    base,
    LoraConfig(
      r=lora.rank,
      lora_alpha=lora.alpha,
      lora_dropout=lora.dropout,
      target_modules=[f"{kind}_proj" for kind in _TARGETS],
    ),
  )
  model.gradient_checkpointing_enable({"use_reentrant": False})
  model.train()
  adapter = [p for p in model.parameters() if p.requires_grad]
  train = experiment.train
  optimizer = torch.optim.AdamW(
    adapter,
    lr=train.learning_rate,
    betas=(train.beta1, train.beta2),
    eps=train.eps,
    weight_decay=train.weight_decay,
    fused=device.type == "cuda",
  )
  head_VD = base.get_output_embeddings().weight
  loss_of = _liger() if with_liger else _chunked
  samples = [
    [
      torch.tensor([*prompt, *sample.response[:-1]], device=device)[None]
      for prompt in (sample.student_prompt, sample.teacher_prompt)
    ]
    for sample in steps.samples(lengths, count, config.vocab_size)
  ]

  def hidden(ids_1T):
    made = base.model(input_ids=ids_1T).last_hidden_state
    return made[0, -lengths.response :]

  def update():
    with torch.autocast(device.type, torch.bfloat16):
      for student_1T, teacher_1T in samples:
        model.eval()
        with torch.no_grad(), model.disable_adapter():
          teacher_RD = hidden(teacher_1T)
        model.train()
        loss = loss_of(hidden(student_1T), teacher_RD, head_VD)
        (loss / (count * lengths.response)).backward()
    torch.nn.utils.clip_grad_norm_(adapter, train.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return update


def _chunked(student_RD, teacher_RD, head_VD):
  """Forward KL summed over the tokens; chunks that are computed again."""

  def chunk(student_CD, teacher_CD):
    log_q_CV = functional.log_softmax((student_CD @ head_VD.T).float(), -1)
    log_p_CV = functional.log_softmax((teacher_CD @ head_VD.T).float(), -1)
    return functional.kl_div(
      log_q_CV, log_p_CV, reduction="sum", log_target=True
    )

  parts = zip(student_RD.split(_CHUNK), teacher_RD.split(_CHUNK), strict=True)
  return sum(checkpoint(chunk, *part, use_reentrant=False) for part in parts)


def _liger():
  from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

  fused = LigerFusedLinearJSDLoss(
    weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0
  )

  def loss(student_RD, teacher_RD, head_VD):
    labels_R = torch.zeros(
      len(student_RD), dtype=torch.long, device=student_RD.device
    )
    # Its own casts want both operands in one dtype.
    student_RD = student_RD.to(head_VD.dtype)
    teacher_RD = teacher_RD.to(head_VD.dtype)
    mean = fused(student_RD, head_VD, teacher_RD, head_VD, labels_R)
    return mean * len(student_RD)

  return loss
