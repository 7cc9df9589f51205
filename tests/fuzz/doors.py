"""The doors through which others' texts and files come in.

A door takes an input and does with it what a stage does. It returns where the
input is accepted, and raises what it refuses with. Where something is known of
what is accepted, an assertion says so: nothing is taken silently for something
else.
"""

import atexit
import contextlib
import dataclasses
import decimal
import functools
import gzip
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2 as httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.fuzz import formulas
from tests.fuzz.values import (
  anything,
  as_json,
  damaged,
  mutated,
  numbers,
  texts,
)
from tests.support.chat_folders import TEMPLATE, small_tokenizer
from trd_jax.data.chat import Chat
from trd_jax.data.problems import (
  deepscaler,
  evalplus,
  jsonl,
  livecodebench,
  rows,
  taco,
  test_column,
)
from trd_jax.data.templates import Templates
from trd_jax.distill import processes
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import cli, config_file, experiment, records, shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.schema import Data, Distributed
from trd_jax.generation.engines import server_client, server_protocol
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.grading.code import code_tests, extract_code
from trd_jax.grading.math import grade_answer
from trd_jax.model.config import ModelConfig, rope_frequencies
from trd_jax.model.weights import finite_weights
from trd_jax.model.weights.peft import read_peft_config
from trd_jax.model.weights.tensor_files import INDEX, TensorFiles


@dataclasses.dataclass(frozen=True)
class Door:
  """A door.

  Attributes:
    inputs: what may come in.
    enter: takes an input and an empty folder.
    refusals: what it refuses with.
    share: of a run's inputs, in comparison with other doors'.
    found: inputs that it once failed at.
  """

  inputs: st.SearchStrategy
  enter: Callable[[Any, Path], object]
  refusals: tuple[type[Exception], ...] = (UserError,)
  share: float = 1.0
  found: tuple[Any, ...] = ()


def _written(folder: Path, name: str, content: bytes | str) -> Path:
  path = folder / name
  if isinstance(content, str):
    content = content.encode("utf-8", "surrogatepass")
  path.write_bytes(content)
  return path


def _same(one: Any, two: Any) -> bool:
  """Whether two values are equal and of one type."""
  return repr(one) == repr(two)


# Command lines and configs.

_KEYS = sorted(KEYS)


@st.composite
def _flags(draw):
  argv = []
  for _ in range(draw(st.integers(1, 3))):
    name = draw(st.sampled_from(_KEYS))
    value = draw(st.one_of(texts, numbers.map(str), anything.map(str)))
    spelt = draw(
      st.sampled_from(["--config.{}={}", "--config.{} {}", "-{}={}"])
    )
    argv += spelt.format(name, value).split(" ", 1)
  return [*argv, *draw(st.lists(texts, max_size=1))]


def _through_json(chosen: experiment.Experiment, folder: Path) -> None:
  path = _written(folder, "config.json", experiment.to_json(chosen))
  assert experiment.from_json(path) == chosen


def _enter_flags(argv: list[str], folder: Path) -> None:
  line = cli._CommandLine((), argv)
  for name, value in line.overrides.items():
    assert KEYS[name].check(value) == value
  _through_json(cli._experiment(line, None), folder)


_DEFAULTS = json.loads(experiment.to_json(experiment.Experiment()))


def _enter_config(value: Any, folder: Path) -> None:
  path = _written(folder, "mine.json", as_json(value))
  _through_json(experiment.from_config(*config_file.load(str(path))), folder)


_PYTHON = (
  "import",
  "def get_config(:",
  "def get_config(): return {}",
  "def get_config(arg): return arg",
  "def get_config(): 1 / 0",
  "def get_config(): raise SystemExit",
  "def get_config(): return get_config()",
  "get_config = 7",
  "raise SystemExit(3)",
  "from trd_jax.experiment.experiment import default_config\n"
  "def get_config(a=None):\n  c = default_config()\n  {}\n  return c",
)


