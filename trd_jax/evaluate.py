"""Stage 5: K graded samples a benchmark question, and what they add up to.

`--model=base` samples from the student as it was before training,
`--model=trained` from the merged weights. Both draw with the same seeds, so
that the two are compared question by question.

    --regrade         judges the samples that are there again, by the graders
                      of today, and samples nothing
    --compare=OTHER   sets them beside those of another workdir
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

if TYPE_CHECKING:
  from trd_jax.data.problems.questions import Questions
  from trd_jax.generation.chat_model import ChatModel

STAGE = "evaluate"
FLAGS = (
  cli.Flag("model", "trained", "whose samples: base or trained (merged)"),
  cli.Flag("regrade", False, "judge samples again; nothing is sampled"),
  cli.Flag(
    "compare",
    None,
    "another workdir, to set these samples beside",
    is_path=True,
  ),
  cli.Flag("compare_model", None, "whose samples there; default: --model"),
  cli.Flag(
    "across_modes", False, "compare although one run thinks, the other doesn't"
  ),
)


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Samples, grades and sums up every benchmark of the experiment.

  Raises:
    UserError: an unknown benchmark or model name, merged weights that aren't
      there yet, a benchmark question over the prompt budget, a grader that
      isn't installed, or no base samples where `evaluate.buckets_from` says.
  """
  from trd_jax.generation import summaries
  from trd_jax.grading import scores

  for name in ("model", "compare_model"):
    if getattr(flags, name) not in ("base", "trained", None):
      raise UserError(
        f"--{name}={getattr(flags, name)}: choose base or trained"
      )
  stage = f"{STAGE}/{flags.model}"
  if flags.compare is not None:
    _compare(experiment, run_dir, flags)
  elif flags.regrade:
    _regrade(experiment, run_dir, stage)
  elif not summaries.skip_if_done(run_dir, stage, scores.describe):
    _evaluate(experiment, run_dir, stage)


def _evaluate(experiment: Experiment, run_dir: RunDir, name: str) -> None:
  """Samples what isn't there yet, and finishes."""
  from trd_jax.data.problems.questions import load_all
  from trd_jax.data.prompts import fit_messages, of_run
  from trd_jax.experiment.records import GradedSample, Rejected
  from trd_jax.generation import preflight, sampling_stage
  from trd_jax.generation.engines.factory import check_installed
  from trd_jax.generation.samples import Prompt
  from trd_jax.grading import benchmark_prompts, benchmark_verdicts, scores

  of_run(experiment, run_dir)
  if not experiment.preflight_only:
    check_installed(experiment.engine)
    benchmark_verdicts.check(experiment)
  section, thinking = experiment.evaluate, experiment.evaluation_thinking

  # 1. The model and the questions.
  model = _open_model(experiment, run_dir, name)
  stage = sampling_stage.SamplingStage(
    experiment, run_dir, name, model, section, thinking
  )
  questions = load_all(experiment)
  # Buckets of other questions are refused before anything is sampled.
  modes = benchmark_prompts.modes(experiment, model.chat.thinks(thinking))
  scores.base_verdicts(section, run_dir, name, questions, modes)

  # 2. K prompts a question; none may be left out of a benchmark.
  asked = {
    name: benchmark_prompts.of_benchmark(
      name, some, stage.prompt_set, experiment
    )
    for name, some in questions.items()
  }
  benchmark_of: dict[str, str] = {}  # by key

  def candidates() -> Iterator[Prompt | Rejected]:
    for benchmark, question_set in questions.items():
      one = asked[benchmark]
      mode = one.switch(model.chat, thinking)
      fitted = fit_messages(
        model.chat,
        one.of(question_set.problems),
        mode,
        section.max_prompt_tokens,
        STAGE,
        one.begun,
      )
      for problem, ids in zip(question_set.problems, fitted, strict=True):
        if isinstance(ids, Rejected):
          yield ids
          continue
        sampled = benchmark_verdicts.to_sample(benchmark, problem, experiment)
        for sample in range(section.k):
          parts = (benchmark, problem.problem_id, sample)
          # Of the question alone: base and trained draw with the same.
          seed = sampling_stage.paired_seed(section.seed, *parts)
          prompt = stage.prompt(
            sampled,
            ids,
            *parts,
            seed=seed,
            sample=sample,
            version=one.version,
            thinks=model.chat.thinks(mode),
          )
          benchmark_of[prompt.key] = benchmark
          yield prompt

  prompts, rejected = sampling_stage.sort_out(candidates())
  problems = [
    problem
    for question_set in questions.values()
    for problem in question_set.problems
  ]
  versions = {
    name: one.version + ", which begins the answer" * bool(one.begun)
    for name, one in asked.items()
  }
  report = preflight.of_evaluation(stage, problems, prompts, rejected, versions)
  preflight.publish(report, run_dir)
  if rejected:
    raise UserError(
      f"{rejected[0].source}, problem {rejected[0].problem_id}:"
      f" {rejected[0].reason} ({len(rejected)} in all); a benchmark has to be"
      " whole: raise evaluate.max_prompt_tokens"
    )
  shas = {
    (benchmark_of[prompt.key], prompt.problem.problem_id): (
      sampling_stage.prompt_sha256(prompt.ids)
    )
    for prompt in prompts
  }
  scores.check_prompts(shas, run_dir)
  if preflight.stops(experiment):
    return

  # 3. What is not on disk yet is sampled, graded and written as it ends.
  stage.fill(
    prompts,
    GradedSample,
    lambda sample: stage.graded_sample(sample, benchmark_of[sample.prompt.key]),
  )
  weights = {model.name: model.fingerprint}
  _finish(experiment, run_dir, name, questions, set(benchmark_of), weights)


