"""`benchmarks/hlo_cost.py`: kernels, FLOPs and bytes out of HLO's text."""

import sys

import jax
import jax.numpy as jnp
import pytest

from tests.support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import hlo_cost
from hlo_cost import Card


def compiled(f, *arguments):
  """The kernels of a function that is compiled for the CPU."""
  return hlo_cost.cost(jax.jit(f).lower(*arguments).compile().as_text())


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def module(entry, *computations, arguments=""):
  """An HLO module of these lines, as XLA prints one."""
  parts = ["HloModule written, is_scheduled=true"]
  for header, lines in (*computations, (f"ENTRY %main ({arguments})", entry)):
    parts.append(f"\n{header} -> (f32[]) {{")
    parts += [f"  {line}" for line in lines]
    parts.append("}")
  return "\n".join(parts)


def kernel(text, name, **options):
  """The one kernel of that name."""
  (found,) = [
    k for k in hlo_cost.cost(text, **options).kernels if k.name == name
  ]
  return found


def test_nested_loops_run_their_kernels_as_often_as_both_turn():
  def f(x, w):
    def inner(x, _):
      return jnp.tanh(x @ w), None

    def outer(x, _):
      return jax.lax.scan(inner, x, None, length=3)[0] @ w, None

    return jax.lax.scan(outer, x, None, length=5)[0]

  found = compiled(f, floats(7, 16), floats(16, 16))
  runs = sorted(k.runs for k in found.kernels if k.flops)
  assert runs == [5, 15]
  assert found.flops() == 20 * 2 * 7 * 16 * 16
  assert found.notes == []


def test_a_products_flops_have_its_batch_and_what_is_contracted():
  def f(x, w):
    return jnp.einsum("bij,bjk->bik", x, w)

  found = compiled(f, floats(3, 5, 7), floats(3, 7, 11))
  assert found.flops() == 2 * 3 * 5 * 7 * 11
  # float32, each array once.
  assert found.bytes() == 4 * (3 * 5 * 7 + 3 * 7 * 11 + 3 * 5 * 11)


def test_an_elementwise_fusion_reads_each_operand_once():
  found = compiled(lambda x, y: jnp.sin(x) * y + x, floats(64), floats(64))
  assert found.bytes() == 3 * 64 * 4
  assert found.flops() == 0


def test_a_gather_reads_the_rows_that_it_takes():
  def f(table, ids):
    return table[ids] * 2

  ids = jax.ShapeDtypeStruct((8,), jnp.int32)
  found = compiled(f, floats(1000, 16), ids)
  assert 2 * 8 * 16 * 4 <= found.bytes() <= 2 * 8 * 16 * 4 + 4 * 8 * 4


def test_a_scan_over_stacked_weights_reads_each_layers_once():
  def f(x, stacked):
    return jax.lax.scan(lambda x, w: (x * w, None), x, stacked)[0]

  found = compiled(f, floats(4096), floats(10, 4096))
  # The state is read and written besides; the counter's bytes are few.
  each = 3 * 4096 * 4
  assert 10 * each <= found.bytes() <= 10 * each * 1.4


_SLICED = (
  "%fused (p0: bf16[36,4096,512], p1: s32[])",
  [
    "%p0 = bf16[36,4096,512]{2,1,0} parameter(0)",
    "%p1 = s32[] parameter(1)",
    "%zero = s32[] constant(0)",
    "%cut = bf16[1,4096,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero),"
    " dynamic_slice_sizes={1,4096,512}",
    "ROOT %flat = bf16[4096,512]{1,0} bitcast(%cut)",
  ],
)


def test_a_fusion_that_slices_an_operand_reads_the_slice():
  text = module(
    [
      "%w = bf16[36,4096,512]{2,1,0} parameter(0)",
      "%i = s32[] parameter(1)",
      "ROOT %copied = bf16[4096,512]{1,0} fusion(%w, %i), kind=kLoop,"
      " calls=%fused",
    ],
    _SLICED,
  )
  slice_bytes = 4096 * 512 * 2
  assert kernel(text, "copied").bytes == 2 * slice_bytes + 4


def test_an_operand_that_is_sliced_and_read_whole_counts_whole():
  header, lines = _SLICED
  whole = [
    *lines[:-1],
    "%sum = bf16[36,4096,512]{2,1,0} add(%p0, %p0)",
    "ROOT %both = (bf16[1,4096,512]{2,1,0}, bf16[36,4096,512]{2,1,0})"
    " tuple(%cut, %sum)",
  ]
  text = module(
    [
      "%w = bf16[36,4096,512]{2,1,0} parameter(0)",
      "%i = s32[] parameter(1)",
      "ROOT %made = (bf16[1,4096,512]{2,1,0}, bf16[36,4096,512]{2,1,0})"
      " fusion(%w, %i), kind=kLoop, calls=%fused",
    ],
    (header, whole),
  )
  one, stack = 4096 * 512 * 2, 36 * 4096 * 512 * 2
  assert kernel(text, "made").bytes == stack + (one + stack) + 4


