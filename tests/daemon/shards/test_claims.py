"""A space is one, on however many shards: one client at a time, one connection to each part.

Spoken by hand, since no client of ours would greet in these ways.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.service_manager import service
from support.wire import (
    BAD_ARGUMENT,
    CONTROL,
    FOR_CONTROL,
    HELLO,
    SPACE_BUSY,
    SPACE_LOST,
    STATUS,
    STOPPING,
    Wire,
)
from vswap.control import Control

SHARDS = 3
NOBODY = 65534
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def daemon() -> Iterator[RunningDaemon]:
    settings = (f"server.shards={SHARDS}", "pool.max=32M", "server.socket_mode=0666")
    with running_daemon(*settings) as running:
        os.chmod(running.directory, 0o755)
        yield running


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


def name_of(shard: int) -> str:
    """A name that leads to a shard."""
    return next(n for n in map(str, range(100)) if crc32(n.encode()) % SHARDS == shard)


def shards_of(daemon: RunningDaemon) -> list[int]:
    """The processes of the shards, by their numbers while none has died."""
    text = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def kill(pid: int) -> None:
    """Kill a process that is not ours, and wait until it is no more."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(30_000)
    finally:
        os.close(pidfd)


def outcome(path: Path, **said: object) -> int:
    """The status of a HELLO on a connection of its own, which is closed again."""
    with Wire(path) as wire:
        return wire.ask(HELLO, json.dumps(said).encode()).status


def resumed(path: Path, **said: Any) -> tuple[Wire, dict[str, Any]]:
    """A connection that has taken a part up again.

    A shard that is about to die, or to come, may break a few before.
    """
    while True:
        wire = Wire(path)
        with contextlib.suppress(OSError, AssertionError):
            return wire, wire.hello(resume=True, **said)
        wire.socket.close()


# One connection to each part


def test_one_part_of_a_space_has_one_connection(daemon: RunningDaemon) -> None:
    """A second one is told SPACE_BUSY, and the first one's slots stay the first one's."""
    with Wire(daemon.socket_path) as first, Wire(daemon.socket_path) as second:
        token = first.hello(shard=1)["token"]
        slots = first.store(noise(2)).slots
        for more in ({}, {"client": "x"}, {"window": 4096}):
            assert outcome(daemon.socket_path, shard=1, token=token, **more) == SPACE_BUSY
        assert second.hello(shard=2, token=token)["token"] == token
        theirs = second.store(noise(3, 1)).slots
        pids = shards_of(daemon)
        kill(pids[1])
        back, said = resumed(daemon.socket_path, shard=1, token=token)
        with back:
            assert said["last"] == {
                "request": 2,
                "status": 0,
                "flags": 0,
                "slots": [str(slot) for slot in slots],
            }
            assert back.load(slots).body == noise(2)
            assert second.load(theirs).body == noise(3, 1)
            assert outcome(daemon.socket_path, shard=1, token=token) == SPACE_BUSY
    with Control(daemon.socket_path) as control:
        while control.status()["slots"]["allocated"]:
            pass


@pytest.mark.parametrize("home", range(SHARDS))
def test_a_token_alone_leads_to_the_first_part(daemon: RunningDaemon, home: int) -> None:
    """As often as it is said: busy while it is in use, and taken up there after a kill."""
    with Wire(daemon.socket_path) as first:
        token = first.hello(shard=home)["token"]
        slots = first.store(noise(4)).slots
        for _ in range(4):
            assert outcome(daemon.socket_path, token=token) == SPACE_BUSY
        kill(shards_of(daemon)[home])
        back, said = resumed(daemon.socket_path, token=token)
        with back:
            assert said["shard"] == home
            assert back.load(slots).body == noise(4)


def test_a_part_that_was_closed_can_be_had_again(daemon: RunningDaemon) -> None:
    """At once, as often as wished, and it is empty: its slots went with its connection."""
    with Wire(daemon.socket_path) as first:
        token = first.hello(shard=0)["token"]
        for turn in range(20):
            with Wire(daemon.socket_path) as lane:
                lane.hello(shard=1, token=token)
                assert lane.store(noise(1, turn)).status == 0
        first.assert_in_step()


def test_a_space_lives_as_long_as_one_of_its_connections(daemon: RunningDaemon) -> None:
    """The first one may go before the others: the token opens parts until the last has gone."""
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(Wire(daemon.socket_path))
        token = first.hello(shard=0)["token"]
        second = opened.enter_context(Wire(daemon.socket_path))
        second.hello(shard=1, token=token)
        slots = second.store(noise(3)).slots
        first.socket.close()
        third = opened.enter_context(Wire(daemon.socket_path))
        assert third.hello(shard=2, token=token)["token"] == token
        assert second.load(slots).body == noise(3)
        second.socket.close()
        third.socket.close()
        with Control(daemon.socket_path) as control:
            while control.call("spaces")["spaces"]:
                pass
        for shard in range(SHARDS):
            assert outcome(daemon.socket_path, shard=shard, token=token) == SPACE_LOST


