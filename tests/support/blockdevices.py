"""What the tests of block devices share: sizes, and commands that only root may run.

This module must not know any one test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vswapd_blockdev.device import EXTENT_BYTES
from vswapd_blockdev.header import DATA_OFFSET

EXTENTS = 6
SIZE = DATA_OFFSET + EXTENTS * EXTENT_BYTES
MakeDisk = Callable[[str, int], Path]
"""Mounts a small file system of a kind, `tmpfs` or `ext4`, of so many bytes, and says where."""


def as_root(*command: str) -> str:
    """What a command says; skips the test where it is not permitted or possible."""
    if os.geteuid() != 0:
        pytest.skip(f"{command[0]} needs root")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
