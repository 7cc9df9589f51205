"""What `gpu.py` measures with JAX, a section a function.

A section gives the names of its cases first and then measures them in that
order, the most telling ones first: what the clock doesn't allow is last.

Shape key: B rows, T tokens, N query heads, K key heads, H width of a head,
R response tokens, C of a chunk, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import shapes
import steps
from gpu_scale import Case, Clock, Measures, Scale

from trd_jax.distill.loss import row_statistics
from trd_jax.distill.loss.token_stats import Scoring, token_stats
from trd_jax.distill.packing import layout, packing
from trd_jax.model import sharding
from trd_jax.model.attention import attention as attention_module
from trd_jax.model.attention.attention import attend


def copy(scale: Scale, clock: Clock) -> Iterator[Case]:
  """Memory: an array is read and another written."""

  def run():
    x = jnp.zeros(scale.copied // 2, jnp.bfloat16)
    seconds, of = clock.median(functools.partial(jax.jit(lambda x: x + 1), x))
    rate = 2 * x.nbytes / seconds / 1e12
    share = {"of 3.35": rate / shapes.PEAK_TBYTES} if _is_h100() else {}
    return {"TB/s": rate, **share, "runs": of}

  yield f"{scale.copied / 2**30:g} GiB read and written", run


def matmul(scale: Scale, clock: Clock) -> Iterator[Case]:
  """Matrix products of bfloat16, accumulated in float32."""

  def run(M, K, N):
    left, right = (
      jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
      for shape in ((M, K), (K, N))
    )
    f = jax.jit(jnp.matmul)
    seconds, of = clock.median(lambda: f(left, right))
    return _rate(2 * M * K * N, seconds, of)

  for sizes in scale.products:
    yield " x ".join(f"{n:,}" for n in sizes), functools.partial(run, *sizes)


def _is_h100() -> bool:
  return "H100" in jax.devices()[0].device_kind


def _rate(flops: float, seconds: float, of: int) -> dict[str, float]:
  return {"ms": seconds * 1e3, **_speed(flops / seconds), "runs": of}


def _speed(flops_a_second: float) -> dict[str, float]:
  rate = flops_a_second / 1e12
  share = {"of 989": rate / shapes.PEAK_TFLOPS} if _is_h100() else {}
  return {"TFLOP/s": rate, **share}


def head(scale: Scale, clock: Clock) -> Iterator[Case]:
  """The loss and its gradient, against its three products alone."""
  R = scale.head_rows

  def ours(student_RD, teacher_RD, head_VD, chunk):
    def loss(student_RD):
      stats = token_stats(
        student_RD,
        teacher_RD,
        head_VD,
        head_VD,
        jnp.zeros(R, jnp.int32),
        jnp.arange(40),
        Scoring(chunk_tokens=chunk),
      )
      return stats.divergence.sum(), stats

    return jax.grad(loss, has_aux=True)(student_RD)

  def products(student_RD, teacher_RD, head_VD, chunk):
    def body(carry, x):
      blocks = [row_statistics.logits(x_CD, head_VD) for x_CD in x]
      # Both must be made whole, though no one reads them.
      student_CV, teacher_CV = jax.lax.optimization_barrier(tuple(blocks))
      slope_CD = row_statistics.pull_back(student_CV, head_VD)
      return carry, (teacher_CV[:, 0], slope_CD)

    chunks = [
      x_RD.reshape(-1, chunk, x_RD.shape[1])
      for x_RD in (student_RD, teacher_RD)
    ]
    return jax.lax.scan(body, None, chunks)[1]

  def run(name, chunk):
    model = shapes.MODELS[name]
    D, V = model.hidden_size, model.vocab_size
    keys = jax.random.split(jax.random.key(0), 3)
    student_RD, teacher_RD, head_VD = (
      jax.random.normal(key, (rows, D), jnp.bfloat16)
      for key, rows in zip(keys, (R, R, V), strict=True)
    )
    operands = student_RD, teacher_RD, 0.04 * head_VD
    taken = []
    for f in ours, products:
      program = jax.jit(functools.partial(f, chunk=chunk))
      taken.append(clock.median(functools.partial(program, *operands)))
    (seconds, of), (floor, _) = taken
    flops = shapes.head_flops(model, model, R)
    return {
      "/ products": seconds / floor,
      **_rate(flops, seconds, of),
      "products TFLOP/s": flops / floor / 1e12,
    }

  for name, chunks in scale.heads:
    D = shapes.MODELS[name].hidden_size
    for chunk in chunks:
      label = f"{R:,} tokens, D={D:,}, chunk {chunk:,}"
      yield label, functools.partial(run, name, chunk)


def attention(scale: Scale, clock: Clock) -> Iterator[Case]:
  """Every path on rows of one segment, and how wrong it is on short ones."""
  model = shapes.MODELS[scale.attention]
  N, K, H = model.num_heads, model.num_kv_heads, model.head_dim

  def inputs(T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
      jax.random.normal(key, (1, T, heads, H), jnp.bfloat16)
      for key, heads in zip(keys, (N, K, K), strict=True)
    ]

  def forward(path, length_B, q, k, v):
    return path(q, k, v, length_B)

  def back(path, length_B, q, k, v):
    return jax.grad(
      lambda *qkv: path(*qkv, length_B).astype(jnp.float32).sum(), (0, 1, 2)
    )(q, k, v)

  def run(path, program, factor, T):
    f = jax.jit(functools.partial(program, path, jnp.array([T], jnp.int32)))
    qkv = inputs(T)
    seconds, of = clock.median(lambda: f(*qkv))
    return _rate(factor * 4 * N * H * T**2 / 2, seconds, of)

  paths = _paths()
  for name, path in paths.items():
    yield f"{name}: error", functools.partial(_error, path, N, K, H)
  for T in scale.forward_and_back:
    for name, path in paths.items():
      yield (
        f"{name}: forward and backward, {T:,}",
        functools.partial(run, path, back, 3.5, T),
      )
  for T in (*scale.forward, *scale.forward_and_back):
    for name, path in paths.items():
      yield (
        f"{name}: forward, {T:,}",
        functools.partial(run, path, forward, 1, T),
      )


def _paths() -> dict[str, Callable[..., jax.Array]]:
  """By name: (q_BTNH, k_BTKH, v_BTKH, length_B) -> [B, T, N, H]."""

  def ours(q, k, v, length_B, **choice):
    T = q.shape[1]
    position_BT = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    return attend(
      q,
      k,
      v,
      query_position_BT=position_BT,
      key_position_BS=position_BT,
      query_segment_BT=segment_BT,
      key_segment_BS=segment_BT,
      **choice,
    )

  known = getattr(attention_module, "IMPLEMENTATIONS", None)
  if known:
    return {
      name: functools.partial(ours, implementation=name) for name in known
    }

  def cudnn(q, k, v, length_B):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      is_causal=True,
      query_seq_lengths=length_B,
      key_value_seq_lengths=length_B,
      implementation="cudnn",
    )

  return {"xla": ours, "cudnn": cudnn}


def _error(path, N, K, H) -> Measures:
  """Against float64, over a full row, a padded one and one of one token."""
  T = 256
  length_B = np.array([T, 5 * T // 8, 1], np.int32)
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((3, T, heads, H)), jnp.bfloat16)
    for heads in (N, K, K)
  )
  got = np.asarray(jax.jit(path)(q, k, v, jnp.asarray(length_B)), np.float64)
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  scores = np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
  scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  wanted = np.einsum("bnts,bsnh->btnh", weights, v)
  real_BT = np.arange(T) < length_B[:, None]
  off = np.linalg.norm((got - wanted)[real_BT])
  return {
    "relative": float(off / np.linalg.norm(wanted[real_BT])),
    "largest": float(np.abs(got - wanted)[real_BT].max()),
    "padding finite": float(np.isfinite(got[~real_BT]).all()),
  }


def step(scale: Scale, clock: Clock) -> Iterator[Case]:
  """The typical update, OPSD: teacher recomputed, cached, and left out.

  Cached, its hidden states come from the host; left out, they don't come at
  all, which is the least that any cache can cost.
  """
  run = functools.partial(
    _step, clock, scale.opsd, None, scale.medians, scale.samples
  )
  yield f"{scale.opsd} OPSD, medians", run
  if "buffer" in packing.MicroBatch._fields:
    yield (
      f"{scale.opsd} OPSD, medians, teacher cached",
      functools.partial(run, teacher="cached"),
    )
  yield (
    f"{scale.opsd} OPSD, medians, teacher's passes left out",
    functools.partial(run, teacher="left out"),
  )


def step_pack(scale: Scale, clock: Clock) -> Iterator[Case]:
  """The same in large student packs, for the memory."""
  run = functools.partial(
    _step, clock, scale.opsd, None, scale.medians, scale.samples
  )
  yield (
    f"{scale.opsd} OPSD, medians, student pack of {scale.pack:,}",
    functools.partial(run, pack_tokens=scale.pack),
  )


def step_long(scale: Scale, clock: Clock) -> Iterator[Case]:
  """One trajectory at the bounds."""
  run = functools.partial(_step, clock, scale.opsd, None, scale.longest, 1)
  # Planned among others it would have a row of its own length; alone, twice it.
  rows = {
    "pack_tokens": scale.longest.student,
    "teacher_pack_tokens": scale.longest.teacher,
  }
  yield f"{scale.opsd} OPSD, longest", functools.partial(run, **rows)


def step_opd(scale: Scale, clock: Clock) -> Iterator[Case]:
  """The typical update with a larger teacher."""
  student, teacher = scale.opd
  yield (
    f"{student} taught by {teacher}, medians",
    functools.partial(
      _step, clock, student, teacher, scale.medians, scale.samples
    ),
  )


def _step(
  clock: Clock,
  student_name: str,
  teacher_name: str | None,
  lengths: shapes.Lengths,
  count: int,
  *,
  teacher: Literal["recomputed", "cached", "left out"] = "recomputed",
  pack_tokens: int | None = None,
  teacher_pack_tokens: int | None = None,
) -> Measures:
  """An update of `count` trajectories by the trainer's own programs."""
  student = shapes.MODELS[student_name]
  other = shapes.MODELS[teacher_name] if teacher_name else None
  experiment = steps.experiment_with()
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  sides = steps.abstract(student, other, experiment, mesh)
  sides = steps.random_arrays(sides)
  data = steps.samples(lengths, count, student.vocab_size)
  planned = layout.choose_layout(
    data,
    groups=1,
    batch_size=count,
    pack_tokens=pack_tokens,
    teacher_pack_tokens=teacher_pack_tokens,
  )
  batches = packing.pack(data, planned)
  if teacher != "recomputed":
    batches = [batch._replace(teacher=[]) for batch in batches]
  if teacher == "cached":
    width = (other or student).hidden_size
    kept_GCD = np.zeros((1, planned.buffer_slots, width), jnp.bfloat16)
    batches = [batch._replace(buffer=kept_GCD) for batch in batches]
  distiller = steps.make(sides, experiment, mesh, planned)
  state = distiller.init(sides.lora, 0)

  def update():
    nonlocal state
    state, metrics = distiller.update(state, batches)
    return state, metrics

  seconds, of = clock.median(update)
  flops = count * shapes.step_flops(
    student,
    other or student,
    lengths,
    experiment.lora.rank,
    teach=teacher == "recomputed",
  )
  student_tokens, teacher_tokens = packing.padded_tokens(batches)
  memory = jax.devices()[0].memory_stats() or {}
  peak = memory.get("peak_bytes_in_use")
  return {
    "s a sample": seconds / count,
    **_speed(flops / seconds),
    **({} if peak is None else {"peak GB so far": peak / 1e9}),
    "student tokens computed": student_tokens,
    "teacher tokens computed": teacher_tokens,
    "runs": of,
  }


SECTIONS = {
  "copy": copy,
  "matmul": matmul,
  "head": head,
  "attention": attention,
  "step": step,
  "step-pack": step_pack,
  "step-long": step_long,
  "step-opd": step_opd,
}
