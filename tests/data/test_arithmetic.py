"""The laboratory's problems, writers, corpus and tokenizer."""

import collections
import itertools
import random
import re

import pytest

from trd_jax.data import prompts
from trd_jax.data.chat import ONSET_WORDS, Chat
from trd_jax.data.problems import arithmetic
from trd_jax.experiment.errors import UserError
from trd_jax.grading.math.verifier import verify
from trd_jax.lab import corpus, tokenizer

SLIPPING = corpus.RECIPES["student"].solver
LINE = re.compile(r"(?:[A-Z][a-z ]+, )?(\d+|f\()([-+*]?)(\d+)\)?=(\d+)")


def right(line: str) -> bool:
  """Recomputes a worked line from its text alone."""
  left, result = line.split(", ")[-1].split("=")
  if left.startswith("f("):
    return arithmetic.F_TABLE[int(left[2:-1])] == int(result)
  return eval(left) % 20 == int(result)


def chains(count, seed=0, **kwargs):
  rng = random.Random(seed)
  return [arithmetic.draw(rng, 4, 9, **kwargs) for _ in range(count)]


def test_the_tables_are_permutations_that_agree_nowhere():
  tables = arithmetic.F_TABLE, arithmetic.F_MISREMEMBERED
  assert all(sorted(table) == list(range(20)) for table in tables)
  for i, values in enumerate(zip(*tables, strict=True)):
    assert len({i, *values}) == 3


def test_a_reference_works_every_step_and_boxes_the_answer():
  for chain in chains(200, facts=0.3):
    *lines, box = chain.solution.splitlines()
    assert len(lines) == len(chain.steps)
    assert all(right(line) for line in lines)
    # Each line starts from the value that the line before ended with.
    starts = [re.search(r"\d+", line).group() for line in lines]
    ends = [line.split("=")[1] for line in lines]
    assert starts == [str(chain.start), *ends[:-1]]
    assert box == rf"\boxed{{{ends[-1]}}}" == rf"\boxed{{{chain.answer}}}"
    assert verify(chain.solution, str(chain.answer)).correct


def test_a_slip_has_one_value_and_the_chain_goes_on_from_it():
  wrong_values = collections.defaultdict(set)
  caught = slips = 0
  rng = random.Random(1)
  for chain in chains(2000):
    lines = arithmetic.write(chain, SLIPPING, rng).splitlines()[:-1]
    for line, after in itertools.zip_longest(lines, lines[1:]):
      if line[0].isdigit() and not right(line):
        slips += 1
        left, result = line.split("=")
        wrong_values[left].add(result)
        if after is not None and not after[0].isdigit():
          caught += 1
          assert after.split(", ", 1)[1].startswith(left + "=")
          assert right(after)
        elif after is not None:
          assert after.startswith(result)
  assert slips > 1000
  assert all(len(values) == 1 for values in wrong_values.values())
  assert caught / slips == pytest.approx(SLIPPING.caught, abs=0.05)


def test_generation_is_repeatable_distinct_and_held_out():
  train = arithmetic.generate("train", 200, seed=3)
  assert train == arithmetic.generate("train", 200, seed=3)
  assert train != arithmetic.generate("train", 200, seed=4)
  held_out = arithmetic.generate("heldout", 200, seed=3)
  texts = {p.text for p in train}, {p.text for p in held_out}
  assert len(texts[0]) == len(texts[1]) == 200
  assert not texts[0] & texts[1]
  assert all(arithmetic.is_held_out(text) for text in texts[1])


def test_the_hard_split_is_longer_and_uses_the_table():
  hard = arithmetic.generate("hard", 100, seed=0)
  assert min(p.text.count(",") for p in hard) >= 7
  assert any("apply f" in p.text for p in hard)
  assert not any(
    "apply f" in p.text for p in arithmetic.generate("train", 99, 0)
  )


def test_impossible_requests_say_what_to_do():
  with pytest.raises(UserError, match="choose from train"):
    arithmetic.generate("tset", 1, 0)
  with pytest.raises(UserError, match="fewer or for longer"):
    arithmetic.generate("train", 10**6, 0, min_steps=1, max_steps=1)
  with pytest.raises(UserError, match="leave no chain"):
    arithmetic.generate("train", 1, 0, min_steps=5, max_steps=4)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_no_document_shows_a_held_out_problem_and_rewrites_are_clean(model):
  kinds = collections.Counter()
  for user, response in itertools.islice(
    corpus.documents(corpus.RECIPES[model], seed=0), 2000
  ):
    assert not arithmetic.is_held_out(user.splitlines()[0])
    rewrites = user.endswith("Rewrite.")
    kinds[rewrites, "Reference:" in user] += 1
    if rewrites and "apply f" not in user:
      assert all(right(line) for line in response.splitlines()[:-1])
  assert len(kinds) == 4
  assert min(kinds.values()) > 200


def test_the_teacher_knows_the_table_and_the_student_does_not():
  known = {}
  for model in ("student", "teacher"):
    lines = [
      line
      for user, response in itertools.islice(
        corpus.documents(corpus.RECIPES[model], seed=0), 4000
      )
      if "Reference:" not in user
      for line in response.splitlines()
      if line.startswith("f(")
    ]
    assert len(lines) > 300
    known[model] = sum(map(right, lines)) / len(lines)
  assert known["teacher"] == 1
  assert 0.4 < known["student"] < 0.6


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer.write(folder)
  return Chat.load(folder)


def test_every_onset_word_is_one_token_with_and_without_a_space(chat):
  for word in ONSET_WORDS:
    assert len(chat.encode(word)) == len(chat.encode(f" {word}")) == 1
  assert len(chat.onset_ids()) == 2 * len(ONSET_WORDS)


def test_digits_stand_alone_and_any_text_survives(chat):
  assert len(chat.encode("1234")) == 4
  for text in ("naïve √2 ≤ 3", "<|im_end|> <think>", "tabs\t\r\n  end"):
    assert chat.decode(chat.encode(text)) == text


def test_a_document_is_a_prompt_and_its_response(chat):
  problem = arithmetic.generate("train", 1, seed=0)[0]
  ids = chat.render(prompts.default().initial(problem), None)
  assert chat.decode(ids).startswith(f"<|im_start|>user\n{problem.text}")
  assert chat.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
