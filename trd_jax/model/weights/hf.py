"""Reads Hugging Face's checkpoints into the model's tree, and writes them.

One table, `tensor_table.entries`, says where each tensor of a checkpoint stands
in the tree. Both directions go through it. It is complete: a tensor that it
doesn't name is an error, and so is one that it names and that is missing.

Trees here are the nested dicts of `nnx.to_pure_dict`. Shape key: L layers,
V vocabulary, D residual channels.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import write_json
from trd_jax.experiment.progress import Progress
from trd_jax.model import float8
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Head, Qwen3
from trd_jax.model.sharding import shardings
from trd_jax.model.weights.model_folder import (
  CONFIG,
  atomic_folder,
  copy_companions,
  read_config,
  token_ids,
)
from trd_jax.model.weights.tensor_files import TensorFiles
from trd_jax.model.weights.tensor_table import (
  EMBEDDING,
  HEAD,
  Entry,
  Keys,
  entries,
)

Tree = Mapping[str, Any]

# Bytes of a file of weights; Hugging Face's own habit is 4 to 5 GB.
_SHARD_BYTES = 4 * 10**9

# Parameters of a model that loads too quickly for a progress bar.
_SMALL_MODEL = 10**8

# A buffer of rotary frequencies in old exports; config.json says the same.
_IGNORED = "rotary_emb.inv_freq"


def stored_dtype(folder: Path | str) -> str:
  """Returns the dtype that holds a folder's weights without loss."""
  dtypes = TensorFiles(folder).dtypes()
  # float16 is no part of bfloat16: it has more bits in its mantissa.
  return "bfloat16" if dtypes == {"BF16"} else "float32"


def load(
  folder: Path | str,
  *,
  dtype: jax.typing.DTypeLike,
  mesh: Mesh | None = None,
  lora: LoraConfig | None = None,
  seed: int = 0,
  in_float8: bool = False,
) -> Qwen3:
  """Loads a model with the weights of a Hugging Face folder.

  Reads each device's part of each parameter and puts it there: the host holds
  at most one parameter (of all layers) at a time, a device no more than its
  share.

  Args:
    folder: holds `config.json` and safetensors, sharded or not.
    dtype: of the base weights and the activations.
    mesh: where the weights go, split as `sharding.RULES` says; None for the
      default device, uncommitted.
    lora: the adapters to put beside the linear layers.
    seed: of the adapters' initial values, which don't depend on the mesh.
    in_float8: whether the linear layers are rounded to eight bits, see
      `float8`; each one as soon as it is read, so that they are never all
      there as they were. Without `lora`.

  Raises:
    UserError: a file is missing or damaged; a tensor is unknown, missing,
      there twice, of a wrong shape or of a dtype that can't be read, or has a
      value that is NaN or infinite; or the config ties the head to the
      embedding and the files hold another head.
  """
  config = read_config(folder)
  # Shapes only: base weights are never drawn at random to be overwritten.
  model = jax.eval_shape(
    lambda: Qwen3(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(seed))
  )
  graph, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
  files = TensorFiles(folder)
  # All names and shapes are compared before the first byte of weights is read:
  # a wrong checkpoint is refused in a second, not after minutes.
  _check(files, config, base)
  parts: dict[Keys, dict[int | None, Entry]] = {}
  for entry in entries(config):
    parts.setdefault(entry.path, {})[entry.layer] = entry
  places = dict(_parameters(shardings(base, mesh))) if mesh else {}
  made = dict(_parameters(base))
  if in_float8:
    graph, state = nnx.split(float8.abstract(config, dtype))
    made = dict(_parameters(state))
  loaded = []
  with _progress(config, folder) as advance:
    for path, variable in _parameters(base):
      place = places[path].get_value() if mesh else None
      value = _place(files, parts[path], variable.get_value(), place)
      found = float8.parts(path, value) if in_float8 else {path: value}
      for name, x in found.items():
        variable = made[name]
        loaded.append((name, variable.replace(x)))
      advance(value.size)
  if lora is not None:
    # One program draws all adapters, straight into their shards. It would draw
    # a base, too, but nothing uses that, so the compiler leaves it out.
    make = jax.jit(
      lambda: nnx.state(
        Qwen3(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(seed)),
        nnx.LoRAParam,
      ),
      out_shardings=shardings(adapter, mesh) if mesh else None,
    )
    adapter = make()
  return nnx.merge(graph, adapter, nnx.from_flat_state(loaded))


