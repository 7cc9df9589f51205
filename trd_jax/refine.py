"""Stage 2: has the teacher rewrite every rollout, and grades what it writes.

In OPD the separate teacher sees the problem and y_o; in OPSD the student's own
base also sees the reference y* (Equation 5 of the paper and what follows it).
"""

from collections.abc import Iterator

from trd_jax.experiment import cli, methods
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

STAGE = "refine"


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples one refinement a rollout and grades it.

  A truncated rollout is refined too, as in the paper, whose counts leave none
  out (Appendix B.3). A draft that doesn't fit loses its middle or its sample,
  as `refine.overflow` says.

  Raises:
    UserError: the rollouts are missing, the model or tokenizer is bad, no
      prompt is within its budget, or a method that doesn't refine; no sample
      is drawn then.
  """
  del flags
  from trd_jax.data.problems import store
  from trd_jax.data.prompts import fit_refinements
  from trd_jax.experiment.errors import UserError
  from trd_jax.experiment.records import Rejected, Trajectory
  from trd_jax.generation import (
    chat_model,
    preflight,
    sampling_stage,
    summaries,
  )
  from trd_jax.generation.samples import Prompt

  if not experiment.refines:
    raise UserError(
      f"method={experiment.method} trains on raw rollouts and has no refine"
      f" stage; use method={methods.refining()}, or go on with trd_jax.train"
    )
  if not sampling_stage.begins(experiment, run_dir, STAGE):
    return
  if run_dir.done("rollout") is None:
    raise UserError(
      f"{run_dir.root}: the rollout stage has not finished here; run"
      " trd_jax.rollout with the same --config and --workdir first"
    )
  section = experiment.refine

  # 1. Drafts, problems and the model that rewrites.
  problems = {p.problem_id: p for p in store.load(experiment, run_dir)}
  drafts = run_dir.read("rollout", Trajectory)
  model = chat_model.open_model(experiment.teacher_model, run_dir)
  stage = sampling_stage.SamplingStage(
    experiment, run_dir, STAGE, model, section, section.thinking
  )

  # 2. Refinement prompts, within their budget, and what they amount to.
  def candidates() -> Iterator[Prompt | Rejected]:
    fitted = fit_refinements(
      model.chat,
      ((problems[draft.problem_id], draft.text) for draft in drafts),
      experiment.regime,
      section.thinking,
      section.max_prompt_tokens,
      section.overflow,
      section.draft_think,
    )
    fitted = sampling_stage.counted(fitted, len(drafts), "refinement prompts")
    for draft, one in zip(drafts, fitted, strict=True):
      if isinstance(one, Rejected):
        yield one
        continue
      yield stage.prompt(
        problems[draft.problem_id],
        one.ids,
        draft.key,
        experiment.seed,
        draft_key=draft.key,
        elided_tokens=one.elided_tokens,
      )

  prompts, rejected = sampling_stage.sort_out(candidates())
  report = preflight.of_refine(stage, problems, drafts, prompts, rejected)
  preflight.publish(report, run_dir)
  if preflight.stops(experiment):
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  stage.fill(
    prompts, Trajectory, stage.trajectory, top_logprobs=section.teacher_top_k
  )

  # 4. What came out, and how it compares with the drafts.
  summary = stage.summarize(prompts, rejected)
  summary["trimmed"] = report.trimmed
  summary["shown_whole"] = report.all_thoughts
  refined = run_dir.read(STAGE, Trajectory)
  summary |= summaries.compare_with_drafts(drafts, refined)
  stage.finish(summary)


if __name__ == "__main__":
  cli.main(STAGE, run, "the teacher rewrites every rollout (y_r)")
