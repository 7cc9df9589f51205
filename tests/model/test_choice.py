"""Which attention runs is said, and what is wrong about it is found."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from tests.support.small_models import SMALL, packed
from trd_jax.experiment.errors import UserError
from trd_jax.model.attention import choice, kernels
from trd_jax.model.attention.attention import attend

HALF = ["bfloat16", "bfloat16"]


def chosen(wanted="auto", packing=None, platform="gpu", dtypes=HALF):
  found = choice.choose(wanted, packing, platform=platform, dtypes=dtypes)
  assert found.why
  return found[:2]


def test_auto_takes_the_kernel_where_it_can_and_packs_where_it_may():
  assert chosen() == ("cudnn_packed", True)
  assert chosen(packing=False) == ("cudnn", False)
  assert chosen(packing=True) == ("cudnn_packed", True)
  assert chosen(platform="cpu") == ("xla", True)
  assert chosen(platform="cpu", packing=False) == ("xla", False)
  assert chosen(dtypes=["bfloat16", "float32"]) == ("xla", True)


def test_what_is_asked_for_is_taken_or_refused_but_never_replaced():
  assert chosen("xla") == ("xla", True)
  assert chosen("xla", packing=False) == ("xla", False)
  assert chosen("cudnn") == ("cudnn_packed", True)
  assert chosen("cudnn", packing=False) == ("cudnn", False)
  for wanted in ("cudnn", "tokamax"):
    with pytest.raises(UserError, match=f"{wanted} runs on GPUs.*are cpu: set"):
      chosen(wanted, platform="cpu")


def rows(kernel):
  """A kernel as `choice.check` takes it."""

  def run(query, key, value, position_BT, segment_BT):
    del position_BT
    return kernels.attend_rows(kernel, query, key, value, segment_BT)

  return run


def cudnn_call(*args):
  return kernels.cudnn(*args, backend="xla")


def no_causality(query, key, value, length_B):
  return jax.nn.dot_product_attention(
    query, key, value, key_value_seq_lengths=length_B, implementation="xla"
  )


def sees_padding(query, key, value, length_B):
  # Causal, but counted from the end: shorter rows see into their padding.
  T = query.shape[1]
  shift = T - length_B[:, None, None]
  t = jnp.arange(T)
  mask = t[None, None, :] <= t[None, :, None] + shift
  return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def wrong_scale(query, key, value, length_B):
  return cudnn_call(1.1 * query, key, value, length_B)


@jax.custom_vjp
def wrong_gradient(query, key, value, length_B):
  return cudnn_call(query, key, value, length_B)


def _wrong_fwd(*args):
  out, back = jax.vjp(cudnn_call, *args)
  return out, back


def _wrong_bwd(back, ct):
  d_query, d_key, d_value, d_length = back(ct)
  return d_query, d_key, d_value.at[:, ::3].multiply(0.5), d_length


wrong_gradient.defvjp(_wrong_fwd, _wrong_bwd)


def check(attention, dtype="bfloat16", pack=False):
  return choice.check(
    attention, "this", SMALL, dtype, packed=pack, lengths=[64]
  )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_right_attentions_pass(dtype):
  assert check(rows(cudnn_call), dtype) > 0
  check(choice.attention_of("xla"), dtype, pack=True)


@pytest.mark.parametrize(
  "kernel", [no_causality, sees_padding, wrong_scale, wrong_gradient]
)
def test_wrong_kernels_are_found(kernel):
  with pytest.raises(UserError, match=r"this is wrong.* from the XLA path"):
    check(rows(kernel))


def test_attention_across_segments_is_found_on_packed_rows():
  check(rows(cudnn_call))
  with pytest.raises(UserError, match="this is wrong"):
    check(rows(cudnn_call), pack=True)


def test_what_is_not_a_number_or_fails_is_told_in_one_line():
  def nan(query, key, value, length_B):
    return cudnn_call(query, key, value, length_B).at[0, 0].set(jnp.nan)

  with pytest.raises(UserError, match="wrong on this machine: nan"):
    check(rows(nan))
  # There is no GPU here for the real call.
  with pytest.raises(UserError, match=r"fails on this model's heads.*xla$"):
    check(choice.attention_of("cudnn"))


@pytest.mark.slow
def test_a_kernel_that_is_wrong_at_half_a_block_only_is_found():
  def half_wrong(query, key, value, length_B):
    out = cudnn_call(query, key, value, length_B)
    return out * (1.5 if query.shape[1] % 128 == 64 else 1.0)

  whole = rows(half_wrong)
  choice.check(whole, "this", SMALL, "bfloat16", packed=False, lengths=[128])
  with pytest.raises(UserError, match=r"wrong on this.* of 192 tokens"):
    choice.check(whole, "this", SMALL, "bfloat16", packed=False)


@pytest.mark.parametrize("packing", [None, True, False])
def test_a_kernel_that_fails_gives_way_under_auto_alone(packing):
  found = choice.choose("auto", packing, platform="gpu", dtypes=HALF)
  assert found.implementation.startswith("cudnn")
  # There is no GPU here for it.
  settled = choice.settle(found, "auto", packing, [SMALL, SMALL])
  assert settled[:2] == ("xla", packing is not False)
  assert "was tried: train.attention=cudnn" in settled.why
  assert "\n" not in settled.why
  found = choice.choose("cudnn", packing, platform="gpu", dtypes=HALF)
  with pytest.raises(
    UserError, match=r"train\.attention=cudnn(_packed)? fails"
  ):
    choice.settle(found, "cudnn", packing, [SMALL])


def test_packed_rows_give_way_to_rows_of_one_sample(monkeypatch):
  monkeypatch.setitem(kernels.KERNELS, "cudnn", cudnn_call)
  for wanted in ("auto", "cudnn"):
    found = choice.choose(wanted, None, platform="gpu", dtypes=HALF)
    settled = choice.settle(found, wanted, None, [SMALL])
    assert settled[:2] == ("cudnn", False)
    assert "cudnn_packed was tried" in settled.why
  # Not where they are asked for.
  found = choice.choose("cudnn", True, platform="gpu", dtypes=HALF)
  with pytest.raises(UserError, match="attention=cudnn_packed fails"):
    choice.settle(found, "cudnn", True, [SMALL])


def test_a_kernel_that_fails_elsewhere_is_used_nowhere():
  asked = []

  def agree(good):
    asked.append(good)
    return False

  found = choice.Choice("cudnn", False, "bfloat16 on GPUs")
  settled = choice.settle(found, "auto", None, [], agree)
  assert settled[:2] == ("xla", True)
  assert "another process" in settled.why
  with pytest.raises(UserError, match="another process"):
    choice.settle(found, "cudnn", None, [], agree)
  assert asked == [True, True]
  # What needs no check is asked of nobody.
  plain = choice.Choice("xla", True, "as asked")
  assert choice.settle(plain, "xla", None, [SMALL], agree) is plain
  assert len(asked) == 2


@pytest.mark.slow
def test_a_kernels_padding_reaches_nothing():
  def dirty(query, key, value, length_B):
    out = cudnn_call(query, key, value, length_B)
    beyond = jnp.arange(query.shape[1]) >= length_B[:, None]
    return jnp.where(beyond[..., None, None], jnp.nan, out)

  check(rows(dirty))
  inputs = [jnp.ones((1, 16, heads, 8)) for heads in (4, 2, 2)]
  segment_BT = jnp.arange(16)[None] < 10
  out, back = jax.vjp(
    lambda *x: kernels.attend_rows(dirty, *x, segment_BT), *inputs
  )
  # Padding of the next layer's inputs is made of this: 0, and no gradient.
  assert not np.asarray(out[:, 10:]).any()
  for gradient in back(jnp.ones_like(out)):
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[:, 10:]).any()


@pytest.mark.slow
def test_rows_of_one_sample_equal_the_xla_path_whatever_stands_in_padding():
  position, segment = (
    np.stack(x)
    for x in zip(*(packed(r, 48) for r in [(48,), (20,), ()]), strict=True)
  )
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((3, 48, heads, 16)), jnp.float32)
    for heads in (4, 2, 2)
  )
  q, k, v = (
    jnp.where((segment > 0)[..., None, None], x, jnp.nan) for x in (q, k, v)
  )
  got = kernels.attend_rows(cudnn_call, q, k, v, segment)
  expected = attend(
    *(jnp.nan_to_num(x) for x in (q, k, v)),
    query_position_BT=position,
    key_position_BS=position,
    query_segment_BT=segment,
    key_segment_BS=segment,
  )
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_tokamax_is_the_same_call():
  pytest.importorskip("tokamax", reason="tokamax is not installed")
  check(rows(lambda *args: kernels.tokamax(*args, backend="xla_chunked")))


def _kernel_of(name):
  """A kernel that JAX knows by a primitive, as it knows cuDNN's."""
  forward = Primitive(name)
  forward.multiple_results = True
  forward.def_abstract_eval(lambda query: (query, query.update(shape=(1,))))

  @jax.custom_vjp
  def kernel(query, key, value, length_B):
    return forward.bind(query)[0]

  def run(*inputs):
    output, lse = forward.bind(inputs[0])
    return output, (*inputs, output, lse)

  def back(kept, ct):
    _, key, value, _, output, lse = kept
    return ct * output * lse, key * 0, value * 0, None

  kernel.defvjp(run, back)
  return kernel


