"""Two learning rates by two ranks: the laboratory's first sweep.

    python -m trd_jax.sweep --config=configs/demo.py \\
        --sweep=configs/sweeps/demo.py --workdir=runs/sweep

Rollouts, refinements and the base's evaluation are made by the first point and
taken over by the other three.
"""

from trd_jax.experiment.sweep_points import product


def get_sweep():
  return product({"train.learning_rate": [1e-3, 2e-3], "lora.rank": [8, 16]})