@pytest.mark.parametrize("said", [{}, {"shard": 0}, {"shard": 2}, {"name": "x"}])
def test_a_token_that_nobody_was_given_opens_nothing(
    daemon: RunningDaemon, said: dict[str, object]
) -> None:
    """Well-formed or not: whoever makes one up has no space by it."""
    for token in ("0" * 32, "f" * 32, os.urandom(16).hex()):
        assert outcome(daemon.socket_path, token=token, **said) == SPACE_LOST
    with Control(daemon.socket_path) as control:
        assert not control.call("spaces")["spaces"]


def as_nobody(path: Path, said: dict[str, object], pipe: Connection) -> None:
    os.setresuid(NOBODY, NOBODY, NOBODY)
    pipe.send(outcome(path, **said))


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_another_users_token_opens_nothing(daemon: RunningDaemon) -> None:
    """Not while the space is in use, on no shard; and its owner's parts are not in the way."""
    with Wire(daemon.socket_path) as owner:
        token = owner.hello(shard=0, name="mine")["token"]
        for said, expected in (
            ({"shard": 0, "token": token}, SPACE_LOST),
            ({"shard": 1, "token": token}, SPACE_LOST),
            ({"token": token, "name": "mine"}, SPACE_LOST),
            ({"name": "mine"}, 0),
        ):
            here, there = FORK.Pipe()
            other = FORK.Process(target=as_nobody, args=(daemon.socket_path, said, there))
            other.start()
            assert here.recv() == expected
            other.join()
        owner.assert_in_step()


def test_a_lane_is_opened_although_the_first_one_has_died(daemon: RunningDaemon) -> None:
    """The part that waits for its client is what the token is judged by."""
    with Wire(daemon.socket_path) as first:
        token = first.hello(shard=0)["token"]
        slots = first.store(noise(3)).slots
        kill(shards_of(daemon)[0])
        with Wire(daemon.socket_path) as lane:
            lane.hello(shard=1, token=token)
            back, _ = resumed(daemon.socket_path, shard=0, token=token)
            with back:
                assert back.load(slots).body == noise(3)


# One client at a time


def test_a_name_that_is_in_use_is_refused_on_every_shard(daemon: RunningDaemon) -> None:
    """Also where its client has no connection, and whichever of its connections is left."""
    name = name_of(0)
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(Wire(daemon.socket_path))
        token = first.hello(name=name)["token"]
        slots = first.store(noise(5)).slots
        second = opened.enter_context(Wire(daemon.socket_path))
        second.hello(name=name, token=token, shard=1)

        def strangers() -> list[int]:
            wishes = [{}, *({"shard": shard} for shard in range(SHARDS))]
            return [outcome(daemon.socket_path, name=name, **wish) for wish in wishes]

        assert strangers() == [SPACE_BUSY] * (1 + SHARDS)
        assert outcome(daemon.socket_path, name=name, token="0" * 32, shard=2) == SPACE_BUSY
        third = opened.enter_context(Wire(daemon.socket_path))
        third.hello(name=name, token=token, shard=2)
        third.socket.close()
        first.socket.close()
        assert strangers() == [SPACE_BUSY] * (1 + SHARDS)
        again = opened.enter_context(Wire(daemon.socket_path))
        while (reply := again.ask(HELLO, _said(name=name, token=token))).status == SPACE_BUSY:
            again = opened.enter_context(Wire(daemon.socket_path))
        assert reply.json["shard"] == 0
        assert again.load(slots).body == noise(5)


def _said(**said: object) -> bytes:
    return json.dumps(said).encode()


def test_a_client_that_is_gone_frees_the_name_at_once(daemon: RunningDaemon) -> None:
    """The next one is not told BUSY, though the last one has left replies unread on many shards."""
    name = name_of(1)
    for turn in range(10):
        with contextlib.ExitStack() as opened:
            said: dict[str, Any] = {"name": name}
            for shard in (1, 0, 2):
                lane = opened.enter_context(Wire(daemon.socket_path))
                said["token"] = lane.hello(shard=shard, **said)["token"]
                slots = lane.store(noise(60, turn)).slots
                for _ in range(6):
                    lane.socket.sendall(lane.frame(4, _packed(slots), count=len(slots)))
        assert outcome(daemon.socket_path, name=name, shard=turn % SHARDS) == 0


