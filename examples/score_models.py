r"""Scores a text under a pair of models with `token_stats`, token by token.

    python examples/score_models.py
    python examples/score_models.py --student FOLDER --teacher FOLDER \
        --prompt "What is 6 times 7?" --response "6*7=42"

Prints, for every token of the response, the full-vocabulary KL(teacher ‖
student) in nats and how likely each of the two found the token. The models need
the same tokenizer. `token_stats` also has a gradient, with respect to the
student's hidden states: that is what training follows.
"""

import argparse

import jax.numpy as jnp

from trd_jax.data.chat import Chat
from trd_jax.distill.loss.token_stats import Scoring, token_stats
from trd_jax.model.weights import hf, hub

WORKED = "3+4=7\n7*2=14\n\\boxed{14}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--student", default="lab:student")
  parser.add_argument("--teacher", default="lab:teacher")
  parser.add_argument("--prompt", default="Start at 3, add 4, times 2.")
  parser.add_argument("--response", default=WORKED)
  args = parser.parse_args()

  folders = [hub.model_folder(path) for path in (args.student, args.teacher)]
  chat = Chat.load(folders[0])
  prompt = chat.render(args.prompt, thinking=None)
  response = chat.encode(args.response)
  tokens_BT = jnp.array([prompt + response])
  position_BT = jnp.arange(tokens_BT.shape[1])[None]
  # Position t predicts token t + 1: the last prompt token predicts the first
  # of the response, and what follows the last is not asked for.
  predicts = slice(len(prompt) - 1, -1)

  hidden, heads = [], []
  for folder in folders:
    model = hf.load(folder, dtype=jnp.float32)
    hidden_BTD = model(tokens_BT, position_BT, jnp.ones_like(tokens_BT))
    hidden.append(hidden_BTD[0, predicts])
    heads.append(model.head_VD)

  stats = token_stats(
    *hidden,
    *heads,
    jnp.array(response),
    jnp.array(chat.onset_ids(), jnp.int32),
    Scoring(),
  )
  print("token        KL(T|S)  p_student  p_teacher")
  rows = zip(
    response,
    stats.divergence,
    jnp.exp(-stats.student_nll),
    jnp.exp(-stats.teacher_nll),
    strict=True,
  )
  for token, divergence, student, teacher in rows:
    text = repr(chat.decode([token]))
    print(f"{text:12} {divergence:7.4f} {student:10.4f} {teacher:10.4f}")
  print(f"mean divergence: {stats.divergence.mean():.4f} nats")


if __name__ == "__main__":
  main()