@pytest.mark.parametrize(
  ("name", "runs"),
  [
    ("dot_product_attention_fwd_wrapper", 1),
    ("dot_product_attention_fwd", 1),
    # So a name that JAX no longer uses would show on a GPU.
    ("another", 2),
  ],
)
def test_what_cudnn_kept_isnt_computed_again(monkeypatch, name, runs):
  kernel = _kernel_of(name)
  monkeypatch.setattr(kernels, "cudnn", kernel)
  segment_BT = jnp.ones((1, 4), jnp.int32)

  def loss(x_BTNH):
    def block(x):
      mixed = kernels.attend_rows(kernel, x, x, x, segment_BT)
      return jnp.sin(mixed)  # whose gradient reads the output, too

    return jax.checkpoint(block, policy=kernels.keeps_attention)(x_BTNH).sum()

  program = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 4, 2, 8)))
  assert len(re.findall(rf"\b{name}\s", str(program))) == runs


def _by_places(query, key, value, start_BM, length_BM):
  """What cuDNN is to compute, by the places of segments that it is told."""
  place_T = jnp.arange(query.shape[1])
  stop_BM = start_BM + length_BM
  inside_BMT = (place_T >= start_BM[..., None]) & (place_T < stop_BM[..., None])
  inside_BMT &= (length_BM > 0)[..., None]
  same_BTT = jnp.einsum("BMT,BMS->BTS", *[inside_BMT.astype(int)] * 2) > 0
  # What belongs to no segment is anything.
  seen_BTT = jnp.where(inside_BMT.any(1)[..., None], same_BTT, True)
  out = jax.nn.dot_product_attention(
    query, key, value, mask=seen_BTT[:, None], is_causal=True
  )
  return jnp.where(inside_BMT.any(1)[..., None, None], out, jnp.nan)


