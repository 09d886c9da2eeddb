"""A shard that is killed is there again, with all that it held, and its clients notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.mortal import mortal
from support.wire import (
    BAD_ARGUMENT,
    CONTROL,
    FOR_CONTROL,
    HELLO,
    REASONS,
    SPACE_LOST,
    Wire,
)
from vswap.control import Control
from vswapd.config_schema import Device, Server
from vswapd.forking import Child
from vswapd.messages import Attach, Parted
from vswapd.reception import Reception
from vswapd.shard_process import ShardProcess
from vswapd.supervisor import Supervisor
from vswapd.swap_table import CLUSTER_SLOTS, Tag, make_words
from vswapd_backends.base import Places
from vswapd_backends.shared_extents import owners_region

SHARDS = 3
NOBODY = 65534
FORK = multiprocessing.get_context("fork")
DISABLED = REASONS["disabled"]


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(f"server.shards={SHARDS}", "pool.max=32M") as running:
        yield running


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


def shards_of(daemon: RunningDaemon) -> list[int]:
    """The processes of the shards; those that are being started may be missing."""
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def kill(pid: int) -> None:
    """Kill a process that is not ours, and wait until it is no more."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(30_000)
        finally:
            os.close(pidfd)


def kill_all(daemon: RunningDaemon) -> None:
    for pid in shards_of(daemon):
        kill(pid)


def successor(daemon: RunningDaemon, others: set[int]) -> int:
    """The process that has come in place of one that was killed."""
    while True:
        found = set(shards_of(daemon)) - others
        if found:
            return found.pop()
        os.sched_yield()


def damage_tables(daemon: RunningDaemon) -> None:
    """Have the first slots name places that there are not."""
    count = 4 * CLUSTER_SLOTS
    places = Places(np.full(count, 1 << 40), np.full(count, 100))
    words = make_words(Tag.ZSWAP, places)
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        if "vswapd-table" in str(link.readlink()):
            with link.open("r+b") as table:
                table.write(words.tobytes())


def test_pages_outlive_their_shards(daemon: RunningDaemon) -> None:
    """Of the pool and of zeros, old and overwritten; in the middle of a space's life."""
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        content = noise(900) + bytes(100 * 4096)
        slots = space.store(content)
        kill_all(daemon)
        assert space.load(slots) == content
        space.store(content[::-1], slots=slots)
        space.free(slots[500:])
        kill_all(daemon)
        assert space.load(slots[:500]) == content[::-1][: 500 * 4096]
        with pytest.raises(vswap.BadSlot):
            space.load(slots[600:])
        with Control(daemon.socket_path) as control:
            assert control.call("verify")["ok"]
            assert control.status()["slots"]["allocated"] == 500
    with vswap.connect(daemon.socket_path) as other:
        assert other.status()["slots"]["allocated"] == 0


