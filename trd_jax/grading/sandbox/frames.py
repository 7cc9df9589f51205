"""What passes between this process and one in the sandbox: length, then bytes.

The process inside imports nothing of ours and has the same few lines itself.
"""

import struct

from trd_jax.grading.sandbox.boxed_process import BoxedProcess


def frame(data: bytes) -> bytes:
  """Puts the length of some bytes before them, in four bytes."""
  return struct.pack(">I", len(data)) + data


def receive(process: BoxedProcess, deadline: float) -> bytes | None:
  """Reads the next frame's bytes; None where none came and none will.

  Args:
    process: ended where it says that more will come than it may write.
    deadline: of `time.monotonic`; when it passes the process is ended.
  """
  head = process.read(4, deadline)
  if head is None:
    return None
  (size,) = struct.unpack(">I", head)
  if size > process.limits.output_bytes:
    process.end("output")
    return None
  return process.read(size, deadline)
