"""Who is at the other end: told apart by when its process started, as far as that can be told."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest

from vswapd.peer import Peer, started


def test_a_process_that_lives_and_one_that_has_ended() -> None:
    """It is the same number as long as it lives, and 0 from its end on, waited for or not."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    first = started(process.pid)
    assert first == started(process.pid) > 0
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert started(process.pid) == 0
    process.wait()
    assert started(process.pid) == 0


def test_where_nothing_can_be_opened_nobody_has_ended() -> None:
    """Without a descriptor to look with, it is an error: a client that lives is not given up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            started(os.getpid())
        peer = Peer(uid=0, pid=os.getpid())
        assert peer.started == 0
        assert peer.name == f"pid {os.getpid()}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
