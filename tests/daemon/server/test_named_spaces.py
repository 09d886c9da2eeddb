"""Spaces with a name: they outlive their clients, one user's never being another's."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import RunningDaemon, running_daemon
from support.mortal import mortal
from support.service_manager import service
from support.wire import BAD_ARGUMENT, CONTROL, FOR_CONTROL, HELLO, SPACE_BUSY, Wire
from vswap.control import Control

PAGE = 4096
NOBODY = 65534
FORK = multiprocessing.get_context("fork")


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE)


@pytest.fixture(params=[1, 3])
def daemon(request: pytest.FixtureRequest) -> Iterator[RunningDaemon]:
    settings = ("pool.max=64M", f"server.shards={request.param}", "server.socket_mode=0666")
    with running_daemon(*settings, "server.max_named_spaces=5") as running:
        os.chmod(running.directory, 0o755)
        yield running


def store_and_stay(path: Path, pipe: Connection) -> None:
    """A client that keeps its pages, and waits to be killed."""
    with vswap.connect(path, name="cache") as space:
        pipe.send(space.store(noise(900)).tolist())
        pipe.recv()


def test_pages_are_there_for_the_next_client(daemon: RunningDaemon) -> None:
    """Closed or killed: whoever says the name has all slots, and their pages."""
    here, there = FORK.Pipe()
    client = FORK.Process(target=store_and_stay, args=(daemon.socket_path, there))
    client.start()
    slots = here.recv()
    client.kill()
    client.join()
    with vswap.connect(daemon.socket_path, name="cache") as space:
        assert sorted(slots) == space.slots().tolist()
        assert space.load(slots) == noise(900)
        space.free(slots[:300])
        more = space.store(noise(5, 1)).tolist()
    with vswap.connect(daemon.socket_path, name="cache") as space:
        assert space.slots().tolist() == sorted(slots[300:] + more)
        assert space.load(slots[300:] + more) == noise(900)[300 * PAGE :] + noise(5, 1)
    with vswap.connect(daemon.socket_path, name="other") as space:
        assert not len(space.slots())
        with pytest.raises(vswap.BadSlot):
            space.load(more)


def test_all_slots_are_listed(daemon: RunningDaemon) -> None:
    """In pieces, ascending, whatever was freed in between; of every kind, also rejected ones."""
    chooser = random.Random(3)
    with vswap.connect(daemon.socket_path, name="many") as space:
        held: set[int] = set()
        for _ in range(6):
            held |= set(space.store(bytes(3000 * PAGE)).tolist())
            gone = chooser.sample(sorted(held), 1500)
            space.free(gone)
            held -= set(gone)
        assert space.slots().tolist() == sorted(held)
        one = min(held)
        with Control(daemon.socket_path) as control:
            control.call("set", key="store.enabled", value="false")
            with pytest.raises(vswap.Rejected):
                space.store(noise(1), slots=[one])
            control.call("set", key="store.enabled", value="true")
        assert space.slots().tolist() == sorted(held)
    with vswap.connect(daemon.socket_path) as nameless:
        assert not len(nameless.slots())


def test_the_same_for_asyncio(daemon: RunningDaemon) -> None:
    """A name, all slots, and the next client."""

    async def main() -> None:
        async with vswap.aio.connect(daemon.socket_path, name="tasks") as space:
            slots = await space.store(noise(600))
        async with vswap.aio.connect(daemon.socket_path, name="tasks") as space:
            assert (await space.slots()).tolist() == sorted(slots.tolist())
            assert await space.load(slots) == noise(600)

    asyncio.run(main())


def test_one_client_at_a_time(daemon: RunningDaemon) -> None:
    """The second one is told so; and may come when the first has gone."""
    with vswap.connect(daemon.socket_path, name="mine") as space:
        slots = space.store(noise(600))
        for _ in range(3):
            with pytest.raises(vswap.SpaceBusy, match="in use"):
                vswap.connect(daemon.socket_path, name="mine")
        assert space.load(slots) == noise(600)
    for _ in range(5):
        with vswap.connect(daemon.socket_path, name="mine") as space:
            assert space.load(slots) == noise(600)


def as_nobody(path: Path, pipe: Connection) -> None:
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with vswap.connect(path, name="shared?") as space:
        pipe.send(space.slots().tolist())
        space.store(noise(3))


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_another_users_name_is_another_space(daemon: RunningDaemon) -> None:
    """They neither see each other's pages nor are in each other's way; a drop says whose."""
    with vswap.connect(daemon.socket_path, name="shared?") as space:
        space.store(noise(10))
        here, there = FORK.Pipe()
        other = FORK.Process(target=as_nobody, args=(daemon.socket_path, there))
        other.start()
        assert here.recv() == []
        other.join()
        assert len(space.slots()) == 10
    with Control(daemon.socket_path) as control:
        with pytest.raises(vswap.BadArgument, match="say whose"):
            control.call("drop", name="shared?")
        assert control.call("drop", name="shared?", uid=NOBODY)["freed_slots"] == 3
        assert control.call("drop", name="shared?")["freed_slots"] == 10


def take_one_shard(path: Path) -> None:
    """Another user's space of the same name, of one part."""
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with Wire(path) as wire:
        wire.hello(name="shared?")
        assert len(wire.store(noise(3)).slots) == 3


