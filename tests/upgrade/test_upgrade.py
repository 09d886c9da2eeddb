"""A live service is upgraded from the version that CI passed last: no page is lost, and no call."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.service_manager import ServiceManager
from support.sources import REPOSITORY
from support.versions import MAKERS, PREVIOUS, Program, git, program, version_of
from vswapd.upgrades import LIFE_VERSION

MIB = 1 << 20
EACH = pytest.mark.parametrize("shards", [1, 3])


@pytest.mark.parametrize("commit", [PREVIOUS, *MAKERS.values()])
def test_what_is_upgraded_is_an_earlier_version(commit: str) -> None:
    """It is of this branch's past, named in full."""
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert git("merge-base", "HEAD", commit).decode().strip() == commit


@contextlib.contextmanager
def _service(shards: int, sources: Path) -> Iterator[ServiceManager]:
    """A service of a version that has been started."""
    with ServiceManager(
        f"server.shards={shards}", "pool.max=64M", "pool.tiers=lz4,zstd:3", "pool.dense_age=1h"
    ) as manager:
        manager.sources = sources
        manager.start()
        yield manager


@contextlib.contextmanager
def _clients(manager: ServiceManager, sources: Path) -> Iterator[Program]:
    with program(manager.socket_path, sources) as made:
        yield made


def _furnish(client: Program, directory: Path) -> None:
    """Pages of every kind and in every place, and whatever else is kept."""
    for who in ("pool", "device", "dense", "lost", "asked"):
        client.tell("open", who=who)
    client.tell("open", who="named", name="for the next one")
    _lose(client, directory)
    client.tell("store", who="device", count=3000)
    client.call("swapon", path=str(directory / "swap"), size=64 * MIB, priority=3)
    while client.status()["slots"]["phys"] < 1200:
        client.call("writeback", bytes=4 * MIB)
    # What is dense is compressed with zstd as it comes.
    client.call("set", key="pool.tiers", value="zstd:3")
    client.tell("store", who="dense", count=500)
    client.call("set", key="pool.tiers", value="lz4,zstd:3")
    client.call("set", key="shrinker.idle_age", value="3h")
    client.call("set", key="groups.0.pool_max", value="48M")
    client.call("set", key="shrinker.write_budget", value="1G")
    for who in ("pool", "named"):
        client.tell("store", who=who, count=700)
        client.tell("overwrite", who=who)
        client.tell("free", who=who)
    for who in ("pool", "device", "dense", "lost", "named"):
        assert client.tell("check", who=who)


def _lose(client: Program, directory: Path) -> None:
    """Pages on a device that is damaged, and given up."""
    client.tell("store", who="lost", count=400)
    client.call("swapon", path=str(directory / "bad"), size=16 * MIB, priority=9)
    before = client.status()["slots"]["phys"]
    while client.status()["slots"]["phys"] < before + 200:
        client.call("writeback", bytes=4 * MIB)
    with (directory / "bad").open("r+b") as device:
        for at in range(128 << 10, 16 * MIB, 64 << 10):
            device.seek(at)
            device.write(os.urandom(32 << 10))
    client.call("swapoff", path=str(directory / "bad"), give_up=True)
    assert client.tell("lose", who="lost") > 20


def _kept(document: dict[str, Any]) -> dict[str, Any]:
    """What an upgrade leaves as it is."""
    names = ("path", "priority", "state", "size_bytes", "used_bytes")
    return {
        "slots": document["slots"],
        "groups": document["groups"],
        "devices": [{name: each.get(name) for name in names} for each in document["devices"]],
        "spaces": document["spaces"],
        "settings": {
            key: value
            for key, value in document["settings"].items()
            if key in {"pool.tiers", "shrinker.idle_age", "shrinker.write_budget", "pool.max"}
        },
        "budget": document["shrinker"]["budget_left_bytes"],
    }


@pytest.mark.parametrize(
    ("shards", "how"), [(1, "restart"), (1, "kill"), (3, "restart"), (3, "kill the main process")]
)
def test_a_live_service_is_upgraded(shards: int, how: str, earlier: Path, tmp_path: Path) -> None:
    """Pages in every place, lost ones, settings, devices, limits; clients old and new."""
    with _service(shards, earlier) as manager, _clients(manager, earlier) as old:
        _furnish(old, tmp_path)
        held = old.tell("held", who="named")
        old.tell("close", who="named")
        before = _kept(old.status())
        old.tell("work", who="asked")
        converts = version_of(manager.kept["kept-life"]) != LIFE_VERSION
        manager.sources = REPOSITORY
        for _ in range(2):
            if how == "restart":
                manager.restart()
            else:
                # Its shards end by themselves, and are waited for.
                os.kill(manager.pid, signal.SIGKILL)
                manager.start()
            for who in ("pool", "device", "dense", "lost"):
                assert old.tell("check", who=who)
        assert old.tell("rest", who="asked") > 0
        assert _kept(old.status()) == before
        assert manager.log.count("what was kept is of layout") == converts
        assert old.call("verify")["ok"]
        with _clients(manager, REPOSITORY) as new:
            new.tell("open", who="named", name="for the next one", held=held)
            new.tell("open", who="new")
            new.tell("store", who="new", count=500)
            new.call("swapoff", path=str(tmp_path / "swap"))
            for client, who in ((new, "named"), (new, "new"), (old, "device"), (old, "lost")):
                assert client.tell("check", who=who)
                client.tell("overwrite", who=who)
                client.tell("free", who=who)
            manager.kill()
            manager.start()
            for client, who in ((new, "named"), (new, "new"), (old, "device"), (old, "dense")):
                assert client.tell("check", who=who)
            assert new.call("verify")["ok"]
        assert "Traceback" not in manager.log


@EACH
def test_what_was_stored_before_is_as_old_as_it_is(
    shards: int, earlier: Path, tmp_path: Path
) -> None:
    """By another clock than before: nothing is idle too early, and all of it in time."""
    device = f"device={tmp_path / 'swap'},size=32M"
    with ServiceManager(f"server.shards={shards}", "pool.max=32M", device) as manager:
        manager.sources = earlier
        manager.settings += ["shrinker.idle_age=1h", "shrinker.write_budget=1G"]
        manager.start()
        with _clients(manager, earlier) as client:
            client.tell("open", who="it")
            client.tell("store", who="it", count=1000)
            client.call("writeback", bytes=MIB)
            before = client.status()
            manager.sources = REPOSITORY
            manager.restart()
            client.tell("check", who="it")
            after = client.status()
            for where, name in (("slots", "phys"), ("shrinker", "budget_left_bytes")):
                assert after[where][name] == before[where][name]
            (space,) = client.call("spaces")["spaces"]
            assert 0 < space["connected_s"] < 3600
            client.call("set", key="shrinker.idle_age", value="1s")
            while client.status()["slots"]["zswap"]:
                pass  # each answer is waited for
            assert client.tell("check", who="it") == 1000
