"""The teacher's side of the loss, from wherever it comes."""
