"""`python -m trd_jax.grading.code FILE`: grades a file of programs."""

import sys

from trd_jax.experiment import printing
from trd_jax.grading.code.programs import main

if __name__ == "__main__":
  with printing.opened():
    sys.exit(main())
