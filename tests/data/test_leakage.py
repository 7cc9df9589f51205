"""Phrases that only make sense to somebody who saw the prompt."""

import re

import pytest

from tests.support.places import SHARED
from trd_jax.data import leakage, problems
from trd_jax.data.leakage import mentions_reference
from trd_jax.experiment import experiment

DATA = SHARED / "data/deepscaler"

LEAKS = [
  "As the reference solution says, $x = 3$.",
  "The reference answer is 7.",
  "This matches the reference.",
  "According to the reference, the sum is 12.",
  "The reference's third step uses symmetry.",
  "The reference\nstates that n is odd.",
  "We get 42, which agrees with the given answer.",
  "according to the given solution we have $a = b$",
  "This is consistent with the expected answer of 5.",
  "The provided solution factors the quadratic first.",
  "The official solution is shorter, and the model answer is 3.",
  "Comparing with the ground-truth answer, we are done.",
  "The draft above drops a sign.",
  "In the draft, the sign of $b$ is lost.",
  "The draft incorrectly assumes that $n > 2$.",
  "The original draft stops at $n = 4$.",
  "The student’s draft is nearly right.",
  "Unlike the draft, we keep the factor 2.",
  "The attempt above forgets a case.",
  "Here is the corrected solution:",
  "Refined solution: let $x = 1$.",
  "I was asked to rewrite the text.",
  "# Draft\n3 + 4 = 8",
  "Start at 3.\nReference:\n3 + 4 = 7",
  # As thoughts speak.
  "Okay, let me look at this draft.",
  "Let's see the draft. It begins with a sum.",
  "I need to rewrite the draft into a clean solution.",
  "I have to rewrite this attempt so that it stands alone.",
  "Let me check the draft step by step.",
  "The draft starts with the substitution u = x + 1.",
  "I shouldn't mention the draft.",
  "I should not refer to the reference.",
  "The reference gets 7, so that step must be wrong.",
]

STAND_ALONE = [
  "The reference angle of 150 degrees is 30 degrees.",
  "Let $ABC$ be the reference triangle, without reference to $D$.",
  "Reference data: $\\ln 3 \\approx 1.10$. Reference formula: $a^2$.",
  "In the reference frame of the train the platform moves.",
  "The team picks third in the draft lottery; draftees are 18.",
  "Ten students take drafting. The ship's draft is 4 m.",
  "He made 5 of his first 12 attempts, one more than in the previous attempt.",
  "20 ml are added to the given solution of salt.",
  "Choose from the provided answer choices. None of the given answers fits.",
  "Check: the correct answer is $\\boxed{7}$, by the above.",
  "We rewrite the equation; the revised data have a refined mesh.",
  "Wait, that is wrong. Let me correct my answer: 3 + 4 = 7.",
  "The given equation has a known solution, the original one.",
  "My preference answers the question. A model answers by statute.",
  "for reference only",
  "He looked at the draft lottery and saw the draft of the ship.",
  "Rewrite the expression; check the attempt at a proof.",
  "",
]


@pytest.mark.parametrize("text", LEAKS)
def test_a_leak_is_found_wherever_it_stands(text):
  phrase = mentions_reference(text)
  assert phrase
  plain = " ".join(text.lower().replace("’", "'").split())
  assert phrase in plain
  rest = "Let $x = 3$, so that the given sum is 12. " * 40
  assert mentions_reference(f"{rest}\n{text}\n{rest}") == phrase
  assert mentions_reference(text.upper()) == phrase


@pytest.mark.parametrize("text", STAND_ALONE)
def test_mathematics_has_references_and_drafts_of_its_own(text):
  assert mentions_reference(text) is None


def test_thoughts_are_searched_and_counted_apart():
  said, quiet = "The draft says 8.", "So it is 7."
  found = leakage.count_leakage(
    [
      quiet,
      f"<think>{said}</think>{quiet}",
      f"<think>{said}</think>{said}",
      f"<think>{quiet}</think>{said}",
      f"<think>{said}",
      f"{said}</think>{quiet}",
      said,
    ]
  )
  assert found == leakage.Leakage(anywhere=6, in_thoughts=4, in_answer=3)


def test_looking_near_keywords_only_finds_what_looking_everywhere_does():
  texts = LEAKS + STAND_ALONE
  texts += [a + " " + b for a in texts for b in texts[::5]]
  for text in texts:
    plain = text.lower().replace("’", "'")
    everywhere = leakage._LEAK.search(plain)
    found = mentions_reference(text)
    assert (found is None) == (everywhere is None)
    assert everywhere is None or re.sub(r"\s+", " ", everywhere[0]) == found


def test_the_end_of_what_is_looked_at_is_not_the_end_of_the_text():
  for size in range(120):
    text = f"given {'x' * size} picked in the draft lottery"
    assert mentions_reference(text) is None


def test_the_laboratory_speaks_of_neither():
  config = experiment.default_config()
  found, _ = problems.read(experiment.from_config(config).data)
  for problem in found:
    assert mentions_reference(problem.text) is None
    assert mentions_reference(problem.solution) is None


@pytest.mark.slow
def test_forty_thousand_real_problems_are_not_suspected():
  if not DATA.is_dir():
    pytest.skip(f"no real data at {DATA}")
  config = experiment.default_config()
  config.data.source, config.data.root = "deepscaler", str(DATA)
  found, _ = problems.read(experiment.from_config(config).data)
  assert len(found) > 38_000
  assert not [p.text for p in found if mentions_reference(p.text)]
  # One worked solution does appeal to somebody else's.
  phrases = [mentions_reference(p.solution or "") for p in found]
  assert [phrase for phrase in phrases if phrase] == ["official solution"]
