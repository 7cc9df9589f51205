"""Stage 1: the student answers every problem; y_o with its verdict."""

from collections.abc import Iterator

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
  from trd_jax.experiment.records import Rejected, Trajectory
  from trd_jax.generation import chat_model, preflight, sampling_stage
  from trd_jax.generation.samples import Prompt

  if not sampling_stage.begins(experiment, run_dir, STAGE):
    return
  section, thinking = experiment.rollout, experiment.student.thinking

  # 1. The model that answers, and the problems. What can be wrong with the
  #    model is seen before anything is written.
  model = chat_model.open_learner(experiment, run_dir)
  problems = store.load(experiment, run_dir)
  stage = sampling_stage.SamplingStage(
    experiment, run_dir, STAGE, model, section, thinking
  )

  # 2. Prompts, within their budget, and what they amount to.
  def candidates() -> Iterator[Prompt | Rejected]:
    fitted = stage.prompt_set.fit_initials(
      model.chat, problems, thinking, section.max_prompt_tokens
    )
    fitted = sampling_stage.counted(fitted, len(problems), "prompts")
    for problem, ids in zip(problems, fitted, strict=True):
      if isinstance(ids, Rejected):
        yield ids
        continue
      for sample in range(section.samples):
        parts = (problem.problem_id, sample, experiment.seed)
        yield stage.prompt(problem, ids, *parts, sample=sample)

  prompts, rejected = sampling_stage.sort_out(candidates())
  report = preflight.of_rollout(stage, problems, prompts, rejected)
  preflight.publish(report, run_dir)
  if preflight.stops(experiment):
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  stage.fill(prompts, Trajectory, stage.trajectory, grade=section.grade)

  # 4. What came out.
  stage.finish(stage.summarize(prompts, rejected))


if __name__ == "__main__":
  cli.main(STAGE, run, "the student answers every problem once (y_o)")
