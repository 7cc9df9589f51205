"""Whether models and tokenizers speak in the same ids."""

from collections.abc import Sequence
from pathlib import Path

from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError


def check_head(
  chat: Chat, rows: int, tokenizer: Path | str, model: Path | str
) -> None:
  """Sees that a model's head has a row for each id of a tokenizer.

  Args:
    chat: the tokenizer.
    rows: of the head.
    tokenizer: where it comes from, for the error.
    model: where the head does.

  Raises:
    UserError: there are more ids than rows.
  """
  if chat.vocab_size > rows:
    raise UserError(
      f"{tokenizer}: the tokenizer has ids up to {chat.vocab_size - 1} but"
      f" {model} has a head of {rows} rows; use the model's own tokenizer"
    )


def check_same(
  names: Sequence[str], chats: Sequence[Chat], rows: Sequence[int]
) -> None:
  """Sees that student and teacher give every id one token and one row.

  Args:
    names: the student and the teacher, as the config says them.
    chats: their tokenizers.
    rows: of their heads.

  Raises:
    UserError: they don't, and no divergence can be taken id by id.
  """
  student, teacher = names
  if not chats[0].same_ids(chats[1]):
    raise UserError(
      f"teacher.path={teacher}: its tokenizer gives other ids than"
      f" student.path={student}'s, and a full-vocabulary divergence"
      " compares id by id; choose a teacher of the same family"
    )
  if rows[0] != rows[1]:
    raise UserError(
      f"teacher.path={teacher} has a head of {rows[1]} rows and"
      f" student.path={student} one of {rows[0]}; choose a teacher with"
      " the student's vocabulary"
    )
