"""Eight host devices for all tests, set before the first import of JAX."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # The tests compile much and compute little.
    "--xla_backend_optimization_level=0",
  ]
)
