"""Has vLLM's CPU build take Triton's interpreter for a backend.

Python runs this file first where its folder is in PYTHONPATH, together with
that of Triton. vLLM's CPU build believes in Triton where it has a backend named
"cpu", which no wheel of it has; interpreted kernels need none. Functions of the
GPU's own library can't be interpreted: the one that vLLM's sampler calls stands
here in Triton's words.
"""

import os
import sys
import types


class _Driver:
  """What vLLM asks of a backend's driver."""

  @staticmethod
  def is_active() -> bool:
    """Says that there is something to run kernels on."""
    return True


def _pretend() -> None:
  from triton.backends import backends
  from triton.language.extra import libdevice

  libdevice.isnan = lambda x: x != x
  backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)


if os.environ.get("TRITON_INTERPRET") == "1" and "vllm" not in sys.modules:
  _pretend()
