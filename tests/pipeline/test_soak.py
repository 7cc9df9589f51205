"""A short soak: the pipeline under faults comes out as without."""

import shutil
import subprocess
import sys

import pytest

from tests import soak
from tests.support.places import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
  subprocess.run(
    ["unshare", "--map-root-user", "--mount", "true"], check=False
  ).returncode
  if shutil.which("unshare")
  else True,
  reason="needs `unshare` and user namespaces",
)
def test_faults_cost_nothing(tmp_path):
  command = [sys.executable, "-m", "tests.soak", "--engine=server"]
  command += ["--minutes=1", "--seed=1", f"--out={tmp_path / 'soak'}"]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  for what in soak.COST:
    assert f"| {what} | 0 |" in done.stdout