def await_nobody(control: Control) -> None:
    """Until the daemon has seen that the clients of all spaces have gone."""
    while any(space["pid"] for space in control.call("spaces")["spaces"]):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_a_drop_that_does_not_say_whose_drops_nothing(daemon: RunningDaemon) -> None:
    """Not even on those shards that know only one user's part of it."""
    with vswap.connect(daemon.socket_path, name="shared?") as space:
        slots = space.store(noise(900))
    other = FORK.Process(target=take_one_shard, args=(daemon.socket_path,))
    other.start()
    other.join()
    with Control(daemon.socket_path) as control:
        await_nobody(control)
        with pytest.raises(vswap.BadArgument, match="say whose"):
            control.call("drop", name="shared?")
        with pytest.raises(vswap.BadArgument, match="uid"):
            control.call("drop", name="shared?", uid=[NOBODY])
    with vswap.connect(daemon.socket_path, name="shared?") as space:
        assert space.load(slots) == noise(900)


def test_a_space_that_is_taken_up_while_it_is_to_be_dropped_stays_whole() -> None:
    """Its client has come to its first shard, and to no other one yet: none drops its part."""
    with running_daemon("server.shards=3") as daemon:
        name = next(n for n in map(str, range(100)) if crc32(n.encode()) % 3 == 0)
        with vswap.connect(daemon.socket_path, name=name) as space:
            slots = space.store(noise(900))
        with Control(daemon.socket_path) as control:
            await_nobody(control)
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        slow = int(children[1])
        with Wire(daemon.socket_path) as operator, Wire(daemon.socket_path) as other:
            operator.hello(FOR_CONTROL, shard=2)
            other.hello(FOR_CONTROL, shard=2)
            os.kill(slow, signal.SIGSTOP)
            body = json.dumps({"verb": "drop", "name": name}).encode()
            operator.socket.sendall(operator.frame(CONTROL, body))
            for _ in range(50):  # by then all others have said that the space has no client
                assert other.control("nonsense").status == BAD_ARGUMENT
            with Wire(daemon.socket_path) as client:
                client.hello(name=name)
                os.kill(slow, signal.SIGCONT)
                assert "in use by pid" in operator.reply().text
        with vswap.connect(daemon.socket_path, name=name) as space:
            assert space.load(slots) == noise(900)


