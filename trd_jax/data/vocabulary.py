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


def check_same(names: Sequence[str], chats: Sequence[Chat]) -> None:
  """Checks that student and teacher give every id the same token.

  Their heads may have other numbers of rows, as those of one family do: what
  is above the tokenizer's ids is padding (see `shared_rows`).

  Args:
    names: the student and the teacher, as the config says them.
    chats: their tokenizers.

  Raises:
    UserError: they don't, and no divergence can be taken id by id.
  """
  student, teacher = names
  if not chats[0].same_ids(chats[1]):
    raise UserError(
      f"teacher.path={teacher}: its tokenizer gives other ids than"
      f" student.path={student}'s, and a full-vocabulary divergence"
      " compares id by id; choose a teacher of the same family, or"
      " method=sft, which reads only its text"
    )


def shared_rows(rows: Sequence[int]) -> tuple[int, str | None]:
  """Returns the ids that two heads both have, and a line where they differ.

  Args:
    rows: of the student's head and of the teacher's.
  """
  # Ids above the tokenizer's are of no text: heads are padded to a multiple of
  # what their training was split over, which is why they differ.
  student, teacher = rows
  shared = min(rows)
  if student == teacher:
    return shared, None
  return shared, (
    f"the student's head has {student:,} rows and the teacher's {teacher:,}:"
    f" both are scored over the {shared:,} ids that both have"
  )