@st.composite
def _config_files(draw):
  source = draw(st.sampled_from(_PYTHON))
  if "{}" in source and "default_config" in source:
    key, value = draw(st.sampled_from(_KEYS)), draw(anything)
    source = source.replace("{}", f"c.{key} = {value!r}")
  return source, draw(st.sampled_from(["", ":", ":a=1", ":\0"]))


def _enter_config_file(value: tuple[str, str], folder: Path) -> None:
  source, arg = value
  path = _written(folder, "mine.py", source)
  found = config_file.load(f"{path}{arg}")
  _through_json(experiment.from_config(*found), folder)


# Rows of data.

_ROWS = (
  {"problem": "1+1?", "answer": "2"},
  {"question": "a", "answer": "so\n#### 2", "solution": "b"},
  {"problem": "p", "tests": {"inputs": ["1\n"], "outputs": ["2\n"]}},
  {"problem": "p", "tests": [{"input": "1", "output": "2"}]},
  {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"a": 1}},
  {
    "messages": [
      {"role": "system", "content": "s"},
      {"role": "user", "content": "u"},
    ]
  },
  {"problem": "p", "answer": 3, "domain": "arithmetic", "extra": 1.5},
)
_rows = st.lists(mutated(*_ROWS) | anything, min_size=1, max_size=4)


def _lines(some: list[Any]) -> bytes:
  return b"\n".join(map(as_json, some))


_row_files = st.one_of(
  st.tuples(st.just("rows.jsonl"), damaged(_rows.map(_lines))),
  st.tuples(st.just("rows.json"), damaged(_rows.map(as_json))),
  st.tuples(
    st.just("rows.jsonl.gz"),
    damaged(_rows.map(_lines).map(lambda x: gzip.compress(x, mtime=0))),
  ),
)


def _stated(row: Any) -> Any:
  """A row's statement, as it stands in the file."""
  if not isinstance(row, dict):
    return None
  found = rows.column(row, rows.PROBLEM_KEYS)
  turns = row.get("messages") or row.get("prompt")
  if found is None and isinstance(turns, list) and turns:
    found = turns[-1].get("content") if isinstance(turns[-1], dict) else None
  return found


def _enter_rows(value: tuple[str, bytes], folder: Path) -> None:
  name, content = value
  path = _written(folder, name, content)
  problems, rejected = jsonl.load(Data(source="jsonl", root=str(path)))
  assert all(isinstance(one.reason, str) for one in rejected)
  found = [row for _, row in rows.read(path)]
  assert len(problems) + len(rejected) == len(found)
  stated = [
    text.strip() for row in found if isinstance(text := _stated(row), str)
  ]
  assert all(one.text in stated for one in problems)
  records.to_table([*problems], records.Problem)


