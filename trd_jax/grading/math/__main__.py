"""`python -m trd_jax.grading.math FILE`: grades a file of answers."""

from trd_jax.experiment import printing
from trd_jax.grading.math.verifier import main

if __name__ == "__main__":
  with printing.opened():
    main()
