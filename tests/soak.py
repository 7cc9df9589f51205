"""Runs the laboratory's pipeline under faults, and counts what they cost.

    make soak [MINUTES=30] [SEED=0]
    python -m tests.soak [--minutes=30] [--seed=0] [--out=FOLDER]

A calm run comes first. Then the same pipeline runs again and again while it is
killed and terminated, while its disk is filled, made read-only or taken away,
and while its server drops connections and lies; between two attempts a bit of
one of its files or of JAX's compiled programs is flipped, a file is cut short,
or a shard removed. After each fault the same command is given again. Where an
attempt refuses, the advice in its one line is followed to the letter. In the
end every row, the adapter and the table have to be those of the calm run.

The disk is a tmpfs in a mount namespace of this process's own, so util-linux's
`unshare` and user namespaces are needed, but no root.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import processes
from trd_jax.experiment import records, shards
from trd_jax.experiment.files import paths
from trd_jax.experiment.run_dir import RunDir

_FLAGS = (
  "--config=configs/demo.py",
  "--config.data.arithmetic.num_problems=48",
  "--config.evaluate.num_problems=8",
  "--config.evaluate.k=2",
  "--config.train.batch_size=8",
  "--config.train.checkpoint_every=1",
)
_SERVED = ("--config.engine.name=server", "--config.engine.weights=adapter")
_INSIDE = "TRD_JAX_SOAK"  # set where the mount namespace is there already
_DISK_BYTES = 96 * 2**20

# Seconds after which an attempt counts as hanging: one that was told to end,
# one whose disk or file is bad, and one that was left alone.
_TO_END, _TO_REFUSE, _TO_FINISH = 90.0, 240.0, 600.0

# Seconds after which a fault comes at the latest. Completions of a server that
# was asked before are quick, so the calm run is a poor guide.
_LATEST = 30.0

# What the exit code of an attempt may be after each fault. A signal may come
# when all is done (0), and one that comes while Python starts ends it by
# itself (a negative code). Before a stage has begun the pipeline is meant.
_CODES = {
  "kill the pipeline": {-9, 0},
  "kill its stage": {137, 0, -9},
  "terminate the pipeline": {143, 0, -15},
  "terminate its stage": {143, 0, -15},
  "interrupt the pipeline": {130, 0, -2},
  "fill the disk": {2, 0},
  "read-only disk": {2, 0},
  "take the disk away": {2, 0},
  "a server that fails": {0, 2},
  "a server that lies": {2, 0},
}
_STORED = (
  "flip a bit",
  "cut a file short",
  "remove a shard",
  "flip a bit of a compiled program",
)
_STAGES = {
  "problems": records.Problem,
  "rollout": records.Trajectory,
  "refine": records.Trajectory,
  "evaluate/base": records.GradedSample,
  "evaluate/trained": records.GradedSample,
}


@dataclasses.dataclass
class Counts:
  """What was injected, and what it cost.

  Attributes:
    injected: faults by kind.
    refused: how many stored faults an attempt refused by name; after the
      others everything came out the same, or it is charged.
    cost: rows lost, rows doubled, wrong numbers, hangs, tracebacks, wrong exit
      codes and advice that led nowhere.
    notes: a line for each of the cost.
    attempts: how often the pipeline was started.
    runs: how many run directories came to their end.
  """

  injected: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  cost: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  notes: list[str] = dataclasses.field(default_factory=list)
  refused: int = 0
  attempts: int = 0
  runs: int = 0

  def charge(self, what: str, note: str) -> None:
    self.cost[what] += 1
    self.notes.append(f"{what}: {note}")
    print(f"  !! {self.notes[-1]}", flush=True)

  def add(self, other: "Counts") -> None:
    self.injected += other.injected
    self.cost += other.cost
    self.notes += other.notes
    self.refused += other.refused
    self.attempts += other.attempts
    self.runs += other.runs


COST = (
  "rows lost",
  "rows doubled",
  "wrong numbers",
  "hangs",
  "tracebacks",
  "wrong exit codes",
  "advice that led nowhere",
)


class Disk:
  """A small disk that can be filled, made read-only and taken away."""

  def __init__(self, folder: Path):
    self._store, self.place = folder / "store", folder / "disk"
    self._store.mkdir()
    self.place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", self._store)
    _mount("--bind", self._store, self.place)

  def fill(self) -> None:
    """Leaves no byte of room."""
    balloon = (self._store / "balloon").open("wb", buffering=0)
    with balloon, contextlib.suppress(OSError):
      while True:
        balloon.write(bytes(2**16))

  def lock(self) -> None:
    """Makes the disk read-only for whatever is opened from now on."""
    self.take()
    _mount("--bind", self._store, self.place)
    _mount("-o", "remount,bind,ro", self.place)

  def take(self) -> None:
    """Takes the disk away, though files of it are open."""
    subprocess.run(["umount", "-l", self.place], check=True)

  def mend(self) -> None:
    """Makes the disk what it was."""
    (self._store / "balloon").unlink(missing_ok=True)
    if os.path.ismount(self.place):
      self.take()
    # What a stage may have begun to write where the disk had been.
    for path in self.place.iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    _mount("--bind", self._store, self.place)


def _mount(*args) -> None:
  subprocess.run(["mount", *args], check=True)


def contents(run_dir: RunDir) -> dict[str, dict]:
  """Reads what a finished run directory has, without its times.

  Returns:
    By the place of it: rows by key; the arrays of the adapter; the table.

  Raises:
    UserError: something is damaged.
  """
  found: dict[str, dict] = {}
  for stage, kind in _STAGES.items():
    table = shards.read_shards(run_dir.stage(stage), kind)
    rows = table.to_pylist()
    found[stage] = {row[kind.KEY]: row for row in rows}
  adapter = run_dir.root / "merge" / "adapter" / "adapter_model.safetensors"
  found["adapter"] = {
    "sha256": hashlib.sha256(adapter.read_bytes()).hexdigest()
  }
  table = json.loads((run_dir.root / "summary.json").read_text())
  del table["seconds"]
  for name in ("seconds", "tokens_per_second", "restarted_after"):
    del table["stages"]["train"][name]
  found["table"] = table
  return found


def doubled(run_dir: RunDir) -> int:
  """Counts the rows whose key another row of their stage has too."""
  extra = 0
  for stage, kind in _STAGES.items():
    keys = [
      key
      for path in run_dir.stage(stage).glob("shard-*.parquet")
      for key in shards.read_table(path, kind, [kind.KEY])[0].to_pylist()
    ]
    extra += len(keys) - len(set(keys))
  return extra


class Soak:
  """One soak: a calm run, and then faults until the time is over."""

  def __init__(
    self, folder: Path, minutes: float, seed: int, server=None, lies=()
  ):
    self.folder, self.random = folder, random.Random(seed)
    self.counts, self.server, self.lies = Counts(), server, lies
    self.disk = Disk(folder)
    self.deadline = time.monotonic() + 60 * minutes
    self.flags = list(_FLAGS)
    if server is not None:
      self.flags += [*_SERVED, f"--config.engine.server.urls={server.url}"]
    self.log, self.cache = folder / "log.txt", folder / "cache"
    # What was compiled before need not be compiled for this.
    known = paths.cache() / "xla" / paths.kind_of_cpu()
    if known.is_dir():
      shutil.copytree(known, self.cache)
    self.calm_seconds = 0.0
    # Damage to the run directory that no attempt has named yet.
    self.stored: list[str] = []

  def run(self) -> Counts:
    """Goes on until the time is over, and the last run to its end."""
    # In the same place as all that follow: rows name the weights by their path.
    calm = RunDir(self.disk.place / "run")
    began = time.monotonic()
    code, said = self.attempt(calm, None)
    if code != 0:
      raise RuntimeError(f"the calm run failed ({code}):\n{said[-3000:]}")
    self.calm_seconds = time.monotonic() - began
    self.expected = contents(calm)
    shutil.rmtree(calm.root)
    print(f"the calm run took {self.calm_seconds:.0f} s", flush=True)
    while time.monotonic() < self.deadline:
      self.one_run(RunDir(self.disk.place / "run"))
    return self.counts

  # -- one run directory ---------------------------------------------------

  def one_run(self, run_dir: RunDir) -> None:
    """Runs one pipeline to its end through faults; compares what it made."""
    self.stored = []
    calm_ends = faults = 0
    # A finished run is damaged a few times more: given again, it has to say so
    # or to be as it was.
    while calm_ends < 4:
      late = time.monotonic() > self.deadline
      if not late and self.random.random() < 0.5:
        self.damage(run_dir)
      calm = faults >= 8 or calm_ends or late
      kind = None if calm else self.random.choice(self.kinds())
      # Of a refusal it has to be plain which fault it speaks of.
      if self.stored and kind and 2 in _CODES[kind]:
        kind = None
      faults += kind is not None
      code, said = self.attempt(run_dir, kind)
      self.settle(run_dir, kind, code, said)
      calm_ends += code == 0
    self.compare(run_dir)
    self.counts.runs += 1
    shutil.rmtree(run_dir.root)

  def kinds(self) -> list[str]:
    """Names what can happen during an attempt."""
    served = self.server is not None
    return [kind for kind in _CODES if served or "server" not in kind]

  def compare(self, run_dir: RunDir) -> None:
    """Charges what differs from the calm run."""
    found = contents(run_dir)
    for place, expected in self.expected.items():
      missing = expected.keys() - found[place].keys()
      more = found[place].keys() - expected.keys()
      differ = [
        key
        for key in expected.keys() & found[place].keys()
        if expected[key] != found[place][key]
      ]
      if missing:
        self.counts.charge("rows lost", f"{len(missing)} of {place}")
      if wrong := sorted([*more, *differ]):
        shown = ", ".join(wrong[:3])
        self.counts.charge("wrong numbers", f"{len(wrong)} {place}: {shown}")
    if extra := doubled(run_dir):
      self.counts.charge("rows doubled", str(extra))

  # -- one attempt ---------------------------------------------------------

  def attempt(
    self, run_dir: RunDir, kind: str | None
  ) -> tuple[int | None, str]:
    """Gives the command once, with a fault of some kind midway.

    Returns:
      Its exit code, None where it hung and was killed; what it printed.
    """
    self.counts.attempts += 1
    if self.server is not None:
      self.server.misbehave = self.liar(kind)
    start = self.log.stat().st_size if self.log.exists() else 0
    command = [sys.executable, "-m", "trd_jax.pipeline"]
    with self.log.open("ab") as log:
      process = subprocess.Popen(
        [*command, f"--workdir={run_dir.root}", *self.flags],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.cache)},
      )
    wait = _TO_FINISH
    started = processes.below(process.pid)
    if kind is not None and "server" not in kind:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(
          self.random.uniform(0.5, min(0.7 * self.calm_seconds, _LATEST))
        )
      if process.poll() is None:
        started = processes.below(process.pid)
        wait = self.inject(kind, process.pid, started)
        self.counts.injected[kind] += 1
    try:
      code = process.wait(wait)
    except subprocess.TimeoutExpired:
      code = None
      self.counts.charge("hangs", f"{kind}, {wait:.0f} s")
      for pid in [process.pid, *processes.below(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      process.wait()
    if left := processes.still_there(started, 60.0):
      self.counts.charge("hangs", f"{kind}: {len(left)} processes went on")
      for pid in left:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
    self.disk.mend()
    with self.log.open("rb") as log:
      log.seek(start)
      return code, log.read().decode(errors="replace")

  def inject(self, kind: str, pid: int, below: list[int]) -> float:
    """Does to an attempt what a fault does; returns how long it may take."""
    stage = below[0] if below else pid
    signals = {"kill": "SIGKILL", "terminate": "SIGTERM", "interrupt": "SIGINT"}
    verb = kind.split()[0]
    if verb in signals:
      target = stage if kind.endswith("stage") else pid
      with contextlib.suppress(ProcessLookupError):
        os.kill(target, signal.Signals[signals[verb]])
      return _TO_END
    {
      "fill the disk": self.disk.fill,
      "read-only disk": self.disk.lock,
      "take the disk away": self.disk.take,
    }[kind]()
    return _TO_REFUSE

  def liar(self, kind: str | None) -> Callable[[int, dict], str | None]:
    """Says how the server takes each request of an attempt."""
    if kind == "a server that fails":
      choices = [None, None, "drop", "busy0.1", "broken", "abort"]
    elif kind == "a server that lies":
      choices = [None] * 20 + [f"lie {name}" for name in self.lies]
    else:
      return lambda number, body: None

    def misbehave(number: int, body: dict) -> str | None:
      how = self.random.choice(choices)
      self.counts.injected[kind] += how is not None
      return how

    return misbehave

  # -- what is stored ------------------------------------------------------

  def damage(self, run_dir: RunDir) -> None:
    """Damages one file of a run directory that nobody is at work in."""
    kind = self.random.choice(_STORED)
    place = self.cache if kind == _STORED[3] else run_dir.root
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    files = [p for p in files if p.stat().st_size]
    if kind == "remove a shard":
      files = [p for p in files if p.match("shard-*.parquet")]
    if not files:
      return
    # Each stage's files weigh the same, however many they are.
    groups = collections.defaultdict(list)
    for path in files:
      groups[path.relative_to(place).parts[0]].append(path)
    path = self.random.choice(groups[self.random.choice(sorted(groups))])
    if kind == "remove a shard":
      path.unlink()
    elif kind == "cut a file short":
      os.truncate(path, self.random.randrange(path.stat().st_size))
    else:
      data = bytearray(path.read_bytes())
      bit = self.random.randrange(8 * len(data))
      data[bit // 8] ^= 1 << bit % 8
      path.write_bytes(data)
    self.counts.injected[kind] += 1
    if place == run_dir.root:
      self.stored.append(kind)
    print(f"  {kind}: {path.relative_to(place)}", flush=True)

  def settle(
    self, run_dir: RunDir, kind: str | None, code: int | None, said: str
  ) -> None:
    """Looks at how an attempt ended, and follows the advice of a refusal."""
    what = f"{kind or 'calm'}: exit {code}"
    print(f"{time.strftime('%T')} {what}", flush=True)
    last = said.strip().splitlines()[-1:] or [""]
    if "Traceback (most recent call last)" in said:
      self.counts.charge("tracebacks", f"{what}: {last[0]}")
    allowed = _CODES.get(kind or "", {0}) | ({2} if self.stored else set())
    if code is not None and code not in allowed:
      self.counts.charge("wrong exit codes", f"{what}: {last[0]}")
    if code == 2 and self.stored:
      if self.follow(run_dir, said):
        self.counts.refused += 1
      else:
        self.counts.charge("advice that led nowhere", f"{what}: {last[0]}")
        shutil.rmtree(run_dir.root)  # so that the soak goes on
        self.stored = []

  def follow(self, run_dir: RunDir, said: str) -> bool:
    """Removes what the last line that was printed says to remove.

    Returns:
      Whether it named something of the run directory that is there.
    """
    lines = [line for line in said.splitlines() if str(run_dir.root) in line]
    if not lines:
      return False
    line = lines[-1]
    root = re.escape(str(run_dir.root))
    named = re.findall(rf"{root}/[^\s,;:)]+", line)
    told = re.search(rf"(?:remove|move) ({root}/[^\s,;:)]+)", line)
    if not named or not re.search("remove|move", line):
      return False
    target = Path((told[1] if told else named[0]).rstrip("."))
    if not target.exists():
      return False
    if "and done.json beside it" in line:
      (target.parent / "done.json").unlink()
    print(f"  followed: {line.strip()}", flush=True)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return True


def table(counts: Counts, minutes: float) -> Iterator[str]:
  """Yields the report's lines, in Markdown."""
  yield f"{minutes:.0f} minutes, {counts.attempts} attempts, {counts.runs} runs"
  yield ""
  yield "| fault | injected |"
  yield "|---|---|"
  for kind in (*_CODES, *_STORED):
    if counts.injected[kind]:
      yield f"| {kind} | {counts.injected[kind]} |"
  yield f"| all | {counts.injected.total()} |"
  yield ""
  stored = sum(counts.injected[kind] for kind in _STORED)
  yield f"Of {stored} stored faults {counts.refused} were refused by name."
  yield ""
  yield "| what it cost | times |"
  yield "|---|---|"
  for what in COST:
    yield f"| {what} | {counts.cost[what]} |"


