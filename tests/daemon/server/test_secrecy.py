"""What one client must never see of another's, and what nobody may see: pages, tokens, keys."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.wire import BAD_SLOT, HELLO, LOAD, PING, Wire, pack
from vswap.control import Control
from vswapd.control import Control as Kept
from vswapd.memory import KINDS, ShardMemory
from vswapd.undumpable import be_undumpable

PAGE = 4096
MARK = b"<nobody else's business>"
NOBODY = 65534
PR_SET_DUMPABLE = 4
DYING = ["env", "--default-signal=QUIT", "sh", "-c", 'ulimit -c "$(ulimit -Hc)"; exec "$@"', "sh"]
"""Before a command that SIGQUIT is to kill with a core file, whatever the test runner ignores."""


def marked(count: int) -> bytes:
    """Pages that shrink and pages that are kept as they are, each with the mark in it."""
    noise = np.random.default_rng(1).bytes(count * PAGE)
    pages = []
    for number in range(count):
        body = noise[number * PAGE : (number + 1) * PAGE] if number % 2 else MARK * 200
        pages.append((MARK + body)[:PAGE])
    return b"".join(pages)


@pytest.fixture(params=[1, 3])
def daemon(request: pytest.FixtureRequest) -> Iterator[RunningDaemon]:
    settings = ("pool.max=4M", f"server.shards={request.param}", "log.level=debug")
    with running_daemon(*settings) as running:
        yield running


@pytest.mark.parametrize("encrypt", [True, False])
def test_what_was_freed_is_seen_by_nobody(
    daemon: RunningDaemon, tmp_path: Path, *, encrypt: bool
) -> None:
    """Neither in windows, nor in replies, nor on an encrypted device."""
    path = tmp_path / "swap"
    with Control(daemon.socket_path) as control:
        control.call("swapon", path=str(path), size=32 << 20, encrypt=encrypt)
        with vswap.connect(daemon.socket_path) as victim:
            window = victim.buffer(64)
            window[:] = marked(64)
            slots = [victim.store(window), victim.store(marked(2000))]
            control.call("writeback", bytes=1 << 30)
            assert victim.load(slots[1]) == marked(2000)
            # Without encryption the mark is there to be found.
            assert (MARK in path.read_bytes()) != encrypt
            stale = slots[0][:8].tolist()
            victim.free(slots[0])
        while control.status()["slots"]["allocated"]:
            control.call("compact")
        for _ in range(3):
            with vswap.connect(daemon.socket_path) as other:
                window = other.buffer(512)
                assert not np.frombuffer(window, np.uint8).any()
                assert MARK not in bytes(other.load(other.store(bytes(300 * PAGE))))
                own = np.random.default_rng(2).bytes(300 * PAGE)
                mine = other.store(own)
                assert other.load(mine) == own
                assert MARK not in bytes(window)
        with Wire(daemon.socket_path) as thief:
            thief.hello(shard=stale[0] >> 56)
            reply = thief.ask(LOAD, pack(stale), count=len(stale))
            assert reply.status == BAD_SLOT
            assert MARK not in reply.body
        control.call("swapoff", path=str(path))
    assert MARK not in path.read_bytes()


def test_another_clients_pages_are_no_ones_to_take(daemon: RunningDaemon) -> None:
    """Neither to load, nor to free, nor to overwrite: by no id that is made up."""
    with vswap.connect(daemon.socket_path) as victim, vswap.connect(daemon.socket_path) as thief:
        content = marked(100)
        slots = victim.store(content)
        thief.store(marked(100)[::-1])
        for slot in slots.tolist():
            for attempt in (
                lambda slot=slot: thief.load([slot]),
                lambda slot=slot: thief.free([slot]),
                lambda slot=slot: thief.store(bytes(PAGE), slots=[slot]),
            ):
                with pytest.raises(vswap.BadSlot):
                    attempt()
        for all_at_once in (
            lambda: thief.load(slots),
            lambda: thief.free(slots),
            lambda: thief.store(content[::-1], slots=slots),
            lambda: thief.load(np.concatenate([thief.store(content), slots[-1:]])),
        ):
            with pytest.raises(vswap.BadSlot):
                all_at_once()
        assert victim.load(slots) == content


def memories(daemon: RunningDaemon) -> list[ShardMemory]:
    """The memory of all shards, as root finds it."""
    found: dict[tuple[str, int], int] = {}
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    for pid in [daemon.pid, *map(int, text.split())]:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            kind = str(link.readlink()).removeprefix("/memfd:vswapd-").removesuffix(" (deleted)")
            if kind in KINDS:
                inode = link.stat().st_ino
                if (kind, inode) not in found:
                    found[kind, inode] = os.open(link, os.O_RDWR)
    # Those of one shard were made one after the other.
    kinds = {kind: sorted(key for key in found if key[0] == kind) for kind in KINDS}
    return [
        ShardMemory.adopt({kind: found[kinds[kind][shard]] for kind in KINDS})
        for shard in range(len(kinds["table"]))
    ]


def test_secrets_are_told_to_nobody(daemon: RunningDaemon, tmp_path: Path) -> None:
    """A space's token and a device's key are in no log, status, listing or metric."""
    metrics = tmp_path / "vswapd.prom"
    with Wire(daemon.socket_path) as wire, Control(daemon.socket_path) as control:
        token = wire.hello(shard=0)["token"]
        control.call("swapon", path=str(tmp_path / "swap"), size=32 << 20)
        control.call("set", key="metrics.textfile", value=str(metrics))
        assert wire.store(marked(10)).status == 0
        keys = {
            device.origin.key for memory in memories(daemon) for device in Kept(memory).devices()
        }
        assert keys
        told = repr(control.status()) + repr(control.call("spaces")) + repr(control.call("verify"))
        while not metrics.exists():
            wire.assert_in_step()
        told += metrics.read_text()
        control.call("swapoff", path=str(tmp_path / "swap"))
    told += daemon.log
    for secret in [bytes.fromhex(token), *keys]:
        assert len(secret) >= 16
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form not in told
    assert token not in told


def dumps_core(directory: Path, command: list[str]) -> bool:
    """Whether a process that is killed by SIGQUIT leaves a core file in its directory."""
    directory.mkdir()
    subprocess.run([*DYING, *command], cwd=directory, check=False, capture_output=True)
    return any(directory.iterdir())


def test_no_core_is_dumped(tmp_path: Path) -> None:
    """PR_SET_DUMPABLE: also where cores are wanted, by no process of the daemon."""
    die = "import os, signal; os.kill(os.getpid(), signal.SIGQUIT)"
    hidden = f"from vswapd.undumpable import be_undumpable; be_undumpable(); {die}"
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    if pattern.startswith("core") and most == resource.RLIM_INFINITY:
        assert dumps_core(tmp_path / "plain", [sys.executable, "-c", die])
    assert not dumps_core(
        tmp_path / "hidden", ["env", "-u", "VSWAPD_DUMPABLE", sys.executable, "-c", hidden]
    )
    if os.geteuid() != 0:
        return  # elsewhere tests have daemons dumpable, to look into them
    with running_daemon("server.shards=2", under=DYING, clean_log=False) as daemon:
        text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
        for pid in [*map(int, text.split()), daemon.pid]:
            os.kill(pid, signal.SIGQUIT)
        daemon.await_exit(expected=-signal.SIGQUIT)
        assert not list(daemon.directory.glob("core*"))


def _as_the_same_user(pipe: Connection, *, hidden: bool) -> None:
    """A process with a secret in memory and a memfd, of a user who is not root."""
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as after an exec
    os.environ.pop("VSWAPD_DUMPABLE", None)
    if hidden:
        be_undumpable()
    pipe.send(os.memfd_create("secret"))
    pipe.recv()


def _look(pid: int, fd: int, pipe: Connection) -> None:
    """Another process of that user tries to get at it."""
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    seen = []
    for name in (f"fd/{fd}", "mem", "environ"):
        with contextlib.suppress(PermissionError):
            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
            seen.append(name)
    pipe.send(seen)


@pytest.mark.parametrize("hidden", [True, False])
def test_processes_of_the_same_user_cannot_look_into_it(*, hidden: bool) -> None:
    """Neither its memory nor its descriptors: what else it could be read through is root's."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_as_the_same_user, args=(there,), kwargs={"hidden": hidden})
    process.start()
    fd = here.recv()
    looked, result = fork.Pipe()
    looker = fork.Process(target=_look, args=(process.pid, fd, result))
    looker.start()
    seen = looked.recv()
    here.send("enough")
    process.join()
    looker.join()
    assert seen == ([] if hidden else [f"fd/{fd}", "mem", "environ"])


def test_descriptors_that_clients_send_are_not_kept(daemon: RunningDaemon) -> None:
    """With HELLO, with every request, many at once, of all kinds: the kernel closes them."""
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    pids = [daemon.pid, *map(int, text.split())]

    def held() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

    with contextlib.ExitStack() as made, Wire(daemon.socket_path) as watcher:
        watcher.hello()
        reader, writer = os.pipe()
        made.callback(os.close, reader)
        made.callback(os.close, writer)
        fds = [reader, writer, os.memfd_create("gift"), os.open("/", os.O_RDONLY), 0, 1]
        made.callback(os.close, fds[2])
        made.callback(os.close, fds[3])
        before = held()
        wires = [made.enter_context(Wire(daemon.socket_path)) for _ in range(5)]
        for wire in wires:
            socket.send_fds(wire.socket, [wire.frame(HELLO)], fds * 40)
            assert wire.reply().status == 0
            for _ in range(20):
                socket.send_fds(wire.socket, [wire.frame(PING)], fds * 40)
                assert wire.reply().status == 0
        watcher.assert_in_step()
        # A connection and perhaps its window, and nothing of what came with it.
        assert held() <= before + 3 * len(wires)
