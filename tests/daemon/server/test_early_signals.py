"""Signals before a daemon serves, and after it has stopped: none ends it without order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.service_manager import service
from support.wire import Wire

AT = """
import os, sys, signal

def hook(event, arguments, told=[]):
    what = f"{event} {arguments[0]}" if event in {"import", "os.remove"} else event
    if what.startswith(os.environ["SIGNAL_AT"]) and not told and os.getpid() == own:
        told.append(what)
        os.write(1, b"told")
        os.kill(own, int(os.environ["SIGNAL"]))

own = os.getpid()
sys.addaudithook(hook)
"""
"""Sends a signal to its own process in the moment when something happens there."""
STARTING = (
    "import argparse",
    "import numpy",
    "import vswapd.service",
    "socket.bind",
    "os.fork",
    "socket.connect",
)
"""By the first word of `import`, or an event of sys.audit; the last is READY's way."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        (Path(name) / "python").mkdir()
        (Path(name) / "python" / "sitecustomize.py").write_text(AT)
        yield Path(name)


def environment(folder: Path, moment: str, number: int) -> dict[str, str]:
    usual = daemon_environment()
    path = os.pathsep.join([str(folder / "python"), usual["PYTHONPATH"]])
    return {"PYTHONPATH": path, "SIGNAL_AT": moment, "SIGNAL": str(number)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", STARTING[:-1])
def test_told_to_stop_before_it_serves(folder: Path, moment: str, number: int) -> None:
    """It ends with 0, says nothing alarming, and leaves no socket, no lock and no process."""
    shards = 2 if moment == "os.fork" else 1
    command = ["vswapd", "serve", f"--socket={folder}/s", f"--set=server.shards={shards}"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", *command],
        env=daemon_environment(environment(folder, moment, number)),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"told"
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["python"]


@pytest.mark.parametrize("moment", STARTING)
def test_sighup_before_it_serves(folder: Path, moment: str) -> None:
    """It starts as if nothing had been."""
    shards = 2 if moment == "os.fork" else 1
    variables = environment(folder, moment, signal.SIGHUP)
    with (
        running_daemon(f"server.shards={shards}", environment=variables) as daemon,
        Wire(daemon.socket_path) as wire,
    ):
        wire.hello()
        assert "told" in daemon.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("shards", [1, 2])
def test_signals_when_it_has_stopped(folder: Path, number: int, shards: int) -> None:
    """Another one while it cleans up does not keep it from that: 0, no socket, no lock."""
    variables = environment(folder, "os.remove", number)
    with running_daemon(f"server.shards={shards}", environment=variables) as daemon:
        daemon.terminate()
        assert "told" in daemon.log
        assert {path.suffix for path in daemon.directory.iterdir()}.isdisjoint({".lock", ".sock"})


def test_told_to_stop_while_an_earlier_one_ends() -> None:
    """Who waits until an earlier process has ended does not have to be waited for himself."""
    with service("server.shards=2") as manager:
        shard = int(Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text().split()[0])
        os.kill(shard, signal.SIGSTOP)
        os.kill(manager.pid, signal.SIGKILL)
        manager.launch()
        while not _holds_signals(manager.pid):
            os.sched_yield()
        os.kill(manager.pid, signal.SIGTERM)
        assert manager.await_exit() == 0
        assert "Traceback" not in manager.log
        os.kill(shard, signal.SIGKILL)
        manager.start()


def _holds_signals(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    held = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return bool(held & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("shards", [1, 2])
def test_no_more_processor_time(shards: int) -> None:
    """SIGXCPU ends the daemon in order, with the limit that it comes from."""
    with running_daemon("pool.max=8M", f"server.shards={shards}") as daemon:
        daemon.process.send_signal(signal.SIGXCPU)
        daemon.await_exit(expected=71)
        assert daemon.log.splitlines()[-1].endswith("raise it (LimitCPU= in a unit)")
        assert not daemon.socket_path.exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_signals_that_are_ignored_where_it_comes_from(shards: int) -> None:
    """Also where signals are ignored from the start (nohup, a script's &) it reloads and stops."""
    with running_daemon(
        *("pool.max=8M", f"server.shards={shards}"),
        under=("sh", "-c", 'trap "" HUP INT TERM; exec "$@"', "sh"),
    ) as daemon:
        daemon.reload()
        assert "reload: changed nothing" in daemon.log
        daemon.process.send_signal(signal.SIGINT)
        daemon.await_exit(expected=0)