def test_pages_on_devices_outlive_their_shards(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The device stays in use, each shard has its part of it again, and swapoff moves all."""
    path = str(tmp_path / "swap")
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        with Control(daemon.socket_path) as control:
            control.call("swapon", path=path, size=32 << 20)
        content = noise(1500)
        slots = space.store(content)
        with Control(daemon.socket_path) as control:
            control.call("writeback", bytes=32 << 20)
        kill_all(daemon)
        assert space.load(slots) == content
        with Control(daemon.socket_path) as control:
            document = control.status()
            assert document["devices"][0]["state"] == "on"
            assert document["slots"]["phys"] > 1000
            control.call("swapoff", path=path)
            assert control.status()["devices"] == []
        assert space.load(slots) == content


def test_a_device_is_let_go_by_shards_that_came_later(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    """After a swapoff no process has it open or locked, and it can be put into use again."""
    path = str(tmp_path / "swap")
    for _ in range(2):
        with Control(daemon.socket_path) as control:
            control.call("swapon", path=path, size=32 << 20)
        kill_all(daemon)
        with Control(daemon.socket_path) as control:
            control.call("swapoff", path=path)
        for pid in (daemon.pid, *shards_of(daemon)):
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert path not in links
            assert not any("vswapd-extents" in link for link in links)


def test_a_device_that_comes_twice_takes_no_lock_from_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the second descriptor of its owners the process's record locks go: not while it has one.

    Two shards could have the same chunk else, and each write over the pages of the other.
    """
    owners, lock, close = owners_region(100, 2), threading.Lock(), os.close
    locked: list[bool] = []

    def watched(fd: int) -> None:
        if fd == twin:
            locked.append(lock.locked())
        close(fd)

    process = ShardProcess.__new__(ShardProcess)
    attach = Attach(Device(path="/swap"), 100, direct=False, block_device=False, boot_id=b"")
    shard = SimpleNamespace(
        driver=SimpleNamespace(lock=lock), steering=SimpleNamespace(devices={"/swap": None})
    )
    monkeypatch.setattr(process, "_shard", shard, raising=False)
    monkeypatch.setattr(os, "close", watched)
    twin = os.dup(owners.fd)
    process._attach(attach, os.open("/dev/null", os.O_RDONLY), twin)
    assert locked == [True]


def test_settings_of_run_time_outlive_their_shards(daemon: RunningDaemon) -> None:
    """What was set holds in the process that comes after, too."""
    with Control(daemon.socket_path) as control:
        control.call("set", key="store.enabled", value="false")
    kill_all(daemon)
    with (
        vswap.connect(daemon.socket_path, timeout=30) as space,
        pytest.raises(vswap.Rejected) as caught,
    ):
        space.store(noise(1))
    assert caught.value.reason == "disabled"


def test_a_setting_reaches_whoever_comes_after_a_shard_that_had_it() -> None:
    """It dies while another one has not got it yet: what holds in all holds in the next process."""
    with running_daemon("server.shards=2") as daemon:
        with Wire(daemon.socket_path) as wire:
            wire.hello(shard=0)
            unlucky, slow = shards_of(daemon)
            os.kill(slow, signal.SIGSTOP)
            (daemon.directory / "vswapd.toml").write_text("[store]\nenabled = false\n")
            daemon.process.send_signal(signal.SIGHUP)
            while wire.store(noise(1)).flags != DISABLED:
                pass
            for _ in range(50):  # its answers come in order: that to the supervisor has, too
                assert wire.control("nonsense").status == BAD_ARGUMENT
        kill(unlucky)
        assert successor(daemon, {unlucky, slow})
        os.kill(slow, signal.SIGCONT)
        daemon.await_notification("READY=1")
        with Wire(daemon.socket_path) as wire:
            wire.hello(shard=0)
            assert wire.store(noise(1)).flags == DISABLED


def test_a_client_that_does_not_come_back_is_forgotten() -> None:
    """After resume_timeout what nobody wants is freed; who comes later is told."""
    with running_daemon("server.shards=2", "server.resume_timeout=100ms") as daemon:
        with mortal(daemon.socket_path, noise(5), shard=0) as token:
            os.kill(daemon.pid, signal.SIGSTOP)  # the end of its connection is not seen
            for pid in shards_of(daemon):
                os.kill(pid, signal.SIGKILL)
        os.kill(daemon.pid, signal.SIGCONT)
        with vswap.connect(daemon.socket_path, timeout=30) as other:
            while other.status()["slots"]["allocated"]:
                other.ping()
        with Wire(daemon.socket_path) as late:
            said = f'{{"token": "{token}", "shard": 0, "resume": true}}'.encode()
            assert late.ask(HELLO, said).status == SPACE_LOST


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
def test_requests_may_have_any_number(daemon: RunningDaemon, number: int) -> None:
    """Up to 64 bits, as the protocol says, and whoever comes back is told of it by that."""
    with Wire(daemon.socket_path) as wire:
        token = wire.hello(shard=0)["token"]
        slots = wire.store(noise(3)).slots
        wire.last_id = number - 2
        assert wire.free(slots[1:]).status == 0
        assert wire.store(noise(1)).request_id == number
        kill_all(daemon)
    with Wire(daemon.socket_path) as back:
        last = back.hello(shard=0, token=token, resume=True)["last"]
        assert (last["request"], last["status"]) == (number, 0)


def test_a_client_that_was_not_answered_comes_back_to_what_it_opened_then(
    daemon: RunningDaemon,
) -> None:
    """The HELLO that opens a lane may be carried out, and its answer lost: another is said."""
    with Wire(daemon.socket_path) as home:
        token = home.hello(shard=0)["token"]
        with Wire(daemon.socket_path) as unheard:
            unheard.hello(shard=1, token=token)
            kill_all(daemon)
        with Wire(daemon.socket_path) as lane:
            lane.hello(shard=1, token=token)
            content = noise(3)
            slots = lane.store(content).slots
            kill_all(daemon)
        with Wire(daemon.socket_path) as back:
            back.hello(shard=1, token=token, resume=True)
            assert back.load(slots).body == content


def as_nobody(path: Path, said: bytes, pipe: Connection) -> None:
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with Wire(path) as thief:
        pipe.send(thief.ask(HELLO, said).status)


def test_another_users_or_a_made_up_token_resumes_nothing() -> None:
    """Whoever says a token that opened no space of his gets none; the space waits for its owner."""
    with running_daemon("server.shards=2", "server.socket_mode=0666", "pool.max=8M") as daemon:
        os.chmod(daemon.directory, 0o755)
        with Wire(daemon.socket_path) as wire:
            said = f'{{"token": "{"0" * 32}", "resume": true}}'.encode()
            assert wire.ask(HELLO, said).status == SPACE_LOST
        if os.geteuid() != 0:
            return  # being another user needs root
        with Wire(daemon.socket_path) as owner:
            token = owner.hello(shard=1)["token"]
            content = noise(5)
            slots = owner.store(content).slots
            kill_all(daemon)
        said = f'{{"token": "{token}", "shard": 1, "resume": true}}'.encode()
        here, there = FORK.Pipe()
        thief = FORK.Process(target=as_nobody, args=(daemon.socket_path, said, there))
        thief.start()
        assert here.recv() == SPACE_LOST
        thief.join()
        with Wire(daemon.socket_path) as owner:
            owner.hello(token=token, shard=1, resume=True)
            assert owner.load(slots).body == content


def test_a_space_that_is_in_use_is_not_taken_over(daemon: RunningDaemon) -> None:
    """Its token resumes it only after its process has died."""
    with Wire(daemon.socket_path) as owner, Wire(daemon.socket_path) as thief:
        token = owner.hello(shard=1)["token"]
        said = f'{{"token": "{token}", "shard": 1, "resume": true}}'.encode()
        assert thief.ask(HELLO, said).status == SPACE_LOST
        owner.assert_in_step()


def test_a_shard_may_die_again_and_again(daemon: RunningDaemon) -> None:
    """It is started each time, with pauses when it happens often."""
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        content = noise(30)
        slots = space.store(content)
        survivors = set(shards_of(daemon))
        unlucky = min(survivors)
        survivors.discard(unlucky)
        for _ in range(7):
            kill(unlucky)
            unlucky = successor(daemon, survivors | {unlucky})
        assert space.load(slots) == content


def test_what_was_asked_of_a_shard_is_asked_of_the_next_process() -> None:
    """A verb goes on, whichever is seen first: that the shard has hung up, or that it has died."""
    with (
        running_daemon("server.shards=2") as daemon,
        Wire(daemon.socket_path) as operator,
        Wire(daemon.socket_path) as other,
    ):
        operator.hello(FOR_CONTROL, shard=0)
        other.hello(FOR_CONTROL, shard=0)
        here, unlucky = shards_of(daemon)
        for _ in range(8):
            os.kill(unlucky, signal.SIGSTOP)
            operator.socket.sendall(operator.frame(CONTROL, b'{"verb": "compact"}'))
            for _ in range(10):  # by then the supervisor has asked
                assert other.control("nonsense").status == BAD_ARGUMENT
            kill(unlucky)
            reply = operator.reply()
            assert reply.status == 0, reply.text
            unlucky = successor(daemon, {here, unlucky})


def test_a_shard_that_cannot_be_made_for_now_is_made_later(daemon: RunningDaemon) -> None:
    """The system has no descriptors left when it dies: it is tried again until there are."""
    with vswap.connect(daemon.socket_path, timeout=30) as space:
        content = noise(300)
        slots = space.store(content)
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        kill_all(daemon)
        while daemon.log.count("cannot be started for now") < SHARDS:
            assert "Traceback" not in daemon.log
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert space.load(slots) == content


def test_the_last_words_of_a_shard_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections are counted off when it dies, and not once more by what it had still said."""

    async def scenario(sock: socket.socket) -> None:
        supervisor = Supervisor.__new__(Supervisor)
        child = Child(0, 100, sock)
        reception = Reception([child], Server(), lambda work: work.close())
        monkeypatch.setattr(supervisor, "_reception", reception, raising=False)
        child.there.set()
        handle = supervisor._handler(child)
        for _ in range(2):
            reception.seat(child, 7)
        await handle(Parted(7), [])
        assert (child.connections, child.places.total(), reception.taken) == (1, 1, 1)
        child.there.clear()
        reception.clear(child)
        await handle(Parted(7), [])
        child.pid = 101
        child.there.set()
        await handle(Parted(7), [])
        assert (child.connections, child.places.total(), reception.taken) == (0, 0, 0)

    with socket.socket() as sock:
        asyncio.run(scenario(sock))


def test_a_shard_whose_memory_is_damaged_ends_the_daemon() -> None:
    """It cannot start again: the daemon says why, and the service manager hears of it."""
    with running_daemon("server.shards=2", clean_log=False) as daemon:
        with Wire(daemon.socket_path) as wire:
            wire.hello(shard=0)
            assert wire.store(noise(30)).status == 0
            damage_tables(daemon)
            kill(shards_of(daemon)[0])
            daemon.await_exit(expected=71)
        assert "that were never handed out" in daemon.log
        assert "cannot be started again" in daemon.log
