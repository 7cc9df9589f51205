"""Divergences between student and teacher, and the loss made of them."""
