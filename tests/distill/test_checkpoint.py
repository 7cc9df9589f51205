import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import digests
from trd_jax.model import sharding


def _tree(rank=4, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  adapter = {
    "layers": {
      "q": {
        "lora_a": jax.random.normal(keys[0], (2, 32, rank)),
        "lora_b": jax.random.normal(keys[1], (2, rank, 64)) * 1e-30,
      }
    }
  }
  return {
    "adapter": adapter,
    "opt_state": optax.adamw(1e-3).init(adapter),
    "rounded": jnp.arange(7, dtype=jnp.bfloat16) / 3,
    "rng": jax.random.key_data(jax.random.key(seed)),
    "step": np.int64(2**40 + seed),
    "order": np.random.default_rng(seed).permutation(50),
    "cursor": {"epoch": 1, "seed": None, "share": 0.1, "done": [3, True]},
    "fingerprint": "lora.rank=4 “x”",
  }


def _abstract(tree):
  return jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      if isinstance(x, jax.Array)
      else x
    ),
    tree,
  )


def _same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    if hasattr(b, "dtype"):
      assert a.dtype == b.dtype
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    else:
      assert type(a) is type(b)
      assert a == b


def test_a_tree_comes_back_bit_for_bit_in_another_object(tmp_path):
  tree = _tree()
  first = Checkpoints(tmp_path / "new" / "folder", 2)
  assert first.latest() is None
  first.save(7, tree)
  first.wait()
  assert first.latest() == 7
  other = _tree(seed=1)  # of the same shapes
  step, restored = Checkpoints(tmp_path / "new" / "folder", 2).restore(
    _abstract(other)
  )
  assert step == 7
  _same_bits(restored, tree)


def test_arrays_return_to_the_shards_that_are_asked_for(tmp_path):
  one, other = sharding.make_mesh(2, 2, 2), sharding.make_mesh(1, 4, 2)
  tree = {
    "x": jax.device_put(
      jax.random.normal(jax.random.key(0), (16, 8)),
      sharding.batch_sharding(one),
    )
  }
  checkpoints = Checkpoints(tmp_path, 1)
  checkpoints.save(0, tree)
  checkpoints.wait()
  wanted = jax.sharding.NamedSharding(other, P("fsdp", "tensor"))
  like = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=wanted)
  _, restored = checkpoints.restore({"x": like})
  assert restored["x"].sharding == wanted
  _same_bits(restored, tree)


def test_what_is_saved_is_what_was_passed_though_it_is_donated(tmp_path):
  checkpoints = Checkpoints(tmp_path, 1)
  overwrite = jax.jit(lambda x: x * 0, donate_argnums=0)
  tree = {"x": jax.random.normal(jax.random.key(0), (1024, 1024))}
  expected = np.array(tree["x"])
  checkpoints.save(0, tree)
  overwrite(tree["x"]).block_until_ready()
  order = {"y": np.arange(10**6)}
  checkpoints.wait()
  _, restored = checkpoints.restore(
    {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
  )
  np.testing.assert_array_equal(restored["x"], expected)
  checkpoints.save(1, order)
  order["y"][:] = 0
  checkpoints.wait()
  _, restored = checkpoints.restore({"y": np.empty(10**6, np.int64)})
  np.testing.assert_array_equal(restored["y"], np.arange(10**6))


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  for step in (10, 20, 30):
    checkpoints.save(step, {"x": np.full(3, step)})
  checkpoints.save(30, {"x": np.zeros(3, int)})
  checkpoints.wait()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [20, 30]
  step, tree = Checkpoints(tmp_path, 2).restore({"x": np.zeros(3, int)})
  assert step == 30
  np.testing.assert_array_equal(tree["x"], 30)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (
      lambda t: t | {"adapter": _tree(rank=8)["adapter"]},
      ["adapter/layers/q/lora_a", "(2, 32, 4)", "(2, 32, 8)"],
    ),
    (
      lambda t: t | {"rounded": jnp.zeros(7)},
      ["rounded", "bfloat16", "float32"],
    ),
    (lambda t: t | {"more": "text"}, ["more", "absent there"]),
    (lambda t: t | {"cursor": {"epoch": 1}}, ["cursor/", "absent in this"]),
    (lambda t: t | {"step": 5}, ["step", "plain value"]),
    (
      lambda t: t | {"opt_state": optax.sgd(0.1).init(t["adapter"])},
      ["opt_state", "absent in this"],
    ),
  ],
)
def test_another_tree_is_refused_by_name(tmp_path, change, named):
  tree = _tree()
  checkpoints = Checkpoints(tmp_path, 1)
  checkpoints.save(3, tree)
  checkpoints.wait()
  with pytest.raises(UserError) as caught:
    checkpoints.restore(change(tree))
  message = str(caught.value)
  assert str(tmp_path / "3") in message
  assert "\n" not in message
  for part in named:
    assert part in message, message


