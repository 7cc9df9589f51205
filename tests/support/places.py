"""Places that tests read from: the repository and data beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Real data. A user's clone has none: tests that read it skip with a reason.
SHARED = ROOT.parent / "shared"
SHARED_DATA = SHARED / "data"