_KNOWN_ROWS = {
  "taco": (
    {
      "question": "q",
      "input_output": '{"inputs": ["1"], "outputs": ["2"]}',
      "solutions": '["print(2)"]',
      "starter_code": "",
      "difficulty": "EASY",
    },
  ),
  "deepscaler": (
    {"problem": "1+1?", "answer": "2", "solution": "It is 2, as 1+1=2."},
  ),
  "livecodebench": (
    {
      "question_content": "q",
      "question_id": "a",
      "public_test_cases": '[{"input": "1", "output": "2"}]',
      "private_test_cases": "[]",
      "metadata": "{}",
      "starter_code": "",
    },
    {"content": "c", "test": "[]", "labels": '{"task_id": 1}', "id": 1},
    {"problem": "p", "tests": "[]", "starter_code": "def f():"},
  ),
  "humanevalplus": (
    {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f"},
  ),
}


@st.composite
def _known_rows(draw):
  name = draw(st.sampled_from(sorted(_KNOWN_ROWS)))
  rows_of = st.lists(mutated(*_KNOWN_ROWS[name]), min_size=1, max_size=3)
  return name, draw(rows_of)


def _enter_known_rows(value: tuple[str, list[Any]], folder: Path) -> None:
  name, some = value
  path = _written(folder, "rows.jsonl", _lines(some))
  data = Data(source=name, root=str(path))
  if name == "taco":
    taco.load(data, graded=False)
    problems, rejected = taco.load(data)
  elif name == "deepscaler":
    problems, rejected = deepscaler.load(data)
  else:
    reader = livecodebench if name == "livecodebench" else evalplus
    build = functools.partial(reader.problem, name=name)
    problems, rejected = rows.collect(name, [path], build)
  assert len(problems) + len(rejected) == len(some)
  records.to_table([*problems], records.Problem)


_ARROW = {
  pa.string(): st.text(max_size=5),
  pa.large_string(): st.text(max_size=5),
  pa.binary(): st.binary(max_size=4),
  pa.large_binary(): st.binary(max_size=4),
  pa.binary(2): st.binary(min_size=2, max_size=2),
  pa.int64(): st.integers(-(2**63), 2**63 - 1),
  pa.uint64(): st.integers(0, 2**64 - 1),
  pa.float64(): st.floats(),
  pa.float16(): st.floats(width=16),
  pa.bool_(): st.booleans(),
  pa.null(): st.none(),
  pa.date32(): st.dates(),
  pa.date64(): st.dates(),
  pa.time64("ns"): st.integers(0, 86_399_999_999_999),
  pa.timestamp("ns"): st.integers(-(2**62), 2**62),
  pa.timestamp("s"): st.integers(-(2**62), 2**62),
  pa.timestamp("us", "Europe/Berlin"): st.integers(-(2**50), 2**50),
  pa.duration("ns"): st.integers(-(2**62), 2**62),
  pa.duration("s"): st.integers(-(2**62), 2**62),
  pa.decimal128(38, 10): st.decimals(-(10**9), 10**9, places=10),
  pa.decimal256(76, 0): st.integers(-(10**70), 10**70).map(decimal.Decimal),
  pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["a", "b"]),
}


@st.composite
def _columns(draw):
  size = draw(st.integers(1, 3))
  columns = {}
  for name in draw(
    st.sets(
      st.sampled_from(
        ["problem", "answer", "solution", "tests", "domain", "x", "messages"]
      ),
      min_size=1,
    )
  ):
    kind = draw(st.sampled_from(list(_ARROW)))
    one = st.none() | _ARROW[kind]
    shape = draw(st.sampled_from(["plain", "plain", "list", "struct", "map"]))
    if shape == "list":
      kind, one = pa.list_(kind), st.lists(one, max_size=2)
    elif shape == "struct":
      kind = pa.struct([("inputs", kind), ("outputs", kind)])
      one = st.fixed_dictionaries({"inputs": one, "outputs": one})
    elif shape == "map":
      kind = pa.map_(pa.string(), kind)
      one = st.lists(st.tuples(st.text(max_size=2), one), max_size=2)
    values = draw(st.lists(one, min_size=size, max_size=size))
    try:
      columns[name] = pa.array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
      columns[name] = pa.nulls(size, kind)
  return draw(st.sampled_from(["parquet", "arrow"])), pa.table(columns)


def _enter_columns(value: tuple[str, pa.Table], folder: Path) -> None:
  suffix, table = value
  path = folder / f"rows.{suffix}"
  if suffix == "parquet":
    try:
      pq.write_table(table, path)
    except (pa.ArrowException, NotImplementedError):
      return  # nobody can have such a file
  else:
    with pa.ipc.new_stream(path, table.schema) as writer:
      writer.write_table(table)
  problems, rejected = jsonl.load(Data(source="jsonl", root=str(path)))
  assert len(problems) + len(rejected) == len(table)
  for problem in problems:
    json.loads(problem.meta, parse_constant=lambda x: 1 / 0)
  records.to_table([*problems], records.Problem)


def _enter_tests(value: Any, folder: Path) -> None:
  text = test_column.to_text(value)
  if text is not None:
    code_tests.parse(text, {})


# Chat templates, prompt templates, tokenizers.

