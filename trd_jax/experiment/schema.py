"""The sections of an experiment: every key, its default, meaning and rule.

Lengths are in tokens. The keys of each engine are in `engines.py`, those of
divergences and token weights in `methods.py`. `experiment.py` puts the sections
together and makes the checks that concern more than one key.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from trd_jax.experiment import (
  chat_templates,
  declarations,
  engines,
  methods,
  prompt_sets,
)
from trd_jax.experiment.declarations import (
  above,
  at_least,
  key,
  one_of,
  section,
  within,
)


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model and how it is spoken to."""

  path: str = declarations.path(
    "lab:student",
    "lab:student, lab:teacher, a Hugging Face folder, a hub id, or "
    "random:<size>",
  )
  revision: str | None = key(None, "the hub id's commit, tag or branch")
  tokenizer: str | None = declarations.path(
    None, "folder or hub id of the tokenizer; None: the model itself"
  )
  chat_template: str | None = declarations.path(
    None,
    f"file of a Jinja chat template, or {', '.join(chat_templates.shipped())}:"
    " the messages alone, for a base model; None: the tokenizer's own",
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
    """Returns where the tokenizer comes from."""
    return self.tokenizer or self.path


@dataclasses.dataclass(frozen=True)
class Student(Model):
  """The student, as it is before training."""

  adapter: str | None = declarations.path(
    None,
    "PEFT folder of an adapter that it has from the start and that training"
    " goes on with; None: a new one",
  )


@dataclasses.dataclass(frozen=True)
class Teacher(Model):
  """The teacher; of these OPSD reads `thinking` only (see `Experiment`)."""

  path: str = declarations.path(
    "lab:teacher", "as student.path; read in OPD only"
  )
  thinking: bool | None = key(
    None,
    "the thinking switch of the contexts in which it scores y_o; None: as y_o"
    " was written. trd's is the refinement prompt as it stands",
    scope="train",
  )


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """The laboratory's problems."""

  num_problems: int = key(512, "how many to make", at_least(1, 1_000_000))
  split: str = key(
    "train",
    "train or train_hard; heldout and hard are benchmarks",
    declarations.filled(),
  )
  min_steps: int | None = key(
    None, "fewest steps of a chain; None: the split's own", at_least(1, 1000)
  )
  max_steps: int | None = key(
    None, "most steps of a chain; None: the split's own", at_least(1, 1000)
  )


@dataclasses.dataclass(frozen=True)
class Data:
  """The problems to train on."""

  source: str = key(
    "arithmetic",
    "arithmetic, deepscaler, taco, jsonl, or a benchmark",
    declarations.filled(),
  )
  root: str | None = declarations.path(
    None, "local file or folder of the source; None: download it"
  )
  limit: int | None = key(None, "use only so many problems", at_least(1))
  seed: int = key(
    0, "seed of the problems and their order", declarations.seed()
  )
  subset: str = key(
    "all",
    "of the source: all, with_cot (with a worked solution) or answer_only",
    declarations.filled(),
  )
  decontaminate: str = key(
    "none",
    "problems of the benchmarks of evaluate are taken out: none, exact (same"
    " words), or ngram (also 13 words in a row)",
    one_of("none", "exact", "ngram"),
  )
  arithmetic: Arithmetic = section(Arithmetic)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What the models are asked, in which words."""

  set: str = declarations.path(
    prompt_sets.DEFAULT,
    f"a shipped set ({', '.join(prompt_sets.shipped())}), or a folder of"
    " templates <role>_<domain>.jinja; what it lacks is the default set's",
  )


@dataclasses.dataclass(frozen=True)
class Generation:
  """What every stage that samples has a say in."""

  temperature: float = key(0.6, "0 is greedy", at_least(0))
  top_p: float = key(
    0.95,
    "nucleus mass",
    declarations.positive_share(),
  )
  top_k: int = key(20, "-1: off", declarations.minus_one_or_positive())
  max_prompt_tokens: int = key(
    4096, "a longer prompt is set aside", at_least(1)
  )
  max_response_tokens: int = key(
    16384, "a longer response is cut and marked as truncated", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class Rollout(Generation):
  """Stage 1: the student's raw answers y_o."""

  samples: int = key(1, "answers a problem", at_least(1, 10_000))
  grade: bool = key(
    True,
    "grade them; off where no verdict is used: correct is then null, and TACO's"
    " rows may do without tests",
    scope=("problems", "rollout"),
  )


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
  grade: bool = key(True, "grade y_r; off: correct is null")
  teacher_top_k: int = key(
    0,
    "keep the teacher's so many likeliest tokens at each position; 0: none",
    within(0, 1024),
  )


@dataclasses.dataclass(frozen=True)
class Ray:
  """The same engine in many processes and machines, under Ray Data."""

  # As `EngineSection.packages`.
  packages: ClassVar[Mapping[str, str]] = {
    "ray": "pip install 'trd-jax[ray]', or use the environment of"
    " third_party/vllm/install.sh"
  }

  actors: int = key(
    0, "engines at work at once; 0: no Ray", at_least(0, 100_000)
  )
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
    2,
    "batches that an actor works on at once, where it can",
    at_least(1, 10_000),
  )


