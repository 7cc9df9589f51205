"""The flags under which the tests' programs are compiled for host devices."""


def xla_flags(devices: int = 8) -> str:
  """Returns XLA's flags for so many host devices and quick compilation.

  The tests compile much and compute little: without LLVM's optimisations, and
  with the older code generator for fused loops, compiling takes half the
  processor time. The demo and the tests of whole pipelines run without them.
  """
  return " ".join(
    [
      f"--xla_force_host_platform_device_count={devices}",
      "--xla_backend_optimization_level=0",
      "--xla_cpu_use_fusion_emitters=false",
    ]
  )
