"""A small Hugging Face hub on loopback, which serves folders."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers for `server.root`, a folder of owner/name folders."""

  server: "Hub"

  def do_GET(self) -> None:
    self.server.asked.append(f"{self.command} {self.path}")
    parts = self.path.partition("?")[0].strip("/").split("/")
    if parts[0] == "api":
      self._about(parts[2:])
    elif "resolve" in parts:
      self._file(parts)
    else:
      self._refuse("EntryNotFound")

  do_HEAD = do_GET

  def _about(self, parts: list[str]) -> None:
    folder = self.server.root.joinpath(*parts[:2])
    if len(parts) < 2 or not folder.is_dir():
      self._refuse("RepoNotFound")
      return
    if parts[2:3] == ["revision"] and parts[3] not in ("main", COMMIT):
      self._refuse("RevisionNotFound")
      return
    names = sorted(
      p.relative_to(folder).as_posix() for p in folder.rglob("*.*")
    )
    config = folder / "config.json"
    architectures = []
    if config.exists():
      architectures = json.loads(config.read_text())["architectures"]
    about = {
      "id": "/".join(parts[:2]),
      "sha": COMMIT,
      "siblings": [{"rfilename": name} for name in names],
      "config": {"architectures": architectures},
    }
    if parts[2:3] == ["tree"]:
      about = [
        {"type": "file", "path": name, "size": 1, "oid": "0"} for name in names
      ]
    self._send(json.dumps(about).encode(), "application/json")

  def _file(self, parts: list[str]) -> None:
    at = parts.index("resolve")
    path = self.server.root.joinpath(*parts[:at], *parts[at + 2 :])
    if not path.is_file():
      self._refuse("EntryNotFound")
      return
    self._send(path.read_bytes(), "application/octet-stream")

  def _send(self, body: bytes, kind: str) -> None:
    self.send_response(200)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
    self.send_header("X-Repo-Commit", COMMIT)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def _refuse(self, code: str) -> None:
    self.send_response(404)
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def log_message(self, *_) -> None:
    pass


class Hub(http.server.ThreadingHTTPServer):
  """The server.

  Attributes:
    root: what it serves.
    asked: every request, as `GET /path`.
    url: its address.
  """

  def __init__(self, root: Path):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.root, self.asked = root, []
    self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
  """A hub of the folders in `root`, named owner/name."""
  with Hub(root) as hub:
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
      yield hub
    finally:
      hub.shutdown()
      thread.join()
