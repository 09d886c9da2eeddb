"""A daemon of several shards, from outside: one daemon, whatever goes on behind its socket."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_SLOT,
    FOR_CONTROL,
    HELLO,
    SPACE_LOST,
    STATUS,
    TOO_MANY_CONNECTIONS,
    Wire,
)
from vswap.control import Control
from vswapd_blockdev.device import EXTENT_BYTES
from vswapd_blockdev.header import DATA_OFFSET

SHARDS = 3


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(f"server.shards={SHARDS}", "pool.max=8M") as running:
        yield running


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


def on_shard(daemon: RunningDaemon, shard: int, **more: object) -> Wire:
    return greeted(daemon, shard, **more)[0]


def greeted(daemon: RunningDaemon, shard: int, **more: object) -> tuple[Wire, str]:
    """A connection to a shard, and its space's token."""
    wire = Wire(daemon.socket_path)
    said = wire.hello(0, shard=shard, **more)
    assert (said["shard"], said["shards"] > shard) == (shard, True)
    return wire, said["token"]


def children(daemon: RunningDaemon) -> list[int]:
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def test_a_client_gets_the_shard_it_asks_for(daemon: RunningDaemon) -> None:
    """HELLO names a shard; slots carry it, and are no other shard's."""
    for shard in range(SHARDS):
        with on_shard(daemon, shard) as wire:
            (slot,) = wire.store(noise(1, shard)).slots
            assert slot >> 56 == shard
            assert wire.load([slot]).body == noise(1, shard)
            wrong = slot ^ (1 << 56)
            assert wire.load([wrong]).status == BAD_SLOT


def test_clients_without_a_wish_are_spread(daemon: RunningDaemon) -> None:
    """Who asks for no shard gets the one with the fewest connections."""
    with contextlib.ExitStack() as open_ones:
        wires = [open_ones.enter_context(Wire(daemon.socket_path)) for _ in range(SHARDS)]
        assert {wire.hello()["shard"] for wire in wires} == set(range(SHARDS))


def test_among_equals_the_longest_left_alone_comes_first(daemon: RunningDaemon) -> None:
    """A new client does not join the one that came last, but the one that came first."""
    with contextlib.ExitStack() as open_ones:
        wires = [open_ones.enter_context(Wire(daemon.socket_path)) for _ in range(2 * SHARDS)]
        order = [wire.hello()["shard"] for wire in wires]
    assert order[:SHARDS] == order[SHARDS:]


@pytest.mark.parametrize("wish", [-1, SHARDS, 1 << 70, "0", True, 1.5, [0]])
def test_a_wish_that_makes_no_sense_is_refused(daemon: RunningDaemon, wish: object) -> None:
    """A shard that there is not is a mistake of the client's, and it is told."""
    with Wire(daemon.socket_path) as wire:
        said = json.dumps({"shard": wish}).encode()
        for flags in (0, FOR_CONTROL):
            reply = wire.ask(HELLO, said, flags=flags)
            assert (reply.status, reply.text.split(":")[0]) == (BAD_ARGUMENT, "shard")
        assert wire.hello(shard=None)["shard"] in range(SHARDS)


def test_a_client_that_says_nothing_holds_up_nobody(daemon: RunningDaemon) -> None:
    """A silent connection, and half a HELLO, cost the others nothing; both are served later."""
    with Wire(daemon.socket_path) as silent, Wire(daemon.socket_path) as half:
        frame = half.frame(1, b"{}")
        half.socket.sendall(frame[:10])
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            wire.assert_in_step()
        half.socket.sendall(frame[10:])
        assert half.reply().status == 0
        assert silent.hello()["shards"] == SHARDS


def test_parts_of_a_space_are_one(daemon: RunningDaemon) -> None:
    """Connections with one token are one space and one client to operators, and are charged so."""
    first, token = greeted(daemon, 0, client="all")
    with (
        first,
        on_shard(daemon, 1, token=token) as second,
        on_shard(daemon, 2, token=token) as third,
    ):
        for seed, wire in enumerate((first, second, third)):
            wire.store(noise(5, seed))
        document = first.ask(STATUS).json
    assert document["shards"] == SHARDS
    assert (document["clients"], document["spaces"]) == (1, 1)
    assert document["slots"]["allocated"] == 15
    (space,) = document["top_spaces"]
    assert (space["client"], space["slots"]) == ("all", 15)
    (group,) = document["groups"]
    assert (group["spaces"], group["pool_bytes"]) == (1, 15 * 4096)