def load_head(
  folder: Path | str, *, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> Head:
  """Loads only the output matrix, tied or not, placed as `load` would.

  Raises:
    UserError: as `load`, about this one tensor.
  """
  config = read_config(folder)
  made = jax.eval_shape(lambda: Head(config, dtype, nnx.Rngs(0)))
  graph, state = nnx.split(made)
  files = TensorFiles(folder)
  name = EMBEDDING if config.tie_embeddings else HEAD
  files.expect(name, made.weight.shape)
  parts: dict[int | None, Entry] = {None: Entry(name, ("weight",), None, False)}
  ((path, variable),) = _parameters(state)
  ((_, place),) = _parameters(shardings(state, mesh))
  value = _place(files, parts, variable.get_value(), place.get_value())
  return nnx.merge(
    graph, nnx.from_flat_state([(path, variable.replace(value))])
  )


def _parameters(state: nnx.State) -> Iterator[tuple[Keys, nnx.Variable]]:
  """Yields each parameter of a state with its path in the tree."""
  for path, variable in nnx.to_flat_state(state):
    yield tuple(map(str, path)), variable


@contextlib.contextmanager
def _progress(
  config: ModelConfig, folder: Path | str
) -> Iterator[Callable[[int], object]]:
  """Counts parameters on a progress bar where loading takes a while."""
  total = config.num_parameters()
  if total < _SMALL_MODEL:
    yield lambda size: None
    return
  with Progress(total, f"loading {folder}", "parameters") as progress:
    yield progress.update


def _check(files: TensorFiles, config: ModelConfig, base: nnx.State) -> None:
  """Refuses files that aren't exactly the table's tensors."""
  abstract = nnx.to_pure_dict(base)
  table = {entry.name: entry for entry in entries(config)}
  for name, entry in table.items():
    files.expect(name, _shape(entry, abstract))
  for name in files:
    if name in table or name.endswith(_IGNORED):
      continue
    if name == HEAD and config.tie_embeddings:
      # Some exports write a tied head out. It may be passed over only if it is
      # the embedding; else the file and its config.json contradict each other.
      if not files.equal(HEAD, EMBEDDING):
        raise UserError(
          f"{files.file(name)}: tensor {name} {files.shape(name)} differs from"
          f" {EMBEDDING} {files.shape(EMBEDDING)}, to which config.json ties"
          " it; set tie_word_embeddings to false to use it"
        )
      continue
    raise UserError(
      f"{files.file(name)}: tensor {name} {files.shape(name)} is not part of"
      f" the {config.architecture} of {config.num_layers} layers that"
      " config.json describes;"
      " use the config.json of this checkpoint"
    )


def _shape(entry: Entry, tree: Tree) -> tuple[int, ...]:
  """Returns the shape of an entry's tensor in the checkpoint."""
  shape = tuple(_get(tree, entry.path).shape)
  shape = shape if entry.layer is None else shape[1:]
  return shape[::-1] if entry.transposed else shape


def _place(
  files: TensorFiles,
  parts: Mapping[int | None, Entry],
  like: jax.ShapeDtypeStruct,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Reads a parameter part by part into its shards.

  Args:
    files: the checkpoint.
    parts: the parameter's entries by layer; by None where it isn't stacked.
    like: the parameter's shape and dtype.
    sharding: where it goes; None for the default device, uncommitted.
  """
  # Devices that hold the same part share one read of it.
  seen: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  # Only the slice that a device holds is read, so a host reads no more than its
  # devices hold.
  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    index = index or (slice(None),) * len(like.shape)
    bounds = tuple(
      part.indices(size)[:2]
      for part, size in zip(index, like.shape, strict=True)
    )
    if bounds not in seen:
      shape = tuple(stop - start for start, stop in bounds)
      seen[bounds] = out = np.empty(shape, like.dtype)
      if None in parts:
        out[...] = _slice(files, parts[None], bounds)
      else:
        # The checkpoint has a tensor a layer, the tree one array for all of
        # them: rows of the array are filled one by one, cast as they are
        # copied.
        for row, layer in enumerate(range(*bounds[0])):
          out[row] = _slice(files, parts[layer], bounds[1:])
    return seen[bounds]

  if sharding is None:
    return jnp.asarray(read(None))
  return jax.make_array_from_callback(like.shape, sharding, read)


def _slice(files: TensorFiles, entry: Entry, bounds) -> np.ndarray:
  """Reads a part of an entry's tensor, turned as the tree has it."""
  part = tuple(slice(start, stop) for start, stop in bounds)
  if entry.transposed:
    # The bounds are those of the tree's array, so they turn with it.
    return files.read(entry.name, part[::-1]).T
  return files.read(entry.name, part)


def save_hf(
  config: ModelConfig,
  base: Tree,
  folder: Path | str,
  *,
  tokenizer_from: Path | str | None = None,
  chat_template: Path | str | None = None,
  special_ids: Mapping[str, Any] | None = None,
  dtype: str = "bfloat16",
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a Hugging Face folder; it appears whole or not at all.

  A tied head is not written, an untied one always is.

  Args:
    config: the model's shape.
    base: the base's tree of arrays, `nnx.to_pure_dict(nnx.state(model))` of a
      model without adapters.
    folder: the folder to write; one that is there is replaced.
    tokenizer_from: a folder whose tokenizer, chat template and generation
      config are copied, and whose config.json gives the special tokens' ids.
    chat_template: a jinja file in the place of that folder's template.
    special_ids: fields of config.json such as `eos_token_id`.
    dtype: of the tensors, "float32" or "bfloat16".
    shard_bytes: largest file of weights, in bytes.

  Raises:
    ValueError: the tree isn't the config's: a parameter is missing, left
      over or of another shape.
  """
  like = nnx.to_pure_dict(
    nnx.state(jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
  )
  if wrong := sorted(_shapes(like) ^ _shapes(base)):
    raise ValueError(f"the tree doesn't fit the config at {wrong[0]}")
  # config.json also names the special tokens, at which generation stops. They
  # are no part of the model's shape, so they come from the source's file.
  fields = config.to_hf(dtype)
  if tokenizer_from is not None:
    fields |= token_ids(tokenizer_from)
  files = _plan(config, like, np.dtype(dtype).itemsize, shard_bytes)
  with atomic_folder(folder) as out:
    total, index = 0, {}
    for number, part in enumerate(files, 1):
      name = "model.safetensors"
      if len(files) > 1:
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
      # One file's tensors at a time are copied to the host.
      tensors = {e.name: _export(e, base, np.dtype(dtype)) for e in part}
      save_file(tensors, out / name, metadata={"format": "pt"})
      total += sum(x.nbytes for x in tensors.values())
      index.update(dict.fromkeys(tensors, name))
    if len(files) > 1:
      # Beside a single file readers expect no index.
      about = {"metadata": {"total_size": total}, "weight_map": index}
      write_json(out / "model.safetensors.index.json", about)
    if tokenizer_from is not None:
      copy_companions(tokenizer_from, out, chat_template)
    write_json(out / CONFIG, fields | dict(special_ids or {}))


def _plan(
  config: ModelConfig, like: Tree, itemsize: int, limit: int
) -> list[list[Entry]]:
  """Cuts the table into files of at most `limit` bytes, in its order.

  A tensor that is larger has a file of its own.
  """
  files: list[list[Entry]] = [[]]
  room = limit
  for entry in entries(config):
    size = itemsize * int(np.prod(_shape(entry, like)))
    if files[-1] and size > room:
      files.append([])
      room = limit
    files[-1].append(entry)
    room -= size
  return files


def _export(entry: Entry, base: Tree, dtype: np.dtype) -> np.ndarray:
  """Returns an entry's tensor on the host, as the checkpoint has it."""
  value = _get(base, entry.path)
  value = value if entry.layer is None else value[entry.layer]
  value = np.asarray(jax.device_get(value)).astype(dtype)
  # safetensors writes an array's memory as it lies, whatever its strides say.
  return np.ascontiguousarray(value.T if entry.transposed else value)


def _shapes(tree: Tree) -> set[tuple[Keys, tuple[int, ...]]]:
  """Returns path and shape of every array of a tree."""
  flat: dict[Any, Any] = flatten_dict(tree)
  return {(path, tuple(x.shape)) for path, x in flat.items()}


def _get(tree: Tree, path: Keys) -> Any:
  for part in path:
    tree = tree[part]
  return tree