def keep_house(path: Path, pipe: Connection) -> None:
    """Somebody who may not steer, and his own spaces."""
    os.setresuid(NOBODY, NOBODY, NOBODY)
    for name in ("mine", "shared?"):
        with vswap.connect(path, name=name) as space:
            space.store(noise(3))
    with Control(path) as control:
        while any(space["pid"] for space in control.call("spaces")["spaces"]):
            pass  # the daemon is about to see that the client has gone
        pipe.send([(one["uid"], one["name"]) for one in control.call("spaces")["spaces"]])
        for wrong in ({"uid": 0}, {"uid": "0"}, {"uid": [NOBODY]}):
            with pytest.raises(vswap.NotAllowed, match="of their own"):
                control.call("drop", name="shared?", **wrong)
        with pytest.raises(vswap.BadArgument, match="no space 'root'"):
            control.call("drop", name="root")
        pipe.send(control.call("drop", name="shared?"))
        pipe.send([one["name"] for one in control.call("spaces", uid=NOBODY)["spaces"]])


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")
def test_everybody_lists_and_drops_his_own(daemon: RunningDaemon) -> None:
    """Who may not steer sees no space of others, and cannot drop one, whatever he says."""
    for name in ("root", "shared?"):
        with vswap.connect(daemon.socket_path, name=name) as space:
            space.store(noise(10))
    here, there = FORK.Pipe()
    other = FORK.Process(target=keep_house, args=(daemon.socket_path, there))
    other.start()
    assert sorted(here.recv()) == [(NOBODY, "mine"), (NOBODY, "shared?")]
    assert here.recv() == {"name": "shared?", "uid": NOBODY, "freed_slots": 3}
    assert here.recv() == ["mine"]
    other.join()
    assert other.exitcode == 0
    with Control(daemon.socket_path) as control:
        assert len(control.call("spaces")["spaces"]) == 3
        assert [s["name"] for s in control.call("spaces", uid=NOBODY)["spaces"]] == ["mine"]
        assert control.call("spaces", uid=1)["spaces"] == []
        with pytest.raises(vswap.BadArgument, match="uid"):
            control.call("spaces", uid="root")


def test_spaces_are_listed_and_dropped(daemon: RunningDaemon) -> None:
    """With their names; one in use is left alone, one that there is not is refused."""
    with Control(daemon.socket_path) as control:
        with vswap.connect(daemon.socket_path, name="cache", label="me") as space:
            slots = space.store(noise(700))
            (listed,) = control.call("spaces")["spaces"]
            assert (listed["name"], listed["pid"]) == ("cache", os.getpid())
            with pytest.raises(vswap.OutOfService, match=f"in use by pid {os.getpid()}"):
                control.call("drop", name="cache")
            assert space.load(slots) == noise(700)
        while control.call("spaces")["spaces"][0]["pid"] is not None:
            pass  # the daemon is about to see that the client has gone
        assert control.call("drop", name="cache")["freed_slots"] == 700
        assert control.call("spaces")["spaces"] == []
        assert control.status()["slots"]["allocated"] == 0
        with pytest.raises(vswap.BadArgument, match="no space 'cache'"):
            control.call("drop", name="cache")
        assert control.call("verify")["ok"]


def test_there_are_only_so_many(daemon: RunningDaemon) -> None:
    """server.max_named_spaces, of one user; those that there are can still be had."""
    made: list[str] = []
    with pytest.raises(vswap.OutOfService, match="max_named_spaces"):
        open_many(daemon, made)
    assert 5 <= len(made) <= 15  # of each shard
    for name in made:
        vswap.connect(daemon.socket_path, name=name).close()


def open_many(daemon: RunningDaemon, made: list[str]) -> None:
    for number in range(100):
        vswap.connect(daemon.socket_path, name=f"cache {number}").close()
        made.append(f"cache {number}")


@pytest.mark.parametrize("name", ["", " x", "x ", "a\nb", "\x00", "x" * 256, 7, ["x"]])
def test_what_is_no_name_is_refused(daemon: RunningDaemon, name: object) -> None:
    """Nothing is opened, and the daemon says what a name is."""
    with Wire(daemon.socket_path) as wire:
        reply = wire.ask(HELLO, json.dumps({"name": name}).encode())
        assert reply.status == BAD_ARGUMENT
        assert wire.hello()["space"]


def test_the_wire_says_who_is_busy(daemon: RunningDaemon) -> None:
    """SPACE_BUSY closes the connection; nothing else happens."""
    with Wire(daemon.socket_path) as first, Wire(daemon.socket_path) as second:
        first.hello(name="x")
        assert second.ask(HELLO, b'{"name": "x"}').status == SPACE_BUSY
        second.assert_closed()
        first.assert_in_step()


