"""Engines: what turns prompts into completions."""

from trd_jax.engines.engine import make

__all__ = ["make"]
