"""Limits mean the same with however many shards: what fits, and what is left when they fall."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import vswap
from support.daemon import running_daemon
from support.wire import Wire
from vswap.control import Control

MIB: Final = 1 << 20
SEGMENT: Final = 256 << 10
PAGES: Final = 5000
"""19.6 MiB that do not shrink, of all shards together."""


def noise(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


@contextlib.contextmanager
def filled(
    shards: int,
    *settings: str,
    device: Path,
    on: Sequence[int] | None = None,
    pages: int = PAGES,
) -> Iterator[tuple[Control, list[tuple[Wire, list[int], bytes]]]]:
    """A daemon with a device, whose shards (those of `on`) hold the same number of pages each."""
    with (
        running_daemon(f"server.shards={shards}", *settings) as daemon,
        contextlib.ExitStack() as opened,
    ):
        control = opened.enter_context(Control(daemon.socket_path))
        control.call("swapon", path=str(device), size=64 * MIB)
        held = []
        those = range(shards) if on is None else on
        for shard in those:
            wire = opened.enter_context(Wire(daemon.socket_path))
            assert wire.hello(0, shard=shard)["shard"] == shard
            for first in range(0, pages // len(those), 100):
                some = noise(100, shard * PAGES + first)
                held.append((wire, wire.store(some).slots, some))
        yield control, held


def at_rest(control: Control, what: str, most: int) -> dict[str, Any]:
    """The status once so little is left, and no shard's shrinker does anything any more."""
    while True:
        document = control.status()
        pool = document["pool"]["bytes"]
        left = pool if what == "pool" else document["groups"][0]["pool_bytes"]
        if left <= most and document["shrinker"]["doing"] == "idle":
            return document


@pytest.mark.parametrize(("shards", "on"), [(1, None), (2, None), (3, None), (3, [1])])
@pytest.mark.parametrize("what", ["pool", "group"])
def test_a_lower_limit_makes_the_excess_go_and_no_more(
    tmp_path: Path, shards: int, on: Sequence[int] | None, what: str
) -> None:
    """What is left, and what was written, is the same with 1, 2 and 3 shards, even or uneven."""
    with filled(shards, "pool.max=64M", device=tmp_path / "swap", on=on) as (control, held):
        before = control.status()["pool"]["bytes"]
        name = control.status()["groups"][0]["name"]
        if what == "pool":
            control.call("set", key="pool.max", value="8M")
            wanted = int(0.85 * 8 * MIB)  # the low watermark
        else:
            control.call("set", key=f"groups.{name}.pool_max", value="8M")
            wanted = 8 * MIB
        document = at_rest(control, what, wanted)
        left = document["pool"]["bytes"] if what == "pool" else document["groups"][0]["pool_bytes"]
        assert wanted - (shards + 1) * SEGMENT <= left <= wanted
        written = document["traffic"]["writeback_bytes"]
        assert written <= before - wanted + (shards + 1) * 2 * SEGMENT
        assert control.call("verify")["ok"]
        for wire, slots, pages in held[:: len(held) // 6]:
            assert wire.load(slots).body == pages


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("limit", ["0", "1M"])
def test_a_limit_below_what_each_shard_has_open(tmp_path: Path, shards: int, limit: str) -> None:
    """All of the shards get below it together, and rest then."""
    with filled(shards, "pool.max=64M", device=tmp_path / "swap", pages=1500) as (control, held):
        control.call("set", key="pool.max", value=limit)
        at_rest(control, "pool", 0 if limit == "0" else MIB)
        control.call("set", key="pool.max", value="64M")
        for wire, slots, pages in held:
            assert wire.load(slots).body == pages


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_swapoff_never_passes_the_limit(tmp_path: Path, shards: int) -> None:
    """Shards that take their parts of a device back at once stay below pool.max together."""
    path = str(tmp_path / "swap")
    settings = ("pool.max=10M", "pool.enabled=false", "shrinker.enabled=false")
    with filled(shards, *settings, device=tmp_path / "swap") as (control, held):
        control.call("set", key="pool.enabled", value="true")
        with pytest.raises(vswap.OutOfService, match="neither the pool nor another device"):
            control.call("swapoff", path=path)
        document = control.status()
        assert document["pool"]["bytes"] <= 10 * MIB
        assert document["devices"][0]["state"] == "on"
        assert control.call("verify")["ok"]
        control.call("set", key="pool.max", value="32M")
        control.call("swapoff", path=path)
        for wire, slots, pages in held:
            assert wire.load(slots).body == pages
        assert control.call("verify")["ok"]
