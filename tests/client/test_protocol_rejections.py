"""Pages that the real daemon does not take, or has lost, each with its reason on the wire."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.wire import (
    FOR_CONTROL,
    NO_SLOTS,
    PAGE_LOST,
    REJECTED,
    STATUS,
    UNBACKED,
    WORDS,
    Reply,
    Wire,
    noise,
    text_pages,
)


def rejection(reply: Reply) -> str:
    assert reply.status == REJECTED, reply
    return WORDS[reply.flags]


def test_a_rejected_overwrite_leaves_no_content() -> None:
    """REJECTED: old bytes are gone, loading is UNBACKED, storing again and freeing work."""
    with running_daemon("pool.max=2M") as daemon, Wire(daemon.socket_path) as wire:
        wire.hello()
        slots = wire.store(text_pages(600)).slots
        reply = wire.store(noise(600), slots)
        assert rejection(reply) == "pool_full"
        assert reply.slots == slots
        unbacked = wire.load(slots[:3])
        assert (unbacked.status, unbacked.slots) == (UNBACKED, slots[:3])
        assert wire.store(text_pages(2), slots[:2]).status == 0
        assert wire.load(slots[:2]).body == text_pages(2)
        assert wire.load(slots[1:4]).slots == slots[2:4]
        assert wire.free(slots).status == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["pool.max=1M"], "pool_full"),
        (["pool.enabled=false"], "no_device"),
        (["groups.default.pool_max=1M"], "group_limit"),
        (["store.enabled=false"], "disabled"),
    ],
)
def test_reasons_without_a_device(settings: list[str], reason: str) -> None:
    """Each way to have no room has its reason; no slot is given out for a refused page."""
    with running_daemon(*settings) as daemon, Wire(daemon.socket_path) as wire:
        wire.hello()
        reply = wire.store(noise(1000))
        assert rejection(reply) == reason
        assert not reply.slots
        slots = wire.ask(STATUS).json["slots"]
        assert slots["allocated"] == 0
        assert wire.ask(STATUS).json["rejects"][reason] == 1000


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "device_full"),
        (["groups.default.writeback=false"], "writeback_disabled"),
        (["shrinker.write_budget=1M"], "write_budget"),
    ],
)
def test_reasons_with_a_device(tmp_path: Path, settings: list[str], reason: str) -> None:
    """With a device there are other reasons for having no room."""
    with (
        running_daemon("pool.max=2M", *settings) as daemon,
        Wire(daemon.socket_path) as wire,
        Wire(daemon.socket_path) as steering,
    ):
        wire.hello()
        steering.hello(FOR_CONTROL)
        steering.done("swapon", path=str(tmp_path / "swap"), size=4 << 20)
        reply = wire.store(noise(256))
        while reply.status == 0:
            reply = wire.store(noise(256))
        assert rejection(reply) == reason


def test_a_full_table_is_no_slots() -> None:
    """NO_SLOTS: the table has no room for so many new slots; nothing was given out."""
    with running_daemon("table.max_slots=512") as daemon, Wire(daemon.socket_path) as wire:
        wire.hello()
        assert wire.store(bytes(4096 * 513)).status == NO_SLOTS
        assert wire.store(bytes(4096 * 512)).status == 0
        assert wire.store(bytes(4096)).status == NO_SLOTS


def test_a_lost_page_is_named(tmp_path: Path) -> None:
    """PAGE_LOST names the slots whose bytes on the device are not what was written."""
    swap = tmp_path / "swap"
    with (
        running_daemon("pool.max=8M", "shrinker.enabled=false") as daemon,
        Wire(daemon.socket_path) as wire,
        Wire(daemon.socket_path) as steering,
    ):
        wire.hello()
        steering.hello(FOR_CONTROL)
        steering.done("swapon", path=str(swap), size=16 << 20)
        pages = noise(512)
        slots = wire.store(pages).slots
        written = steering.done("writeback", bytes=1 << 30)
        assert written["pages"] > 0
        assert wire.load(slots).body == pages
        size = swap.stat().st_size
        with swap.open("r+b") as device:
            device.seek(1 << 20)
            device.write(b"\xa5" * (size - (1 << 20)))
            device.flush()
            os.fsync(device.fileno())
        reply = wire.load(slots)
        assert reply.status == PAGE_LOST
        lost = set(reply.slots)
        assert lost
        assert reply.text
        kept = [n for n, slot in enumerate(slots) if slot not in lost]
        for n in kept:
            assert wire.load([slots[n]]).body == pages[n * 4096 : (n + 1) * 4096]
        assert wire.free(slots).status == 0