def test_a_slice_behind_a_conversion_counts_what_lies_in_memory():
  """float32 in memory, read as bfloat16."""
  text = module(
    [
      "%w = f32[8,100]{1,0} parameter(0)",
      "%i = s32[] parameter(1)",
      "ROOT %cast = bf16[1,100]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused",
    ],
    (
      "%fused (p0: f32[8,100], p1: s32[])",
      [
        "%p0 = f32[8,100]{1,0} parameter(0)",
        "%p1 = s32[] parameter(1)",
        "%zero = s32[] constant(0)",
        "%half = bf16[8,100]{1,0} convert(%p0)",
        "ROOT %cut = bf16[1,100]{1,0} dynamic-slice(%half, %p1, %zero)",
      ],
    ),
  )
  assert kernel(text, "cast").bytes == 100 * 4 + 4 + 100 * 2


def test_what_is_written_in_place_counts_as_the_update():
  text = module(
    [
      "%buffer = f32[16,1000]{1,0} parameter(0)",
      "%row = f32[1,1000]{1,0} parameter(1)",
      "%i = s32[] parameter(2)",
      "ROOT %put = f32[16,1000]{1,0} fusion(%buffer, %row, %i), kind=kLoop,"
      " calls=%fused",
    ],
    (
      "%fused (p0: f32[16,1000], p1: f32[1,1000], p2: s32[])",
      [
        "%p0 = f32[16,1000]{1,0} parameter(0)",
        "%p1 = f32[1,1000]{1,0} parameter(1)",
        "%p2 = s32[] parameter(2)",
        "%zero = s32[] constant(0)",
        "ROOT %new = f32[16,1000]{1,0} dynamic-update-slice(%p0, %p1, %p2,"
        " %zero)",
      ],
    ),
  )
  assert kernel(text, "put").bytes == 2 * 1000 * 4 + 4


def _product_in_a_fusion(dims):
  """A product that slices its weights, as a Triton fusion has it."""
  return (
    "%gemm (x: bf16[640,4096], w: bf16[36,4096,512], i: s32[])",
    [
      "%x = bf16[640,4096]{1,0} parameter(0)",
      "%w = bf16[36,4096,512]{2,1,0} parameter(1)",
      "%i = s32[] parameter(2)",
      "%zero = s32[] constant(0)",
      "%cut = bf16[1,4096,512]{2,1,0} dynamic-slice(%w, %i, %zero, %zero)",
      "%flat = bf16[4096,512]{1,0} bitcast(%cut)",
      f"ROOT %y = bf16[640,512]{{1,0}} dot(%x, %flat), {dims}",
    ],
  )


def test_a_product_in_a_fusion_reads_its_weights_in_place():
  text = module(
    [
      "%x = bf16[640,4096]{1,0} parameter(0)",
      "%w = bf16[36,4096,512]{2,1,0} parameter(1)",
      "%i = s32[] parameter(2)",
      "ROOT %y = bf16[640,512]{1,0} fusion(%x, %w, %i), kind=kCustom,"
      " calls=%gemm",
    ],
    _product_in_a_fusion("lhs_contracting_dims={1}, rhs_contracting_dims={0}"),
  )
  found = kernel(text, "y")
  assert found.flops == 2 * 640 * 4096 * 512
  assert found.bytes == 2 * (640 * 4096 + 4096 * 512 + 640 * 512) + 4
  assert found.kind == "products"


def test_a_librarys_product_is_read_from_its_configuration():
  line = (
    "ROOT %y = (f32[640,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w),"
    ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_'
    'config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]}}}'
  )
  inputs = [
    "%x = bf16[640,4096]{1,0} parameter(0)",
    "%w = bf16[4096,512]{1,0} parameter(1)",
  ]
  text = module([*inputs, line])
  assert kernel(text, "y").flops == 2 * 640 * 4096 * 512
  with pytest.raises(ValueError, match="can't be read"):
    hlo_cost.cost(text.replace("lhs_contracting_dimensions", "others"))


def _f8_library(left, right):
  return module(
    [
      f"%x = {left}[640,4096]{{1,0}} parameter(0)",
      f"%w = {right}[512,4096]{{1,0}} parameter(1)",
      "%s = f32[] parameter(2)",
      "ROOT %y = (bf16[640,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w, %s,"
      ' %s), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_'
      'backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":'
      '["1"],"rhs_contracting_dimensions":["1"]}}}',
    ]
  )


