"""Where tests need a browser: Debian's Chromium, driven by playwright."""

import importlib.util
import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def _lacking() -> str | None:
  if CHROMIUM is None:
    return "chromium is not installed: apt-get install chromium"
  if importlib.util.find_spec("playwright") is None:
    return "playwright is not installed: pip install playwright"
  return None


if _lacking() and os.environ.get("TRD_REQUIRE_BROWSER"):
  raise RuntimeError(f"TRD_REQUIRE_BROWSER is set and {_lacking()}")
# What a file's `pytestmark` is, of which all tests need it.
NEEDED = [
  pytest.mark.browser,
  pytest.mark.skipif(_lacking() is not None, reason=_lacking() or ""),
]


def launch(playwright):
  """Starts the system's Chromium, without a window and without a sandbox.

  Containers, and root, have none for it. What it opens here is our own page.
  """
  return playwright.chromium.launch(
    executable_path=CHROMIUM, args=["--no-sandbox"]
  )