def _open_model(
  experiment: Experiment, run_dir: RunDir, stage: str
) -> "ChatModel":
  """Opens the model that is evaluated.

  Raises:
    UserError: it isn't there.
  """
  from trd_jax.generation import chat_model

  if not stage.endswith("trained"):
    return chat_model.open_student(experiment, run_dir)
  return chat_model.open_trained(experiment, run_dir)


def _regrade(experiment: Experiment, run_dir: RunDir, stage: str) -> None:
  """Judges again what a finished evaluation has sampled.

  Raises:
    UserError: it isn't finished, or its questions are others now.
  """
  from trd_jax.data.problems.questions import load_all
  from trd_jax.experiment.records import GradedSample
  from trd_jax.grading import benchmark_verdicts, scores

  done = run_dir.done(stage)
  if done is None:
    raise UserError(
      f"{run_dir.stage(stage)}: the evaluation isn't finished; run it without"
      " --regrade first"
    )
  benchmark_verdicts.check(experiment)
  questions = load_all(experiment)
  for name, question_set in questions.items():
    ids = {problem.problem_id for problem in question_set.problems}
    if ids != done[name]["verdicts"].keys():
      raise UserError(
        f"{run_dir.stage(stage)}: {name} had other questions when it was"
        " sampled; give it the files that it had then"
      )
  modes = {name: row.get("thinking") for name, row in done.items()}
  scores.base_verdicts(experiment.evaluate, run_dir, stage, questions, modes)
  keys = {
    row.key
    for row in run_dir.read(stage, GradedSample)
    if row.benchmark in done
    and row.model_revision
    == done[row.benchmark].get("model_revision", row.model_revision)
  }
  # Those that it was sampled with: nobody has opened them.
  weights = run_dir.record(stage).get("weights", {})
  _finish(experiment, run_dir, stage, questions, keys, weights, again=True)