_WORDS = (
  *("{{ ", " }}", "{% ", " %}", "{%- ", "{# ", " #}", "for m in messages"),
  *("endfor", "if", "endif", "set x =", "macro f(x)", "endmacro", "f(1)"),
  *("m.role", "m['content']", "messages[0]", "messages", "loop.index", "|trim"),
  *("|length", "|tojson", "~", "*", "10**10", "range(99999)", "'a'", "9", "("),
  *(")", "[", "]", "namespace(a=1)", "raise_exception('no')", "break", "x"),
  *(
    "bos_token",
    "eos_token",
    "enable_thinking",
    "is defined",
    "strftime_now(1)",
  ),
  *(
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "\n",
    "generation",
    "endgeneration",
  ),
  *("include 'x'", "self.__class__", "import 'x' as x", "block a", "endblock"),
)
_snippets = st.lists(st.sampled_from(_WORDS) | texts, max_size=8).map(" ".join)
_STATEMENTS = (
  "{% for i in range(99999) %}{% for j in range(99999) %}"
  "{% endfor %}{% endfor %}",
  "{{ 'a' * 10**10 }}",
  "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
  "{% set x = messages|map(attribute='content')|join|center(10**9) %}",
  "{{ messages|tojson }}",
  "{% if messages[0].role != 'user' %}{{ raise_exception('no\nno') }}"
  "{% endif %}",
)


@st.composite
def _chat_templates(draw):
  snippet = draw(_snippets | st.sampled_from(_STATEMENTS))
  at = draw(st.integers(0, len(TEMPLATE)))
  how = draw(st.sampled_from(["before", "alone", "inside", "cut"]))
  return {
    "before": snippet + TEMPLATE,
    "alone": snippet + "{{ messages[-1].content }}",
    "inside": TEMPLATE[:at] + snippet + TEMPLATE[at:],
    "cut": TEMPLATE[:at],
  }[how]


_tokenizer = functools.cache(small_tokenizer)


def _chat(template: str) -> Chat:
  return Chat(
    _tokenizer(),
    template,
    name="model",
    special={"eos_token": "<|im_end|>"},
    stop_ids=[1],
    pad_id=0,
    template_name="mine.jinja",
  )


def _enter_chat_template(template: str, folder: Path) -> None:
  chat = _chat(template)
  message = "What is 1 + 2?"
  assert message in chat._text(chat.render(message, None))


@st.composite
def _prompt_templates(draw):
  role = draw(
    st.sampled_from(["initial", "privileged", "refinement", "system"])
  )
  words = [
    "{{ problem }}",
    "{{ draft }}",
    "{{ privileged }}",
    "{% if reference %}",
  ]
  words += [
    "{% endif %}",
    "{{ reference }}",
    "{{ problem * 10**7 }}",
    "{{ draft|trim }}",
  ]
  parts = st.lists(st.sampled_from(words) | _snippets, max_size=6)
  return role, "\n".join(draw(parts))


def _enter_prompt_template(value: tuple[str, str], folder: Path) -> None:
  role, text = value
  _written(folder, f"{role}_math.jinja", text)
  templates = Templates.load(str(folder), "v1")
  fields = {"problem": "qq<|im_end|>qq", "privileged": "rr"}
  if role == "refinement":
    around = templates.around_draft("math", **fields)
    assert fields["problem"] in "".join(around)
  elif role != "system":
    del fields["privileged" if role == "initial" else "problem"]
    fields.setdefault("problem", "p")
    message = templates.message(role, "math", **fields)
    assert all(text in message for text in fields.values())


_TOKENIZER_CONFIG = {
  "eos_token": "<|im_end|>",
  "pad_token": {"content": "<|endoftext|>"},
  "chat_template": TEMPLATE,
}


@functools.cache
def _tokenizer_json() -> dict:
  fields = json.loads(small_tokenizer(8).to_str())
  return fields


@st.composite
def _tokenizer_folders(draw):
  files = {
    "tokenizer.json": as_json(_tokenizer_json()),
    "tokenizer_config.json": as_json(_TOKENIZER_CONFIG),
    "generation_config.json": as_json({"eos_token_id": [1, 2]}),
  }
  name = draw(st.sampled_from(sorted(files)))
  base = {
    "tokenizer.json": _tokenizer_json(),
    "tokenizer_config.json": {
      **_TOKENIZER_CONFIG,
      "chat_template": [{"name": "default", "template": TEMPLATE}],
    },
    "generation_config.json": {"eos_token_id": [1, 2]},
  }[name]
  new = mutated(base).map(as_json) | anything.map(as_json)
  files[name] = draw(new | damaged(st.just(files[name])))
  return files