def packed_rows(kernel):
  def attention(query, key, value, position_BT, segment_BT):
    return kernels.attend_packed(kernel, query, key, value, segment_BT)

  return attention


def test_packed_rows_reach_a_kernel_with_their_places():
  attention = packed_rows(_by_places)
  choice.check(attention, "this", SMALL, "bfloat16", packed=True)
  # Rows of one sample are packed rows, too.
  choice.check(attention, "this", SMALL, "bfloat16", packed=False)

  def a_token_late(query, key, value, start_BM, length_BM):
    late_BM = jnp.where(start_BM > 0, start_BM + 1, start_BM)
    return _by_places(query, key, value, late_BM, length_BM)

  late = packed_rows(a_token_late)
  with pytest.raises(UserError, match="wrong on this machine"):
    choice.check(late, "this", SMALL, "bfloat16", packed=True)


def test_places_of_segments():
  segment_BT = np.zeros((3, 16), np.int32)
  segment_BT[0] = [1] * 5 + [2] * 4 + [3] * 7
  segment_BT[1, :2] = 1
  start, length = kernels.segment_places(jnp.asarray(segment_BT), 4)
  assert start.tolist() == [[0, 5, 9, -1], [0, -1, -1, -1], [0, -1, -1, -1]]
  # A row of padding has a segment, as not every kernel takes one without.
  assert length.tolist() == [[5, 4, 7, -1], [2, -1, -1, -1], [1, -1, -1, -1]]


def test_offsets_of_keys_are_by_heads_of_keys_in_every_jax():
  offsets = jnp.array([[0, 3, -1]])
  seqlen = jnp.array([[3, 5, -1]])
  query, key = jnp.zeros((1, 8, 6, 4)), jnp.zeros((1, 8, 2, 4))

  def of(heads_of_keys):
    def fix(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key):
      _, _, N, H = query.shape
      K = heads_of_keys(query, key)
      return q_seqlen, kv_seqlen, q_offsets * N * H, kv_offsets * K * H

    fused = types.SimpleNamespace(_fix_seqlen_offsets=fix)
    for _ in range(2):  # once, however often it is asked for
      kernels._mend_offsets(fused)
    given = (seqlen, seqlen, offsets, offsets, query, key)
    return fused._fix_seqlen_offsets(*given)

  wrong = of(lambda query, key: query.shape[2])
  right = of(lambda query, key: key.shape[2])
  for found in (wrong, right):
    assert found[2].tolist() == [[0, 72, -24]]
    assert found[3].tolist() == [[0, 24, -8]]


def test_the_jax_at_hand_has_what_packed_rows_need():
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  kernels._mend_offsets(fused)
  query, key = jnp.zeros((2, 8, 6, 4)), jnp.zeros((2, 8, 2, 4))
  start = jnp.array([[0, 3, -1], [0, -1, -1]])
  length = jnp.array([[3, 5], [7, -1]])
  found = fused._fix_seqlen_offsets(length, length, start, start, query, key)
  assert found[0].ravel().tolist() == [3, 5, 7, 0]
  # In numbers, from the first row's beginning: of queries and of keys.
  for heads, got in ((6, found[2]), (2, found[3])):
    assert got.ravel().tolist()[:3] == [0, 3 * heads * 4, 8 * heads * 4]