def _packed(slots: list[int]) -> bytes:
    return np.array(slots, "<u8").tobytes()


def test_of_many_that_come_at_once_one_gets_the_name(daemon: RunningDaemon) -> None:
    """On different shards, in whatever order their greetings arrive."""
    chooser = random.Random(1)
    for turn in range(30):
        name = f"race {turn}"
        with contextlib.ExitStack() as opened:
            wires = [opened.enter_context(Wire(daemon.socket_path)) for _ in range(6)]
            for number, wire in enumerate(wires):
                body = _said(name=name, shard=(number + chooser.randrange(2)) % SHARDS)
                wire.socket.sendall(wire.frame(HELLO, body))
            statuses = sorted(wire.reply().status for wire in wires)
            assert statuses == [0, *[SPACE_BUSY] * 5]


def test_a_shard_that_dies_frees_what_was_claimed_there(daemon: RunningDaemon) -> None:
    """The last connection has died with its shard: the name is free, and its pages are there."""
    name = name_of(2)
    with Wire(daemon.socket_path) as idle:
        token = idle.hello(name=name)["token"]
        slots = idle.store(noise(3)).slots
        kill(shards_of(daemon)[2])
        with contextlib.ExitStack() as opened:
            while True:
                # A connection that goes to the dying shard breaks.
                wire = opened.enter_context(Wire(daemon.socket_path))
                with contextlib.suppress(OSError, AssertionError):
                    if wire.ask(HELLO, _said(name=name)).status == 0:
                        break
            assert wire.load(slots).body == noise(3)
            lost = {"name": name, "token": token, "resume": True}
            assert outcome(daemon.socket_path, **lost) == SPACE_LOST
            assert outcome(daemon.socket_path, shard=0, **lost) == SPACE_LOST


def test_what_a_client_left_on_a_shard_is_not_its_own_once_another_has_the_name() -> None:
    """The next one has not come to that shard yet: it holds the whole space all the same."""
    name = name_of(0)
    with service(f"server.shards={SHARDS}", "pool.max=32M") as manager:
        path = manager.socket_path
        with Wire(path) as first, Wire(path) as second:
            token = first.hello(name=name)["token"]
            second.hello(name=name, token=token, shard=1)
            slots = second.store(noise(2)).slots
            manager.kill()
            manager.start()
            with Wire(path) as other:
                other.hello(name=name)
                old = {"name": name, "token": token, "shard": 1}
                assert outcome(path, **old, resume=True) == SPACE_LOST
                assert outcome(path, **old) == SPACE_BUSY
            with Control(path) as control:
                while any(space["pid"] for space in control.call("spaces")["spaces"]):
                    pass
            for more in ({"resume": True}, {}):
                assert outcome(path, **old, **more) == SPACE_LOST
        with Wire(path) as last:
            last.hello(name=name, shard=1)
            assert last.load(slots).body == noise(2)


def test_nobody_waits_for_a_shard_that_is_not_asked(daemon: RunningDaemon) -> None:
    """One shard hangs: names and spaces on the others are opened and refused all the same."""
    hanging = shards_of(daemon)[2]
    os.kill(hanging, signal.SIGSTOP)
    try:
        with Wire(daemon.socket_path) as first, Wire(daemon.socket_path) as second:
            name = name_of(0)
            token = first.hello(name=name)["token"]
            second.hello(name=name, token=token, shard=1)
            assert outcome(daemon.socket_path, name=name, shard=1) == SPACE_BUSY
            with Wire(daemon.socket_path) as plain, Wire(daemon.socket_path) as lane:
                lane.hello(shard=1, token=plain.hello(shard=0)["token"])
    finally:
        os.kill(hanging, signal.SIGCONT)


def test_a_greeting_that_comes_in_pieces_is_taken_as_one(daemon: RunningDaemon) -> None:
    """Shard, name and token lead to where they lead, also if HELLO comes bit by bit."""
    name = name_of(2)
    with Wire(daemon.socket_path) as first, Wire(daemon.socket_path) as second:
        token = first.hello(name=name)["token"]
        frame = second.frame(HELLO, _said(name=name, token=token, shard=1))
        for begin in range(0, len(frame), 7):
            second.socket.send(frame[begin : begin + 7])
        reply = second.reply()
        assert (reply.status, reply.json["shard"]) == (0, 1)
        long = _said(name=name, token=token, shard=0, padding="x" * 60_000)
        with Wire(daemon.socket_path) as third:
            assert third.ask(HELLO, long).json["shard"] == 0


