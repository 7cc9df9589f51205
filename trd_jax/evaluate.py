"""Stage 5: K graded samples a benchmark question, Avg@K and Pass@K.

`--model=base` samples from the student as it was before training,
`--model=trained` from the merged weights. Both draw with the same seeds, so
that the two are compared question by question.
"""

from typing import Any

from trd_jax import cli
from trd_jax.experiment import Experiment
from trd_jax.run_dir import RunDir

STAGE = "evaluate"
FLAGS = (
  cli.Flag("model", "trained", "whose samples: base or trained (merged)"),
)


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples, grades and sums up every benchmark of the experiment.

  Raises:
    UserError: an unknown benchmark or model name, merged weights that aren't
      there yet, or a benchmark question over the prompt budget.
  """
  from trd_jax import generation, outcomes, preflight
  from trd_jax.engines.engine import check_installed
  from trd_jax.errors import UserError
  from trd_jax.problems import store
  from trd_jax.prompts import fit_initials
  from trd_jax.records import GradedSample, Rejected

  if flags.model not in ("base", "trained"):
    raise UserError(f"--model={flags.model}: choose base or trained")
  stage = f"{STAGE}/{flags.model}"
  if outcomes.skip_if_done(run_dir, stage, describe):
    return
  if not experiment.preflight_only:
    check_installed(experiment.engine)
  trained = flags.model == "trained"
  merged = run_dir.done("merge")
  if trained and merged is None:
    raise UserError(
      f"{run_dir.root}: there are no merged weights yet; run trd_jax.train and"
      " trd_jax.merge first, or evaluate --model=base"
    )
  unmerged = trained and experiment.engine.weights == "adapter"
  if trained and merged and not unmerged and not merged["merged"]:
    raise UserError(
      f"{run_dir.root}: trd_jax.merge wrote the adapter alone; go on with"
      " --config.engine.weights=adapter, or remove merge/done.json and merge"
      " again"
    )
  section, student = experiment.evaluate, experiment.student

  # 1. Questions and the model.
  who = generation.speaker(
    student,
    run_dir,
    folder=run_dir.merged if trained and not unmerged else None,
    adapter=run_dir.adapter if unmerged else None,
  )
  questions = {
    name: store.benchmark(experiment, name).problems
    for name in section.benchmarks
  }

  # 2. K prompts a question; none may be left out of a benchmark.
  prompts: list[generation.Prompt] = []
  rejected: list[Rejected] = []
  of_benchmark: dict[str, str] = {}
  for name, problems in questions.items():
    fitted = fit_initials(
      who.chat, problems, student.thinking, section.max_prompt_tokens, STAGE
    )
    for problem, ids in zip(problems, fitted, strict=True):
      if isinstance(ids, Rejected):
        rejected.append(ids)
        continue
      for sample in range(section.k):
        key, _ = generation.identity(
          stage, who, section, ids, name, problem.problem_id, sample
        )
        seed = generation.paired_seed(
          section.seed, name, problem.problem_id, sample
        )
        prompts.append(generation.Prompt(key, problem, ids, seed, sample))
        of_benchmark[key] = name
  every = [problem for problems in questions.values() for problem in problems]
  preflight.publish(
    preflight.check(
      experiment,
      stage,
      who,
      section,
      "student.thinking",
      problems=len(every),
      prompts=prompts,
      rejected=rejected,
      texts={"problems": [(p.problem_id, p.text) for p in every]},
    ),
    run_dir,
  )
  if rejected:
    raise UserError(
      f"{rejected[0].source}, problem {rejected[0].problem_id}:"
      f" {rejected[0].reason} ({len(rejected)} in all); a benchmark has to be"
      " whole: raise evaluate.max_prompt_tokens"
    )
  if experiment.preflight_only:
    print(preflight.STOPPED, flush=True)
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  generation.fill(
    experiment,
    run_dir,
    stage,
    who,
    section,
    prompts,
    GradedSample,
    lambda sample: generation.graded_sample(
      sample,
      of_benchmark[sample.prompt.key],
      who,
      section,
      student.thinking,
    ),
    desc=f"evaluate {flags.model}",
  )

  # 4. The numbers.
  summary = summarise(
    run_dir.read(stage, GradedSample), of_benchmark, experiment
  )
  run_dir.mark_done(stage, summary)
  print(f"{stage}: {describe(summary)}", flush=True)


def summarise(
  rows, of_benchmark: dict[str, str], experiment: Experiment
) -> dict[str, Any]:
  """Each benchmark's figures, from its graded rows.

  Args:
    rows: `GradedSample`s.
    of_benchmark: the benchmark of every key that belongs to this run.
    experiment: for K, the seed and the number of resamples.

  Returns:
    By benchmark: `verdicts` (those of a problem's samples, by its id), the
    figures of `estimators.summarize`, and shares and lengths.

  Raises:
    UserError: samples are missing.
  """
  import statistics

  from trd_jax.errors import UserError
  from trd_jax.grading import estimators
  from trd_jax.records import NO_ANSWER

  mine = [row for row in rows if row.key in of_benchmark]
  if missing := len(of_benchmark) - len(mine):
    raise UserError(f"evaluate: {missing} samples are missing; run it again")
  section = experiment.evaluate
  summary: dict[str, Any] = {}
  for name in section.benchmarks:
    here = [row for row in mine if row.benchmark == name]
    verdicts: dict[str, list[bool | None]] = {}
    for row in sorted(here, key=lambda row: (row.problem_id, row.sample)):
      verdicts.setdefault(row.problem_id, []).append(row.correct)
    summary[name] = {
      **estimators.summarize(
        verdicts, resamples=section.bootstrap, seed=section.seed
      ),
      "verdicts": verdicts,
      "truncated_share": sum(row.truncated for row in here) / len(here),
      "no_box_share": sum(r.reason in NO_ANSWER for r in here) / len(here),
      "median_tokens": statistics.median(row.num_tokens for row in here),
      "grader_version": here[0].grader_version,
    }
  return summary


def describe(summary: dict[str, Any]) -> str:
  """One line: Avg@K and Pass@K of every benchmark."""
  return "; ".join(
    f"{name} Avg@{row['k']} {100 * row['avg_at_k']:.1f}%,"
    f" Pass@{row['k']} {100 * row['pass_at_k']:.1f}% (n={row['n']})"
    for name, row in summary.items()
  )


if __name__ == "__main__":
  cli.main(STAGE, run, "K graded samples a question; Avg@K and Pass@K", FLAGS)
