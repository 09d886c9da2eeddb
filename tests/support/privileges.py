"""Commands that run with less than the tests may: without capabilities, within limits.

This module must not know what is run.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Final

import pytest


def without(*capabilities: str) -> list[str]:
    """What to put before a command so that it runs without these, such as `ipc_lock`, also as root.

    Nobody but root has any.
    """
    if os.geteuid() != 0:
        return []
    names = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set={names}", f"--inh-caps={names}"]


def limited(**limits: str) -> list[str]:
    """What to put before a command so that limits hold for it: `limited(stack="262144:262144")`."""
    return ["prlimit", *(f"--{name}={value}" for name, value in limits.items())]


_REFUSING: Final = """
import ctypes, os, struct, sys
numbers = [int(number) for number in sys.argv[1].split(",")]
load, equal, done = 0x20, 0x15, 0x06
code = [struct.pack("HBBI", load, 0, 0, 0)]
code += [struct.pack("HBBI", equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
code += [struct.pack("HBBI", done, 0, 0, 0x7FFF0000), struct.pack("HBBI", done, 0, 0, 0x50001)]
filters = ctypes.create_string_buffer(b"".join(code))
program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.create_string_buffer(program), 0, 0):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Has the kernel answer EPERM to some system calls: seccomp(2), SECCOMP_MODE_FILTER."""
_MLOCK2: Final = {"x86_64": (149, 151, 325), "aarch64": (228, 230, 284)}
"""mlock, mlockall, mlock2."""


def refusing_locks() -> list[str]:
    """What to put before a command so that no memory can be locked by it, as in many containers."""
    numbers = ",".join(map(str, _MLOCK2[platform.machine()]))
    return [sys.executable, "-c", _REFUSING, numbers]


_LOCKING: Final = """
import sys
sys.path[:0] = sys.argv[2:]
from vswapd_backends.shared import SharedRegion
SharedRegion("test", int(sys.argv[1])).lock()
"""


def skip_unless_locking(nbytes: int) -> None:
    """Skip the test where a process may not lock so much memory, and say what keeps it from it."""
    tried = subprocess.run(
        [sys.executable, "-c", _LOCKING, str(nbytes), *sys.path],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        why = tried.stderr.strip().splitlines()[-1]
        pytest.skip(f"hardware: no memory can be locked here (RLIMIT_MEMLOCK, seccomp): {why}")
