"""Prompts in, graded samples out."""
