"""Does a text speak of a draft or a reference that its reader can't see?

A refined trajectory is learnt by a student who has the problem and nothing
else. "The reference solution says" then teaches it to appeal to what isn't
there. Mathematics has drafts and references of its own (a reference angle, a
reference triangle, "Reference data:", an official of a club), so that the words
alone say nothing: what counts is a noun phrase that can only mean the prompt's
other text, or a verb or place that makes it one.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from trd_jax.data.final_answer import final_text

_SAYS = (
  "says?|said|states?|stated|claims?|claimed|gives?|gave|shows?|showed|notes?"
  "|uses?|used|concludes?|concluded|arrives?|arrived|indicates?|indicated"
  "|suggests?|suggested|confirms?|confirmed|tells?|finds?|found|obtains?"
  "|obtained|derives?|derived|computes?|computed|assumes?|assumed"
)
_ERRS = (
  "contains?|contained|makes?|made|skips?|skipped|misses|missed|stops?|stopped"
  "|goes|went|gets?|got|tries|tried|correctly|incorrectly|wrongly|mistakenly"
  "|errs|erred|forgets|forgot|did|does|didn't|doesn't|starts?|started|begins?"
  "|began|ends?|ended|seems?|needs?|needed"
)
# What thoughts do with the text that they are about.
_HANDLES = (
  "look(?:s|ed|ing)? (?:at|through)|read(?:s|ing)?|see|check(?:s|ed|ing)?"
  "|review(?:s|ed|ing)?|examin(?:es?|ed|ing)|go(?:es|ing)? (?:through|over)"
  "|analy[sz](?:es?|ed|ing)|understand(?:s|ing)?|compar(?:es?|ed|ing)"
  "|mention(?:s|ed|ing)?|refer(?:s|red|ring)? to|rewr(?:ites?|iting|itten|ote)"
  "|refin(?:es?|ed|ing)|revis(?:es?|ed|ing)|fix(?:es|ed|ing)?"
  "|improv(?:es?|ed|ing)|clean(?:s|ed|ing)? up"
)
_RIGHT = "correct|right|wrong|incorrect|incomplete|flawed|mistaken|cut off"
_TEXT = "solution|answer|final answer|response|proof|derivation"
# What follows in "answer choices" makes it part of a problem.
_OF_A_PROBLEM = "choices?|options?|sets?|sheets?|spaces?|box|blanks?|formats?"
_END = r"(?=\s*(?:[.,;:)!?]|$))"

_PHRASES = (
  # The reference, by name.
  rf"\breference (?:{_TEXT}|result)s?\b",
  rf"\bthe reference(?:'s\b| (?:{_SAYS}|gets?|got|is (?:{_RIGHT})|above"
  r"|provided)\b)",
  r"\b(?:mention(?:s|ed|ing)?|refer(?:s|red|ring)? to|look(?:s|ed|ing)? at"
  r"|rel(?:y|ies|ied|ying) on) (?:a|any|the) reference" + _END,
  r"\b(?:according to|as in|per|in|from|with|by|match(?:es|ing)?"
  r"|follow(?:s|ing)?|see|using|unlike|contradicts|confirms)"
  rf" the reference{_END}",
  # Somebody else's solution.
  r"\b(?:provided|supplied|official|the model|ground[- ]truth)"
  rf" (?:{_TEXT})s?\b(?! (?:{_OF_A_PROBLEM})\b)",
  r"\b(?:according to|as in|per|match(?:es|ing|ed)?|agree(?:s|ing)? with"
  r"|consistent with|confirm(?:s|ing)?|contradict(?:s|ing)?)"
  rf" the (?:given|expected|known|stated|correct) (?:{_TEXT})\b"
  rf"(?! (?:{_OF_A_PROBLEM})\b)",
  rf"\bthe (?:given|known) (?:{_TEXT}) (?:{_SAYS})\b",
  # The draft.
  rf"\b(?:{_HANDLES}) (?:a|the|this|that|your|their) (?:draft|attempt)\b"
  r"(?! (?:lottery|picks?|horses?|beer|of|to|at)\b)",
  rf"\bdraft (?:above|attempt|{_TEXT})\b",
  r"\b(?:above|given|provided|original|earlier|initial|previous|user's"
  r"|student's) draft\b",
  rf"\b(?:the|this|that|your) draft(?:'s\b| (?:{_SAYS}|{_ERRS}"
  rf"|(?:is|was) (?:{_RIGHT}))\b)",
  r"\b(?:as in|in|from|of|unlike|follow(?:s|ing)?|contrary to|fix(?:es|ing)?"
  r"|correct(?:s|ing)?|complet(?:es?|ing)|rewrit(?:es?|ing|ten)"
  rf"|revis(?:es?|ing)|refin(?:es?|ing)) (?:the|this|that|your) draft{_END}",
  r"\b(?:the|this|your) attempt above\b",
  r"\b(?:above|provided|original|user's|student's) attempt\b",
  # The task of rewriting.
  rf"\b(?:rewritten|refined) (?:version|{_TEXT})\b",
  r"\b(?:here is|here's|below is) (?:the|a|my|your)"
  r" (?:corrected|revised|improved|cleaned[- ]up|polished)"
  rf" (?:version|{_TEXT})\b",
  r"\b(?:asked|told|instructed|task is) to (?:rewrite|refine|revise)\b",
  # A heading of the refinement prompt, repeated.
  r"^(?:#+ )?(?:draft|reference):?$",
)
_LEAK = re.compile("|".join(_PHRASES).replace(" ", r"\s+"), re.MULTILINE)
_WORDS = re.compile(
  "reference|draft|attempt|provided|supplied|official|model|ground|given"
  "|expected|known|stated|correct|rewrit|rewrot|refine|revise|improved"
  "|cleaned|polished"
)
_BEFORE, _AFTER = 48, 96  # characters around such a word that decide


def mentions_reference(text: str) -> str | None:
  """Finds the first phrase about a draft, a reference or the rewriting.

  Args:
    text: a response, a problem or a worked solution.

  Returns:
    The phrase in lower case, its white space as single spaces; None where
    the text stands on its own.
  """
  text = text.lower().replace("’", "'")
  for word in _WORDS.finditer(text):
    end = min(len(text), word.end() + _AFTER)
    found = _LEAK.search(text, max(0, word.start() - _BEFORE), end)
    # The window's end looks like the text's: ask again without it.
    if found and (found := _LEAK.match(text, found.start())):
      return " ".join(found.group().split())
  return None


class Leakage(NamedTuple):
  """Holds how many responses speak of a draft or a reference.

  Attributes:
    anywhere: in thoughts or answer.
    in_thoughts: in what comes before the answer (`final_answer.final_text`).
    in_answer: in the answer. One that speaks of it in both parts counts in
      both.
  """

  anywhere: int
  in_thoughts: int
  in_answer: int


def count_leakage(texts: Iterable[str]) -> Leakage:
  """Counts the responses that speak of a draft or a reference."""
  anywhere = in_thoughts = in_answer = 0
  for text in texts:
    if mentions_reference(text) is None:
      continue
    anywhere += 1
    answer = final_text(text)
    thoughts = text.removesuffix(answer)
    in_thoughts += mentions_reference(thoughts) is not None
    in_answer += mentions_reference(answer) is not None
  return Leakage(anywhere, in_thoughts, in_answer)
