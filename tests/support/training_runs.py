"""A workdir with problems and hand-made trajectories, ready to train on."""

import dataclasses

import numpy as np
from flax import nnx

from tests.support import chat_folders, small_models
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.weights.hf import save_hf

VOCABULARY = 384
MODEL = dataclasses.replace(
  small_models.SMALL, vocab_size=VOCABULARY, tie_embeddings=True
)


def model_folder(folder, seed=0, merges=60, **sizes):
  """A random model on disk with a small real tokenizer."""
  chat_folders.write_folder(
    folder / "tokenizer", tokenizer=chat_folders.small_tokenizer(merges)
  )
  config = dataclasses.replace(MODEL, **sizes)
  base = nnx.to_pure_dict(nnx.state(Qwen3(config, rngs=nnx.Rngs(seed))))
  save_hf(
    config,
    base,
    folder / "model",
    tokenizer_from=folder / "tokenizer",
    dtype="float32",
  )
  return folder / "model"


def teacher_folder(folder):
  """Another model, of another width and with a head of its own."""
  return model_folder(folder, seed=1, hidden_size=24, tie_embeddings=False)


def problem(number) -> Problem:
  return Problem(
    problem_id=f"p{number}",
    text=f"Start at {number}, add 7.",
    answer=str(number + 7),
    solution=f"{number} + 7 = \\boxed{{{number + 7}}}",
    domain="arithmetic",
    source="hand-made",
    tests=None,
    meta="{}",
  )


def trajectory(chat, problem, stage, number, **fields) -> Trajectory:
  """A random response of a dozen tokens to the stage's own prompt."""
  rng = np.random.default_rng(number)
  response = rng.integers(3, 256, rng.integers(4, 14)).tolist()
  draft = f"draft {number}"
  message = prompts.default().initial(problem)
  if stage == "refine":
    message = prompts.default().refinement(problem, draft, "opsd")
  values = {
    "key": f"{stage}-{number}",
    "problem_id": problem.problem_id,
    "stage": stage,
    "prompt_ids": chat.render(message, None),
    "response_ids": [*response, chat.stop_ids[0]],
    "text": draft,
    "finish_reason": "stop",
    "truncated": False,
    "seed": number,
    "thinking": None,
    "sampling": "{}",
    "model": "hand-made",
    "model_revision": "0",
    "prompt_version": prompts.VERSION,
    "draft_key": f"rollout-{number}" if stage == "refine" else None,
    "draft_elided_tokens": 0,
    "correct": number % 2 == 0,
    "reason": "match",
    "extracted": None,
    "grader_version": "0",
  }
  return Trajectory(**(values | fields))


def write(run_dir: RunDir, stage, rows) -> None:
  """Writes a stage's rows and calls it done."""
  with run_dir.shard_writer(stage, type(rows[0])) as writer:
    for row in rows:
      writer.add(row)
  run_dir.mark_done(stage, {"samples": len(rows)})


def workdir(root, chat: Chat, count=6, refine=None, rollout=None) -> RunDir:
  """Problems, rollouts and refinements; the keywords change rows by number.

  Args:
    root: the workdir.
    chat: renders all prompts.
    count: problems.
    refine: `number -> fields` of refined trajectories to change.
    rollout: the same of rollouts.
  """
  run_dir = RunDir(root)
  made = [problem(n) for n in range(count)]
  write(run_dir, "problems", made)
  for stage, changes in (("rollout", rollout), ("refine", refine)):
    rows = [
      trajectory(chat, p, stage, n, **(changes or {}).get(n, {}))
      for n, p in enumerate(made)
    ]
    write(run_dir, stage, rows)
  return run_dir


def experiment(folder, **fields) -> Experiment:
  """An experiment whose student is the model in `folder`."""
  default = Experiment()
  changed = {
    name: dataclasses.replace(getattr(default, name), **value)
    if isinstance(value, dict)
    else value
    for name, value in fields.items()
  }
  student = dataclasses.replace(default.student, path=str(folder))
  return dataclasses.replace(default, **({"student": student} | changed))
