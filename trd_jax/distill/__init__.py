"""Trajectories in, gradient out."""
