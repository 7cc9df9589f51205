import dataclasses
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trd_jax.experiment import methods, records
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  Rejected,
  TokenScores,
  Trajectory,
  Verdict,
)

_VALUES = {
  str: st.text(),
  int: st.integers(-(2**63), 2**63 - 1),
  bool: st.booleans(),
  list[int]: st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
  str | None: st.none() | st.text(),
  bool | None: st.none() | st.booleans(),
}
_VALUES[list[int] | None] = st.none() | _VALUES[list[int]]
_VALUES[list[float]] = st.lists(
  st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=5
)
_VALUES[list[float] | None] = st.none() | _VALUES[list[float]]
_CLOSED = {
  "domain": st.sampled_from(["arithmetic", "math", "code"]),
  "finish_reason": st.sampled_from(["stop", "length"]),
  "reason": st.sampled_from(["match", "mismatch", "no_box", "timeout"]),
  "trajectory": st.sampled_from(["y_o", "y_r", "y_star", "teacher"]),
  "student": st.sampled_from(["base", "trained"]),
  "context": st.sampled_from(["x", "x_reference", "refine"]),
}


def _rows(cls):
  """Any rows of a record kind."""
  fields = {
    name: _CLOSED[name] if name in _CLOSED else _VALUES.get(hint)
    for name, hint in records._hints(cls).items()
  }
  if cls is Trajectory:
    fields["stage"] = st.sampled_from(["rollout", "refine"])
  if cls is Rejected:
    fields["reason"] = st.text()
  return st.lists(st.builds(cls, **fields), max_size=4)


@pytest.mark.parametrize(
  "cls", [Problem, Verdict, Trajectory, GradedSample, TokenScores, Rejected]
)
def test_rows_survive_parquet(cls, tmp_path):
  @settings(max_examples=25, deadline=None)
  @given(_rows(cls))
  def survive(rows):
    path = tmp_path / "rows.parquet"
    pq.write_table(records.to_table(rows, cls), path)
    assert records.from_table(cls, pq.read_table(path)) == rows

  survive()


def test_scores_name_trajectories_and_contexts_as_the_methods_do():
  hints = records._hints(TokenScores)
  assert get_args(hints["trajectory"]) == tuple(methods.TRAJECTORIES)
  assert get_args(hints["context"]) == tuple(methods.TEACHER_CONTEXTS)


def test_token_ids_are_32_bit_and_seeds_64_bit():
  schema = records.schema(Trajectory)
  assert schema.field("response_ids").type.value_type == pa.int32()
  assert schema.field("seed").type == pa.int64()


def test_another_record_kind_version_or_foreign_table_is_refused():
  rejected = Rejected("p1", "jsonl", "problems", "no answer")
  table = records.to_table([rejected])
  newer = table.replace_schema_metadata(
    {**table.schema.metadata, b"trd_jax.version": b"7"}
  )
  with pytest.raises(UserError, match=r"x\.parquet holds Rejected version 7"):
    records.from_table(Rejected, newer, "x.parquet")
  with pytest.raises(UserError, match="reads Problem version 1"):
    records.from_table(Problem, table)
  with pytest.raises(UserError, match="foreign rows"):
    records.from_table(Rejected, table.replace_schema_metadata({}))
  with pytest.raises(UserError, match="columns differ"):
    records.from_table(Rejected, table.drop_columns(["reason"]))


def test_a_missing_value_is_refused_where_the_column_needs_one():
  good = Problem("p", "1+1", "2", None, "math", "s", None, "{}")
  records.to_table([good])
  with pytest.raises(ValueError, match=r"Problem\.answer is None"):
    records.to_table([good, dataclasses.replace(good, answer=None)])


def test_a_closed_field_takes_its_values_only():
  with pytest.raises(ValueError, match=r"Problem\.domain is 'maths'"):
    Problem("p", "1+1", "2", None, "maths", "s", None, "{}")  # type: ignore
  with pytest.raises(ValueError, match=r"Verdict\.reason is 'wrong'"):
    Verdict(False, "wrong", None)  # type: ignore


def test_different_parts_have_different_content_keys():
  parts = [
    ("ab",),
    ("a", "b"),
    (["a", "b"],),
    (1,),
    ("1",),
    (True,),
    (None,),
    ("null",),
    (0.6,),
    ({"a": 1},),
    (),
  ]
  keys = {records.content_key(*each) for each in parts}
  assert len(keys) == len(parts)
  assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
  with pytest.raises(ValueError, match="not JSON compliant"):
    records.content_key(float("nan"))


def test_content_keys_do_not_depend_on_the_order_of_a_mapping():
  assert records.content_key({"a": 1, "b": 2}, "x") == records.content_key(
    {"b": 2, "a": 1}, "x"
  )
  # Pinned: a changed key would make every finished run start again.
  assert (
    records.content_key("p1", 0.6, None) == "66370acc941d72a5cddf2b0e35709897"
  )