def test_a_token_that_is_none_is_refused(daemon: RunningDaemon) -> None:
    """What is no token is a bad argument."""
    for token in ("", "x" * 32, "0" * 31, 7, ["0" * 32]):
        with Wire(daemon.socket_path) as wire:
            said = json.dumps({"token": token}).encode()
            assert wire.ask(HELLO, said).status == BAD_ARGUMENT
            assert wire.hello()["shards"] == SHARDS


def test_the_pools_limit_holds_in_sum(daemon: RunningDaemon) -> None:
    """Clients that fill all shards get what pool.max allows together, and no more."""
    stored = 0
    with contextlib.ExitStack() as wires_open:
        wires = [wires_open.enter_context(on_shard(daemon, shard)) for shard in range(SHARDS)]
        for seed in range(1000):
            if wires[seed % SHARDS].store(noise(16, seed)).status:
                break
            stored += 16
        document = wires[0].ask(STATUS).json
    assert document["rejects"]["pool_full"] == 16
    assert document["pool"]["bytes"] <= 8 << 20
    assert stored * 4096 > 7 << 20


def test_limits_of_a_group_hold_in_sum() -> None:
    """A group's pages on all shards together are what its limit is about."""
    with (
        running_daemon("server.shards=2", "pool.max=64M", "groups.default.pool_max=1M") as daemon,
        on_shard(daemon, 0) as one,
        on_shard(daemon, 1) as two,
    ):
        assert one.store(noise(200, 1)).status == 0
        assert two.store(noise(100, 2)).status == 1
        assert two.store(noise(50, 3)).status == 0
        assert one.ask(STATUS).json["rejects"]["group_limit"] == 100


def test_a_device_serves_all_shards(daemon: RunningDaemon, tmp_path: Path) -> None:
    """swapon, writeback, loads, verify and swapoff mean the same as with one shard."""
    path = str(tmp_path / "swap")
    with contextlib.ExitStack() as opened:
        wires = [opened.enter_context(on_shard(daemon, shard)) for shard in range(SHARDS)]
        control = opened.enter_context(Control(daemon.socket_path))
        assert control.call("swapon", path=path, size=32 << 20)["size_bytes"] <= 32 << 20
        with pytest.raises(vswap.OutOfService, match="in use already"):
            control.call("swapon", path=path)
        held = [
            (wire, wire.store(noise(300, i)).slots, noise(300, i)) for i, wire in enumerate(wires)
        ]
        written = control.call("writeback", bytes=2 << 20)
        assert written["bytes"] >= 2 << 20
        document = control.status()
        (device,) = document["devices"]
        assert device["live_bytes"] == document["slots"]["phys"] * 4096 > 0
        assert document["traffic"]["writeback_bytes"] == written["bytes"]
        for wire, slots, pages in held:
            assert wire.load(slots).body == pages
        assert control.call("verify")["ok"]
        moved = control.call("swapoff", path=path)
        assert moved["moved_pages"] == document["slots"]["phys"]
        assert control.status()["devices"] == []
        for wire, slots, pages in held:
            assert wire.load(slots).body == pages


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_a_swapon_that_lacks_descriptors_leaves_nothing_behind(
    daemon: RunningDaemon, tmp_path: Path, spare: int
) -> None:
    """However far it came: the operator is told why, and the device is not locked after it."""
    path = str(tmp_path / "swap")
    with Control(daemon.socket_path) as control:
        control.status()
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        open_now = {int(entry.name) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()}
        unused = (fd for fd in range(before[0]) if fd not in open_now)
        limit = next(fd for index, fd in enumerate(unused) if index == spare)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        with pytest.raises(vswap.OutOfService, match=r"Too many open files|RLIMIT_NOFILE"):
            control.call("swapon", path=path, size=32 << 20)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert not control.status()["devices"]
        control.call("swapon", path=path, size=32 << 20)
        control.call("swapoff", path=path)


