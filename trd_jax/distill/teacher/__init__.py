"""The teacher's side of the loss where it is known before training."""
