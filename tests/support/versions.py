"""Versions of vswapd, and clients of them.

`tests/upgrade/PREVIOUS` names the last commit that CI passed: what is out there, and is upgraded.
`tests/upgrade/MAKERS` names, for each layout of kept memory but the latest, a commit that makes it.

This module must not know what an upgrade does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import DEADLINE_S, SOURCE_ROOTS, daemon_environment
from support.sources import REPOSITORY
from vswapd_backends.shared import SYSTEM_PAGE

PREVIOUS = (REPOSITORY / "tests/upgrade/PREVIOUS").read_text().strip()
MAKERS = {
    int(version): commit
    for version, commit in map(
        str.split, (REPOSITORY / "tests/upgrade/MAKERS").read_text().splitlines()
    )
}
_PROGRAM = Path(__file__).with_name("client_program.py")


def git(*arguments: str) -> bytes:
    """What git says in the repository.

    A tree without history skips the test, which CI does not accept.
    """
    command = ["git", "-C", str(REPOSITORY), "-c", f"safe.directory={REPOSITORY}", *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", b"").decode().strip() or error
        pytest.skip(f"the previous version comes from git's history: {why}")


def sources_of(commit: str, directory: Path) -> Path:
    """The sources of a version, put into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    # Not tarfile: how it is told to be careful is not the same in all versions of Python 3.11.
    subprocess.run(["tar", "-x", "-C", str(directory)], input=git("archive", commit), check=True)
    return directory


def version_of(fd: int) -> int:
    """The layout version that kept memory says of itself."""
    label = os.pread(fd, 12, os.fstat(fd).st_size - SYSTEM_PAGE)
    return int.from_bytes(label[8:], "little")


def python_path(sources: Path) -> str:
    """PYTHONPATH for the version that lies there."""
    return os.pathsep.join(str(sources / root.name) for root in SOURCE_ROOTS)


class Program:
    """A client in a process of its own; see client_program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, do: str, **rest: Any) -> Any:
        """Have it do something; returns its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        assert "failed" not in said, said["failed"]
        return said["ok"]

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask an operator's verb of the daemon."""
        found: dict[str, Any] = self.tell("call", verb=verb, arguments=arguments)
        return found

    def status(self) -> dict[str, Any]:
        """The daemon's status."""
        found: dict[str, Any] = self.tell("status")
        return found


@contextlib.contextmanager
def program(socket_path: Path, sources: Path) -> Iterator[Program]:
    """A client of the version that lies in `sources`."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(_PROGRAM), str(socket_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=daemon_environment({"PYTHONPATH": python_path(sources)}),
    )
    try:
        with process:
            yield Program(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
