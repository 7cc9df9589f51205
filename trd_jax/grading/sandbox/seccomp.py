"""The system calls that a program in the sandbox is refused.

Namespaces and limits leave some ways open: memory that no limit counts
(`memfd_create`, System V shared memory, and anonymous memory that is shared,
all of which the kernel keeps for as long as one page of it is mapped), one
process writing into another, namespaces of one's own, sockets that reach past
the network namespace (AF_VSOCK) and corners of the kernel that no solution
needs. A filter in the kernel's own language (classic BPF over
`struct seccomp_data`) answers these with EPERM; bubblewrap installs it just
before the program starts.
"""

import errno
import platform
import struct

# Of each architecture: the kernel's name for it, and its system call numbers.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
  # name: (x86_64, aarch64)
  "ptrace": (101, 117),
  "process_vm_readv": (310, 270),
  "process_vm_writev": (311, 271),
  "kcmp": (312, 272),
  "pidfd_getfd": (438, 438),
  "process_madvise": (440, 440),
  "unshare": (272, 97),
  "setns": (308, 268),
  "mount": (165, 40),
  "umount2": (166, 39),
  "pivot_root": (155, 41),
  "chroot": (161, 51),
  "open_tree": (428, 428),
  "move_mount": (429, 429),
  "fsopen": (430, 430),
  "fsconfig": (431, 431),
  "fsmount": (432, 432),
  "mount_setattr": (442, 442),
  # Opens a file by its number, past the folders that are mounted here.
  "open_by_handle_at": (304, 265),
  "memfd_create": (319, 279),
  "memfd_secret": (447, 447),
  "shmget": (29, 194),
  "msgget": (68, 186),
  "semget": (64, 190),
  "add_key": (248, 217),
  "request_key": (249, 218),
  "keyctl": (250, 219),
  "bpf": (321, 280),
  "perf_event_open": (298, 241),
  "userfaultfd": (323, 282),
  # The kernel carries out what is queued there, past any filter of calls.
  "io_uring_setup": (425, 425),
  "io_uring_enter": (426, 426),
  "io_uring_register": (427, 427),
  "syslog": (103, 116),
  "personality": (135, 92),
  "quotactl": (179, 60),
  "acct": (163, 89),
  "reboot": (169, 142),
  "swapon": (167, 224),
  "swapoff": (168, 225),
  "init_module": (175, 105),
  "finit_module": (313, 273),
  "delete_module": (176, 106),
  "kexec_load": (246, 104),
  "kexec_file_load": (320, 294),
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = {"x86_64": 435, "aarch64": 435}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_MMAP = {"x86_64": 9, "aarch64": 222}
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag of clone(2)
_X32 = 0x40000000  # x86_64's second table of numbers

_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_SET, _RETURN = (
  0x20,  # BPF_LD | BPF_W | BPF_ABS
  0x15,  # BPF_JMP | BPF_JEQ | BPF_K
  0x35,  # BPF_JMP | BPF_JGE | BPF_K
  0x45,  # BPF_JMP | BPF_JSET | BPF_K
  0x06,  # BPF_RET | BPF_K
)
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_FIRST_ARGUMENT_AT, _FOURTH_ARGUMENT_AT = 16, 40


def known() -> bool:
  """Returns whether this machine's system calls are known here."""
  return platform.machine() in _ARCHITECTURES


def program(machine: str | None = None) -> bytes:
  """Builds the filter, as an array of `struct sock_filter`.

  Args:
    machine: 'x86_64' or 'aarch64'; None: this machine's.

  Raises:
    KeyError: another machine.
  """
  machine = machine or platform.machine()
  column = list(_ARCHITECTURES).index(machine)
  allow = (_RETURN, 0, 0, _ALLOW)
  refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
  code = [
    # The architecture first: under another one (32-bit calls on x86_64) the
    # same numbers are other calls, and every refusal below would miss.
    (_LOAD, 0, 0, _ARCHITECTURE_AT),
    (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine]),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, _NUMBER_AT),
    (_JUMP_ABOVE, 0, 1, _X32),
    (_RETURN, 0, 0, _KILL),
    # A C library that is told of no clone3 uses clone, whose flags are seen.
    (_JUMP_EQUAL, 0, 1, _CLONE3[machine]),
    (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    # A jump says how many lines to skip if so and if not. The argument's load
    # replaces the number, so each of these blocks ends by itself.
    (_JUMP_EQUAL, 0, 4, _CLONE[machine]),
    (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
    (_JUMP_SET, 0, 1, _NEW_NAMESPACES),
    refuse,
    allow,
    (_JUMP_EQUAL, 0, len(_FAMILIES) + 3, _SOCKET[machine]),
    (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
    *(
      (_JUMP_EQUAL, len(_FAMILIES) - i, 0, family)
      for i, family in enumerate(_FAMILIES)
    ),
    refuse,
    allow,
    # Shared and anonymous at once: a jump tests for any bit, so both take two.
    (_JUMP_EQUAL, 0, 5, _MMAP[machine]),
    (_LOAD, 0, 0, _FOURTH_ARGUMENT_AT),
    (_JUMP_SET, 0, 2, _MAP_ANONYMOUS),
    (_JUMP_SET, 0, 1, _MAP_SHARED),
    refuse,
    allow,
  ]
  # Last: what comes through the blocks above still has its number loaded.
  for numbers in _REFUSED.values():
    code += [(_JUMP_EQUAL, 0, 1, numbers[column]), refuse]
  return b"".join(struct.pack("=HBBI", *line) for line in [*code, allow])
