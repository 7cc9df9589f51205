"""Is this machine fit for a config? Looked at before an hour is spent.

    python -m trd_jax.doctor --config=FILE.py [--workdir=DIR]

One line a check: ok, or what is wrong and what to do. Without a config all that
applies to the machine is looked at. Nothing is written where the workdir is.
"""

from trd_jax.experiment import cli
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

FLAGS = (
  cli.Flag("only", (), "the checks to run, or beginnings of names, as vllm"),
  cli.Flag("list", False, "name all checks and run none"),
  cli.Flag("json", None, "a file for the diagnoses, as JSON", is_path=True),
)


def run(experiment: Experiment, run_dir: RunDir | None, flags) -> None:
  """Runs the checks and prints a line each.

  Raises:
    UserError: --only names no check; or, at the end, what is needed failed.
  """
  from trd_jax.doctor import examination

  # A workdir that was run before has one, too.
  has_config = any(one.startswith("--config") for one in flags.config_argv)
  if flags.list:
    print(examination.table())
    return
  examination.examine(
    experiment, has_config, run_dir, only=flags.only, json_file=flags.json
  )


if __name__ == "__main__":
  cli.main(
    "doctor",
    run,
    "tells whether this machine is fit, for a config or at all",
    FLAGS,
    standalone=True,
    looks_only=True,
    examples=(
      "--config=configs/opsd.py:model=8b --workdir=runs/opsd-8b",
      "--only=vllm,gpus",
    ),
  )
