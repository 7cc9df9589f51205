"""One completion against one gold, from the text to a verdict's parts.

`prepare` does all that needs no algebra: it finds the answer, tries the fast
ways, and says what is left to ask. The worker answers that with `decide`.
"""

from typing import NamedTuple

from trd_jax.data import final_answer
from trd_jax.experiment.records import Verdict
from trd_jax.grading.math import compare_structure, latex, numbers, shapes

MAX_ANSWER = 2_000  # characters of an answer that is looked at by structure
MAX_NESTING = 50


class Prepared(NamedTuple):
  """What is known before any algebra.

  Attributes:
    correct: the verdict, or None where `question` has to be answered first.
    reason: 'match', 'mismatch', 'no_box', 'unparsed', or '' with a question.
    extracted: the answer that was found, or None.
    question: (gold, answer) for `decide`; None where all is settled.
    boxed: whether the answer stood in a box.
    detail: what was raised where the text could not be looked at.
  """

  correct: bool | None
  reason: str
  extracted: str | None
  question: tuple[str, str] | None = None
  boxed: bool = True
  detail: str | None = None


def _digits(text: str) -> str | None:
  """Returns a plain integer without plus and leading zeros, else None."""
  text = text.strip()
  body = text[1:] if text[:1] in ("-", "+") else text
  if not (body.isascii() and body.isdigit()):
    return None
  body = body.lstrip("0") or "0"
  return "-" + body if text[0] == "-" and body != "0" else body


def _too_wild(text: str) -> bool:
  """Returns whether an answer is too long or too deep to take apart."""
  if len(text) > MAX_ANSWER:
    return True
  depth = deepest = 0
  for character in text:
    if character in "([{":
      depth += 1
      deepest = max(deepest, depth)
    elif character in ")]}":
      depth -= 1
  return deepest > MAX_NESTING


def _gold_text(gold: str) -> str:
  """Returns the gold without the box or dollars that data sets put around."""
  box = final_answer.last_box(gold)
  if box is None or not box.content:
    return gold
  boxes = final_answer.adjacent_boxes(gold, box)
  return boxes[0] if len(boxes) == 1 else ", ".join(boxes)


def _is_list(gold: str) -> bool:
  items = shapes.split(latex.clean(gold))
  return len(items) > 1 or gold.lstrip().startswith(("\\{", "{"))


def prepare(completion: str, gold: str) -> Prepared:
  """Finds the answer in a completion and settles what is easily settled.

  Whatever a text does to this module, it is `unparsed` and no error.

  Args:
    completion: a model's whole output, thoughts included.
    gold: the right answer, as its data set writes it.
  """
  try:
    return _prepare(completion, gold)
  except Exception as error:
    found = Verdict.unparsed(error)
    return Prepared(False, "unparsed", None, detail=found.detail)


def _prepare(completion: str, gold: str) -> Prepared:
  # As GSM8K writes it: a solution, whose last line is the answer.
  gold = gold.rpartition("####")[2]
  text = final_answer.final_text(completion)
  box = final_answer.last_box(text)
  if box is None:
    stated = final_answer.stated_answer(text)
    if stated is None:
      return Prepared(False, "no_box", None)
    found = _settle(stated, gold)
    # Without a box there is no telling what the model meant as its answer: a
    # stated one counts for it, never against another reason.
    if found.question is None and not found.correct:
      return Prepared(False, "no_box", stated)
    return found._replace(boxed=False)
  if box.content is None or not box.content.strip():
    return Prepared(False, "no_box", None)
  answer = box.content.strip()
  # Two integers, as in most contests, need no LaTeX to be read.
  plain, plain_gold = _digits(answer), _digits(gold)
  if plain is not None and plain_gold is not None:
    equal = plain == plain_gold
    return Prepared(equal, "match" if equal else "mismatch", answer)
  if "\\boxed" in gold or "\\fbox" in gold:
    gold = _gold_text(gold)
  # Several boxes in a row are one answer only where several values are asked
  # for; else the last box is the answer.
  if len(gold) <= MAX_ANSWER and _is_list(gold):
    run = final_answer.adjacent_boxes(text, box)
    answer = ", ".join(part.strip() for part in run) if len(run) > 1 else answer
  return _settle(answer, gold)


def _settle(answer: str, gold: str) -> Prepared:
  """Compares by structure and literals; leaves a question where it must."""
  if answer.strip() == gold.strip():
    return Prepared(True, "match", answer)
  if _too_wild(answer) or _too_wild(gold):
    return Prepared(False, "unparsed", answer)
  clean_gold, clean_answer = latex.clean(_gold_text(gold)), latex.clean(answer)
  if not clean_answer:
    return Prepared(False, "no_box", answer)
  try:
    equal = compare_structure.compare(clean_gold, clean_answer, numbers.equal)
  except RecursionError:
    return Prepared(False, "unparsed", answer)
  if equal is None:
    return Prepared(None, "", answer, (clean_gold, clean_answer))
  return Prepared(equal, "match" if equal else "mismatch", answer)


def decide(gold: str, answer: str) -> tuple[bool, str]:
  """Answers a question of `prepare`, with algebra: (correct, reason).

  Args:
    gold: cleaned.
    answer: cleaned.
  """
  # Imported late: sympy takes most of a second, and only workers need it.
  from trd_jax.grading.math import compare_symbolic, values

  try:
    equal = compare_structure.compare(gold, answer, compare_symbolic.equal)
  except (values.TooLarge, RecursionError):
    equal = None
  if equal is None:
    return False, "unparsed"
  return equal, "match" if equal else "mismatch"
