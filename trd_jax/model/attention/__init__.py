"""Causal attention over packed rows, and which implementation computes it."""
