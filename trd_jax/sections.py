"""The sections of an experiment: every key, its default, meaning and rule.

Lengths are in tokens. `experiment.py` puts the sections together and makes
the checks that concern more than one key. The sections of the evaluation and
of the interpreters are in `run_sections.py`.
"""

import dataclasses
from dataclasses import field

from trd_jax import keys
from trd_jax.keys import above, at_least, key, one_of, within


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model and how it is spoken to."""

  path: str = key(
    "lab:student",
    "lab:student, lab:teacher, a Hugging Face folder, a hub id, or "
    "random:<size>",
    keys.filled(),
  )
  revision: str | None = key(None, "the hub id's commit, tag or branch")
  tokenizer: str | None = key(
    None, "folder or hub id of the tokenizer; None: the model itself"
  )
  chat_template: str | None = key(
    None, "file of a Jinja chat template; None: the tokenizer's own"
  )
  thinking: bool | None = key(
    None, "the template's thinking switch; None: it has none, or its default"
  )
  dtype: str = key(
    "float32", "type of the frozen weights", one_of("float32", "bfloat16")
  )

  @property
  def tokenizer_path(self) -> str:
    """Where the tokenizer comes from."""
    return self.tokenizer or self.path


@dataclasses.dataclass(frozen=True)
class Teacher(Model):
  """The teacher; of these OPSD reads `thinking` only (see `Experiment`)."""

  path: str = key(
    "lab:teacher", "as student.path; read in OPD only", keys.filled()
  )


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """The laboratory's problems."""

  num_problems: int = key(512, "how many to make", at_least(1))
  split: str = key(
    "train",
    "train or train_hard; heldout and hard are benchmarks",
    keys.filled(),
  )
  min_steps: int | None = key(
    None, "fewest steps of a chain; None: the split's own", at_least(1)
  )
  max_steps: int | None = key(
    None, "most steps of a chain; None: the split's own", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class Data:
  """The problems to train on."""

  source: str = key(
    "arithmetic",
    "arithmetic, deepscaler, taco, jsonl, or a benchmark",
    keys.filled(),
  )
  root: str | None = key(
    None, "local file or folder of the source; None: download it"
  )
  limit: int | None = key(None, "use only so many problems", at_least(1))
  seed: int = key(0, "seed of the problems and their order", at_least(0))
  subset: str = key("all", "a named part of the source", keys.filled())
  arithmetic: Arithmetic = field(default_factory=Arithmetic)


@dataclasses.dataclass(frozen=True)
class Generation:
  """What every stage that samples has a say in."""

  temperature: float = key(0.6, "0 is greedy", at_least(0))
  top_p: float = key(
    0.95,
    "nucleus mass",
    keys.Rule("above 0 and at most 1", lambda mass: 0 < mass <= 1),
  )
  top_k: int = key(20, "-1: off", keys.minus_one_or_positive())
  max_prompt_tokens: int = key(
    4096, "a longer prompt is set aside", at_least(1)
  )
  max_response_tokens: int = key(
    16384, "a longer response is cut and marked as truncated", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class Rollout(Generation):
  """Stage 1: the student's raw answers y_o."""

  samples: int = key(1, "answers a problem", at_least(1))


@dataclasses.dataclass(frozen=True)
class Refine(Generation):
  """Stage 2: the teacher's rewriting of y_o into y_r."""

  max_prompt_tokens: int = key(
    18432, "a longer prompt overflows: see refine.overflow", at_least(1)
  )
  thinking: bool | None = key(
    False, "the template's thinking switch while refining"
  )
  overflow: str = key(
    "trim_middle",
    "an over-long draft loses its middle, or its sample is dropped",
    one_of("trim_middle", "drop"),
  )
  draft_think: str = key(
    "keep_text",
    "the draft's thinking marks: kept as plain text, or left out",
    one_of("keep_text", "strip"),
  )
  teacher_top_k: int = key(
    0,
    "keep the teacher's so many likeliest tokens at each position; 0: none",
    within(0, 1024),
  )


@dataclasses.dataclass(frozen=True)
class JaxEngine:
  """The embedded engine."""

  slots: int | None = key(
    None,
    "sequences decoded at once; None: 64 to 128 a CPU device, 256 an"
    " accelerator",
    at_least(1),
  )
  decode_steps: int = key(
    16, "tokens decoded between two looks at what has ended", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class VllmEngine:
  """vLLM in the stage's own process."""

  tensor_parallel: int = key(1, "devices that share each layer", at_least(1))
  data_parallel: int = key(
    1, "copies of the model, each on devices of its own", at_least(1)
  )
  max_num_seqs: int | None = key(
    None, "sequences decoded at once, a copy; None: vLLM's own", at_least(1)
  )
  max_batched_tokens: int | None = key(
    None, "tokens of one step, a copy; None: vLLM's own", at_least(1)
  )
  max_model_tokens: int | None = key(
    None, "longest prompt with its response; None: what is asked", at_least(2)
  )
  memory_share: float = key(
    0.9, "share of a GPU's memory that vLLM may take", within(0.01, 1)
  )
  kv_cache_gib: float | None = key(
    None, "KV cache of a copy; None: what memory_share leaves", above(0)
  )
  prefix_caching: bool = key(True, "keep the KV cache of shared prefixes")
  chunked_prefill: bool = key(
    True, "mix prefill and decoding in one step (on GPUs)"
  )
  eager: bool | None = key(
    None, "neither compile nor capture, to start sooner; None: on CPUs"
  )


@dataclasses.dataclass(frozen=True)
class ServerEngine:
  """OpenAI-compatible servers, such as `vllm serve`."""

  urls: tuple[str, ...] = key(
    (), "their base addresses, as http://127.0.0.1:8000, separated by commas"
  )
  model: str | None = key(
    None,
    "the name that a server knows the model by; None: found by its folder",
  )
  concurrency: int = key(256, "requests in flight at a server", at_least(1))
  retries: int = key(
    8, "further tries of a request, each after a longer pause", at_least(0)
  )
  start_seconds: float = key(
    600.0,
    "how long to wait until a server is ready, and, once none is left, until "
    "one is back",
    above(0),
  )
  request_seconds: float = key(
    3600.0, "how long a server may take over a request", above(0)
  )
  api_key_variable: str = key(
    "VLLM_API_KEY",
    "environment variable that holds the API key, if servers want one",
    keys.filled(),
  )


@dataclasses.dataclass(frozen=True)
class Ray:
  """The same engine in many processes and machines, under Ray Data."""

  actors: int = key(0, "engines at work at once; 0: no Ray", at_least(0))
  address: str | None = key(
    None, "of a running cluster, or auto; None: this machine alone"
  )
  cpus: float = key(1.0, "CPUs that an actor reserves", at_least(0))
  gpus: float | None = key(
    None,
    "GPUs that an actor reserves; None: as many as its engine needs",
    at_least(0),
  )
  batch: int = key(256, "requests that an actor is given at once", at_least(1))
  batches: int = key(
    2, "batches that an actor works on at once, where it can", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class Engine:
  """What generates."""

  name: str = key(
    "jax",
    "embedded, vLLM in process, or servers",
    one_of("jax", "vllm", "server"),
  )
  weights: str = key(
    "merged",
    "the trained student's form: merged, or the base with its adapter",
    one_of("merged", "adapter"),
  )
  jax: JaxEngine = field(default_factory=JaxEngine)
  vllm: VllmEngine = field(default_factory=VllmEngine)
  server: ServerEngine = field(default_factory=ServerEngine)
  ray: Ray = field(default_factory=Ray)


@dataclasses.dataclass(frozen=True)
class Train:
  """Stage 3: distillation into the adapter."""

  batch_size: int = key(128, "trajectories an update", at_least(1))
  epochs: int = key(1, "passes over the trajectories", at_least(1))
  learning_rate: float = key(5e-6, "peak", above(0))
  warmup_ratio: float = key(0.1, "share of the updates", within(0, 1))
  final_lr_ratio: float = key(
    0.1, "the cosine ends at this share of the peak", within(0, 1)
  )
  weight_decay: float = key(0.005, "decoupled (AdamW)", at_least(0))
  beta1: float = key(0.9, "AdamW", keys.fraction_below_one())
  beta2: float = key(0.999, "AdamW", keys.fraction_below_one())
  eps: float = key(1e-8, "AdamW", above(0))
  grad_clip: float = key(1.0, "largest global norm", above(0))
  max_student_tokens: int = key(
    18432, "prompt and response; a longer sample is dropped", at_least(2)
  )
  max_teacher_tokens: int = key(
    34816, "prompt and response; a longer sample is dropped", at_least(2)
  )
  pack_tokens: int | None = key(
    None,
    "row length of a student pack, doubled for samples that do not fit; "
    "without packing the shortest row length; None: automatic",
    at_least(2),
  )
  teacher_pack_tokens: int | None = key(
    None, "as pack_tokens, for the teacher", at_least(2)
  )
  rows_per_device: int = key(1, "rows of a pack on a device", at_least(1))
  packing: bool | None = key(
    None,
    "several samples a row; False: one, in about ten row lengths a side; None: "
    "as the attention can",
  )
  attention: str = key(
    "auto",
    "what computes it; auto: cudnn on GPUs in bfloat16 unless train.packing is "
    "True, else xla",
    one_of("auto", "xla", "cudnn", "tokamax"),
  )
  truncated: str = key(
    "drop", "trajectories that a budget ended", one_of("drop", "keep")
  )
  subset: str = key(
    "all",
    "trajectories to train on, by verdict",
    one_of("all", "fail", "succ", "fail_to_succ"),
  )
  remat: str = key(
    "full",
    "what a backward pass computes again",
    one_of("full", "none", "dots", "attention"),
  )
  checkpoint_every: int = key(50, "updates", at_least(1))
  keep_checkpoints: int = key(2, "newest ones that stay", at_least(1))
  max_steps: int | None = key(
    None, "end after so many updates; None: after the epochs", at_least(1)
  )
  log_every: int = key(1, "updates between rows of metrics", at_least(1))


@dataclasses.dataclass(frozen=True)
class Loss:
  """The divergence; `Experiment.method` chooses it."""

  temperature: float = key(
    1.0, "of the softmax; not the sampling temperature", above(0)
  )
  chunk_tokens: int | None = key(
    512,
    "response tokens whose logits exist at once; None: automatic, by widths, "
    "dtype and platform",
    at_least(1),
  )
  clip: float | None = key(
    None,
    "largest divergence of a token, in nats; None: the method's own",
    above(0),
  )
  top_k: int = key(
    32, "teacher's top tokens that reverse_kl_topk compares", at_least(0)
  )
  beta: float = key(0.5, "jsd's weight of the teacher", within(0, 1))
  tip_entropy: float = key(
    1.0, "tip's weight of the student's entropy", at_least(0)
  )
  tip_divergence: float = key(
    1.0, "tip's weight of the divergence", at_least(0)
  )
  discount: float = key(
    0.0,
    "sampled_reverse_kl's discount: 0 a token's own, 1 the full return-to-go",
    within(0, 1),
  )
  diagnostics: bool = key(True, "compute the Figure 3 diagnostics")


@dataclasses.dataclass(frozen=True)
class Lora:
  """The adapter on q, k, v, o, gate, up and down."""

  rank: int = key(64, "r", at_least(1))
  alpha: float = key(128.0, "the adapter is scaled by alpha / rank", above(0))
  dropout: float = key(0.05, "on its input", keys.fraction_below_one())


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Where programs that a model wrote run, and how far they may go."""

  unsafe: bool = key(
    False, "run them without a sandbox, with limits and nothing else"
  )
  workers: int | None = key(
    None, "programs at a time; None: one a core", at_least(1)
  )
  python: str | None = key(
    None, "the interpreter that they are run with; None: the stage's own"
  )
  test_seconds: int = key(
    6, "processor time of a test; five times that by the clock", at_least(1)
  )
  total_seconds: float = key(
    120.0, "time of all tests of a program, by the clock", above(0)
  )
  memory_gib: float = key(2.0, "of a program with all that it starts", above(0))
  processes: int = key(
    64, "processes and threads of a program at a time", at_least(4)
  )
  output_mib: int = key(16, "what it may write in one test", at_least(1))
  file_mib: int = key(64, "what it may keep in files", at_least(1))


@dataclasses.dataclass(frozen=True)
class Metrics:
  """Where metrics go besides the JSONL file that is always written."""

  tensorboard: bool = key(False, "write TensorBoard event files")
  wandb: bool = key(False, "log to Weights & Biases")
  wandb_project: str = key("trd-jax", "its project", keys.filled())