def test_a_part_may_be_read_alone_if_that_is_said(tmp_path):
  tree = _tree()
  checkpoints = Checkpoints(tmp_path, 1)
  checkpoints.save(3, tree)
  checkpoints.wait()
  part = {"adapter": tree["adapter"], "fingerprint": ""}
  with pytest.raises(UserError, match="absent in this run"):
    checkpoints.restore(part)
  step, restored = checkpoints.restore(part, partial=True)
  assert step == 3
  _same_bits(restored, {name: tree[name] for name in part})
  assert checkpoints.arrays()["adapter/layers/q/lora_b"] == (
    jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
  )


@pytest.mark.slow
def test_a_save_that_is_killed_is_as_if_it_had_not_begun(tmp_path):
  script = f"""
    import numpy as np
    from trd_jax.distill.checkpoint import Checkpoints
    checkpoints = Checkpoints({str(tmp_path)!r}, 1)
    checkpoints.save(1, {{"x": np.arange(5)}})
    checkpoints.wait()
    print("one", flush=True)
    noise = np.random.default_rng(0).standard_normal((60, 10**6))
    checkpoints.save(2, {{"x": noise}})
    checkpoints.wait()
    print("two", flush=True)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script)],
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout.readline() == "one\n"
    while not list(tmp_path.glob("2*")):
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == ""
  left = [path.name for path in tmp_path.iterdir()]
  assert any(name.startswith("2.") for name in left), left
  checkpoints = Checkpoints(tmp_path, 1)
  assert checkpoints.latest() == 1
  _, tree = checkpoints.restore({"x": np.empty(5, int)})
  np.testing.assert_array_equal(tree["x"], np.arange(5))
  # What the killed one left is cleared away, though its step never recurs.
  checkpoints.save(3, {"x": np.ones(2)})
  checkpoints.wait()
  assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_damaged_checkpoint_is_named(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  noise = np.random.default_rng(0).standard_normal((100, 100))
  checkpoints.save(4, {"x": noise})
  checkpoints.wait()
  for path in (tmp_path / "4" / "arrays").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(UserError, match="remove it") as caught:
    Checkpoints(tmp_path, 2).restore({"x": noise})
  assert str(tmp_path / "4") in str(caught.value)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A folder with the checkpoints of steps 4 and 5, and what they hold."""
  folder = tmp_path_factory.mktemp("two")
  checkpoints, tree = Checkpoints(folder, 2), _tree()
  checkpoints.save(4, tree)
  checkpoints.save(5, tree)
  checkpoints.wait()
  return folder, tree


