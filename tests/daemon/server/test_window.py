"""Pages through the window: as right as through the socket, and no way to harm anybody."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import socket
import struct
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from support.daemon import RunningDaemon, running_daemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_LENGTH,
    BAD_SLOT,
    FOR_CONTROL,
    FREE,
    HELLO,
    LOAD,
    STATUS,
    STORE,
    WITH_SLOTS,
    Reply,
    Wire,
    noise,
    pack,
)
from vswapd.window import Window

IN_WINDOW = 2
SIZE = 1 << 20
SCRIBBLED = b"\x11\x22\xee"
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)


class Windowed(Wire):
    """A connection with a window, spoken by hand."""

    def __init__(self, path: Path, wish: object = SIZE, **said: object) -> None:
        super().__init__(path)
        body = json.dumps({"window": wish, **said}).encode()
        self.socket.sendall(self.frame(HELLO, body))
        data, ancillary, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(4))
        self.said = json.loads(data[24:])
        self.fds = [struct.unpack("i", rights)[0] for _, _, rights in ancillary]
        self.memory = mmap.mmap(self.fds[0], self.said["window"]) if self.fds else None

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        if self.memory is not None:
            self.memory.close()
        for fd in self.fds:
            os.close(fd)

    def store_at(self, offset: int, count: int, slots: list[int] | None = None) -> Reply:
        body = struct.pack("<Q", offset) + pack(slots or [])
        flags = IN_WINDOW | (WITH_SLOTS if slots else 0)
        return self.ask(STORE, body, count=count, flags=flags)

    def load_at(self, offset: int, slots: list[int]) -> Reply:
        body = struct.pack("<Q", offset) + pack(slots)
        return self.ask(LOAD, body, count=len(slots), flags=IN_WINDOW)


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon("pool.max=32M", "server.window=2M") as running:
        yield running


def test_pages_come_and_go_through_the_window(daemon: RunningDaemon) -> None:
    """What is stored from the window loads into it, or through the socket, and the other way."""
    with Windowed(daemon.socket_path) as wire:
        assert wire.memory is not None
        pages = noise(40) + bytes(4096) * 3
        wire.memory[8192 : 8192 + len(pages)] = pages
        slots = wire.store_at(8192, 43).slots
        wire.memory[:] = b"x" * SIZE
        reply = wire.load_at(4096, slots[::-1])
        assert (reply.status, reply.count, reply.body) == (0, 43, b"")
        got = wire.memory[4096 : 4096 + len(pages)]
        assert [got[i : i + 4096] for i in range(0, len(got), 4096)] == [
            pages[i : i + 4096] for i in range(0, len(pages), 4096)
        ][::-1]
        assert wire.memory[:4096] == b"x" * 4096
        assert wire.memory[4096 + len(pages) :] == b"x" * (SIZE - 4096 - len(pages))
        assert wire.load(slots).body == pages
        through_socket = wire.store(pages).slots
        wire.load_at(0, through_socket)
        assert wire.memory[: len(pages)] == pages
        new = noise(2)
        wire.memory[:8192] = new
        assert wire.store_at(0, 2, slots[5:7]).slots == slots[5:7]
        assert wire.load(slots).body == pages[: 5 * 4096] + new + pages[7 * 4096 :]


@pytest.mark.parametrize(
    ("wish", "granted"),
    [(0, 0), (1, 4096), (5000, 8192), (2 << 20, 2 << 20), (1 << 60, 2 << 20), (None, 0)],
)
def test_a_window_is_as_large_as_it_may_be(
    daemon: RunningDaemon, wish: int | None, granted: int
) -> None:
    """A wish is rounded up to pages and cut to server.window; without one there is none."""
    with Windowed(daemon.socket_path, wish) as wire:
        assert wire.said["window"] == granted
        assert len(wire.fds) == bool(granted)
        if granted:
            assert os.fstat(wire.fds[0]).st_size == granted


@pytest.mark.parametrize("wish", [-1, True, "1M", 1.5, [1]])
def test_a_wish_that_makes_no_sense_is_refused(daemon: RunningDaemon, wish: object) -> None:
    """What is no number of bytes is a bad argument."""
    with Wire(daemon.socket_path) as wire:
        assert wire.ask(HELLO, json.dumps({"window": wish}).encode()).status == BAD_ARGUMENT


def test_control_connections_have_none(daemon: RunningDaemon) -> None:
    """Who keeps no pages gets no window."""
    with Wire(daemon.socket_path) as wire:
        said = json.dumps({"window": SIZE}).encode()
        assert wire.ask(HELLO, said, flags=FOR_CONTROL).json["window"] == 0


def test_windows_can_be_switched_off() -> None:
    """server.window=0: nobody gets one."""
    with running_daemon("server.window=0") as daemon, Windowed(daemon.socket_path) as wire:
        assert wire.said["window"] == 0
        assert wire.store_at(0, 1).status == BAD_ARGUMENT
        assert wire.store(noise(1)).status == 0


def test_what_is_not_in_the_window_is_refused(daemon: RunningDaemon) -> None:
    """Offsets beyond it, not of a page, or bodies of another length: refused, nothing changed."""
    with Windowed(daemon.socket_path) as wire:
        (slot,) = wire.store(noise(1)).slots
        before = wire.ask(STATUS).json["slots"]
        for offset in (1, 4095, SIZE, SIZE - 4095, 1 << 63, (1 << 64) - 4096):
            assert wire.store_at(offset, 1).status == BAD_ARGUMENT
            assert wire.load_at(offset, [slot]).status == BAD_ARGUMENT
        assert wire.store_at(SIZE - 4096, 2).status == BAD_ARGUMENT
        assert wire.load_at(SIZE - 4096, [slot] * 2).status == BAD_ARGUMENT
        assert wire.ask(STORE, noise(1), count=1, flags=IN_WINDOW).status == BAD_LENGTH
        assert wire.ask(LOAD, pack([slot]), count=1, flags=IN_WINDOW).status == BAD_LENGTH
        assert wire.ask(FREE, pack([slot]), count=1, flags=IN_WINDOW).status == BAD_ARGUMENT
        assert wire.load_at(0, [slot, slot ^ 1 << 45]).status == BAD_SLOT
        assert wire.ask(STATUS).json["slots"] == before
        assert wire.store_at(SIZE - 4096, 1).status == 0


def test_nobody_can_take_the_window_away(daemon: RunningDaemon) -> None:
    """The window is sealed: a client can neither cut it nor make it grow, nor break the seals."""
    with Windowed(daemon.socket_path) as wire:
        fd = wire.fds[0]
        for size in (0, 4096, SIZE - 1, SIZE + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_GROW
        assert seals & fcntl.F_SEAL_SEAL
        assert wire.store_at(0, 4).status == 0


def _scribble(memory: mmap.mmap, ready: Event, stop: Event) -> None:
    """Write in all of the window without end. In a process of its own, which shares the memory."""
    fills = [bytes([value]) * SIZE for value in SCRIBBLED]
    while not stop.is_set():
        for fill in fills:
            memory[:] = fill
        ready.set()


def test_what_is_taken_from_a_window_is_the_daemons_alone() -> None:
    """Whatever is written there afterwards, the bytes that are worked with stay as they were."""
    window = Window(SIZE)
    with mmap.mmap(window.fd, SIZE) as theirs:
        theirs[:] = b"a" * SIZE
        taken = window.take(8192, 2)
        theirs[:] = b"b" * SIZE
        assert taken == b"a" * 8192


def test_scribbling_meanwhile_harms_nobody_else(daemon: RunningDaemon) -> None:
    """A client that changes the window while it is read gets some page of its own, and no other.

    Each byte is one of those that were written there, the same each time it is loaded.
    """
    with Windowed(daemon.socket_path) as wire, Wire(daemon.socket_path) as other:
        other.hello()
        theirs = noise(64)
        kept = other.store(theirs).slots
        assert wire.memory is not None
        wire.memory[:] = bytes([SCRIBBLED[0]]) * SIZE
        fork = multiprocessing.get_context("fork")
        ready, stop = fork.Event(), fork.Event()
        scribbler = fork.Process(target=_scribble, args=(wire.memory, ready, stop), daemon=True)
        scribbler.start()
        torn = 0
        try:
            assert ready.wait(30)
            for _ in range(100):
                slots = wire.store_at(0, 64).slots
                mine = wire.load(slots).body
                assert len(mine) == 64 * 4096
                assert set(mine) <= set(SCRIBBLED)
                torn += len(set(mine)) > 1
                assert wire.load(slots).body == mine
                # Into memory that somebody writes in, too: nobody knows what is there then.
                assert wire.load_at(0, slots).status == 0
                assert wire.load(slots).body == mine
                assert wire.free(slots).status == 0
                assert other.load(kept).body == theirs
        finally:
            stop.set()
            scribbler.join()
        assert torn, "nothing was written while the window was read: this has tested nothing"
        assert other.done("verify")["ok"]


def test_a_window_that_its_client_gave_up_still_works(daemon: RunningDaemon) -> None:
    """Unmapped and closed at the other end, or with holes in it, it is the daemon's to read."""
    with Windowed(daemon.socket_path) as wire:
        assert wire.memory is not None
        pages = noise(16)
        wire.memory[: len(pages)] = pages
        slots = wire.store_at(0, 16).slots
        libc = ctypes.CDLL(None, use_errno=True)
        hole = (ctypes.c_long(4096), ctypes.c_long(8 * 4096))
        assert libc.fallocate(wire.fds[0], PUNCH_HOLE | KEEP_SIZE, *hole) == 0
        stored = wire.store_at(0, 16).slots
        expected = pages[:4096] + bytes(8 * 4096) + pages[9 * 4096 :]
        assert wire.load(stored).body == expected
        beyond = (ctypes.c_long(SIZE), ctypes.c_long(1 << 30))
        assert libc.fallocate(wire.fds[0], KEEP_SIZE, *beyond) == -1
        assert ctypes.get_errno() == errno.EPERM
        wire.memory.close()
        wire.memory = None
        os.close(wire.fds.pop())
        assert wire.load_at(0, slots).status == 0
        assert wire.load(wire.store_at(0, 16).slots).body == pages


def test_windows_leave_nothing_behind(daemon: RunningDaemon) -> None:
    """A window goes with its connection: no descriptor, no memory."""
    with Wire(daemon.socket_path) as wire:
        wire.hello()
        before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        for _ in range(30):
            with Windowed(daemon.socket_path) as windowed:
                windowed.store_at(0, 16)
        while wire.ask(STATUS).json["clients"] != 1:
            pass
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "vswapd-window" not in maps


def test_every_shard_has_windows() -> None:
    """Connections to all shards of one space each have their own."""
    with (
        running_daemon("server.shards=2", "pool.max=32M") as daemon,
        Windowed(daemon.socket_path, shard=0) as one,
        Windowed(daemon.socket_path, shard=1) as two,
    ):
        for wire in (one, two):
            assert wire.memory is not None
            pages = noise(16)
            wire.memory[: len(pages)] = pages
            assert wire.load(wire.store_at(0, 16).slots).body == pages
