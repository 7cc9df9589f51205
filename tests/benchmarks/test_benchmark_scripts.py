"""The benchmarks' own machinery: turns, documents, figures, the report."""

import argparse
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compiled  # noqa: E402
import loss  # noqa: E402
import packing  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import training  # noqa: E402
import turns  # noqa: E402
from targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.slow

# A variant's process that notes when it runs, and dies at its nth run.
_VARIANT = """
import sys
sys.path.insert(0, {folder!r})
import turns
left = [int(sys.argv[3])]
def prepare():
  print("a library's chatter")
  return run, {{"loss": 1.0}}
def run():
  left[0] -= 1
  if left[0] < 0:
    raise SystemExit("out of memory")
  with open(sys.argv[2], "a") as file:
    file.write(sys.argv[1] + " ")
  return {{"wall_s": 2.0}}
turns.serve(prepare)
"""


def variant(tmp_path, name, runs=9):
  script = _VARIANT.format(folder=str(BENCHMARKS))
  return [sys.executable, "-c", script, name, str(tmp_path / "log"), str(runs)]


def test_variants_take_turns_forwards_and_backwards(tmp_path):
  commands = {name: variant(tmp_path, name) for name in "abc"}
  cases = turns.take_turns(commands, 3)
  assert (tmp_path / "log").read_text() == "a b c c b a a b c "
  assert cases["b"]["runs"] == [{"wall_s": 2.0}] * 3
  assert cases["b"]["about"]["loss"] == 1.0


def test_a_variant_that_dies_is_named_and_the_others_go_on(tmp_path, capfd):
  cases = turns.take_turns(
    {
      "none": [sys.executable, "-c", "raise SystemExit('no such package')"],
      "one": variant(tmp_path, "one", runs=1),
      "all": variant(tmp_path, "all"),
    },
    2,
  )
  assert cases["none"] == {"failed": "no such package"}
  assert cases["one"] == {"failed": "out of memory"}
  assert len(cases["all"]["runs"]) == 2
  assert "no such package" in results.failures(cases)
  assert "out of memory" in capfd.readouterr().err


def test_a_command_names_no_folder_of_the_machine(tmp_path, monkeypatch):
  inside = results.ROOT / ".venv-tunix" / "bin" / "python"
  monkeypatch.setattr(
    sys,
    "argv",
    [
      str(results.ROOT / "benchmarks" / "step.py"),
      f"--tunix-python={inside}",
      str(inside),
      f"--task={tmp_path / 'x'}",
      "--repeats=3",
      f"--json={tmp_path / 'out.json'}",
    ],
  )
  made = results.Document("part", None, quick=False)
  assert made.fields["command"] == (
    "python benchmarks/step.py --tunix-python=.venv-tunix/bin/python"
    " .venv-tunix/bin/python --task=x --repeats=3"
  )


def test_a_document_is_whole_after_every_group(tmp_path):
  path = tmp_path / "made" / "part.json"
  document = results.Document("part", path, quick=False)
  versions = {"jax": "1", "torch": "2"}
  document.add("first", {}, {"a": {"about": {"versions": versions}}})
  with pytest.raises(TypeError):
    document.add("second", {}, {"a": {"about": {}, "runs": [object()]}})
  kept = json.loads(path.read_text())
  assert list(kept["groups"]) == ["first"]
  assert kept["versions"] == {"python": kept["versions"]["python"], **versions}


def test_ratios_are_of_one_round():
  cases = {
    "a": {"runs": [{"s": 2.0}, {"s": 30.0}, {"s": 4.0}]},
    "b": {"runs": [{"s": 1.0}, {"s": 10.0}, {"s": 1.0}]},
    "c": {"failed": "why"},
  }
  assert results.ratios(cases, "a", "b", "s") == [2, 3, 4]
  assert results.spread(results.ratios(cases, "a", "b", "s"), ".1f") == (
    "3.0 (2.0-4.0)"
  )
  assert results.ratios(cases, "a", "c", "s") == []


def test_variants_that_compute_something_else_are_refused():
  def case(loss):
    return {"about": {"loss": loss}}

  cases = {"a": case([1.0, 2.0]), "b": {"failed": "x"}, "c": case([1.0, 2.001])}
  results.agree(cases, "loss", 1e-3)
  with pytest.raises(ValueError, match=r"a has 2\.0, c has 2\.001"):
    results.agree(cases, "loss", 1e-4)
  with pytest.raises(ValueError, match="nan"):
    results.agree({"a": case(1.0), "b": case(float("nan"))}, "loss", 1)