def _enter_tokenizer(files: dict[str, bytes], folder: Path) -> None:
  for name, content in files.items():
    _written(folder, name, content)
  chat = Chat.load(folder)
  chat.onset_ids()
  ids = chat.render("Start at 3", None)
  assert max(ids, default=0) < chat.vocab_size
  assert all(i < chat.vocab_size for i in (*chat.stop_ids, chat.pad_id))
  chat.decode(ids)


# Models: shapes, weights, adapters.

_LLAMA = {
  **ModelConfig(
    64, 32, 48, 2, 4, 2, 12, architecture="LlamaForCausalLM"
  ).to_hf(),
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
}
_MODELS = (
  ModelConfig(64, 32, 48, 2, 4, 2, 12).to_hf(),
  ModelConfig(64, 32, 48, 2, 4, 2, 12).to_hf()
  | {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}},
  _LLAMA,
)


def _enter_model(fields: dict, folder: Path) -> None:
  config = ModelConfig.from_hf(fields)
  assert ModelConfig.from_hf(config.to_hf()) == config
  assert _same(config.vocab_size, fields["vocab_size"])
  frequencies, factor = rope_frequencies(config)
  assert all(map(math.isfinite, (*frequencies, factor)))
  assert 0 < config.num_parameters() < 2**60


def _tensors(header: Any, data: bytes = bytes(64)) -> bytes:
  text = header if isinstance(header, bytes) else as_json(header)
  return struct.pack("<Q", len(text)) + text + data


_HEADER = {
  "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
  "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
  "__metadata__": {"format": "pt"},
}


@st.composite
def _tensor_folders(draw):
  whole = _tensors(_HEADER)
  content = draw(
    damaged(st.just(whole))
    | mutated(_HEADER).map(_tensors)
    | st.binary(max_size=40)
  )
  if draw(st.booleans()):
    return {"model.safetensors": content}
  index = {
    "metadata": {},
    "weight_map": {"a": "x.safetensors", "b": "x.safetensors"},
  }
  odd = [
    ["x.safetensors"],
    "../x.safetensors",
    "/etc/passwd",
    "",
    "\0",
    ".",
    "y",
    7,
  ]
  values = st.sampled_from(odd) | anything
  return {
    INDEX: draw(
      mutated(index, values=values).map(as_json)
      | damaged(st.just(as_json(index)))
    ),
    "x.safetensors": draw(st.sampled_from([whole, content])),
  }


def _enter_tensors(files: dict[str, bytes], folder: Path) -> None:
  for name, content in files.items():
    _written(folder, name, content)
  finite_weights.check_folder(folder)
  opened = TensorFiles(folder)
  opened.dtypes()
  for name in opened:
    assert opened.file(name).parent == folder
    assert opened.read(name).shape == opened.shape(name)


_ADAPTER = {
  "peft_type": "LORA",
  "task_type": "CAUSAL_LM",
  "base_model_name_or_path": "x",
  "r": 8,
  "lora_alpha": 16,
  "lora_dropout": 0.05,
  "target_modules": ["q_proj", "v_proj"],
  "inference_mode": True,
  "init_lora_weights": True,
  "bias": "none",
  "use_dora": False,
}


def _enter_adapter(fields: dict, folder: Path) -> None:
  _written(folder, "adapter_config.json", as_json(fields))
  lora, _ = read_peft_config(folder)
  assert lora.rank == fields["r"] >= 1
  assert lora.alpha == fields["lora_alpha"] > 0
  assert 0 <= lora.dropout < 1
  assert math.isfinite(lora.scale)


# Servers.