def _finish(
  experiment: Experiment,
  run_dir: RunDir,
  stage: str,
  questions: "Mapping[str, Questions]",
  keys: set[str],
  weights: "Mapping[str, str]",
  again: bool = False,
) -> None:
  """Judges what is still to be judged, sums up, and prints the summary.

  Args:
    experiment: the experiment.
    run_dir: where the rows are.
    stage: whose rows.
    questions: by benchmark.
    keys: of the rows that count.
    weights: fingerprints of what sampled them, by name.
    again: judge all of them, whatever they have.

  Raises:
    UserError: samples are missing, or a grader is.
  """
  from trd_jax.experiment.files.json_files import write_json
  from trd_jax.experiment.records import GradedSample
  from trd_jax.grading import benchmark_verdicts, scores

  every = run_dir.read(stage, GradedSample)
  mine = [row for row in every if row.key in keys]
  if missing := len(keys) - len(mine):
    raise UserError(f"{stage}: {missing} samples are missing; run it again")
  judged = mine
  for name, question_set in questions.items():
    # A benchmark at a time: what has been judged is not lost.
    before = judged
    judged = benchmark_verdicts.settle(
      before, {name: question_set}, experiment, again=again
    )
    if judged != before:
      others = [row for row in every if row.key not in keys]
      run_dir.replace(stage, GradedSample, judged + others)
  base = scores.base_verdicts(experiment.evaluate, run_dir, stage, questions)
  summary = {}
  for name, question_set in questions.items():
    here = [row for row in judged if row.benchmark == name]
    summary[name] = scores.figures(here, question_set.data, base.get(name))
  if stage != f"{STAGE}/base" and run_dir.done(f"{STAGE}/base") is not None:
    for name, share in scores.identical_to_base(judged, run_dir).items():
      summary[name]["identical_to_base"] = share
  write_json(run_dir.stage_summary(stage), scores.without_verdicts(summary))
  revisions = {row.model: row.model_revision for row in judged}
  run_dir.mark_done(stage, summary, weights=revisions | {**weights})
  print(f"{stage}: {scores.describe(summary)}\n", flush=True)
  print(scores.table(summary))
  for line in (
    scores.describe_identical(summary),
    scores.served_base(summary),
    *scores.without_answers(summary),
  ):
    if line is not None:
      print(f"\n{stage}: {line}", flush=True)
  print(f"\nwritten: {run_dir.stage_summary(stage)}", flush=True)
  if stage == f"{STAGE}/trained" and run_dir.finished("train"):
    _tell_trackers(experiment, run_dir, stage)


def _tell_trackers(experiment: Experiment, run_dir: RunDir, stage: str) -> None:
  """Adds the figures to those of the run's training, where these are kept.

  Base's are among them already: training begins with them.
  """
  from trd_jax.experiment import metric_sinks, stage_figures
  from trd_jax.experiment.experiment import flat

  train = run_dir.record("train")
  metric_sinks.write_figures(
    run_dir.metrics_file("train"),
    experiment.metrics,
    flat(experiment),
    train.get("first_update", 0) + train.get("updates", 0),
    stage_figures.of_stage(stage, run_dir.record(stage)),
  )


def _compare(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Sets a finished evaluation beside another run's.

  Raises:
    UserError: one isn't finished, or they weren't asked the same.
  """
  from trd_jax.experiment.files.json_files import write_json
  from trd_jax.grading import scores

  whose = flags.compare_model or flags.model
  sides = {
    "mine": (run_dir, f"{STAGE}/{flags.model}"),
    "other": (RunDir(flags.compare), f"{STAGE}/{whose}"),
  }
  summaries = {}
  for side, (where, stage) in sides.items():
    summaries[side] = where.done(stage)
    if summaries[side] is None:
      raise UserError(
        f"{where.stage(stage)}: there is no finished evaluation; run"
        f" trd_jax.evaluate --model={stage.rpartition('/')[2]} there"
      )
  comparison = scores.compare(
    summaries["mine"],
    summaries["other"],
    across_modes=flags.across_modes,
  )
  names = {
    side: f"{where.root} {stage.rpartition('/')[2]}"
    f" ({scores.describe_modes(summaries[side])})"
    for side, (where, stage) in sides.items()
  }
  path = run_dir.comparison(sides["mine"][1])
  write_json(path, {**names, "benchmarks": comparison})
  print(scores.comparison_table(comparison, names["mine"], names["other"]))
  print(f"\nwritten: {path}", flush=True)


def _account(flags) -> str:
  """Returns the stage that the flags choose; a wrong one is refused later."""
  known = flags.model in ("base", "trained")
  return f"{STAGE}/{flags.model}" if known else STAGE


if __name__ == "__main__":
  cli.main(
    STAGE,
    run,
    "K graded samples a question; Avg@K and Pass@K",
    FLAGS,
    account=_account,
  )
