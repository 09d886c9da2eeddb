"""Daemons of one service, one after the other, between which somebody sets the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
from support.service_manager import ServiceManager
from vswap.control import Control

HOUR = 3600.0
DAY = 24 * HOUR
PAGES = 1000


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    """A service with a device that has not been started yet."""
    device = f"device={tmp_path / 'swap'},size=32M"
    with ServiceManager(f"server.shards={request.param}", "pool.max=32M", device) as made:
        yield made


def _noise() -> bytes:
    return np.random.default_rng(0).bytes(PAGES * 4096)


def _status(manager: ServiceManager) -> dict[str, Any]:
    with Control(manager.socket_path) as control:
        return control.status()


def _await(manager: ServiceManager, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status of which that is true."""
    with Control(manager.socket_path) as control:
        while not wanted(document := control.status()):
            pass  # each answer is waited for
    return document


@pytest.mark.parametrize("set_by", [-HOUR, -DAY], ids=["an hour", "a day"])
def test_pages_grow_idle_in_time_when_the_clock_was_set_back(
    manager: ServiceManager, set_by: float
) -> None:
    """What was stored before, and what is stored since, goes to the device when it is idle."""
    manager.settings.append("shrinker.idle_age=1s")
    manager.settings.append("shrinker.enabled=false")
    manager.start()
    with vswap.connect(manager.socket_path, timeout=30) as space:
        slots = space.store(_noise())
        manager.settings.pop()
        manager.clock_set_by = set_by
        manager.restart()
        _await(manager, lambda document: document["slots"]["phys"] == PAGES)
        more = space.store(_noise())
        _await(manager, lambda document: document["slots"]["phys"] == 2 * PAGES)
        assert space.load(slots) == space.load(more) == _noise()


def test_a_leap_forwards_makes_nothing_idle(manager: ServiceManager) -> None:
    """Pages are as old as they are, and stay in the pool."""
    manager.settings.append("shrinker.idle_age=1h")
    manager.start()
    with vswap.connect(manager.socket_path, timeout=30) as space:
        slots = space.store(_noise())
        for set_by in (400 * DAY, 800 * DAY):
            manager.clock_set_by = set_by
            manager.restart()
            # Each time it has to look at what there is to do.
            for _ in range(20):
                space.free(space.store(_noise()))
            found = _status(manager)
            assert found["shrinker"]["why"] == "below the watermarks"
            assert found["slots"]["phys"] == 0
            assert space.load(slots) == _noise()


@pytest.mark.parametrize("set_by", [-HOUR, -DAY, -400 * DAY], ids=["an hour", "a day", "a year"])
def test_a_days_budget_is_not_given_twice(manager: ServiceManager, set_by: float) -> None:
    """What was written is written, whichever day the clock names after it was set back."""
    manager.settings.append("shrinker.write_budget=2M")
    # Not just before midnight, when it would be another day's by right.
    noon = DAY / 2 - time.time() % DAY
    manager.clock_set_by = noon
    manager.start()
    with vswap.connect(manager.socket_path, timeout=30) as space:
        slots = space.store(_noise())
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=32 << 20)
        before = _status(manager)
        left = before["shrinker"]["budget_left_bytes"]
        assert left < 1 << 20
        manager.clock_set_by = noon + set_by
        manager.restart()
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=32 << 20)
        after = _status(manager)
        assert after["shrinker"]["budget_left_bytes"] <= left
        assert after["slots"]["phys"] - before["slots"]["phys"] <= left // 4096
        assert space.load(slots) == _noise()


def test_a_connection_is_as_old_as_it_is(manager: ServiceManager) -> None:
    """Whatever the clock shows: `connected_s` is no time of day."""
    manager.start()
    with vswap.connect(manager.socket_path, name="named", timeout=30) as space:
        space.store(_noise())
        for set_by in (-400 * DAY, 400 * DAY):
            manager.clock_set_by = set_by
            manager.restart()
            with Control(manager.socket_path) as control:
                (found,) = control.call("spaces")["spaces"]
            assert 0 <= found["connected_s"] < HOUR
