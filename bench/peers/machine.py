"""The machine and the versions that a run's figures hold for.

This module must not know what is done with them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("vswapd", "lz4", "numpy", "redis", "hiredis", "pymemcache", "lmdb")
_PROGRAMS = ("redis-server", "memcached")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def facts() -> dict[str, str | int]:
    """Names and numbers, for people who compare."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **dict(_versions()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _versions() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    for name in _PROGRAMS:
        if (path := shutil.which(name)) is not None:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            yield name, said.stdout.strip()