def test_a_swapoff_that_one_shard_cannot_do_leaves_the_device(tmp_path: Path) -> None:
    """If the pages of one shard fit nowhere the device stays in use for all, with all its pages."""
    path = str(tmp_path / "swap")
    with (
        running_daemon("server.shards=2", "pool.max=4M") as daemon,
        Control(daemon.socket_path) as control,
        on_shard(daemon, 0) as full,
        on_shard(daemon, 1) as light,
    ):
        control.call("swapon", path=path, size=64 << 20)
        heavy = [full.store(noise(64, seed)).slots for seed in range(40)]
        few = light.store(noise(10, 99)).slots
        control.call("writeback", bytes=64 << 20)
        with pytest.raises(vswap.OutOfService, match="neither the pool nor another device"):
            control.call("swapoff", path=path)
        (device,) = control.status()["devices"]
        assert device["state"] == "on"
        assert light.load(few).body == noise(10, 99)
        for seed, slots in enumerate(heavy):
            assert full.load(slots).body == noise(64, seed)
        assert light.store(noise(10, 98)).status == 0
        control.call("writeback", bytes=1 << 20)
        assert control.call("verify")["ok"]


def test_a_swapoff_that_one_shard_cannot_do_says_what_others_have_given_up(
    tmp_path: Path,
) -> None:
    """Pages that nobody can read are lost on one shard by the time another one has no room."""
    path = tmp_path / "swap"
    with (
        running_daemon("server.shards=2", "pool.max=4M") as daemon,
        Control(daemon.socket_path) as control,
        on_shard(daemon, 0) as full,
        on_shard(daemon, 1) as light,
    ):
        control.call("swapon", path=str(path), size=64 << 20)
        light.store(noise(10))
        control.call("writeback", bytes=64 << 20)
        with path.open("r+b") as file:
            file.seek(DATA_OFFSET)
            file.write(noise(EXTENT_BYTES // 4096))
        heavy = [full.store(noise(64, seed)).slots for seed in range(40)]
        control.call("writeback", bytes=64 << 20)
        with pytest.raises(vswap.OutOfService, match=r"has room .* given up 10 page\(s\)"):
            control.call("swapoff", path=str(path), give_up=True)
        document = control.status()
        assert document["slots"]["lost"] == 10
        assert document["devices"][0]["state"] == "on"
        for seed, slots in enumerate(heavy):
            assert full.load(slots).body == noise(64, seed)
        assert light.store(noise(10, 98)).status == 0
        control.call("writeback", bytes=1 << 20)
        assert control.call("verify")["ok"]


def test_settings_hold_everywhere_or_nowhere(daemon: RunningDaemon) -> None:
    """A setting reaches every shard; one that is wrong reaches none."""
    with Control(daemon.socket_path) as control:
        control.call("set", key="store.enabled", value="false")
        for shard in range(SHARDS):
            with on_shard(daemon, shard) as wire:
                assert wire.store(noise(1)).flags == 7
        with pytest.raises(vswap.BadArgument):
            control.call("set", key="pool.max", value="lots")
        control.call("set", key="store.enabled", value="true")
        for shard in range(SHARDS):
            with on_shard(daemon, shard) as wire:
                assert wire.store(noise(1)).status == 0
        with pytest.raises(vswap.BadArgument, match="cannot be changed while the daemon runs"):
            control.call("set", key="server.shards", value="2")


def test_reload_reaches_all_shards(daemon: RunningDaemon) -> None:
    """SIGHUP: what can change changes in every shard."""
    (daemon.directory / "vswapd.toml").write_text("[store]\nenabled = false\n")
    daemon.reload()
    for shard in range(SHARDS):
        with on_shard(daemon, shard) as wire:
            assert wire.store(noise(1)).flags == 7
    assert "reload: changed store.enabled" in daemon.log


def test_too_many_clients_are_told() -> None:
    """max_connections counts clients, wherever they are; further connections of theirs do not."""
    with (
        running_daemon("server.shards=2", "server.max_connections=3") as small,
        contextlib.ExitStack() as opened,
    ):
        first, token = greeted(small, 0)
        opened.enter_context(first)
        opened.enter_context(on_shard(small, 1))
        last = on_shard(small, 1)
        opened.enter_context(on_shard(small, 1, token=token)).assert_in_step()
        with Wire(small.socket_path) as refused:
            assert refused.reply().status == TOO_MANY_CONNECTIONS
        last.socket.close()
        # The shard says that the place is free, before it answers what comes after.
        while first.ask(STATUS).json["clients"] != 2:
            pass
        opened.enter_context(on_shard(small, 0)).assert_in_step()


def _with_a_late_token(wire: Wire, token: str) -> None:
    """The supervisor has looked at the first greeting, and the second one joins a space."""
    assert wire.ask(HELLO, b'{"window": -1, "shard": 1}').status == BAD_ARGUMENT
    wire.hello(token=token, shard=1)


def _with_a_long_greeting(wire: Wire, token: str) -> None:
    wire.hello(token=token, shard=1, padding="x" * 60_000)


def _with_a_token_that_is_none(wire: Wire, token: str) -> None:
    del token
    assert wire.ask(HELLO, b'{"token": "x"}').status == BAD_ARGUMENT


def _with_a_token_that_nobody_was_given(wire: Wire, token: str) -> None:
    del token
    assert wire.ask(HELLO, json.dumps({"token": "0" * 32}).encode()).status == SPACE_LOST


def _with_a_token_for_nothing(wire: Wire, token: str) -> None:
    said = json.dumps({"token": token}).encode()
    assert wire.ask(HELLO, said, flags=FOR_CONTROL).status == BAD_ARGUMENT


@pytest.mark.parametrize(
    "greet",
    [
        _with_a_late_token,
        _with_a_long_greeting,
        _with_a_token_that_is_none,
        _with_a_token_that_nobody_was_given,
        _with_a_token_for_nothing,
    ],
)
def test_places_are_given_back_as_they_were_taken(greet: Callable[[Wire, str], None]) -> None:
    """However a client greets, and goes: as many clients as before may come after it, no more."""
    with (
        running_daemon("server.shards=2", "server.max_connections=3") as small,
        contextlib.ExitStack() as opened,
    ):
        watcher, token = greeted(small, 0)
        opened.enter_context(watcher)
        other = opened.enter_context(on_shard(small, 1))
        for _ in range(4):
            with Wire(small.socket_path) as wire:
                greet(wire, token)
            # Each shard has said who has gone before it answers for the status of those after it.
            for wire in (watcher, other):
                wire.ask(STATUS)
        other.socket.close()
        while watcher.ask(STATUS).json["clients"] != 1:
            pass
        for _ in range(2):
            opened.enter_context(on_shard(small, 1)).assert_in_step()
        with Wire(small.socket_path) as refused:
            refused.socket.sendall(refused.frame(HELLO))
            assert refused.reply().status == TOO_MANY_CONNECTIONS


def test_a_client_that_a_shard_refuses_has_no_place() -> None:
    """One shard is full of connections that are not counted: who is refused there, neither."""
    with (
        running_daemon("server.shards=2", "server.max_connections=2") as small,
        contextlib.ExitStack() as opened,
    ):
        with contextlib.ExitStack() as firsts:
            tokens = []
            for _ in range(2):
                first, token = greeted(small, 1)
                firsts.enter_context(first)
                tokens.append(token)
            watcher, _ = (opened.enter_context(on_shard(small, 0, token=token)) for token in tokens)
        while watcher.ask(STATUS).json["clients"]:
            pass
        for _ in range(3):
            with Wire(small.socket_path) as refused:
                refused.socket.sendall(refused.frame(HELLO, b'{"shard": 0}'))
                assert "2 connections are open" in refused.reply().text
                refused.assert_closed()
            watcher.ask(STATUS)  # the shard has said so before it answers
        for _ in range(2):
            opened.enter_context(on_shard(small, 1)).assert_in_step()


def test_a_client_whose_connection_a_shard_cannot_receive_has_no_place() -> None:
    """It has no descriptor left for it: what was lost on the way is not counted for ever."""
    with (
        running_daemon("server.shards=2", "server.max_connections=3") as small,
        on_shard(small, 0) as watcher,
        contextlib.ExitStack() as opened,
    ):
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in children(small)}
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        for _ in range(3):
            with Wire(small.socket_path) as lost:
                lost.socket.sendall(lost.frame(HELLO, b'{"shard": 0}'))
                lost.assert_closed()
            watcher.ask(STATUS)  # the shard has said so before it answers
        for pid, before in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for _ in range(2):
            opened.enter_context(on_shard(small, 0)).assert_in_step()


def test_a_client_that_cannot_be_handed_over_has_no_place() -> None:
    """Its connection has taken the last descriptor: none is left to send it with."""
    with (
        running_daemon("server.shards=2", "server.max_connections=3") as small,
        contextlib.ExitStack() as opened,
    ):
        watcher = opened.enter_context(on_shard(small, 0))
        watcher.ask(STATUS)  # the supervisor has closed its copy of this connection before
        before = resource.prlimit(small.pid, resource.RLIMIT_NOFILE)
        open_now = {int(entry.name) for entry in Path(f"/proc/{small.pid}/fd").iterdir()}
        last = next(fd for fd in range(before[0]) if fd not in open_now)
        resource.prlimit(small.pid, resource.RLIMIT_NOFILE, (last + 1, before[1]))
        for _ in range(3):
            with Wire(small.socket_path) as lost:
                lost.socket.sendall(lost.frame(HELLO))
                assert "raise RLIMIT_NOFILE" in lost.reply().text
                lost.assert_closed()
        resource.prlimit(small.pid, resource.RLIMIT_NOFILE, before)
        for _ in range(2):
            opened.enter_context(on_shard(small, 0)).assert_in_step()


def test_a_shard_is_killed_while_it_is_asked() -> None:
    """Whoever waits for the answer of a killed shard is told, and the daemon goes on."""
    with running_daemon("server.shards=2") as daemon:
        killed, _ = children(daemon)
        os.kill(killed, signal.SIGSTOP)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_notification("RELOADING=1")
        os.kill(killed, signal.SIGKILL)
        daemon.await_notification("READY=1")
        assert f"(pid {killed}) was killed by signal 9: it is started again" in daemon.log
        daemon.reload()
        assert "Traceback" not in daemon.log
        assert "exception was never retrieved" not in daemon.log


def test_a_setting_that_the_end_cuts_off_holds_nothing_up() -> None:
    """It is taken back when metrics have ended already; they do not begin again."""
    with running_daemon("server.shards=2") as daemon:
        metrics, file = daemon.directory / "vswapd.prom", daemon.directory / "vswapd.toml"
        file.write_text(f'[metrics]\ntextfile = "{metrics}"\n')
        daemon.reload()
        while not metrics.exists():
            pass
        _, slow = children(daemon)
        os.kill(slow, signal.SIGSTOP)
        file.write_text(f'[metrics]\ntextfile = "{metrics}"\n[store]\nenabled = false\n')
        daemon.process.send_signal(signal.SIGHUP)
        daemon.await_notification("RELOADING=1")
        daemon.process.send_signal(signal.SIGTERM)
        while metrics.exists():
            pass
        os.kill(slow, signal.SIGCONT)
        daemon.terminate()
        assert not metrics.exists()


def test_shards_end_with_their_supervisor() -> None:
    """A supervisor that is killed leaves no process behind."""
    with running_daemon("server.shards=2") as daemon:
        pidfds = [os.pidfd_open(pid) for pid in children(daemon)]
        daemon.process.kill()
        daemon.await_exit(expected=-signal.SIGKILL)
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 60)[0], "a shard lives on"
            os.close(pidfd)


def test_the_watchdog_wants_every_shard() -> None:
    """Beats come while all shards move, and stop when one of them stands still."""
    environment = {"WATCHDOG_USEC": "400000"}
    with running_daemon("server.shards=2", environment=environment) as daemon:
        for _ in range(3):
            daemon.await_notification("WATCHDOG=1")
        stopped = children(daemon)[1]
        os.kill(stopped, signal.SIGSTOP)
        try:
            daemon.notify.settimeout(0.0)
            _drain(daemon.notify)
            daemon.notify.settimeout(1.0)
            said = _until_silent(daemon.notify)
            assert said.count("WATCHDOG=1") <= 1
        finally:
            os.kill(stopped, signal.SIGCONT)
        daemon.notify.settimeout(None)
        daemon.await_notification("WATCHDOG=1")


def _drain(sock: socket.socket) -> None:
    try:
        while True:
            sock.recv(65536)
    except BlockingIOError:
        return


def _until_silent(sock: socket.socket) -> list[str]:
    lines: list[str] = []
    try:
        while len(lines) < 100:
            lines += sock.recv(65536).decode().splitlines()
    except TimeoutError:
        return lines
    return lines