_REQUEST = Request("k", (1, 2, 3), 0, 4)
_ANSWER = {
  "choices": [
    {
      "finish_reason": "stop",
      "token_ids": [4, 9],
      "prompt_token_ids": [1, 2, 3],
      "logprobs": {
        "top_logprobs": [
          {"token_id:4": -0.1, "token_id:5": -3.0},
          {"token_id:9": -0.1, "token_id:5": -3.0},
        ]
      },
    }
  ]
}


def _enter_answer(answer: Any, folder: Path) -> None:
  sampling = Sampling(0.6, 0.95, 20, (9,), vocab_size=12, top_logprobs=2)
  found = server_protocol.completion(
    _REQUEST, sampling, answer, "http://x", limit=4, head_rows=16
  )
  choice = answer["choices"][0]
  assert _same(list(found.ids), choice["token_ids"])
  assert found.top is not None
  assert found.top.ids.shape == (len(found.ids), 2)


_CARD = {"id": "m", "root": "/x", "parent": None, "max_model_len": 99}


def _enter_card(card: Any, folder: Path) -> None:
  found = server_client._card(card)
  assert found["id"] == card["id"]
  wanted = server_client.Wanted(
    None, frozenset({"m"}), folder, None, "a", 9, 9, 9
  )
  wanted.is_served_as(found)


@st.composite
def _urls(draw):
  host = draw(
    st.sampled_from(["x", "[::1]", "[", "127.0.0.1", "a@b", "é", ""]) | texts
  )
  port = draw(st.sampled_from(["", ":8000", ":0", ":-1", ":99999", ":x"]))
  path = draw(st.sampled_from(["", "/v1", "/v1/", "/a?b", "#c", "/\n"]))
  retry = draw(
    texts | st.sampled_from(["Wed, 21 Oct 2015 07:28:00 GMT", "1" * 99])
  )
  return draw(
    st.sampled_from(["http://", "https://", "", "ftp://"])
  ) + host + port + path, retry


def _enter_url(value: tuple[str, str], folder: Path) -> None:
  url, retry = value
  header = (
    retry.encode("ascii", "ignore").decode().replace("\n", "").replace("\0", "")
  )
  server_client._retry_after(
    httpx.Response(429, headers={"Retry-After": header})
  )
  address = server_client._address(url)
  server_client._is_loopback(address)
  assert address.startswith(("http://", "https://"))
  assert not address.endswith(("/", "/v1"))


# What models write.

_LATEX = (
  *(
    "\\boxed{",
    "}",
    "\\frac",
    "{1}{2}",
    "\\sqrt",
    "[3]{x}",
    "^",
    "_",
    "$",
    "$$",
  ),
  *("\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\left(", "\\right)"),
  *("\\text{", "1,000", "10^{10^{10}}", "9**9**9", "\\pi", "x=", "3.5\\%", "|"),
  *(
    "\\infty",
    "\\cup",
    "(1,2]",
    "\\{",
    "\\}",
    "!",
    "2^{1000000}",
    "1e999",
    "-",
  ),
  *(
    "Answer: ",
    "</think>",
    "\\pm",
    "\\sum_{i=1}^{10^9} i",
    "i",
    "°",
    "½",
    "\n",
  ),
)
_formulas = st.lists(st.sampled_from(_LATEX) | texts, max_size=10).map("".join)
_completions = st.one_of(
  _formulas,
  _formulas.map(lambda text: f"So \\boxed{{{text}}}."),
  st.sampled_from(
    ["\\boxed{" * 3000, "{" * 9999, "\\frac" * 5000, "(" * 9999, "$" * 9999]
  ),
)


def _enter_answers(value: tuple[str, str], folder: Path) -> None:
  completion, gold = value
  prepared = grade_answer.prepare(completion, gold)
  if prepared.question is None:
    assert prepared.correct in (True, False, None)


# Two answers, and whether they differ, where that is known.
_pairs = st.one_of(
  formulas.answers(), st.tuples(_formulas, _formulas, st.none())
)