@dataclasses.dataclass(frozen=True)
class Engine(engines.Engines):
  """What generates, with a section for each engine that there is."""

  name: str = key("jax", engines.summaries(), one_of(*engines.ENGINES))
  weights: str = key(
    "merged",
    "the trained student's form: merged, or the base with its adapter",
    one_of("merged", "adapter"),
  )
  ray: Ray = section(Ray)

  @property
  def chosen(self) -> engines.EngineSection:
    """Returns the section of the engine that `name` names."""
    return getattr(self, self.name)

  def without_drafts(self) -> "Engine":
    """Returns the section for a stage whose prompts hold no draft."""
    return dataclasses.replace(
      self, **{self.name: self.chosen.without_drafts()}
    )

  @property
  def packages(self) -> Mapping[str, Mapping[str, str]]:
    """Returns what is imported to generate, by the key that asks for it.

    For each package how to get it.
    """
    ray = {"engine.ray.actors": self.ray.packages} if self.ray.actors else {}
    return {**ray, f"engine.name={self.name}": self.chosen.packages}


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
  beta1: float = key(0.9, "AdamW", declarations.fraction_below_one())
  beta2: float = key(0.999, "AdamW", declarations.fraction_below_one())
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
    "without packing the shortest row length; None: automatic. A run that goes"
    " on with another one ends with other bits than one that wasn't stopped",
    at_least(2),
    scope="runtime",
  )
  teacher_pack_tokens: int | None = key(
    None, "as pack_tokens, for the teacher", at_least(2), scope="runtime"
  )
  rows_per_device: int = key(
    1,
    "rows of a pack on a device; another one changes bits, as pack_tokens",
    at_least(1),
    scope="runtime",
  )
  packing: bool | None = key(
    None,
    "several samples a row; False: one, in about ten row lengths a side; None: "
    "as the attention can",
    scope="runtime",
  )
  attention: str = key(
    "auto",
    "what computes it; auto: cudnn on GPUs in bfloat16, else xla",
    one_of("auto", "xla", "cudnn", "tokamax"),
    scope="runtime",
  )
  deterministic: bool = key(
    False,
    "the same bits in every run on GPUs, too: XLA and cuDNN leave out what adds"
    " in no fixed order",
    scope="runtime",
  )
  teacher: str = key(
    "recompute",
    "its distributions: anew in each update (one epoch); from hidden states "
    "computed once and kept on disk (epochs, sweeps); or what refine recorded "
    "(approximate, no teacher at all)",
    one_of("recompute", "hidden_cache", "topk_from_rollout"),
  )
  cache_dir: str | None = declarations.path(
    None,
    "of hidden_cache, to share between runs; None: in the workdir",
    scope="runtime",
  )
  cache_dtype: str | None = key(
    None,
    "of hidden_cache; None: the teacher's own, which loses nothing",
    one_of("float32", "bfloat16"),
  )
  teacher_dtype: str | None = key(
    None,
    "of the products of its linear layers while it scores; None: that of its"
    " weights; float8 is faster and approximate (CPUs, or NVIDIA GPUs from Ada"
    " and Hopper on)",
    one_of("float8"),
  )
  teacher_tail_limit: float = key(
    0.01,
    "largest mean mass outside the recorded tokens (topk_from_rollout)",
    within(0, 1),
  )
  truncated: str = key(
    "drop", "trajectories that a budget ended", one_of("drop", "keep")
  )
  context: str = key(
    "chat",
    "what both sides read before a trajectory that they score: its prompt in"
    " the chat template, or the message as plain text (plain), which no end of"
    " turn follows",
    one_of("chat", "plain"),
  )
  student_thinking: bool | None = key(
    None,
    "the thinking switch of the contexts in which the student learns; None: as"
    " the trajectory was written",
  )
  subset: str = key(
    "all",
    "trajectories to train on: by the rollout's verdict, by the refined"
    " trajectory's (refined_succ), or by both (fail_to_succ)",
    one_of("all", "fail", "succ", "fail_to_succ", "refined_succ"),
  )
  leaks: str = key(
    "keep",
    "what the teacher wrote and speaks of a draft or a reference, which the"
    " student can't see",
    one_of("keep", "drop"),
  )
  remat: str = key(
    "full",
    "what a backward pass computes again",
    one_of("full", "none", "dots", "attention"),
    scope="runtime",
  )
  checkpoint_every: int = key(
    50, "updates between checkpoints", at_least(1), scope="runtime"
  )
  keep_checkpoints: int = key(
    2, "newest ones that stay", at_least(1), scope="runtime"
  )
  max_steps: int | None = key(
    None, "end after so many updates; None: after the epochs", at_least(1)
  )
  log_every: int = key(
    1, "updates between rows of metrics", at_least(1), scope="runtime"
  )


