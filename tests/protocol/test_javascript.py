"""A client in another language, written from docs/protocol.md alone, drives the real daemon.

JavaScript is what most rounds numbers beyond 2**53, which slots are.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import RunningDaemon, running_daemon

CLIENT = Path(__file__).parent / "client.js"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("server.shards=2", "pool.max=32M") as running:
        yield running


def kill_shards(daemon: RunningDaemon) -> None:
    """Kill all of them, and wait until they are no more."""
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    for pid in map(int, text.split()):
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(30_000)
        os.close(pidfd)


@pytest.mark.parametrize("scenario", ["basics", "errors", "resume", "named"])
def test_a_client_in_javascript(daemon: RunningDaemon, scenario: str) -> None:
    """Pages in and out, mistakes, coming back after a kill, and a space with a name."""
    with subprocess.Popen(
        ["node", str(CLIENT), scenario, str(daemon.socket_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            while client.stdout.readline() == "kill\n":
                kill_shards(daemon)
                client.stdin.write("done\n")
                client.stdin.flush()
            _, said = client.communicate()
        finally:
            client.kill()
    assert client.returncode == 0, said