def _enter_algebra(value: tuple[str, str, bool | None], folder: Path) -> None:
  gold, answer, differ = value
  prepared = grade_answer.prepare(f"So \\boxed{{{answer}}}.", gold)
  assert prepared.detail is None, prepared.detail
  correct, reason = prepared.correct, prepared.reason
  if prepared.question is not None:
    correct, reason = grade_answer.decide(*prepared.question)
  assert correct == (reason == "match")
  assert not (correct and differ), f"{answer} is taken for {gold}"
  # It may be unparsed, but is no other value.
  assert reason != "mismatch" or differ is not False, f"{answer} is {gold}"
  if not correct:
    raise UserError("refused")


_CODE = (
  *(
    "```",
    "```python\n",
    "```py\n",
    "~~~",
    "````",
    "\n",
    "  ",
    "\t",
    "print(1)",
  ),
  *("</think>", "def f():\n", "```cpp\n", "`", "\r\n", "# ", "\x0c", "- "),
)
_programs = st.one_of(
  st.lists(st.sampled_from(_CODE) | texts, max_size=12).map("".join),
  st.sampled_from(
    [
      "`" * 50_000,
      "```\n" * 9999,
      "~" * 50_000,
      " ```" * 9999,
      "```python\n" + "x`" * 20_000,
    ]
  ),
)


def _enter_program(completion: str, folder: Path) -> None:
  program = extract_code.last_program(completion)
  assert program is None or program.strip()


# What stages have written, and the environment.


@functools.cache
def _shard() -> bytes:
  problem = records.Problem("a", "p", "2", None, "math", "jsonl", None, "{}")
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "shard-1.parquet"
    shards.write_table(path, records.to_table([problem] * 3))
    return path.read_bytes()


_shards = st.one_of(
  damaged(st.builds(_shard)), _columns().map(lambda found: found[1])
)


def _enter_shard(value: bytes | pa.Table, folder: Path) -> None:
  path = folder / "shard-1.parquet"
  if isinstance(value, bytes):
    path.write_bytes(value)
  else:
    try:
      pq.write_table(value, path)
    except (pa.ArrowException, NotImplementedError):
      return
  table = shards.read_shards(folder, records.Problem)
  records.from_table(records.Problem, table)
  shards.read_keys(folder)


_TREE = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.ones(3)}, "n": 7}


