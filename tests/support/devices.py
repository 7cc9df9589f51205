"""The flags under which the tests' programs are compiled for host devices."""

from importlib.metadata import version


def xla_flags(devices: int | None = 8) -> str:
  """Returns XLA's flags for so many host devices and quick compilation.

  The tests compile much and compute little: without LLVM's optimisations, and
  with the older code generator for fused loops, compiling takes half the
  processor time: of a small pipeline they save half of it. The demo runs
  without them, as a user's pipeline does.

  Args:
    devices: how many; None: as the process would have without the flags.
  """
  flags = ["--xla_backend_optimization_level=0"]
  if devices is not None:
    flags.append(f"--xla_force_host_platform_device_count={devices}")
  # XLA ends the process at a flag that it doesn't know, as newer ones may not
  # know these: they have one code generator alone.
  if version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
    # A small program in pieces, one a thread, takes a fifth more of the cores,
    # which other tests keep busy.
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
  return " ".join(flags)
