"""Stage 2: the teacher rewrites every rollout; y_r with its verdict.

In OPD the separate teacher sees the problem and y_o; in OPSD the student's own
base also sees the reference y* (Equation 5).
"""

from trd_jax.experiment import cli, methods
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

STAGE = "refine"


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples one refinement a rollout and grades it.

  A truncated rollout is refined too (SPEC §5.4); a draft that doesn't fit
  loses its middle or its sample, as `refine.overflow` says.

  Raises:
    UserError: the rollouts are missing, the model or tokenizer is bad, no
      prompt is within its budget, or a method that doesn't refine; no sample
      is drawn then.
  """
  del flags
  from trd_jax.data.leakage import count_leaks
  from trd_jax.data.problems import store
  from trd_jax.data.prompts import VERSION, fit_refinements
  from trd_jax.experiment.errors import UserError
  from trd_jax.experiment.metrics import Progress
  from trd_jax.experiment.records import Rejected, Trajectory
  from trd_jax.generation import chat_model, generate, preflight, summaries
  from trd_jax.generation.engines.factory import check_installed

  if not experiment.refines:
    raise UserError(
      f"method={experiment.method} trains on raw rollouts and has no refine"
      f" stage; use method={methods.refining()}, or go on with trd_jax.train"
    )
  if run_dir.done(STAGE) is not None:
    store.check_source(experiment, run_dir)  # or else as they are loaded
  if summaries.skip_if_done(run_dir, STAGE, summaries.describe):
    return
  if not experiment.preflight_only:
    check_installed(experiment.engine)
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

  # 2. Refinement prompts, within their budget, and what they amount to.
  prompts: list[generate.Prompt] = []
  rejected: list[Rejected] = []
  with Progress(len(drafts), "refinement prompts", "prompts") as progress:
    every = fit_refinements(
      model.chat,
      ((problems[draft.problem_id], draft.text) for draft in drafts),
      experiment.regime,
      section.thinking,
      section.max_prompt_tokens,
      section.overflow,
      section.draft_think,
    )
    for draft, fitted in zip(drafts, every, strict=True):
      progress.update()
      if isinstance(fitted, Rejected):
        rejected.append(fitted)
        continue
      key, seed = generate.identity(
        STAGE, model, section, fitted.ids, draft.key, experiment.seed
      )
      prompts.append(
        generate.Prompt(
          key,
          problems[draft.problem_id],
          fitted.ids,
          seed,
          draft_key=draft.key,
          elided_tokens=fitted.elided_tokens,
        )
      )
  report = preflight.of_refine(
    experiment, run_dir, model, problems, drafts, prompts, rejected
  )
  preflight.publish(report, run_dir)
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
      sample, STAGE, model, section, section.thinking, VERSION
    ),
    desc=STAGE,
    top_logprobs=section.teacher_top_k,
  )
  run_dir.write_rejected(STAGE, rejected)

  # 4. What came out, and how it compares with the drafts.
  summary = summaries.settle(run_dir, STAGE, {p.key for p in prompts})
  summary |= {"rejected": len(rejected), "trimmed": report.trimmed}
  summary["shown_whole"] = report.all_thoughts
  refined = run_dir.read(STAGE, Trajectory)
  summary["by_draft"] = confusion(drafts, refined)
  leaks = count_leaks(row.text for row in refined)
  summary |= {"leaks": leaks.anywhere, "leaks_in_thoughts": leaks.in_thoughts}
  run_dir.mark_done(STAGE, summary)
  print(f"refine: {summaries.describe(summary)}", flush=True)


def confusion(drafts, refined) -> dict[str, int]:
  """Counts of (verdict of y_o, verdict of y_r), as in the paper's Figure 7."""
  verdict = {draft.key: draft.correct for draft in drafts}
  counts = dict.fromkeys(
    (f"{a}_to_{b}" for a in ("fail", "succ") for b in ("fail", "succ")), 0
  )
  for row in refined:
    before = "succ" if verdict.get(row.draft_key) else "fail"
    counts[f"{before}_to_{'succ' if row.correct else 'fail'}"] += 1
  return counts


if __name__ == "__main__":
  cli.main(STAGE, run, "the teacher rewrites every rollout (y_r)")