@dataclasses.dataclass(frozen=True)
@declarations.with_keys(methods.PARAMETERS)
class Loss:
  """What `Experiment.method` leaves open of the loss.

  Besides the keys here it has those that divergences and token weights declare
  as their parameters in `methods.py`.
  """

  temperature: float = key(
    1.0, "of the softmax; not the sampling temperature", above(0)
  )
  chunk_tokens: int | None = key(
    512,
    "response tokens whose logits exist at once; None: automatic, by widths, "
    "dtype and platform. Another one changes sums in their last digits",
    at_least(1),
    scope="runtime",
  )
  clip: float | None = key(
    None,
    "largest divergence of a token, in nats; 0: none; None: the method's own",
    at_least(0),
  )
  token_weights: str | None = key(
    None,
    "how tokens weigh within their trajectory; none: all the same; None: the"
    " method's own",
    one_of("none", *methods.TOKEN_WEIGHTS),
  )
  mean: str = key(
    "trajectory",
    "over the tokens of each trajectory and then over trajectories, as in the"
    " paper; or over all tokens of the batch (token)",
    one_of("trajectory", "token"),
  )
  cross_entropy: float = key(
    0.0,
    "weight of -log q(y_t), which is added to the divergence of each token",
    at_least(0),
  )
  diagnostics: bool = key(True, "compute the Figure 3 diagnostics")


@dataclasses.dataclass(frozen=True)
class Lora:
  """The adapter on q, k, v, o, gate, up and down."""

  rank: int = key(64, "r", at_least(1, 8192))
  alpha: float = key(128.0, "the adapter is scaled by alpha / rank", above(0))
  dropout: float = key(0.05, "on its input", declarations.fraction_below_one())


