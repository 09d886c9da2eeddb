"""Who reads the daemon's log, or does not: the daemon goes on in any case."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import RunningDaemon, daemon_environment, running_daemon
from support.wire import STATUS, STORE, Wire, noise
from vswap.control import Control

KEY = "metrics.textfile"
"""What is set: a path may be long, and so few lines are as much as is kept."""
LONG = "./" * 1900
DROPPED = re.compile(r" (\d+) lines of the log were dropped here")


@contextmanager
def unread_log(folder: Path, shards: int) -> Iterator[tuple[RunningDaemon, int]]:
    """A daemon whose standard error is a pipe, and the end of it that nobody reads yet."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with running_daemon(
            *("pool.max=8M", f"server.shards={shards}"),
            under=("sh", "-c", f'exec "$@" 2>{pipe}', "sh"),
        ) as daemon:
            yield daemon, reader
    finally:
        os.close(reader)


def sets(daemon: RunningDaemon, values: range) -> None:
    with Control(daemon.socket_path) as control:
        for value in values:
            control.call("set", key=KEY, value=f"{daemon.directory}/{LONG}{value}.prom")


def read_until(reader: int, text: str) -> str:
    os.set_blocking(reader, True)
    said = b""
    while text.encode() not in said:
        piece = os.read(reader, 65536)
        assert piece, said[-1000:]
        said += piece
    return said.decode()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pipe_that_nobody_reads(tmp_path: Path, shards: int) -> None:
    """The daemon serves and can be steered; who reads later is told how much he has missed."""
    with unread_log(tmp_path, shards) as (daemon, reader):
        sets(daemon, range(1, 101))
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            assert wire.ask(STORE, noise(3), count=3).status == 0
            assert wire.ask(STATUS).status == 0
        said = read_until(reader, "were dropped here")
        sets(daemon, range(101, 102))
        said += read_until(reader, f"new {daemon.directory}/{LONG}101.prom")
        lines = [line for line in said.splitlines() if KEY in line or DROPPED.search(line)]
        told = [int(found[1]) for line in lines if (found := DROPPED.search(line))]
        seen = [int(line.rpartition("/")[2].removesuffix(".prom")) for line in lines if KEY in line]
        assert len(told) == 1
        assert len(seen) + sum(told) == 101
        # The line stands where the others would have stood.
        cut = next(i for i, line in enumerate(lines) if DROPPED.search(line))
        assert seen[:cut] == [*range(1, cut + 1)]
        assert seen[cut:] == [*range(seen[cut], 102)]
        # And it ends as well, when nobody reads again.
        sets(daemon, range(1, 21))
        daemon.terminate()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_reader_that_has_gone(tmp_path: Path, shards: int) -> None:
    """A pipe without a reader costs lines, and nothing else."""
    with unread_log(tmp_path, shards) as (daemon, reader):
        os.dup2(os.open(os.devnull, os.O_RDONLY), reader)
        sets(daemon, range(1, 11))
        daemon.reload()
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            assert wire.ask(STORE, noise(3), count=3).status == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_a_full_disk_behind_the_log(shards: int) -> None:
    """Lines that cannot be written are lost, and nothing else."""
    with running_daemon(
        *("pool.max=8M", f"server.shards={shards}"),
        under=("sh", "-c", 'exec "$@" 2>/dev/full', "sh"),
    ) as daemon:
        sets(daemon, range(1, 11))
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            assert wire.ask(STORE, noise(3), count=3).status == 0


@pytest.mark.parametrize("begin", ["journal.begin()", ""])
def test_lines_that_were_lost_are_counted(tmp_path: Path, begin: str) -> None:
    """Once it can be written again the log begins with how many lines it lacks."""
    script = f"""
import logging, resource, sys
from vswapd import journal
journal.set_up("info")
{begin}
def limit(most):
    logging.getLogger().handlers[0].flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
logging.info("first")
limit(70)
for number in range(10):
    logging.info("lost %d, %s", number, "x" * 100)
limit(resource.RLIM_INFINITY)
logging.info("last")
"""
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=daemon_environment(),
            stderr=file,
            timeout=60,
            check=True,
        )
    first, torn, told, last = log.read_text().splitlines()
    assert first.endswith("first")
    assert torn.startswith(first[:11])
    assert "10 lines of the log were dropped here" in told
    assert last.endswith("last")


@pytest.mark.parametrize("begin", ["journal.begin()", ""])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_process_ends_whoever_does_not_read(kind: str, begin: str) -> None:
    """Neither lines nor the end wait for who has a pipe, or a socket as the journal has, unread."""
    script = f"""
import logging
from vswapd import journal
journal.set_up("info")
{begin}
for number in range(5000):
    logging.info("%d %s", number, "x" * 1000)
"""
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=daemon_environment(),
            stderr=writer,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0
        os.close(writer)
        with os.fdopen(reader, "rb") as log:
            lines = log.read().splitlines()
        numbers = [int(line.split()[-2]) for line in lines if line.endswith(b"x" * 1000)]
        assert numbers == [*range(len(numbers))]
        assert numbers
    finally:
        with contextlib.suppress(OSError):
            os.close(writer)


def test_the_journal_has_one_style(tmp_path: Path) -> None:
    """A reload is told in the same words whoever has asked for it, and nothing as Python has it."""
    with running_daemon(config='[pool]\nmax = "8M"\n') as daemon:
        file = daemon.directory / "vswapd.toml"
        with Control(daemon.socket_path) as control:
            file.write_text('[pool]\nmax = "6M"\n[server]\nmax_batch = 7\n')
            daemon.reload()
            file.write_text('[pool]\nmax = "5M"\n[server]\nmax_batch = 7\n')
            control.call("reload")
            control.call("swapon", path=str(tmp_path / "swap"), size=8 << 20)
            control.call("set", key="pool.tiers", value="zstd:3")
            control.call("compact")
            control.call("writeback", bytes=1 << 20)
            control.call("verify")
            control.call("swapoff", path=str(tmp_path / "swap"))
        log = daemon.log
        assert log.count("reload: changed pool.max") == 2
        assert log.count("reload: needs a restart to take effect: server.max_batch") == 2
        assert "set: key pool.tiers, old " in log
        for python in ("['", "[]", "{'", "'pool", "None", "True", "False", "='"):
            assert python not in log, python