def loss_document():
  """Runs with known ratios: 1.2 of the floor, 0.9 of Liger, 0.7 of TRL."""
  mb = {loss.OURS: 100, loss.ALL: 110, loss.LIGER: 200, loss.TRL: 1000}
  seconds = {loss.FLOOR: 1, loss.OURS: 1.2, loss.ALL: 1.3}
  seconds |= {loss.LIGER: 1.2 / 0.9, loss.TRL: 1.2 / 0.7}

  def group(dtype, tokens, growth, error):
    cases = {
      name: {
        "about": {"error": error, "loss": 0.5},
        "runs": [{"cpu_s": s, "extra_mb": mb.get(name, 1) * growth}] * 3,
      }
      for name, s in seconds.items()
    }
    settings = {"dtype": dtype, "tokens": tokens, "width": 8, "vocab": 64}
    settings |= {"chunk": 4, "repeats": 3}
    return {"settings": settings, "cases": cases}

  return {
    "part": "loss",
    "quick": False,
    "date": "a day",
    "command": "python benchmarks/loss.py",
    "commit": "abc",
    "machine": "2 cores",
    "load_before": 0.1,
    "seconds": 60.0,
    "versions": {"jax": "0.10.2"},
    "groups": {
      "small": group("float32", 1024, 1.0, 5e-6),
      "large": group("float32", 2048, 1.1, 5e-6),
      "half": group("bfloat16", 2048, 1.0, 2e-3),
    },
  }


def verdicts(documents, notes=()):
  text = report.render(documents, dict(notes))
  table = text.partition("## Targets")[2].partition("\n##")[0]
  rows = [row.strip("| ").split(" | ") for row in table.splitlines()[4:]]
  return {t.key: row[2:] for t, row in zip(TARGETS, rows, strict=False)}


def test_figures_are_held_to_their_targets():
  found = verdicts({"loss": loss_document()}, {"loss_liger": "it\n is so"})
  assert found["loss_floor"] == ["1.200", "met"]
  assert found["loss_floor_diagnostics"][:2] == ["1.300", "**missed**"]
  assert found["loss_floor_diagnostics"][2] == "no reason found yet"
  assert found["loss_liger"] == ["0.900", "**missed**", "it is so"]
  assert found["loss_trl"] == ["0.700", "met"]
  assert found["loss_growth"][:2] == ["1.100", "**missed**"]
  assert found["loss_memory_liger"][:2] == ["0.500", "**missed**"]
  assert found["loss_memory_trl"] == ["0.100", "met"]
  assert found["error_float32"] == ["5.0e-06", "met"]
  assert found["error_bfloat16"] == ["2.0e-03", "met"]
  assert found["packing"] == ["-", "not measured"]
  assert len(found) == len(TARGETS)


def test_what_failed_has_no_figure():
  document = loss_document()
  document["groups"]["small"]["cases"][loss.LIGER] = {"failed": "no compiler"}
  text = report.render({"loss": document}, {})
  assert "liger, compiled: no compiler." in text
  assert verdicts({"loss": document})["loss_liger"] == ["-", "not measured"]


def test_smoke_tests_are_not_judged():
  document = loss_document() | {"quick": True}
  text = report.render({"loss": document}, {})
  assert "smoke test" in text
  assert verdicts({"loss": document})["loss_floor"] == ["-", "not measured"]


def test_the_gpus_rows_are_judged_on_an_h100_alone():
  row = {"section": "step", "case": "8B", "measures": {"of 989": 0.46}}
  more = {"section": "peer", "case": "8B", "not_measured": "no torch"}
  document = {"devices": ["NVIDIA H100"], "rows": [row, more], "scale": "full"}
  found = verdicts({"gpu": document})
  assert found["h100_step"] == ["46.0%", "met"]
  assert "not measured: no torch" in report.render({"gpu": document}, {})
  for other in ({"devices": ["NVIDIA A100"]}, {"scale": "small"}):
    found = verdicts({"gpu": document | other})
    assert found["h100_step"] == ["-", "not measured"]


def test_notes_name_targets(tmp_path):
  assert report.read_notes(BENCHMARKS / "notes.toml").keys() <= {
    target.key for target in TARGETS
  }
  (tmp_path / "notes.toml").write_text('loss_flor = "a slip"')
  with pytest.raises(ValueError, match="no target is called loss_flor"):
    report.read_notes(tmp_path / "notes.toml")


