"""Slots as runs of trajectories: what a loss reads along them.

A slot is one response token. The slots of a trajectory lie next to each other
in their order, all in one call; padding slots have weight 0 and trajectory
-1, and may stand anywhere between trajectories. Shape key: R slots.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax


class LossSlots(Protocol):
  """What the loss reads of the slots; `packing.Slots` has it too."""

  @property
  def label(self) -> jax.Array:
    """Returns the response token, int32 [R]; any id in padding."""
    ...

  @property
  def weight(self) -> jax.Array:
    """Returns 1 / (|y| · trajectories), float32 [R]; 0 in padding."""
    ...

  @property
  def trajectory(self) -> jax.Array:
    """Returns numbers that differ between neighbours, int32 [R]."""
    ...

  @property
  def offset(self) -> jax.Array:
    """Returns the token's number t in its response, from 0, int32 [R]."""
    ...

  @property
  def correct(self) -> jax.Array:
    """Returns stage 1's verdict, int32 [R]: 1, 0, or else unjudged."""
    ...


def segments(slots: LossSlots) -> jax.Array:
  """Returns a number for each run of slots of one trajectory, or of padding.

  int32 [R], rising from 0: neighbours differ where a trajectory begins.
  """
  owner_R = jnp.where(slots.weight > 0, slots.trajectory, -1)
  starts_R = jnp.diff(owner_R, prepend=owner_R[:1]) != 0
  return jnp.cumsum(starts_R)


def return_to_go(
  delta_R: jax.Array, slots: LossSlots, discount: float
) -> jax.Array:
  """Returns Σ_{t' ≥ t} γ^{t'-t} δ_t' within each trajectory, float32 [R]."""
  segment_R = segments(slots)
  goes_on_R = jnp.diff(segment_R, append=len(segment_R) + 1) == 0
  factor_R = jnp.where(goes_on_R, jnp.float32(discount), 0)

  def compose(later, earlier):
    # Slots are maps G -> delta + factor · G; a run of them is one, too. So the
    # sum along a row of thousands of slots is a scan of logarithmic depth.
    return (
      earlier[0] + earlier[1] * later[0],
      earlier[1] * later[1],
    )

  return lax.associative_scan(compose, (delta_R, factor_R), reverse=True)[0]
