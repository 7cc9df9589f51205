"""One config and one run directory: what is asked for, and what is on disk.

Nothing here imports JAX or another room.
"""
