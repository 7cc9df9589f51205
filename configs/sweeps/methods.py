"""Every method of the paper on one config, rolled out once.

    python -m trd_jax.sweep --config=configs/demo.py \\
        --sweep=configs/sweeps/methods.py --workdir=runs/methods

The four baselines train on the same y_o, and trd refines them.
"""

from trd_jax.recipe import METHODS
from trd_jax.sweep_points import product


def get_sweep():
  return product({"method": METHODS})
