"""The box in which a program that a model wrote runs."""