@functools.cache
def _checkpoint() -> tuple[Path, list[Path]]:
  """A folder with one checkpoint, and its files."""
  folder = Path(tempfile.mkdtemp(prefix="trd-fuzz-"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  saved = Checkpoints(folder / "saved", 2)
  saved.save(1, _TREE)
  saved.wait()
  root = folder / "saved" / "1"
  return root.parent, sorted(p for p in root.rglob("*") if p.is_file())


@st.composite
def _checkpoints(draw):
  root, files = _checkpoint()
  path = draw(st.sampled_from(files))
  content = path.read_bytes()
  new = damaged(st.just(content))
  if content[:1] == b"{":
    with contextlib.suppress(ValueError):  # some begin so and are binary
      new |= mutated(json.loads(content)).map(as_json)
  return str(path.relative_to(root)), draw(new)


def _enter_checkpoint(value: tuple[str, bytes], folder: Path) -> None:
  name, content = value
  shutil.copytree(_checkpoint()[0], folder / "saved")
  (folder / "saved" / name).write_bytes(content)
  step, tree = Checkpoints(folder / "saved", 2).restore(_TREE)
  assert step == 1
  assert tree["n"] == 7
  np.testing.assert_array_equal(tree["a"], _TREE["a"])
  np.testing.assert_array_equal(tree["b"]["c"], _TREE["b"]["c"])


_numbers_typed = st.one_of(
  texts,
  st.integers(-2, 9).map(str),
  st.sampled_from(["²", "1(x2)", "٣", "1e3"]),
)
_environments = st.fixed_dictionaries(
  {},
  optional={
    "TRD_COORDINATOR": texts | st.sampled_from(["h:1", ":1", "h:", "h:²"]),
    "TRD_PROCESSES": _numbers_typed,
    "TRD_PROCESS": _numbers_typed,
    "SLURM_STEP_TASKS_PER_NODE": _numbers_typed,
    "SLURM_STEP_NUM_TASKS": _numbers_typed,
    "VLLM_API_KEY": texts,
  },
).map(
  lambda found: {
    k: v.encode("utf-8", "surrogatepass")
    .replace(b"\0", b"")
    .decode("utf-8", "surrogateescape")
    for k, v in found.items()
  }
)


def _enter_environment(variables: dict[str, str], folder: Path) -> None:
  with mock.patch.dict(os.environ, variables):
    server_client._api_key("VLLM_API_KEY")
    processes.idle_gpus(1, os.environ, folder)
    processes.tasks_of_slurm()
    found = processes.coordinates(Distributed())
  if found is not None:
    assert found[1] > found[2] >= 0


DOORS = {
  "command line": Door(_flags(), _enter_flags, share=2),
  "config.json of a run": Door(
    mutated(_DEFAULTS) | anything, _enter_config, share=2
  ),
  "config file in Python": Door(_config_files(), _enter_config_file, share=0.5),
  "rows of JSON": Door(_row_files, _enter_rows, share=2),
  "rows of parquet and arrow": Door(_columns(), _enter_columns, share=2),
  "rows of known data sets": Door(
    _known_rows(),
    _enter_known_rows,
    found=(
      (
        "livecodebench",
        [{**_KNOWN_ROWS["livecodebench"][2], "starter_code": 7}],
      ),
      ("taco", [{**_KNOWN_ROWS["taco"][0], "solutions": 7}]),
    ),
  ),
  "tests of programs": Door(
    mutated(*(row["tests"] for row in _ROWS if "tests" in row)) | anything,
    _enter_tests,
    (rows.BadRow, code_tests.BadTests),
  ),
  "chat template": Door(
    _chat_templates(),
    _enter_chat_template,
    share=0.5,
    found=("\ud800" + TEMPLATE, "{{ 'a' * 10**10 }}" + TEMPLATE),
  ),
  "prompt template": Door(
    _prompt_templates(), _enter_prompt_template, share=0.5
  ),
  "tokenizer's files": Door(_tokenizer_folders(), _enter_tokenizer),
  "config.json of a model": Door(mutated(*_MODELS), _enter_model, share=2),
  "safetensors and index": Door(
    _tensor_folders(),
    _enter_tensors,
    share=2,
    found=tuple(
      {"model.safetensors": _tensors({"a": entry})}
      for entry in (
        7,
        {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [64]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, math.inf]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]},
      )
    ),
  ),
  "adapter_config.json": Door(
    mutated(_ADAPTER),
    _enter_adapter,
    found=(_ADAPTER | {"lora_dropout": 2**31 - 1},),
  ),
  "server's completion": Door(
    mutated(_ANSWER) | anything,
    _enter_answer,
    (UserError, server_protocol.Failed),
    share=2,
  ),
  "server's list of models": Door(
    mutated(_CARD) | anything,
    _enter_card,
    (AttributeError, KeyError, TypeError),  # which `_card` declares
  ),
  "server's address": Door(_urls(), _enter_url),
  "answer to a question": Door(
    st.tuples(_completions, _formulas), _enter_answers
  ),
  "algebra of an answer": Door(
    _pairs,
    _enter_algebra,
    share=2,
    found=(
      (r"\{3!, 3!\}", r"\{3!, 6\}", False),
      (r"e^{e^{10+\frac{16}{11}}}", r"e^{e^{\frac{16}{11}+10}}", None),
      (r"e^{e^{10+\frac{16}{11}}}", r"e^{e^{10+\frac{15}{11}}}", True),
    ),
  ),
  "program in an answer": Door(_programs, _enter_program),
  "stored rows": Door(_shards, _enter_shard),
  "checkpoint": Door(
    _checkpoints(),
    _enter_checkpoint,
    share=0.2,
    found=(("1/_CHECKPOINT_METADATA", b'{"item_handlers": -3.5}'),),
  ),
  "environment": Door(_environments, _enter_environment, share=0.5),
}