@pytest.mark.parametrize("shards", [1, 3])
def test_names_outlive_the_daemon(shards: int) -> None:
    """Killed with or without a client: the name leads to the pages, and nobody frees them."""
    with service(f"server.shards={shards}", "server.resume_timeout=50ms") as manager:
        with vswap.connect(manager.socket_path, name="kept") as space:
            slots = space.store(noise(500))
            manager.kill()
            manager.start()
            assert space.load(slots) == noise(500)
        manager.kill()
        manager.start()
        with mortal(manager.socket_path, noise(5)):
            manager.kill()
        manager.start()
        with Control(manager.socket_path) as control:
            while len(control.call("spaces")["spaces"]) > 1:
                pass  # the one without a name is freed, and not the other
        with vswap.connect(manager.socket_path, name="kept") as space:
            assert space.slots().tolist() == sorted(slots.tolist())
            assert space.load(slots) == noise(500)
            with Control(manager.socket_path) as control:
                assert control.call("verify")["ok"]


def test_the_next_client_is_not_given_the_answer_of_the_last() -> None:
    """Both number their requests alike: what one has stored is no answer to what the other asks."""
    with service("server.shards=1", "pool.max=32M") as manager:
        with Wire(manager.socket_path) as first:
            first.hello(name="cache")
            slots = first.store(noise(3)).slots
        manager.kill()
        manager.start()
        with Wire(manager.socket_path) as second:
            token = second.hello(name="cache")["token"]
            manager.kill()  # before it has asked for anything
        manager.start()
        with Wire(manager.socket_path) as second:
            assert second.hello(name="cache", token=token, resume=True)["last"] is None
            assert second.load(slots).body == noise(3)


def test_an_earlier_clients_answer_is_not_the_next_ones() -> None:
    """A store that meets a kill is sent again, also if an earlier client had one of its number."""
    with service("server.shards=1") as manager:
        with vswap.connect(manager.socket_path, name="kept") as earlier:
            theirs = [earlier.store(noise(1, 7)).tolist() for _ in range(5)]
        with vswap.connect(manager.socket_path, name="kept") as space:
            for _ in range(4):
                space.ping()
            manager.kill()
            with ThreadPoolExecutor(1) as pool:
                storing = pool.submit(space.store, noise(1, 11))
                manager.start()
                slots = storing.result()
            assert slots.tolist() not in theirs
            assert space.load(slots) == noise(1, 11)


def test_a_client_does_not_come_back_to_what_the_next_has_had() -> None:
    """Whoever was idle while the daemon died, and another took the name: it is told, not served."""
    with (
        service("server.shards=1") as manager,
        vswap.connect(manager.socket_path, name="kept") as idle,
    ):
        slots = idle.store(noise(2, 1))
        manager.kill()
        manager.start()
        with vswap.connect(manager.socket_path, name="kept") as space:
            space.free(slots[:1])
            assert space.store(noise(1, 2)).tolist() == slots[:1].tolist()
        while True:
            # The daemon is about to see that the other one has gone.
            with Control(manager.socket_path) as control:
                if control.call("spaces")["spaces"][0]["pid"] is None:
                    break
        with pytest.raises(vswap.SpaceLost):
            idle.load(slots)


def test_a_shard_that_takes_no_more_names_is_done_without() -> None:
    """A store that any shard could take goes to the space's own one, for threads and tasks."""

    async def store(path: Path, name: str) -> None:
        async with vswap.aio.connect(path, name=name) as space:
            slots = await space.store(noise(1000))
            assert await space.load(slots) == noise(1000)

    with running_daemon("server.shards=2", "server.max_named_spaces=1") as daemon:
        # The shard that a name leads to is a matter of its checksum.
        homes: dict[int, str] = {}
        for number in range(20):
            homes.setdefault(crc32(f"cache {number}".encode()) % 2, f"cache {number}")
        with (
            vswap.connect(daemon.socket_path, name=homes[0]),
            vswap.connect(daemon.socket_path, name=homes[1]) as space,
        ):
            slots = space.store(noise(1000))
            assert space.load(slots) == noise(1000)
            space.free(slots)
        asyncio.run(store(daemon.socket_path, homes[1]))
