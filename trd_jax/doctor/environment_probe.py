"""A child that tells what an interpreter's environment holds.

It is run by its path and imports nothing of ours: the environment that it looks
at may lack the package.

Asked for `packages` it compares what is installed with `requirements`, and with
those of the distribution `own` but for the names in `without`; for `jax` and
`torch`, it tells the devices that these see.
"""

import importlib.metadata as metadata
import json
import platform
import re
import sys


def canonical(name):
  """Returns a distribution's name as PEP 503 compares it."""
  return re.sub(r"[-_.]+", "-", name).lower()


def packages(requested):
  """Returns versions, and what is missing or other than required."""
  from packaging.requirements import Requirement

  texts = list(requested["requirements"])
  try:
    texts += metadata.requires(requested["own"]) or []
    own = metadata.version(requested["own"])
  except metadata.PackageNotFoundError:
    own = None
  without = set(map(canonical, requested["without"]))
  missing, other, versions = [], [], {}
  for text in texts:
    one = Requirement(text)
    # Requirements of extras and of other systems are nothing to miss.
    if one.marker and not one.marker.evaluate({"extra": ""}):
      continue
    if canonical(one.name) in without:
      continue
    try:
      version = metadata.version(one.name)
    except metadata.PackageNotFoundError:
      missing.append(one.name)
      continue
    versions[one.name] = version
    if not one.specifier.contains(version, prereleases=True):
      other.append(f"{one.name} {version}, not {one.specifier}")
  for name in requested["show"]:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions.setdefault(name, None)
  return {
    "python": platform.python_version(),
    "own": own,
    "versions": versions,
    "missing": missing,
    "other": other,
  }


def jax_devices():
  """Returns what JAX sees, with the memory that it may use of each."""
  import jax

  devices = jax.local_devices()
  return {
    "platform": jax.default_backend(),
    "kinds": [device.device_kind for device in devices],
    "bytes": [
      (device.memory_stats() or {}).get("bytes_limit") for device in devices
    ],
  }


def torch_devices():
  """Returns what PyTorch sees, on which vLLM builds."""
  import torch

  count = torch.cuda.device_count()
  return {
    "cuda": torch.version.cuda,
    "kinds": [torch.cuda.get_device_name(i) for i in range(count)],
  }


def main():
  """Writes what is requested as JSON: packages or devices."""
  with open(sys.argv[1], encoding="utf-8") as file:
    requested = json.load(file)
  kinds = {"jax": jax_devices, "torch": torch_devices}
  if requested["kind"] == "packages":
    facts = packages(requested)
  else:
    facts = kinds[requested["kind"]]()
  with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(facts, file)


if __name__ == "__main__":
  main()