# Share of a GPU's memory that a training takes at its start; JAX's own is 0.75.
# What is left is for CUDA, NCCL and cuDNN, which allocate beside it.
MEMORY_SHARE = 0.92
# Share of a device's memory that is planned with: what follows is an estimate,
# and allocators lose some to gaps.
PLANNED_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; with none given, what the sizes ask for.

  One of them may be -1: all the rest, which `data` is where another is given.
  """

  data: int | None = key(
    None,
    "copies of the weights; -1: the rest",
    declarations.minus_one_or_positive(),
  )
  fsdp: int | None = key(
    None,
    "shards of each weight; -1: the rest",
    declarations.minus_one_or_positive(),
  )
  tensor: int | None = key(
    None,
    "shards of each layer; -1: the rest",
    declarations.minus_one_or_positive(),
  )
  memory_gib: float | None = key(
    None, "a device's memory; None: what the platform says", above(0)
  )

  @property
  def sizes(self) -> tuple[int, int, int] | None:
    """Devices along data, fsdp and tensor; None where all is left open."""
    given = self.data, self.fsdp, self.tensor
    if given == (None, None, None):
      return None
    data = self.data or (1 if -1 in given else -1)
    return data, self.fsdp or 1, self.tensor or 1


@dataclasses.dataclass(frozen=True)
class Distributed:
  """The processes of a training on several machines (see `processes`)."""

  coordinator: str | None = key(
    None, "HOST:PORT of process 0; None: TRD_COORDINATOR, or Slurm's"
  )
  processes: int | None = key(
    None, "how many there are; None: TRD_PROCESSES, or Slurm's", at_least(1)
  )
  process: int | None = key(
    None, "which of them this is; None: TRD_PROCESS, or Slurm's", at_least(0)
  )
  timeout_seconds: float = key(
    300.0, "how long to wait for the others to come", declarations.seconds()
  )
  heartbeat_seconds: int = key(
    60,
    "silence after which a process counts as dead and all end",
    at_least(5, 86_400),
  )


@dataclasses.dataclass(frozen=True)
class Evaluate(Generation):
  """Stage 5: base and trained student on the benchmarks."""

  benchmarks: tuple[str, ...] = key(
    ("arithmetic",), "their names, separated by commas", declarations.filled()
  )
  root: str | None = declarations.path(
    None, "folder with local copies of the benchmarks; None: download them"
  )
  thinking: bool | None = key(
    None, "the template's thinking switch; None: student.thinking"
  )
  k: int = key(16, "samples a problem: Avg@k, Pass@k", at_least(1, 10_000))
  max_response_tokens: int = key(
    38912, "a longer response is cut and marked as truncated", at_least(1)
  )
  num_problems: int | None = key(
    None, "problems a benchmark; None: all", at_least(1, 1_000_000)
  )
  livecodebench: str = key(
    "release_v6",
    "which of its problems: release_v6 (all) or v6 (those that v6 added)",
    one_of("release_v6", "v6"),
  )
  unchecked: bool = key(
    False, "take benchmark files of another length or SHA-256 than declared"
  )
  math_prompt: str | None = key(
    None,
    "whose words ask mathematical benchmarks: card (the question and the boxed"
    " sentence of Qwen's model card) or ours (initial of the prompt set); None:"
    " ours where prompts.set is a folder with an initial_math or system_math,"
    " else card",
    one_of("card", "ours"),
  )
  code_prompt: str = key(
    "ours",
    "whose words ask HumanEval+, MBPP+ and LiveCodeBench, and who takes the"
    " program out of an answer: official (EvalPlus and lcb_runner, as"
    " installed; EvalPlus begins the answer, which leaves no thoughts) or ours"
    " (initial of the prompt set)",
    one_of("official", "ours"),
  )
  lcb_model: str = key(
    "Qwen/Qwen3-235B-A22B",
    "the entry of lcb_runner's list of models whose prompt is the official one",
    declarations.filled(),
  )
  evalplus_seconds: float = key(
    1.0,
    "EvalPlus's shortest time limit of an input; published results have 1",
    declarations.seconds(),
  )
  buckets_from: str | None = declarations.path(
    None,
    "workdir whose base samples sort the questions by difficulty; None: this"
    " one",
    scope="runtime",
  )
  seed: int = key(0, "seed of the samples", declarations.seed())


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Where programs that a model wrote run, and how far they may go."""

  unsafe: bool = key(
    False,
    "run them without a sandbox, with limits and nothing else",
    scope="runtime",
  )
  workers: int | None = key(
    None,
    "programs at a time; None: one a core",
    at_least(1, 10_000),
    scope="runtime",
  )
  python: str | None = declarations.path(
    None, "the interpreter that they are run with; None: the stage's own"
  )
  test_seconds: int = key(
    6,
    "processor time of a test; five times that by the clock",
    at_least(1),
  )
  total_seconds: float = key(
    120.0,
    "time of all tests of a program, by the clock",
    declarations.seconds(),
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
  wandb_project: str = key("trd-jax", "its project", declarations.filled())
  trackio: bool = key(False, "log to trackio, in files of this machine")
  trackio_project: str = key("trd-jax", "its project", declarations.filled())
  mlflow: bool = key(
    False, "log to MLflow: into the workdir, or to MLFLOW_TRACKING_URI"
  )
  mlflow_experiment: str = key(
    "trd-jax", "its experiment", declarations.filled()
  )


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The whole pipeline, once or several times over."""

  # The first three decide artifacts where rounds are split, and nothing
  # elsewhere: see `scopes.identity`.
  rounds: int = key(
    1,
    "times that the stages are run, each from the student that the one before"
    " has trained",
    at_least(1, 10_000),
    scope="rollout",
  )
  split: bool = key(
    False,
    "each round takes its own part of the problems, and one training, with one"
    " optimizer and one schedule, goes on over all rounds",
    scope="rollout",
  )
  round: int = key(
    1,
    "which of the split rounds a workdir holds: the pipeline sets it",
    at_least(1, 10_000),
    scope="rollout",
  )
  evaluate_every: int | None = key(
    None,
    "split rounds from one evaluation to the next; the last round always has"
    " one. None: it alone",
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

  @property
  def parts(self) -> int:
    """Returns how many parts the problems are cut into; 1: they stay whole."""
    return self.rounds if self.split else 1

  @property
  def evaluates(self) -> bool:
    """Returns whether the student that this round trains is evaluated."""
    if self.parts == 1 or self.round == self.rounds:
      return True
    return self.evaluate_every is not None and (
      self.round % self.evaluate_every == 0
    )


@dataclasses.dataclass(frozen=True)
class Python:
  """The interpreter that `trd_jax.pipeline` starts each stage with."""

  generation: str | None = declarations.path(
    None, "for rollout, refine and evaluate; None: the pipeline's own"
  )
  rollout: str | None = declarations.path(None, "None: python.generation")
  refine: str | None = declarations.path(None, "None: python.generation")
  evaluate: str | None = declarations.path(None, "None: python.generation")
  train: str | None = declarations.path(None, "None: the pipeline's own")
  merge: str | None = declarations.path(None, "None: the pipeline's own")
  convert: str | None = declarations.path(None, "None: the pipeline's own")
  evalplus: str | None = declarations.path(
    None, "EvalPlus's, for HumanEval+ and MBPP+; None: .venv-evalplus's"
  )
  lcb_runner: str | None = declarations.path(
    None, "lcb_runner's, for LiveCodeBench; None: .venv-lcb's if it is there"
  )

  def of(self, stage: str) -> str | None:
    """Returns the interpreter of a stage; None for the pipeline's own."""
    own = getattr(self, stage)
    if own is None and stage in ("rollout", "refine", "evaluate"):
      return self.generation
    return own
