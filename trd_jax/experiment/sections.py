"""The sections of an experiment: every key, its default, meaning and rule.

Lengths are in tokens. `experiment.py` puts the sections together and makes
the checks that concern more than one key. The sections about engines are in
`engine_sections.py`, those of the evaluation and of the interpreters in
`run_sections.py`.
"""

import dataclasses
from dataclasses import field

from trd_jax.experiment import schema
from trd_jax.experiment.schema import above, at_least, key, one_of, within


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model and how it is spoken to."""

  path: str = schema.path(
    "lab:student",
    "lab:student, lab:teacher, a Hugging Face folder, a hub id, or "
    "random:<size>",
  )
  revision: str | None = key(None, "the hub id's commit, tag or branch")
  tokenizer: str | None = schema.path(
    None, "folder or hub id of the tokenizer; None: the model itself"
  )
  chat_template: str | None = schema.path(
    None, "file of a Jinja chat template; None: the tokenizer's own"
  )
  thinking: bool | None = key(
    None,
    "the template's thinking switch in its rollouts; None: the template's"
    " default, or it has none",
  )
  dtype: str = key(
    "float32", "type of the frozen weights", one_of("float32", "bfloat16")
  )

  @property
  def tokenizer_path(self) -> str:
    """Where the tokenizer comes from."""
    return self.tokenizer or self.path


@dataclasses.dataclass(frozen=True)
class Student(Model):
  """The student, as it is before training."""

  adapter: str | None = schema.path(
    None,
    "PEFT folder of an adapter that it wears from the start and that training"
    " goes on with; None: a new one",
  )


@dataclasses.dataclass(frozen=True)
class Teacher(Model):
  """The teacher; of these OPSD reads `thinking` only (see `Experiment`)."""

  path: str = schema.path("lab:teacher", "as student.path; read in OPD only")
  thinking: bool | None = key(
    None,
    "the thinking switch of the contexts in which it scores y_o; None: as y_o"
    " was written. trd's is the refinement prompt as it stands",
  )


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """The laboratory's problems."""

  num_problems: int = key(512, "how many to make", at_least(1))
  split: str = key(
    "train",
    "train or train_hard; heldout and hard are benchmarks",
    schema.filled(),
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
    schema.filled(),
  )
  root: str | None = schema.path(
    None, "local file or folder of the source; None: download it"
  )
  limit: int | None = key(None, "use only so many problems", at_least(1))
  seed: int = key(0, "seed of the problems and their order", at_least(0))
  subset: str = key(
    "all",
    "of the source: all, with_cot (with a worked solution) or answer_only",
    schema.filled(),
  )
  decontaminate: str = key(
    "none",
    "problems of the benchmarks of evaluate are taken out: none, exact (same"
    " words), or ngram (also 13 words in a row)",
    one_of("none", "exact", "ngram"),
  )
  arithmetic: Arithmetic = field(default_factory=Arithmetic)


@dataclasses.dataclass(frozen=True)
class Generation:
  """What every stage that samples has a say in."""

  temperature: float = key(0.6, "0 is greedy", at_least(0))
  top_p: float = key(
    0.95,
    "nucleus mass",
    schema.Rule("above 0 and at most 1", lambda mass: 0 < mass <= 1),
  )
  top_k: int = key(20, "-1: off", schema.minus_one_or_positive())
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
    False,
    "the template's thinking switch while refining; None: its default, or it"
    " has none",
  )
  overflow: str = key(
    "trim_middle",
    "an over-long draft loses its middle, or its sample is dropped",
    one_of("trim_middle", "drop"),
  )
  draft_think: str = key(
    "keep_text",
    "the draft's thoughts: kept, marks and all, as plain text; kept without"
    " the marks (strip); or left out (answer), unless nothing follows them",
    one_of("keep_text", "strip", "answer"),
  )
  teacher_top_k: int = key(
    0,
    "keep the teacher's so many likeliest tokens at each position; 0: none",
    within(0, 1024),
  )


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
  beta1: float = key(0.9, "AdamW", schema.fraction_below_one())
  beta2: float = key(0.999, "AdamW", schema.fraction_below_one())
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
  deterministic: bool = key(
    False,
    "the same bits in every run on GPUs, too: XLA and cuDNN leave out what adds"
    " in no fixed order",
  )
  teacher: str = key(
    "recompute",
    "its distributions: anew in each update (one epoch); from hidden states "
    "computed once and kept on disk (epochs, sweeps); or what refine recorded "
    "(approximate, no teacher at all)",
    one_of("recompute", "hidden_cache", "topk_from_rollout"),
  )
  cache_dir: str | None = schema.path(
    None, "of hidden_cache, to share between runs; None: in the workdir"
  )
  cache_dtype: str | None = key(
    None,
    "of hidden_cache; None: the teacher's own, which loses nothing",
    one_of("float32", "bfloat16"),
  )
  teacher_tail_limit: float = key(
    0.01,
    "largest mean mass outside the recorded tokens (topk_from_rollout)",
    within(0, 1),
  )
  truncated: str = key(
    "drop", "trajectories that a budget ended", one_of("drop", "keep")
  )
  student_thinking: bool | None = key(
    None,
    "the thinking switch of the contexts in which the student learns; None: as"
    " the trajectory was written",
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
  dropout: float = key(0.05, "on its input", schema.fraction_below_one())


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Where programs that a model wrote run, and how far they may go."""

  unsafe: bool = key(
    False, "run them without a sandbox, with limits and nothing else"
  )
  workers: int | None = key(
    None, "programs at a time; None: one a core", at_least(1)
  )
  python: str | None = schema.path(
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
  wandb_project: str = key("trd-jax", "its project", schema.filled())


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The whole pipeline, once or several times over."""

  rounds: int = key(
    1,
    "times that the stages are run, each from the student that the one before"
    " has trained",
    at_least(1),
  )
  collapse_pass: float = key(
    0.2,
    "no further round once mean Pass@k is so far below the base's",
    within(0, 1),
  )
  collapse_length: float = key(
    0.2,
    "nor once responses have shrunk to so much of the base's median length",
    within(0, 1),
  )
