"""Stage 1: the student answers every problem; y_o with its verdict."""

from trd_jax.experiment import cli
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

STAGE = "rollout"


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples `rollout.samples` answers a problem and grades them.

  Goes on where an earlier process stopped: samples whose key is on disk are
  not drawn again.

  Raises:
    UserError: bad problems, model or tokenizer, a data file that has changed
      since it was read, or no prompt is within its budget; no sample is drawn
      then.
  """
  del flags
  from trd_jax.data.problems import store
  from trd_jax.data.prompts import VERSION, fit_initials
  from trd_jax.experiment.metrics import Progress
  from trd_jax.experiment.records import Rejected, Trajectory
  from trd_jax.generation import chat_model, generate, preflight, summaries
  from trd_jax.generation.engines.factory import check_installed

  if run_dir.done(STAGE) is not None:
    store.check_source(experiment, run_dir)  # or else as they are loaded
  if summaries.skip_if_done(run_dir, STAGE, summaries.describe):
    return
  if not experiment.preflight_only:
    check_installed(experiment.engine)
  section, student = experiment.rollout, experiment.student

  # 1. The model that answers, and the problems. What can be wrong with the
  #    model is seen before anything is written.
  model = chat_model.open_student(experiment, run_dir)
  problems = store.load(experiment, run_dir)

  # 2. Prompts, within their budget, and what they amount to.
  prompts: list[generate.Prompt] = []
  rejected: list[Rejected] = []
  fitted = fit_initials(
    model.chat, problems, student.thinking, section.max_prompt_tokens
  )
  with Progress(len(problems), "prompts", "prompts") as progress:
    for problem, ids in zip(problems, fitted, strict=True):
      progress.update()
      if isinstance(ids, Rejected):
        rejected.append(ids)
        continue
      for sample in range(section.samples):
        key, seed = generate.identity(
          STAGE,
          model,
          section,
          ids,
          problem.problem_id,
          sample,
          experiment.seed,
        )
        prompts.append(generate.Prompt(key, problem, ids, seed, sample))
  preflight.publish(
    preflight.of_rollout(
      experiment, run_dir, model, problems, prompts, rejected
    ),
    run_dir,
  )
  if experiment.preflight_only:
    print(preflight.STOPPED, flush=True)
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  generate.fill(
    experiment,
    run_dir,
    STAGE,
    model,
    section,
    prompts,
    Trajectory,
    lambda sample: generate.trajectory(
      sample, STAGE, model, section, student.thinking, VERSION
    ),
    desc=STAGE,
  )
  run_dir.write_rejected(STAGE, rejected)

  # 4. What came out.
  summary = summaries.settle(run_dir, STAGE, {p.key for p in prompts})
  summary["rejected"] = len(rejected)
  run_dir.mark_done(STAGE, summary)
  print(f"rollout: {summaries.describe(summary)}", flush=True)


if __name__ == "__main__":
  cli.main(STAGE, run, "the student answers every problem once (y_o)")
