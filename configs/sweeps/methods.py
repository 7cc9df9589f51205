"""The paper's trd and its four baselines on one config, rolled out once.

    python -m trd_jax.sweep --config=configs/demo.py \\
        --sweep=configs/sweeps/methods.py --workdir=runs/methods

The baselines train on the same y_o, and trd refines them. docs/training.md has
more methods, which are no rows of the paper's tables; a sweep may name them,
too.
"""

from trd_jax.experiment.paper_recipe import METHODS
from trd_jax.experiment.sweep_points import product


def get_sweep():
  return product({"method": METHODS})
