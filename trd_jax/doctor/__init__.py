"""Is this machine fit, for a config or at all? `python -m trd_jax.doctor`."""
