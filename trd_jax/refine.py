"""Stage 2: has the teacher write y_r, or its own answer, and grades that.

Along y_r it rewrites every rollout: in OPD the separate teacher sees the
problem and y_o; in OPSD the student's own base also sees the reference y*
(Equation 5 of the paper and what follows it). With `trajectory=teacher` it
answers the problem itself, after the prompt of x.
"""

from collections.abc import Iterator, Sequence

from trd_jax.experiment import cli
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

STAGE = "refine"


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples one response a rollout, or one a problem, and grades it.

  A truncated rollout is refined too, as in the paper, whose counts leave none
  out (Appendix B.3). A draft that doesn't fit loses its middle or its sample,
  as `refine.overflow` says.

  Raises:
    UserError: the rollouts are missing, the model or tokenizer is bad, no
      prompt is within its budget, or trajectories that the teacher doesn't
      write; no sample is drawn then.
  """
  del flags
  from trd_jax.data.problems import store
  from trd_jax.experiment.errors import UserError
  from trd_jax.experiment.records import Trajectory
  from trd_jax.generation import (
    chat_model,
    preflight,
    sampling_stage,
    summaries,
  )

  if experiment.teacher_writes is None:
    raise UserError(
      f"method={experiment.method} trains along {experiment.trains_on}, which"
      " no refine stage writes; set trajectory=y_r, or go on with trd_jax.train"
    )
  if not sampling_stage.begins(experiment, run_dir, STAGE):
    return
  rewrites = experiment.teacher_writes == "y_r"
  if rewrites and run_dir.done("rollout") is None:
    raise UserError(
      f"{run_dir.root}: the rollout stage has not finished here; run"
      " trd_jax.rollout with the same --config and --workdir first"
    )
  section = experiment.refine

  # 1. Drafts, problems and the model that writes.
  problems = store.load(experiment, run_dir)
  drafts = run_dir.read("rollout", Trajectory) if rewrites else []
  model = chat_model.open_model(experiment.teacher_model, run_dir)
  stage = sampling_stage.SamplingStage(
    experiment, run_dir, STAGE, model, section, section.thinking
  )

  # 2. Prompts, within their budget, and what they amount to.
  if rewrites:
    by_id = {p.problem_id: p for p in problems}
    prompts, rejected = sampling_stage.sort_out(
      _refinements(stage, by_id, drafts)
    )
    report = preflight.of_refine(stage, by_id, drafts, prompts, rejected)
  else:
    prompts, rejected = sampling_stage.sort_out(_own_answers(stage, problems))
    report = preflight.of_teacher_samples(stage, problems, prompts, rejected)
  preflight.publish(report, run_dir)
  if preflight.stops(experiment):
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  facts = stage.fill(
    prompts,
    Trajectory,
    stage.trajectory,
    top_logprobs=section.teacher_top_k,
    grade=section.grade,
  )

  # 4. What came out, and how it compares with the drafts: an own answer has
  #    none, and nothing that it could leak.
  summary = stage.summarize(prompts, rejected) | facts
  if rewrites:
    summary["trimmed"] = report.trimmed
    summary["shown_whole"] = report.all_thoughts
    refined = run_dir.read(STAGE, Trajectory)
    summary |= summaries.compare_with_drafts(drafts, refined)
  stage.finish(summary)
  if rewrites:
    print(summaries.draft_table(summary["by_draft"]), flush=True)


def _refinements(stage, by_id, drafts: Sequence) -> Iterator:
  """Yields the refinement prompt of each draft, or the row of a rejected one.

  Args:
    stage: of `sampling_stage`.
    by_id: the problems.
    drafts: the rollouts.
  """
  from trd_jax.experiment.records import Rejected
  from trd_jax.generation.sampling_stage import counted

  section, seed = stage.section, stage.experiment.seed
  fitted = stage.prompt_set.fit_refinements(
    stage.model.chat,
    ((by_id[draft.problem_id], draft.text) for draft in drafts),
    stage.experiment.regime,
    section.thinking,
    section.max_prompt_tokens,
    section.overflow,
    section.draft_think,
  )
  fitted = counted(fitted, len(drafts), "refinement prompts")
  for draft, one in zip(drafts, fitted, strict=True):
    if isinstance(one, Rejected):
      yield one
      continue
    yield stage.prompt(
      by_id[draft.problem_id],
      one.ids,
      draft.key,
      seed,
      draft_key=draft.key,
      elided_tokens=one.elided_tokens,
    )


def _own_answers(stage, problems: Sequence) -> Iterator:
  """Yields the prompt of x for each problem, or the row of a rejected one."""
  from trd_jax.experiment.records import Rejected
  from trd_jax.generation.sampling_stage import counted

  section, seed = stage.section, stage.experiment.seed
  fitted = stage.prompt_set.fit_initials(
    stage.model.chat,
    problems,
    section.thinking,
    section.max_prompt_tokens,
    STAGE,
  )
  fitted = counted(fitted, len(problems), "prompts")
  for problem, ids in zip(problems, fitted, strict=True):
    if isinstance(ids, Rejected):
      yield ids
    else:
      yield stage.prompt(problem, ids, "teacher", problem.problem_id, seed)


if __name__ == "__main__":
  cli.main(STAGE, run, "the teacher rewrites every rollout (y_r)")
