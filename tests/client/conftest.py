"""What the client's tests share: places for sockets, the fake daemon, the real one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.fake_daemon import FakeDaemon

SILENCE_S = 30.0
"""A client in these tests that hears nothing for so long has failed."""


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # not tmp_path: its names can pass the 108 bytes of a socket's address
    with tempfile.TemporaryDirectory(prefix="vswap-test-") as directory:
        yield Path(directory) / "vswapd.sock"


@pytest.fixture
def fake(socket_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(socket_path) as daemon:
        yield daemon


@pytest.fixture
def space(fake: FakeDaemon) -> Iterator[vswap.Space]:
    with vswap.connect(fake.path, timeout=SILENCE_S) as space:
        yield space


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("pool.max=64M") as daemon:
        yield daemon


@pytest.fixture
def real_space(daemon: RunningDaemon) -> Iterator[vswap.Space]:
    with vswap.connect(daemon.socket_path, timeout=SILENCE_S) as space:
        yield space
