"""Which attention runs is said, and what is wrong about it is found."""

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


def test_auto_takes_the_kernel_where_it_can_and_packs_where_it_cannot():
  assert chosen() == ("cudnn", False)
  assert chosen(packing=False) == ("cudnn", False)
  assert chosen(packing=True) == ("xla", True)
  assert chosen(platform="cpu") == ("xla", True)
  assert chosen(platform="cpu", packing=False) == ("xla", False)
  assert chosen(dtypes=["bfloat16", "float32"]) == ("xla", True)


def test_what_is_asked_for_is_taken_or_refused_but_never_replaced():
  assert chosen("xla") == ("xla", True)
  assert chosen("xla", packing=False) == ("xla", False)
  assert chosen("cudnn") == ("cudnn", False)
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


@pytest.mark.parametrize("packing", [None, False])
def test_a_kernel_that_fails_gives_way_under_auto_alone(packing):
  found = choice.choose("auto", packing, platform="gpu", dtypes=HALF)
  assert found.implementation == "cudnn"
  # There is no GPU here for it.
  settled = choice.settle(found, "auto", packing, [SMALL, SMALL])
  assert settled[:2] == ("xla", packing is None)
  assert settled.why.startswith("cudnn was tried: train.attention=cudnn fails")
  assert "\n" not in settled.why
  found = choice.choose("cudnn", packing, platform="gpu", dtypes=HALF)
  with pytest.raises(UserError, match=r"train\.attention=cudnn fails"):
    choice.settle(found, "cudnn", packing, [SMALL])


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
    query, key, value, length_B, output, lse = kept
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
  assert str(program).count(f"{name} ") + str(program).count(f"{name}\n") == runs
