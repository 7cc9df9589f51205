"""What runs in vLLM's workers, under both of its model runners.

vLLM's own loaders take the class by its name, and it is driven with their
objects on CPU tensors; no model is needed for that, and no GPU.
"""

import json
import subprocess

import pytest

from tests.support.engine_env import ROOT, vllm_python

pytestmark = pytest.mark.vllm

BATCHES = [
  "v2 all alike",
  "v2 mixed",
  "v2 reordered",
  "v2 drafts",
  "v2 alike with drafts",
  "v2 without any limit",
  "v2 slots used again",
  "v2 beyond the head",
  "v1 all alike",
  "v1 mixed",
  "v1 swapped",
  "v1 condensed",
  "v1 rows used again",
]


@pytest.fixture(scope="module")
def driven() -> dict:
  done = subprocess.run(
    [vllm_python(), ROOT / "tests" / "support" / "vllm_worker_driver.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_every_batch_was_driven(driven):
  assert list(driven) == BATCHES


@pytest.mark.parametrize("name", BATCHES)
def test_exactly_the_surplus_rows_are_covered(driven, name):
  made = driven[name]
  expected = [list(range(min(limit, 40))) for limit in made["limits"]]
  assert made["open"] == expected
