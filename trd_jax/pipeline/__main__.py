"""`python -m trd_jax.pipeline`: all stages in order, then one table."""

from trd_jax.experiment import cli
from trd_jax.pipeline.pipeline import FLAGS, run

if __name__ == "__main__":
  cli.main(
    "pipeline",
    run,
    "runs every stage that is not done, then prints base against trained",
    FLAGS,
  )
