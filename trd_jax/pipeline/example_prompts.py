"""One prompt of each stage, as the model will read it, before any is made.

Nothing is fetched: where a tokenizer isn't on this machine the message is shown
without the chat template around it, and where the problems aren't, or are many
and in a file of somebody's, with words in the place of one.
"""

import dataclasses
import textwrap
import typing
from collections.abc import Callable, Iterator

from trd_jax.data import contexts, problems, prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import benchmarks, questions, store
from trd_jax.data.problems.questions import Questions
from trd_jax.data.prompts import PromptSet
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.experiment import LAB_BENCHMARKS, Experiment
from trd_jax.experiment.records import Domain, Problem
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model
from trd_jax.grading import benchmark_prompts
from trd_jax.model.weights import hub, hub_look
from trd_jax.pipeline.data_checks import is_counted

_HEAD, _TAIL = 420, 180  # characters that are shown of a longer prompt
_INDENT = "    "
_DRAFT = "<y_o: what the student will have answered>"
_ENOUGH = 8  # of the laboratory's problems: the first are always the same


def describe(
  experiment: Experiment, run_dir: RunDir, width: int
) -> Iterator[str]:
  """Yields lines: for each stage with prompts its name, then an example.

  Args:
    experiment: what is to be run.
    run_dir: where; it may hold the problems already.
    width: characters of a line.
  """
  e = experiment
  try:
    words, problem = prompts.load(e.prompts.set), _problem(e, run_dir)
    student = _chat(e.student, run_dir)
    teacher = student if e.regime == "opsd" else _chat(e.teacher, run_dir)
  except UserError as error:
    yield f"no example prompts: {one_line(error)}"
    return
  examples: list[tuple[str, Callable[[], str], Chat | None]] = []
  if e.needs_rollouts:
    examples.append(
      (
        "rollout, to the student",
        lambda: _text(
          student, words, problem, words.initial(problem), e.student.thinking
        ),
        student,
      )
    )
  if e.teacher_writes is not None:
    examples.append(
      (
        "refine, to the teacher",
        lambda: _text(
          teacher, words, problem, _refine(e, words, problem), e.refine.thinking
        ),
        teacher,
      )
    )
  if e.context_of_teacher == "x_reference":
    examples.append(
      (
        "train, what the teacher reads before a trajectory",
        lambda: _context(e, teacher, words, problem),
        teacher,
      )
    )
  if e.pipeline.evaluates and e.evaluate.benchmarks:
    name = e.evaluate.benchmarks[0]
    examples.append(
      (
        f"evaluate, {name}",
        lambda: _benchmark(e, name, student, words, problem),
        student,
      )
    )
  for title, render, chat in examples:
    bare = " (without its template: the tokenizer isn't here)" * (chat is None)
    try:
      text = render()
    except UserError as error:
      yield f"  {title}: no example ({one_line(error)})"
      continue
    yield f"  {title}{bare}:"
    yield from _cut(text, width)


def _problem(e: Experiment, run_dir: RunDir) -> Problem:
  """Returns a problem to show: one of the run's, or words in its place."""
  found: list[Problem] = []
  if run_dir.complete(store.STAGE) is not None:
    found = store.load_all(e, run_dir)
  elif e.data.source == "arithmetic":
    few = dataclasses.replace(e.data.arithmetic, num_problems=_ENOUGH)
    found, _ = problems.read(dataclasses.replace(e.data, arithmetic=few))
  elif is_counted(e.data):
    found, _ = problems.read(e.data, e.grades)
  for one in found:
    if prompts.lacks(e, one) is None:
      return one
  return Problem(
    "example",
    "<x: the problem>",
    "<the answer>",
    "<y*: the reference solution>",
    typing.cast(Domain, e.domain),
    e.data.source,
    None,
    "{}",
  )


def _chat(model: Model, run_dir: RunDir) -> Chat | None:
  """Opens a tokenizer that is on this machine; None: it isn't."""
  path = model.tokenizer_path
  if hub.is_hub_id(path):
    revision = None if model.tokenizer else model.revision
    folder = hub_look.cached(path, revision)
  elif path.startswith("random:") and not run_dir.root.exists():
    folder = None
  else:
    folder = hub.tokenizer_folder(path, run_dir)
  if folder is None or not (folder / "tokenizer.json").is_file():
    return None
  return Chat.load(folder, model.chat_template)


def _refine(e: Experiment, words: PromptSet, problem: Problem) -> str:
  """Returns the message of the refine stage."""
  if e.teacher_writes != "y_r":
    return words.initial(problem)
  return words.refinement(problem, _DRAFT, e.regime)


def _text(
  chat: Chat | None,
  words: PromptSet,
  problem: Problem,
  message: str,
  thinking: bool | None,
) -> str:
  """Returns a message in its template, or alone where that isn't here."""
  if chat is None:
    return message
  return chat.decode(chat.render(message, thinking, words.system(problem)))


def _context(
  e: Experiment, chat: Chat | None, words: PromptSet, problem: Problem
) -> str:
  """Returns the teacher's context of x and y*, in the form that is trained."""
  message = words.privileged(problem)
  if chat is None:
    return message
  (ids,) = contexts.render_many(
    chat,
    [message],
    e.train.context,
    e.teacher_model.thinking,
    [words.system(problem)],
  )
  return chat.decode(ids)


def _benchmark(
  e: Experiment,
  name: str,
  chat: Chat | None,
  words: PromptSet,
  problem: Problem,
) -> str:
  """Returns a benchmark's question as it is asked.

  Raises:
    UserError: its own tool asks it, and isn't started for an example.
  """
  if name in LAB_BENCHMARKS:
    few = dataclasses.replace(e.evaluate, num_problems=1)
    asked_of = questions.load(dataclasses.replace(e, evaluate=few), name)
  else:
    entry = benchmarks.BENCHMARKS[questions.canonical_name(e, name)]
    if benchmark_prompts.is_official(entry, e.evaluate):
      raise UserError("its own tool writes the prompt")
    text = "<the benchmark's question>"
    asked_of = Questions([dataclasses.replace(problem, text=text)], {})
  asked = benchmark_prompts.of_benchmark(name, asked_of, words, e)
  ((_, message, system),) = asked.of(asked_of.problems)
  if chat is None:
    return message
  switch = asked.switch(chat, e.evaluation_thinking)
  (ids,) = chat.render_many([message], switch, [system], asked.begun)
  return chat.decode(ids)


def _cut(text: str, width: int) -> Iterator[str]:
  """Yields the lines of a prompt, each within the width, without its middle."""
  if len(text) > _HEAD + _TAIL:
    left_out = len(text) - _HEAD - _TAIL
    gap = f"\n[… {left_out:,} characters …]\n"
    text = text[:_HEAD] + gap + text[-_TAIL:]
  room = max(width - len(_INDENT), 20)
  for line in text.rstrip("\n").split("\n"):
    for part in textwrap.wrap(line, room) or [""]:
      yield (_INDENT + part).rstrip()