@pytest.mark.parametrize("first", [b'{"shard": 99}', b'{"window": -1}', b"{", b'{"client": 5}'])
def test_a_second_greeting_does_not_lead_elsewhere(daemon: RunningDaemon, first: bytes) -> None:
    """The first one was refused, and the connection has come to a shard: it serves no other's."""
    with Wire(daemon.socket_path) as wire:
        assert wire.ask(HELLO, first).status == BAD_ARGUMENT
        for shard in range(SHARDS):
            answer = wire.ask(HELLO, _said(shard=shard))
            if answer.status == 0:
                assert answer.json["shard"] == shard
                break
            assert answer.status == BAD_ARGUMENT
        else:
            pytest.fail("no shard has the connection")


def test_what_is_claimed_is_let_go_of_in_every_way(daemon: RunningDaemon) -> None:
    """Refused, cut off, gone before the answer, too many: afterwards the name can be had."""
    with Control(daemon.socket_path) as control:
        control.call("set", key="log.level", value="warning")
    for turn in range(40):
        said = _said(name="x", shard=turn % SHARDS)
        with Wire(daemon.socket_path) as wire:
            wire.socket.sendall(wire.frame(HELLO, said))
            if turn % 2:
                wire.socket.shutdown(socket.SHUT_WR)
    with Wire(daemon.socket_path) as wire:
        wire.hello(name="x")
        while wire.ask(STATUS).json["clients"] != 1:
            pass  # a shard notices the end of a connection when it has a turn
    with Wire(daemon.socket_path) as control_only:
        control_only.hello(FOR_CONTROL)
        assert outcome(daemon.socket_path, name="x", shard=1) == 0


def test_a_daemon_that_ends_meanwhile_says_so() -> None:
    """Whoever greets while the supervisor dies is served, told to come again, or cut off."""
    with service(f"server.shards={SHARDS}", "pool.max=32M") as manager:
        greetings: list[dict[str, Any]] = [{"name": "x"}, {}, {"name": "x", "window": 4096}]
        for said in greetings:
            with Wire(manager.socket_path) as wire:
                assert wire.ask(HELLO, b'{"window": -1}').status == BAD_ARGUMENT
                os.kill(manager.pid, signal.SIGSTOP)
                wire.socket.sendall(wire.frame(HELLO, _said(**said)))
                kill(manager.pid)
                status = STOPPING
                with contextlib.suppress(OSError, AssertionError):
                    status = wire.reply().status
                assert status in {0, STOPPING}
            manager.start()
        with vswap.connect(manager.socket_path, name="x") as space:
            assert space.load(space.store(noise(3))) == noise(3)


def test_a_space_that_is_being_dropped_is_nobodys(daemon: RunningDaemon) -> None:
    """It is dropped on all shards or on none: nobody gets a part of it in between, on any shard."""
    hanging = shards_of(daemon)[2]
    with Wire(daemon.socket_path) as operator, Wire(daemon.socket_path) as lane:
        operator.hello(FOR_CONTROL, shard=0)
        with Wire(daemon.socket_path) as first:
            token = first.hello(name="x", shard=0)["token"]
            first.store(noise(3))
            lane.hello(name="x", token=token, shard=2)
            lane.store(noise(4))
            lane.socket.close()
        while operator.done("spaces")["spaces"][0]["pid"] is not None:
            pass
        with Wire(daemon.socket_path) as probe:
            probe.hello(FOR_CONTROL, shard=1)
            operator.socket.sendall(operator.frame(CONTROL, b'{"verb": "drop", "name": "x"}'))
            os.kill(hanging, signal.SIGSTOP)
            try:
                for _ in range(50):
                    probe.assert_in_step()
                status = outcome(daemon.socket_path, name="x", shard=1)
            finally:
                os.kill(hanging, signal.SIGCONT)
            reply = operator.reply()
        # Whichever came first has had its way, and wholly so.
        if reply.status == 0:
            assert reply.json["freed_slots"] == 7
        else:
            assert (status, "in use" in reply.text) == (0, True)
            assert operator.ask(STATUS).json["slots"]["allocated"] == 7


def test_a_client_of_ours_is_the_one(daemon: RunningDaemon) -> None:
    """Its further lanes are its own; a second process is told, wherever it comes."""
    with vswap.connect(daemon.socket_path, name="cache") as space:
        slots = space.store(noise(900))
        for shard in range(SHARDS):
            assert outcome(daemon.socket_path, name="cache", shard=shard) == SPACE_BUSY
        with pytest.raises(vswap.SpaceBusy):
            vswap.connect(daemon.socket_path, name="cache")
        assert space.load(slots) == noise(900)