def _f8_fusion(convert):
  """A product in a fusion, of operands in eight bits or made wider before."""
  dims = "lhs_contracting_dims={1}, rhs_contracting_dims={1}"
  lines = [
    "%x = f8e4m3fn[640,4096]{1,0} parameter(0)",
    "%w = f8e4m3fn[512,4096]{1,0} parameter(1)",
  ]
  names = "%x, %w"
  if convert:
    lines += [
      "%wide.x = bf16[640,4096]{1,0} convert(%x)",
      "%wide.w = bf16[512,4096]{1,0} convert(%w)",
    ]
    names = "%wide.x, %wide.w"
  return module(
    [
      "%a = f8e4m3fn[640,4096]{1,0} parameter(0)",
      "%b = f8e4m3fn[512,4096]{1,0} parameter(1)",
      "ROOT %y = bf16[640,512]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm",
    ],
    (
      "%gemm (x: f8e4m3fn[640,4096], w: f8e4m3fn[512,4096])",
      [*lines, f"ROOT %d = bf16[640,512]{{1,0}} dot({names}), {dims}"],
    ),
  )


@pytest.mark.parametrize(
  ("text", "share"),
  [
    (_f8_library("f8e4m3fn", "f8e4m3fn"), 1),
    (_f8_library("f8e4m3fn", "f8e5m2"), 1),
    (_f8_library("f8e4m3fn", "bf16"), 0),
    (_f8_fusion(convert=False), 1),
    (_f8_fusion(convert=True), 0),
  ],
)
def test_a_product_of_eight_bits_has_a_rate_of_its_own(text, share):
  found = kernel(text, "y")
  assert found.flops == 2 * 640 * 4096 * 512
  assert found.flops8 == share * found.flops
  assert found.kind == "products"


def attention(target, operands, mask="PADDING_CAUSAL"):
  names = ["q", "k", "v", "do"][:operands]
  return module(
    [
      "%q = bf16[4,1024,32,128]{3,2,1,0} parameter(0)",
      "%k = bf16[4,1024,8,128]{3,2,1,0} parameter(1)",
      "%v = bf16[4,1024,8,128]{3,2,1,0} parameter(2)",
      "%do = bf16[4,1024,32,128]{3,2,1,0} parameter(3)",
      "ROOT %mixed = (bf16[4,32,1024,128]{3,1,2,0}, u8[0]{0}) custom-call("
      + ", ".join(f"%{name}" for name in names)
      + f'), custom_call_target="__cudnn${target}", backend_config={{'
      f'"mask_type": "{mask}"}}',
    ]
  )


def test_attention_has_half_its_pairs_twice_forward_and_five_times_back():
  pairs = 4 * 32 * 1024**2
  forward = kernel(attention("fmhaSoftmax", 3), "mixed")
  assert forward.flops == 2 * 2 * 128 * pairs / 2
  assert forward.kind == "attention"
  back = kernel(attention("fmhaSoftmaxBackward", 4), "mixed")
  assert back.flops == 2.5 * forward.flops
  every = kernel(attention("fmhaSoftmax", 3, "NO_MASK"), "mixed")
  assert every.flops == 2 * forward.flops
  # Rows of two equal segments have half the pairs of one.
  packed = kernel(attention("fmhaSoftmax", 3), "mixed", seen=0.5)
  assert packed.flops == forward.flops / 2


@pytest.mark.parametrize(
  "groups",
  [
    "[2,8]<=[16]",
    "{{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}",
    "mesh['a'=2,'b'=4,'c'=2] {'b','c'}",
  ],
)
def test_a_collective_sends_its_part_around_the_ring(groups):
  def made(opcode, result):
    return kernel(
      module(
        [
          "%x = f32[1000]{0} parameter(0)",
          f"ROOT %y = f32[{result}]{{0}} {opcode}-start(%x), channel_id=1,"
          f" replica_groups={groups}, to_apply=%add",
          f"%z = f32[{result}]{{0}} {opcode}-done(%y)",
        ]
      ),
      "y",
    )

  whole = made("all-reduce", 1000)
  assert whole.kind == "collectives"
  assert whole.link_bytes == pytest.approx(2 * 7 / 8 * 4000)
  assert made("all-gather", 8000).link_bytes == pytest.approx(7 * 4000)
  assert made("reduce-scatter", 125).link_bytes == pytest.approx(3500)