def test_a_part_that_fails_leaves_the_others_as_they_were(tmp_path):
  before = json.dumps(loss_document())
  (tmp_path / "loss.json").write_text(before)
  done = subprocess.run(
    [
      *(sys.executable, BENCHMARKS / "run.py", "--only", "rollout_overhead"),
      *(f"--out={tmp_path}", "--vllm-python=/bin/false"),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "failed: rollout_overhead" in done.stderr
  assert (tmp_path / "loss.json").read_text() == before
  written = (tmp_path / "BENCHMARKS.md").read_text()
  notes = report.read_notes(BENCHMARKS / "notes.toml")
  assert written == report.render({"loss": loss_document()}, notes)


def test_the_float64_reference_is_the_gradient():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  hidden, teacher = rng.standard_normal((2, 70, 8))
  head = rng.standard_normal((50, 8))
  full, top = loss.reference(hidden, teacher, head, chunk=32, k=5)

  student = torch.tensor(hidden, requires_grad=True)
  p_logits = torch.tensor(teacher) @ torch.tensor(head).T
  q_logits = student @ torch.tensor(head).T
  p, log_q = p_logits.softmax(-1), q_logits.log_softmax(-1)
  (wanted,) = torch.autograd.grad(
    (p * (p.log() - log_q)).sum(), student, retain_graph=True
  )
  np.testing.assert_allclose(full, wanted.numpy(), atol=1e-12)
  ids = p_logits.topk(5).indices
  log_p, log_q = (
    x.gather(-1, ids).log_softmax(-1) for x in (p_logits, q_logits)
  )
  (wanted,) = torch.autograd.grad(
    (log_q.exp() * (log_q - log_p)).sum(), student
  )
  np.testing.assert_allclose(top, wanted.numpy(), atol=1e-12)


def test_the_loss_beside_its_peers(tmp_path):
  path = tmp_path / "loss.json"
  variants = ["ours", "torch, full logits"]
  done = subprocess.run(
    [
      *(sys.executable, BENCHMARKS / "loss.py", "--quick", f"--json={path}"),
      *("--variants", *variants, "--groups", "0", "2"),
    ],
    capture_output=True,
    text=True,
    env=os.environ | {"OMP_NUM_THREADS": "1"},
  )
  assert done.returncode == 0, done.stderr
  groups = json.loads(path.read_text())["groups"]
  assert len(groups) == 2
  for name, group in groups.items():
    bound = 1e-5 if group["settings"]["dtype"] == "float32" else 5e-3
    ours = group["cases"]["ours"]
    assert ours["about"]["error"] < bound, name
    assert all(run["extra_mb"] > 0 for run in ours["runs"])
  assert "| torch, full logits | " in done.stdout


@pytest.mark.parametrize("by_length", [False, True])
def test_padded_rows_hold_what_packed_rows_hold(by_length):
  """Each response token once, with its weight and its teacher's position."""
  samples = training.make_samples(8, 64, vocab=1000)
  batches, buffer_slots = packing.padded(samples, by_length)
  assert len({len(s.response) for s in samples}) > 3
  found, rows = [], 0
  for batch in batches:
    buffer = np.full(buffer_slots + 1, -1)
    (teacher,), (student,) = batch.teacher, batch.student
    # The token that a position predicts is the next one's input, but for the
    # last: its row says none. So the inputs themselves are compared.
    buffer[teacher.slot[0]] = teacher.rows.tokens[0]
    slots = jax.tree.map(lambda x: x[0], student.slots)
    read = np.take_along_axis(student.rows.tokens[0], slots.index, axis=1)
    taken = slots.weight > 0
    rows += student.rows.tokens.shape[1]
    for row, real in enumerate(taken):
      # Past the first response token both sides read the same input.
      np.testing.assert_array_equal(
        read[row, real][1:], buffer[slots.teacher_slot[row, real]][1:]
      )
      weight = slots.weight[row, real]
      np.testing.assert_allclose(weight, 1 / (8 * len(weight)), rtol=1e-6)
      found.append(tuple(slots.label[row, real]))
  assert rows == 8
  assert sorted(found) == sorted(tuple(s.response) for s in samples)


def test_products_are_counted_as_often_as_loops_turn():
  def nested(x, w):
    def inner(carry, _):
      return carry @ w, None

    def outer(carry, _):
      carry, _ = jax.lax.scan(inner, carry, None, length=3)
      return jnp.tanh(carry), None

    return jax.lax.scan(outer, x, None, length=5)[0] @ w

  x, w = jax.ShapeDtypeStruct((7, 16), jnp.float32), jnp.ones((16, 16))
  program = jax.jit(nested).lower(x, w).compile()
  assert compiled.cost(program).flops == (5 * 3 + 1) * 2 * 7 * 16 * 16


def test_a_loop_of_unknown_length_is_refused():
  def endless(x):
    return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

  program = jax.jit(endless).lower(jnp.ones((4, 4))).compile()
  with pytest.raises(ValueError, match="unknown length"):
    compiled.cost(program)
  assert compiled.cost(program, 2.5).flops == 2.5 * 2 * 4**3


def test_results_take_the_place_of_results_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = results.output("~/mine.json")
  assert path == tmp_path / "mine.json"
  results.Document("loss", path, quick=True).add("g", {}, {})
  assert results.output(str(path)) == path
  assert results.output(str(tmp_path)) == tmp_path
  for name in ("notes.json", "BENCHMARKS.md"):
    (tmp_path / name).write_text('{"a": 1}')
    for text in (str(tmp_path / name), str(tmp_path)):
      with pytest.raises(argparse.ArgumentTypeError, match=f"{name} was not"):
        results.output(text)
    (tmp_path / name).unlink()
  with pytest.raises(argparse.ArgumentTypeError, match="empty"):
    results.output("")
