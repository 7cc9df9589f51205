"""Trajectories as arrays of a few static shapes."""
