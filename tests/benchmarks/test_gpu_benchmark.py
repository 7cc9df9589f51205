"""`benchmarks/gpu.py` on a CPU: its arithmetic, its checks, its clock."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.devices import xla_flags
from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_scale  # noqa: E402
import gpu_sections  # noqa: E402
import shapes  # noqa: E402

from trd_jax.distill.loss.token_stats import Scoring, token_stats  # noqa: E402
from trd_jax.model.lora_config import LoraConfig  # noqa: E402
from trd_jax.model.qwen3 import Qwen3  # noqa: E402

pytestmark = pytest.mark.slow


def run(tmp_path, *flags):
  """The document that a run on one CPU device writes."""
  out = tmp_path / "gpu.json"
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  environment["XLA_FLAGS"] = xla_flags(None)
  subprocess.run(
    [
      sys.executable,
      BENCHMARKS / "gpu.py",
      "--scale=small",
      f"--out={out}",
      *flags,
    ],
    env=environment,
    capture_output=True,
    check=True,
  )
  return json.loads(out.read_text())


def test_every_case_of_a_section_is_measured_or_says_why_not(tmp_path):
  made = run(tmp_path, "--sections=copy,attention,step", "--minutes=20")
  rows = {(row["section"], row["case"]): row for row in made["rows"]}
  assert len(rows) == len(made["rows"])
  missing = {case for (_, case), row in rows.items() if "measures" not in row}
  kernels = ("cudnn", "tokamax")  # of GPUs, all of their cases
  assert missing == {case for _, case in rows if case.startswith(kernels)}
  for case in missing:
    assert rows["attention", case]["not_measured"]
  error = rows["attention", "xla: error"]["measures"]
  assert error["relative"] < 2**-7
  assert error["padding finite"] == 1
  for name in ("medians", "medians, teacher's passes left out"):
    measures = rows["step", f"tiny OPSD, {name}"]["measures"]
    model = shapes.MODELS["tiny"]
    lengths = gpu_scale.SCALES["small"].medians
    flops = shapes.step_flops(
      model, model, lengths, 64, teach=name == "medians"
    )
    done = measures["TFLOP/s"] * 1e12 * measures["s a sample"]
    assert done == pytest.approx(flops)
    assert measures["student tokens computed"] >= 4 * (lengths.student - 1)
    teaches = measures["teacher tokens computed"] >= 4 * (lengths.teacher - 1)
    assert teaches == (name == "medians")
    # On a CPU there is no share of an H100 and no device memory to speak of.
    assert not {"of 989", "peak GB so far"} & measures.keys()


def test_without_time_nothing_is_measured_and_every_section_says_so(tmp_path):
  made = run(tmp_path, "--minutes=0.001")
  assert {row["section"] for row in made["rows"]} == set(gpu.SHARES)
  assert {row["not_measured"] for row in made["rows"]} == {"no time was left"}


def test_a_section_that_hangs_is_ended_and_keeps_what_it_had(tmp_path):
  slow = tmp_path / "python"
  slow.write_text(
    f"#!{sys.executable}\n"
    "import time\n"
    """print('CASES ["cpu", ["first", "second"]]', flush=True)\n"""
    """print('ROW ["first", {"runs": 5}]', flush=True)\n"""
    "time.sleep(30)\n"
    """print('ROW ["second", {"runs": 5}]', flush=True)\n"""
  )
  slow.chmod(0o755)
  device, rows = gpu.run_section("copy", str(slow), "small", 5)
  assert device == "cpu"
  assert [row.get("measures") for row in rows] == [{"runs": 5}, None]
  assert rows[1]["not_measured"] == "no time was left"


def test_a_section_that_fails_gives_its_reason():
  device, rows = gpu.run_section("no-such-section", sys.executable, "small", 60)
  assert device is None
  assert rows == [
    {
      "section": "no-such-section",
      "case": "no-such-section",
      "not_measured": "KeyError: 'no-such-section'",
    }
  ]


def row(section, case, **measures):
  return {"section": section, "case": case, "measures": measures}


def test_targets_and_ratios_need_both_sides_measured():
  assert all(line.endswith(": not measured") for line in gpu.judge([]))
  ours = row("step", "ours", **{"s a sample": 0.5, "of 989": 0.4})
  peer = row("peer", "theirs", **{"s a sample": 1.0})
  lines = gpu.judge([ours, peer])
  assert "step, of 989 >= 0.45: 0.4 (not met)" in lines
  assert "step, s a sample <= 0.6: 0.5 (met)" in lines
  (ratio,) = gpu.compare([ours, peer])
  assert ratio["measures"] == {"times as fast": 2.0}
  absent = {"section": "peer", "case": "theirs", "not_measured": "why"}
  assert gpu.compare([ours, absent]) == gpu.compare([peer]) == []


@pytest.mark.parametrize("name", shapes.MODELS)
def test_the_counted_weights_are_the_models(name):
  config = shapes.MODELS[name]
  model = jax.eval_shape(
    lambda: Qwen3(config, lora=LoraConfig(rank=64), rngs=nnx.Rngs(0))
  )
  _, lora, base = nnx.split(model, nnx.LoRAParam, ...)
  kernels = [
    leaf.get_value().size
    for path, leaf in nnx.to_flat_state(base)
    if path[-1] == "kernel"
  ]
  assert shapes.linear_weights(config) == sum(kernels)
  adapter = sum(x.size for x in jax.tree.leaves(lora))
  assert config.adapter_parameters(64) == adapter


def test_the_flops_of_a_trajectory_by_hand():
  model, lengths = shapes.MODELS["8b"], shapes.MEDIANS
  # 4096 x (2 x 128 x 40 + 3 x 12,288) x 36 weights, 128 x 32 x 36 a pair of
  # positions and product of attention.
  P, pair = 6_945_767_424, 147_456
  teacher = 2 * P * 9420 + 4 * pair * 9420**2 / 2
  assert shapes.teacher_flops(model, lengths) == teacher
  # The forward pass that comes again leaves the last product of a block out.
  down = 36 * (12_288 + 64) * 4096
  student = (6 * P + 8 * 174_587_904 - 2 * down) * 1080 + 9 * pair * 1080**2
  assert shapes.student_flops(model, lengths, 64) == student
  head = 6 * 151_936 * 4096 * 880
  assert shapes.head_flops(model, model, 880) == head
  with_both = shapes.step_flops(model, model, lengths, 64)
  assert with_both == student + head + teacher
  assert shapes.step_flops(model, model, lengths, 64, teach=False) == (
    student + head
  )


def test_the_check_of_attention_sees_a_path_that_looks_ahead_or_at_padding():
  right = gpu_sections._paths()["xla"]

  def ahead(q, k, v, length_B):
    return jax.nn.dot_product_attention(
      q, k, v, query_seq_lengths=length_B, key_value_seq_lengths=length_B
    )

  def early(q, k, v, length_B):
    return right(q, k, v, length_B - 3)

  good, *bad = (
    gpu_sections._error(path, 4, 2, 16)["relative"]
    for path in (right, ahead, early)
  )
  assert good < 2**-7
  assert min(bad) > 0.05


def test_the_peers_loss_is_ours():
  pytest.importorskip("peft")
  import gpu_peer
  import torch

  rng = np.random.default_rng(0)
  student, teacher, head = (
    rng.standard_normal((rows, 16)).astype(np.float32)
    for rows in (700, 700, 96)
  )
  ours = token_stats(
    *map(jnp.asarray, (student, teacher, head, head)),
    jnp.zeros(700, jnp.int32),
    jnp.arange(2),
    Scoring(diagnostics=False),
  )
  theirs = gpu_peer._chunked(*map(torch.from_numpy, (student, teacher, head)))
  np.testing.assert_allclose(theirs, ours.divergence.sum(), rtol=1e-5)
