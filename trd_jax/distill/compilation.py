"""Programs that are compiled before they are needed, one a shape."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax

from trd_jax.experiment.progress import Progress

# Programs that are compiled at once: each holds the compiler's memory.
_MOST_AT_ONCE = 8


class Program:
  """A jitted function with its executables, by the shapes of one argument.

  A call never compiles what has been compiled ahead; a shape that hasn't been
  is compiled when it comes.

  Args:
    function: what is jitted.
    varies: the argument that comes in several shapes; None for none.
    **options: of `jax.jit`.
  """

  def __init__(
    self, function: Callable, *, varies: int | None = None, **options: Any
  ):
    self._jitted = jax.jit(function, **options)
    self._varies = varies
    self._executables: dict[Any, jax.stages.Compiled] = {}

  def __call__(self, *arguments: Any) -> Any:
    """Runs the executable of these arguments' shapes."""
    executable = self._executables.get(self._key(arguments))
    if executable is None:
      executable = self.finish(arguments, self.lower(arguments))
    return executable(*arguments)

  def lower(self, arguments: tuple) -> jax.stages.Lowered:
    """Traces the function for arguments, arrays or `ShapeDtypeStruct`s."""
    return self._jitted.lower(*arguments)

  def finish(
    self, arguments: tuple, lowered: jax.stages.Lowered
  ) -> jax.stages.Compiled:
    """Compiles what `lower` made and keeps it; any thread may."""
    executable = self._executables[self._key(arguments)] = lowered.compile()
    return executable

  def _key(self, arguments: tuple) -> Any:
    if self._varies is None:
      return None
    return tuple(x.shape for x in jax.tree.leaves(arguments[self._varies]))


def compile_all(
  wanted: Mapping[str, tuple[Program, tuple]],
) -> dict[str, jax.stages.Compiled]:
  """Compiles programs, several at once, and shows how far it is.

  Tracing is Python's and goes on here; XLA compiles in other threads
  meanwhile.

  Args:
    wanted: `name -> (program, arguments)`.

  Returns:
    The executables by name.
  """
  workers = min(_MOST_AT_ONCE, os.cpu_count() or 1)
  done = {}
  with (
    Progress(len(wanted), "compiling", "programs") as progress,
    ThreadPoolExecutor(workers) as pool,
  ):
    names = {}
    for name, (program, arguments) in wanted.items():
      lowered = program.lower(arguments)
      names[pool.submit(program.finish, arguments, lowered)] = name
    for future in as_completed(names):
      done[names[future]] = future.result()
      progress.update(1, names[future])
  return done
