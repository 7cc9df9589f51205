"""What a disk changes in rows is found by name, and the advice mends it."""

import random
import shutil

import pyarrow.parquet as pq
import pytest

from tests.support.training_runs import problem
from trd_jax.experiment import records, shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json, write_json
from trd_jax.experiment.records import Problem
from trd_jax.experiment.run_dir import RunDir


def flipped(content: bytes, generator) -> bytes:
  """The same bytes but for one bit."""
  changed = bytearray(content)
  changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
  return bytes(changed)


def finished(root, count=12) -> RunDir:
  """A stage of three shards that is done."""
  run_dir = RunDir(root)
  add(run_dir, range(count), rows_per_shard=count // 3)
  run_dir.mark_done("problems", {"problems": count})
  return run_dir


def add(run_dir, numbers, rows_per_shard=100):
  with run_dir.shard_writer("problems", Problem, rows_per_shard) as writer:
    for number in numbers:
      writer.add(problem(number))


def shards_of(run_dir):
  return sorted(run_dir.problems_dir.glob("shard-*.parquet"))


def test_a_flipped_bit_anywhere_in_a_shard_is_one_line(tmp_path):
  run_dir = finished(tmp_path)
  path = shards_of(run_dir)[1]
  content, generator = path.read_bytes(), random.Random(0)
  footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
  for number in range(400):
    damaged = flipped(content, generator)
    if number % 2:  # half of them in the footer, which no page checksum covers
      damaged = content[:footer] + flipped(content[footer:], generator)
    path.write_bytes(damaged)
    for read in (
      lambda: run_dir.read("problems", Problem),
      lambda: run_dir.table("problems", Problem, ["text"]),
      lambda: run_dir.keys("problems"),
      lambda: run_dir.check_bytes("problems"),
    ):
      with pytest.raises(UserError) as caught:
        read()
      message = str(caught.value)
      assert message.startswith(f"{path} cannot be read (its bytes are not")
      assert message.endswith("remove it and give the same command again")
      assert "\n" not in message
  path.write_bytes(content)
  assert len(run_dir.read("problems", Problem)) == 12


def test_the_pages_of_a_shard_have_checksums_for_other_readers(tmp_path):
  """And for those of ours that an earlier version named without a digest."""
  table = records.to_table([problem(n) for n in range(50)])
  path = tmp_path / "shard-00001.parquet"
  shards.write_table(path, table)
  content, generator = path.read_bytes(), random.Random(1)
  # Inside of the first page: its zstd frame begins with these four bytes.
  start = content.index(bytes.fromhex("28b52ffd"))
  end = start + 60
  for _ in range(50):
    page = flipped(content[start:end], generator)
    path.write_bytes(content[:start] + page + content[end:])
    with pytest.raises(OSError, match="CRC"):
      pq.read_table(path, page_checksum_verification=True)
    with pytest.raises(UserError, match="CRC"):
      shards.read_table(path, Problem)


def test_flips_in_a_shard_without_a_digest_are_found_or_harmless(tmp_path):
  """Those of earlier versions; no exception but the one line."""
  table = records.to_table([problem(n) for n in range(50)])
  path = tmp_path / "shard-00001.parquet"
  shards.write_table(path, table)
  content, generator = path.read_bytes(), random.Random(2)
  found = 0
  for _ in range(600):
    path.write_bytes(flipped(content, generator))
    try:
      assert shards.read_table(path, Problem).equals(table)
    except UserError:
      found += 1
  assert found > 300


def test_rows_that_are_gone_are_named_and_what_the_line_says_mends_it(tmp_path):
  run_dir = finished(tmp_path)
  rows, before = run_dir.read("problems", Problem), run_dir.record("problems")
  gone = shards_of(run_dir)[1]
  gone.write_bytes(gone.read_bytes()[:-1])
  with pytest.raises(
    UserError, match="remove it and give the same command again"
  ):
    run_dir.check_bytes("problems")
  gone.unlink()
  with pytest.raises(UserError, match=rf"{gone.name}, which problems had left"):
    run_dir.done("problems")
  # Whoever makes the stage sees that it isn't done, and makes it.
  assert run_dir.complete("problems") is None
  add(
    run_dir, [n for n in range(12) if f"p{n}" not in run_dir.keys("problems")]
  )
  run_dir.mark_done("problems", {"problems": 12})
  assert run_dir.done("problems") == {"problems": 12}
  assert run_dir.read("problems", Problem) == rows
  after = run_dir.record("problems")["left"]
  for name in ("number", "digest"):
    assert after[name] == before["left"][name]


def test_a_shard_that_is_not_the_stages_is_named(tmp_path):
  run_dir = finished(tmp_path / "run")
  first, second, _ = shards_of(run_dir)
  # Doubled rows: a copy under another name.
  copy = first.with_name(first.name.replace("shard-0", "shard-1"))
  shutil.copy(first, copy)
  with pytest.raises(UserError, match=f"{copy.name} is none of the shards"):
    run_dir.done("problems")
  copy.unlink()
  assert run_dir.done("problems") == {"problems": 12}
  # One in the place of another, under its name and under its own.
  other = finished(tmp_path / "other", 15)
  stranger = shards_of(other)[0]
  content = second.read_bytes()
  second.write_bytes(stranger.read_bytes())
  with pytest.raises(UserError, match=f"{second.name} cannot be read"):
    run_dir.check_bytes("problems")
  second.unlink()
  shutil.copy(stranger, run_dir.problems_dir)
  with pytest.raises(UserError, match=f"{second.name}, which problems had"):
    run_dir.done("problems")
  second.write_bytes(content)
  with pytest.raises(UserError, match=f"{stranger.name} is none of the"):
    run_dir.done("problems")


def test_a_stage_of_an_earlier_version_needs_no_list(tmp_path):
  run_dir = finished(tmp_path)
  done = run_dir.problems_dir / "done.json"
  write_json(done, {"problems": 12})
  path = shards_of(run_dir)[0]
  old = path.with_name("shard-00000000000000000001-1-000000.parquet")
  path.rename(old)
  assert run_dir.done("problems") == {"problems": 12}
  assert len(run_dir.read("problems", Problem)) == 12
  # Nothing would miss the shard: the list has to go, too, and the line says it.
  old.write_bytes(old.read_bytes()[:-1])
  with pytest.raises(UserError, match=r"remove it and done\.json beside it"):
    run_dir.read("problems", Problem)


def test_a_changed_digit_in_done_json_is_named(tmp_path):
  run_dir = finished(tmp_path)
  done = run_dir.problems_dir / "done.json"
  content, generator, found = done.read_bytes(), random.Random(3), 0
  for _ in range(200):
    done.write_bytes(flipped(content, generator))
    try:
      # A space that became a line feed is no damage.
      assert run_dir.done("problems") == {"problems": 12}
    except UserError as error:
      message = str(error)
      found += 1
    else:
      continue
    assert str(done) in message
    assert "remove it" in message
  assert found > 150
  done.write_bytes(content)
  record = read_json(done)
  write_json(done, record | {"problems": 13})
  with pytest.raises(UserError, match=r"done\.json is damaged or was edited"):
    run_dir.done("problems")


@pytest.mark.parametrize("killed", ["write_bytes", "unlink", "record", None])
def test_rows_replaced_in_a_finished_stage_are_listed_at_any_moment(
  tmp_path, monkeypatch, killed
):
  run_dir = finished(tmp_path)
  new = [problem(n + 100) for n in range(12)]
  old = run_dir.read("problems", Problem)
  with monkeypatch.context() as patch:
    if killed == "write_bytes":
      patch.setattr(shards, "_write", lambda *_: 1 / 0)
    elif killed == "unlink":
      patch.setattr(shards.Path, "unlink", lambda *_, **__: 1 / 0)
    elif killed == "record":
      patch.setattr(shards, "digest", lambda *_: 1 / 0)
    try:
      run_dir.replace("problems", Problem, new)
    except ZeroDivisionError:
      assert killed
  assert run_dir.done("problems") == {"problems": 12}
  found = run_dir.read("problems", Problem)
  by_id = sorted(new, key=lambda row: row.problem_id)
  if killed == "write_bytes":
    assert found == old
  elif killed != "unlink":
    assert found == by_id
  run_dir.replace("problems", Problem, new)
  assert run_dir.done("problems") == {"problems": 12}
  assert run_dir.read("problems", Problem) == by_id


def test_a_digest_of_rows_doesnt_depend_on_their_shards(tmp_path):
  one, other = finished(tmp_path / "one"), RunDir(tmp_path / "other")
  add(other, reversed(range(12)), rows_per_shard=5)
  add(other, range(4))  # doubled, and read once
  number, digest = shards.digest(one.problems_dir)
  assert number == 12
  assert shards.digest(other.problems_dir) == (number, digest)
  rows = [problem(n) for n in range(12)]
  assert records.digest_of_rows(rows) == digest
  assert records.digest_of_rows(rows[:-1]) != digest
