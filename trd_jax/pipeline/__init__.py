"""All stages in order, rounds, and what is looked at before any starts."""