def main() -> int:
  """Runs a soak; the exit code is 1 where a fault cost anything."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=30.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--engine", choices=("jax", "server", "both"), default="both"
  )
  parser.add_argument("--out", type=Path, help="a folder for log and runs")
  args = parser.parse_args()
  if _INSIDE not in os.environ:
    # A mount namespace of its own, in which whoever runs this may mount.
    command = ["unshare", "--map-root-user", "--mount", sys.executable]
    os.environ[_INSIDE] = "1"
    os.execvp(command[0], [*command, "-m", "tests.soak", *sys.argv[1:]])
  # A shell's background jobs ignore it, and so would what they start.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  folder = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
  folder.mkdir(parents=True, exist_ok=True)
  engines = ["jax", "server"] if args.engine == "both" else [args.engine]
  all_counts = Counts()
  for engine in engines:
    place = folder / engine
    place.mkdir()
    print(f"\n{engine}: everything is in {place}", flush=True)
    with contextlib.ExitStack() as stack:
      server, lies = None, ()
      if engine == "server":
        # Imports JAX, and generates in this process.
        from tests.support import serving

        server = stack.enter_context(serving.FakeServer())
        lies = tuple(serving.LIES)
      minutes = args.minutes / len(engines)
      soak = Soak(place, minutes, args.seed, server, lies)
      all_counts.add(soak.run())
  print("\n".join(["", *table(all_counts, args.minutes)]))
  for note in all_counts.notes:
    print(note)
  return 1 if all_counts.cost.total() else 0


if __name__ == "__main__":
  sys.exit(main())