def loop(body, trips='{"known_trip_count":{"n":"36"}}'):
  """A loop over stacked weights, which it hands on from the arguments."""
  state = "(s32[], bf16[640,4096]{1,0}, bf16[36,4096,512]{2,1,0})"
  return module(
    [
      "%x = bf16[640,4096]{1,0} parameter(0)",
      "%w = bf16[36,4096,512]{2,1,0} parameter(1)",
      "%start = s32[] constant(0)",
      f"%given = {state} tuple(%start, %x, %w)",
      f"ROOT %end = {state} while(%given), condition=%cond, body=%body,"
      f" backend_config={trips}",
    ],
    _SLICED,
    (
      "%body (state: (s32[], bf16[640,4096], bf16[36,4096,512]))",
      [
        f"%state = {state} parameter(0)",
        "%i = s32[] get-tuple-element(%state), index=0",
        "%x = bf16[640,4096]{1,0} get-tuple-element(%state), index=1",
        "%w = bf16[36,4096,512]{2,1,0} get-tuple-element(%state), index=2",
        "%copied = bf16[4096,512]{1,0} fusion(%w, %i), kind=kLoop,"
        " calls=%fused",
        *body,
        f"ROOT %next = {state} tuple(%i, %x, %w)",
      ],
    ),
  )


def test_what_only_copies_a_layers_weights_is_told_apart():
  found = kernel(loop([]), "copied")
  assert (found.kind, found.runs) == ("weight copies", 36)


def test_a_loop_with_a_product_of_the_heads_rows_is_the_heads():
  product = [
    "%y = bf16[640,512]{1,0} dot(%x, %copied), lhs_contracting_dims={1},"
    " rhs_contracting_dims={0}"
  ]
  assert kernel(loop(product), "y").kind == "products"
  for name in "y", "copied":
    assert kernel(loop(product), name, vocab=512).kind == "head"


def test_logits_in_no_loop_are_the_heads_and_an_embedding_is_not():
  text = module(
    [
      "%x = bf16[64,128]{1,0} parameter(0)",
      "%head = bf16[999,128]{1,0} parameter(1)",
      "%ids = s32[64,1]{1,0} parameter(2)",
      "%embedded = bf16[64,128]{1,0} gather(%head, %ids)",
      "%logits = f32[64,999]{1,0} dot(%x, %head), lhs_contracting_dims={1},"
      " rhs_contracting_dims={1}",
      "ROOT %likely = f32[64,999]{1,0} exponential(%logits)",
    ]
  )
  found = {k.name: k.kind for k in hlo_cost.cost(text, vocab=999).kernels}
  assert found == {"embedded": "rest", "logits": "head", "likely": "head"}


def test_bits_of_a_mask_are_dropouts_and_other_arithmetic_is_the_norms():
  def line(op_name):
    return (
      "%n = bf16[640,4096]{1,0} negate(%x),"
      f' metadata={{op_name="jit(f)/{op_name}"}}'
    )

  bits = loop([line("jit(_bernoulli)/jit(_uniform)/rng_bit_generator")])
  assert kernel(bits, "n").kind == "dropout"
  assert kernel(loop([line("mul")]), "n").kind == "norms and gates"


def test_a_loop_of_unknown_length_without_products_is_noted():
  found = hlo_cost.cost(loop([], trips="{}"))
  assert found.notes == ["end: a loop of unknown length, counted once"]
  assert kernel(loop([], trips="{}"), "copied", turns=4).runs == 4


def test_of_a_conditional_the_dearest_branch_counts():
  def branch(name, size):
    lines = [
      f"%{name}.p = f32[{size}]{{0}} parameter(0)",
      f"ROOT %{name}.n = f32[{size}]{{0}} negate(%{name}.p)",
    ]
    return f"%{name} (p: f32[{size}])", lines

  text = module(
    [
      "%i = s32[] parameter(0)",
      "%a = f32[10]{0} parameter(1)",
      "%b = f32[1000]{0} parameter(2)",
      "ROOT %c = f32[] conditional(%i, %a, %b),"
      " branch_computations={%small, %large}",
    ],
    branch("small", 10),
    branch("large", 1000),
  )
  assert [k.name for k in hlo_cost.cost(text).kernels] == ["large.n"]


def test_a_kernel_takes_the_longest_of_three_and_a_moment():
  card = Card(
    flops=100.0,
    flops8=200.0,
    reached=0.5,
    bytes=10.0,
    link_bytes=1.0,
    start=0.5,
  )

  def of(flops, bytes_, link, flops8=0.0):
    kernel = hlo_cost.Kernel("k", "rest", flops, bytes_, link, 2, flops8)
    return kernel.seconds(card)

  assert of(100.0, 10.0, 1.0) == 2 * (2.0 + 0.5)
  assert of(1.0, 30.0, 1.0) == 2 * (3.0 + 0.5)
  assert of(1.0, 10.0, 4.0) == 2 * (4.0 + 0.5)
  assert of(400.0, 10.0, 1.0, 400.0) == 2 * (4.0 + 0.5)
  assert of(400.0, 10.0, 1.0, 200.0) == 2 * (6.0 + 0.5)


def test_text_that_is_no_module_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo_cost.cost("Traceback (most recent call last)")
