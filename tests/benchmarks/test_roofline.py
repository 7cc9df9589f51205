"""`benchmarks/roofline.py`: its plan, its sums, its refusals; no compiler."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from tests.support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import hlo_cost
import report
import roofline
import shapes
import training

from trd_jax.experiment.errors import UserError

pytestmark = pytest.mark.slow

needs_devices = pytest.mark.skipif(
  jax.device_count() < 8, reason="needs 8 (host) devices"
)
# Three products of 64 x 64 x 64, and what they are called with.
_PROGRAM = """HloModule written

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  ROOT %y = bf16[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}
}
"""
_FLOPS = 2 * 64**3


def small_experiment(**values):
  """The default row in small batches, one trajectory in a row or several."""
  changes = [f"{key.replace('__', '.')}={v}" for key, v in values.items()]
  return roofline.experiment_of(
    "8b", "opsd", "trd", ["train.batch_size=32", *changes]
  )


def small_plan(**values):
  """A plan of the tiny model for 8 host devices, and its lengths."""
  experiment = small_experiment(**values)
  rng = np.random.default_rng(0)
  lengths = rng.integers(8, 60, (96, 3))
  lengths[:, 1] *= 4
  devices = jax.devices()[:8]
  return roofline.plan("tiny", experiment, lengths, 0, devices), lengths


def test_drawn_lengths_have_the_papers_medians():
  experiment = small_experiment()
  student, teacher, response = roofline.paper_lengths(experiment, 0).T
  assert np.median(student) == pytest.approx(200, rel=0.02)
  assert np.median(response) == pytest.approx(880, rel=0.02)
  # The draft is cut at the budget; the reference and 150 around are read, too.
  assert 7700 + 490 + 350 < np.median(teacher) < 1.1 * (7700 + 490 + 350)
  assert response.max() <= training.LONGEST
  again = roofline.paper_lengths(experiment, 0).T
  np.testing.assert_array_equal(again[2], response)
  assert (roofline.paper_lengths(experiment, 1).T[2] != response).any()


def test_what_the_teacher_reads_follows_the_regime_and_the_method():
  def longest(regime, method):
    experiment = roofline.experiment_of("4b", regime, method)
    return roofline.paper_lengths(experiment, 0)

  opsd, opd = longest("opsd", "trd"), longest("opd", "trd")
  # Without the reference in OPD; the same draws otherwise.
  assert (opsd[:, 1] > opd[:, 1]).all()
  np.testing.assert_array_equal(opsd[:, 2], opd[:, 2])
  on_y_o = longest("opd", "forward_kl")
  np.testing.assert_array_equal(on_y_o[:, 1], on_y_o[:, 0])
  assert np.median(on_y_o[:, 2]) == pytest.approx(7700, rel=0.02)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ("lora.dropuot=0", "lora.dropout"),
    ("lora.dropout=much", "lora.dropout"),
    ("lora.dropout", "write KEY=VALUE"),
  ],
)
def test_a_change_that_is_no_change_of_the_config_is_refused(change, told):
  with pytest.raises(UserError, match=told):
    roofline.experiment_of("8b", "opsd", "trd", [change])


@needs_devices
@pytest.mark.parametrize("packing", [False, True])
def test_a_plan_has_each_token_once_on_some_device(packing):
  plan, lengths = small_plan(train__packing=packing)
  assert dict(plan.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert plan.samples == 4
  # The last response token is no input; three updates take all 96.
  inputs = lengths[:, :2] + lengths[:, 2:] - 1
  for side, tokens in zip(("learn", "teach"), inputs.sum(0), strict=True):
    found = [s for name, s in plan.programs.items() if name.startswith(side)]
    assert sum(s.real for s in found) * 8 * 3 == pytest.approx(tokens)
    for one in found:
      each = one.pack.rows.tokens[0].size
      assert one.padded == pytest.approx(one.runs * each)
      assert one.seen < 1 if packing and one.runs else one.seen == 1


@needs_devices
def test_flops_of_the_arithmetic_follow_rows_and_what_they_see():
  plan, _ = small_plan(train__packing=False)
  model = shapes.MODELS["tiny"]
  for name, one in plan.programs.items():
    _, rows, length = one.pack.rows.tokens.shape
    lengths = shapes.Lengths(length, length, length)
    wanted = roofline.expected_flops(plan, name)
    if name.startswith("teach"):
      assert wanted == rows * shapes.teacher_flops(model, lengths)
      half = roofline.Side(one.pack, 1, 1, 1, 0.5)
      plan.programs[name] = half
      less = wanted - rows * shapes.attention_flops(model, length) / 2
      assert roofline.expected_flops(plan, name) == pytest.approx(less)
    else:
      learnt = rows * shapes.student_flops(model, lengths, 64)
      slots = one.pack.slots.label[0].size
      assert wanted == learnt + shapes.head_flops(model, model, slots)
  assert roofline.expected_flops(plan, "update") is None


class Program:
  """Stands for a compiled program."""

  def as_text(self):
    return _PROGRAM

  def memory_analysis(self):
    return types.SimpleNamespace(
      temp_size_in_bytes=7, output_size_in_bytes=5, alias_size_in_bytes=3
    )


def evaluated(monkeypatch, wanted, keep=None):
  """What `evaluate` makes of a plan whose programs are all `Program`."""
  rows = types.SimpleNamespace(tokens=np.zeros((8, 2, 64), np.int32))
  pack = types.SimpleNamespace(rows=rows)
  plan = types.SimpleNamespace(
    programs={"learn 64": roofline.Side(pack, 1.5, 100.0, 192.0, 1.0)},
    student=types.SimpleNamespace(vocab_size=999),
    samples=16.0,
  )
  monkeypatch.setattr(
    roofline,
    "programs_of",
    lambda plan: [("learn 64", Program()), ("update", Program())],
  )
  monkeypatch.setattr(roofline, "expected_flops", lambda plan, name: wanted)
  return roofline.evaluate(plan, keep)


def test_a_program_with_other_flops_than_the_arithmetic_is_refused(
  monkeypatch,
):
  assert evaluated(monkeypatch, _FLOPS * 1.019)
  with pytest.raises(roofline.Wrong, match="learn 64: "):
    evaluated(monkeypatch, _FLOPS * 1.03)


def test_texts_are_kept_with_how_often_they_run(monkeypatch, tmp_path):
  cases = evaluated(monkeypatch, None, tmp_path)
  run = cases["learn 64"]["runs"][0]
  assert (run["flops"], run["scratch"], run["rows"]) == (_FLOPS, 9, 2)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["samples_a_device"] == 16
  assert manifest["programs"][0] == {
    "program": "learn 64",
    "file": "learn-64.txt",
    "count": 1.5,
    "real_tokens": 100.0,
    "padded_tokens": 192.0,
  }
  for one in manifest["programs"]:
    assert (tmp_path / one["file"]).read_text() == _PROGRAM


def written():
  """A document of one group with round figures."""

  def case(seconds, runs, real, padded):
    kinds = dict.fromkeys(hlo_cost.KINDS, 0.0) | {"products": seconds}
    run = {
      **{"s": seconds, "flops": 98.9e12 * seconds, "bytes": 1e9, "rows": 1},
      **{"scratch": 3e9, "runs": runs, "real": real, "padded": padded},
      "kinds": kinds,
    }
    return {"about": {"notes": []}, "runs": [run]}

  settings = {
    **{"model": "8b", "regime": "opsd", "method": "trd", "remat": "full"},
    **{"attention": "cudnn", "packing": False, "dropout": 0.05},
    **{"mesh": {"data": 8, "fsdp": 1}, "samples": 16.0, "held": {"all": 20e9}},
  }
  cases = {
    "teach 4096": case(2.0, 3.0, 60.0, 100.0),
    "learn 512": case(1.0, 4.0, 30.0, 40.0),
    "learn 1024": case(2.0, 0.5, 10.0, 60.0),
    "update": case(1.0, 1.0, 0.0, 0.0),
  }
  return {
    "part": "roofline",
    "groups": {"8b opsd trd": {"settings": settings, "cases": cases}},
  }


def test_an_updates_figures_are_sums_over_its_packs():
  (group,) = written()["groups"].values()
  found = roofline.sums(group["settings"], group["cases"])
  assert (found["teach"], found["learn"], found["update"]) == (6, 5, 1)
  assert found["sample"] == 12 / 16
  assert found["cached"] == 6 / 16
  assert found["student fill"] == 40 / 100
  assert found["teacher fill"] == 60 / 100
  assert found["learn, of peak"] == pytest.approx(0.1)
  assert found["peak"] == 23e9


def test_the_report_holds_modelled_rows_to_their_targets():
  text = report.render({"roofline": written()}, {})
  assert "| 8B OPSD trd | 0.75 | 0.38 | 40% / 60% |" in text
  assert "Modelled, not measured: eight H100s (data=8)" in text
  row = next(line for line in text.splitlines() if "student tokens" in line)
  assert "≥ 92% | 40% | **missed**" in row


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    ("--model 7b", "--model"),
    ("--modle 8b", "--modle"),
    ("--seed -1", "--seed -1"),
    ("--seed x", "--seed"),
    ("--table --model 8b", "--table"),
    ("--workdir x --method trd", "--workdir"),
    ("--hlo setup.py", "no folder"),
  ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
  flags, told, capsys, monkeypatch
):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as left:
    roofline.main(flags.split())
  assert left.value.code == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert told in error


def test_a_bad_key_is_said_before_anything_is_compiled(capsys, monkeypatch):
  monkeypatch.setattr(roofline.fit, "h100s", lambda: pytest.fail("too late"))
  assert roofline.main(["--set", "lora.x=1"]) == 2
  assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (UserError("no such\nkey"), 2),
    (roofline.Wrong("learn: 1 TFLOP"), 1),
    (ValueError("a loop of unknown length"), 1),
  ],
)
def test_what_goes_wrong_later_is_one_line_too(
  error, code, capsys, monkeypatch
):
  def fail(*_):
    raise error

  monkeypatch.setattr(roofline.fit, "h100s", lambda: [])
  monkeypatch.setattr(roofline, "_evaluate", fail)
  assert roofline.main([]) == code
  assert capsys.readouterr().err.count("\n") == 1


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch):
  def fail():
    raise RuntimeError("no plugin\nfound")

  monkeypatch.setattr(roofline.fit, "h100s", fail)
  assert roofline.main([]) == 2
  error = capsys.readouterr().err
  assert "jax[cuda12]" in error
  assert error.count("\n") == 1


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match="there is no run in it"):
    roofline.workdir_lengths(tmp_path)