def _files(folder):
  """The files of a checkpoint that have any bytes."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  return [path for path in paths if path.stat().st_size]


def test_300_flipped_bits_in_a_checkpoint_are_each_found_by_name(two, tmp_path):
  folder = tmp_path / "5"
  shutil.copytree(two[0] / "5", folder)
  assert digests.difference(folder) is None
  # What orbax writes after the list is tried below.
  files = [path for path in _files(folder) if path.parent != folder]
  assert len(files) > 10
  generator = random.Random(0)
  for number in range(300):
    path = files[number % len(files)]
    content = path.read_bytes()
    changed = bytearray(content)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    name = path.relative_to(folder).as_posix()
    assert digests.difference(folder) == f"{name} is damaged"
    path.write_bytes(content)
  for path in files:
    content, name = path.read_bytes(), path.relative_to(folder).as_posix()
    path.write_bytes(content[:-1])
    assert digests.difference(folder).startswith(f"{name} has ")
    path.unlink()
    assert digests.difference(folder) == f"{name} is missing"
    path.write_bytes(content)
  assert digests.difference(folder) is None


def test_a_flip_beside_the_digests_is_harmless_or_found(two, tmp_path):
  """In the list itself, and in the two files that orbax writes after it."""
  shutil.copytree(two[0], tmp_path / "all")
  folder, tree = tmp_path / "all", two[1]
  generator = random.Random(1)
  names = ("_CHECKPOINT_METADATA", "commit_success.txt", digests.LIST)
  for name in (n for n in names for _ in range(10)):
    path = folder / "5" / name
    content = path.read_bytes()
    changed = bytearray(content)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    try:
      step, restored = Checkpoints(folder, 2).restore(_abstract(tree))
    except UserError as error:
      message = str(error)
    else:
      message = None
      assert step == 5
      _same_bits(restored, tree)
    if message is not None:
      assert name == digests.LIST
      assert f"{path} is damaged: remove it" in message
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
  two, tmp_path
):
  folder, tree = tmp_path / "all", two[1]
  shutil.copytree(two[0], folder)
  path = _files(folder / "5" / "arrays")[0]
  path.write_bytes(bytes(len(path.read_bytes())))
  name = path.relative_to(folder / "5")
  for read in (
    lambda: Checkpoints(folder, 2).restore(_abstract(tree)),
    lambda: Checkpoints(folder, 2).arrays(),
  ):
    with pytest.raises(UserError) as caught:
      read()
    assert str(caught.value) == (
      f"{folder / '5'} can't be read ({name} is damaged); remove it to go on"
      " from the one before"
    )
  shutil.rmtree(folder / "5")
  step, restored = Checkpoints(folder, 2).restore(_abstract(tree))
  assert step == 4
  _same_bits(restored, tree)
  path = _files(folder / "4" / "arrays")[0]
  path.unlink()
  with pytest.raises(UserError, match=r"missing.*remove it to begin anew"):
    Checkpoints(folder, 2).restore(_abstract(tree))


def test_a_checkpoint_of_an_earlier_version_is_read_and_that_is_said(
  two, tmp_path, capsys
):
  folder, tree = tmp_path / "all", two[1]
  shutil.copytree(two[0], folder)
  Checkpoints(folder, 2).restore(_abstract(tree))
  assert capsys.readouterr().out == ""
  (folder / "5" / digests.LIST).unlink()
  step, restored = Checkpoints(folder, 2).restore(_abstract(tree))
  assert step == 5
  _same_bits(restored, tree)
  assert f"note: {folder / '5'} has no digests.json" in capsys.readouterr().out


def test_of_an_unfinished_save_only_what_orbax_wrote_is_removed(tmp_path):
  left = tmp_path / "2.orbax-checkpoint-tmp"
  (left / "arrays.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
  mine = left / "arrays.orbax-checkpoint-tmp" / "notes.txt"
  theirs = left / "arrays.orbax-checkpoint-tmp" / "d" / (32 * "0")
  for path in (mine, theirs, left / "_CHECKPOINT_METADATA"):
    path.write_text("text")
  with pytest.raises(UserError, match=r"holds .*notes\.txt, which is no check"):
    Checkpoints(tmp_path, 1).save(3, {"x": np.ones(2)})
  assert mine.read_text() == theirs.read_text() == "text"
  mine.unlink()
  checkpoints = Checkpoints(tmp_path, 1)
  checkpoints.save(3, {"x": np.ones(2)})
  checkpoints.wait()
  assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_without_a_checkpoint_there_is_one_line(tmp_path):
  with pytest.raises(UserError, match="no checkpoint"):
    Checkpoints(tmp_path / "none", 1).restore({"x": np.zeros(1)})
  assert not (tmp_path / "none").exists()


def test_a_leaf_that_is_neither_array_nor_plain_is_refused(tmp_path):
  with pytest.raises(ValueError, match="a/b is a object"):
    Checkpoints(tmp_path, 1).save(0, {"a": {"b": object()}})
