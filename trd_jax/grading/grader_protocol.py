"""What every grader is: the protocol, and what one says of itself.

Whoever has answers to judge opens a grader, submits answers one by one, and
takes verdicts as they are finished. `graders.GRADERS` names all of them.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Verdict


class Environment(NamedTuple):
  """A Python environment that a grader has to itself.

  Attributes:
    title: what the grader's program is called.
    field: the key of the section `python` that names its interpreter.
    python: the interpreter where that key is None.
    package: what the interpreter must import, and the folder of
      `third_party/` whose `install.sh` makes the environment.
    without: what is said where it isn't here and nothing asks for it.
  """

  title: str
  field: str
  python: str
  package: str
  without: str

  def named(self, experiment: Experiment) -> str | None:
    """Returns the interpreter that an experiment names, or None."""
    return getattr(experiment.python, self.field)

  def path(self, named: str | None) -> str:
    """Returns the absolute path of an interpreter; None: of the default."""
    return os.path.abspath(named or self.python)

  def wanted(self, experiment: Experiment) -> bool:
    """Returns whether the interpreter is named, or is there unnamed."""
    named = self.named(experiment)
    return named is not None or os.access(self.path(None), os.X_OK)


class Official(NamedTuple):
  """How a benchmark's own tool puts its questions.

  Attributes:
    version: of the tool, and of what else its words depend on.
    messages: a user's message a problem, in their order.
    system: the system prompt before each; None: there is none.
    begun: how each answer begins; '': it isn't begun.
  """

  version: str
  messages: list[str]
  system: str | None = None
  begun: str = ""


class Grader(Protocol):
  """Judges answers, several at a time.

  A grader is a context manager; leaving it forgets what has no verdict yet.

  Attributes:
    version: recorded with each verdict (`grader_version`); a row of another
      version is judged again.
    domains: of problems whose answers it judges while others are sampled. One
      that has none is a benchmark's, and judges once all are there: it has to
      see them together, is dear to start, or needs more than the gold.
    runs_programs: whether it runs what a model wrote, in the sandbox.
    environment: the Python environment that it needs, if one.
    begins_answers: whether its own tool begins the answer for the model, which
      leaves no room for thoughts.
    workers: how many answers are judged at a time.
  """

  version: ClassVar[str]
  domains: ClassVar[frozenset[str]] = frozenset()
  runs_programs: ClassVar[bool] = False
  environment: ClassVar[Environment | None] = None
  begins_answers: ClassVar[bool] = False
  workers: int

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Returns a grader that works as an experiment says.

    Args:
      experiment: limits, interpreters, processes at a time.
      files: the benchmark's files, for a grader that reads them itself.

    Raises:
      UserError: what the grader needs isn't here.
    """
    ...

  @classmethod
  def stand_in(
    cls, experiment: Experiment, problem: Problem | None
  ) -> str | None:
    """Returns the name of the grader that judges instead, or None.

    Args:
      experiment: says what is here and wanted.
      problem: whose answers; None: those of a benchmark as a whole.
    """
    del experiment, problem
    return None

  @classmethod
  def official(
    cls,
    experiment: Experiment,
    problems: Sequence[Problem],
    files: Sequence[Path],
  ) -> Official:
    """Returns what the grader's own tool asks, out of the tool itself.

    A grader that is opened where `evaluate.code_prompt` is `official` judges
    answers to it, and takes the program out of them as the tool does.

    Args:
      experiment: says where the tool is.
      problems: what is asked.
      files: the benchmark's files.

    Raises:
      UserError: the tool isn't here; it says how to get it.
    """
    del experiment, problems, files
    raise UserError(f"{cls.version} asks no questions itself")

  @classmethod
  def check(cls, experiment: Experiment) -> None:
    """Checks, before anything starts, that what the grader needs is here.

    Raises:
      UserError: something is missing; it says how to get it.
    """
    del experiment

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes an answer; its verdict comes out of `finished` with its key.

    Args:
      key: the caller's name for the answer.
      text: a model's whole output, thoughts included.
      problem: what it answers.

    Raises:
      UserError: the grader can't judge such an answer at all.
    """
    ...

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields (key, verdict) as answers are judged, in any order.

    Args:
      wait: until all that was submitted is judged. Without it nothing is
        waited for: where nothing is finished nothing is yielded.

    Raises:
      UserError: what judges can't start, or broke down.
    """
    ...

  def close(self) -> None:
    """Ends what is being judged and forgets what waits for a verdict."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()
