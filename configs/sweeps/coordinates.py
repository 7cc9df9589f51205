"""One coordinate of the method at a time, on one set of rollouts.

    python -m trd_jax.sweep --config=configs/demo.py \\
        --sweep=configs/sweeps/coordinates.py --workdir=runs/coordinates

Along y_r: every divergence after every context of the teacher. Beside them the
other trajectories, fine-tuning, and what else the loss can be made of. All
points share the rollouts, and those along y_r the refined trajectories.
docs/training.md explains each coordinate and has what this printed.
"""

from trd_jax.experiment.sweep_points import point, product


def get_sweep():
  return [
    *product(
      {
        "trajectory": ["y_r"],
        "divergence": ["forward_kl", "reverse_kl", "jsd", "reverse_kl_topk"],
        "teacher_context": ["x", "x_reference", "refine"],
      }
    ),
    point("y_star", {"trajectory": "y_star"}),
    point("teacher", {"trajectory": "teacher"}),
    point("sft", {"method": "sft"}),
    point("sft-y_star", {"method": "sft", "trajectory": "y_star"}),
    point("clip_entries", {"loss.clip_entries": 0.05}),
    point("token_mean", {"loss.mean": "token"}),
    point("cross_entropy", {"loss.cross_entropy": 0.1}),
    point("entropy_gate", {"loss.token_weights": "entropy_gate"}),
  ]
