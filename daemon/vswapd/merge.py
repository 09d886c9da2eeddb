"""Several shards seen as one: sums, and what stands for all of them.

Invariants:
- Of one shard's snapshot nothing is changed.
- A space is one, however many shards have a part of it.

This module must not know processes, or where the snapshots come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, TypeVar

from vswapd.settings import Settings
from vswapd.snapshot import (
    DeviceState,
    GroupState,
    PoolPart,
    PoolState,
    ShrinkerState,
    Slots,
    Snapshot,
    SpaceState,
)
from vswapd.stats import Stats

T = TypeVar("T")
_AT_REST: Final = {"waits": 1, "idle": 2}
"""What a shrinker does that does nothing: the first of these holds for all."""
_WORST: Final = ("draining", "failing", "on")
"""States of a device: what one shard says of it holds for all, in this order."""


def merged(snapshots: Sequence[Snapshot], settings: Settings) -> Snapshot:
    """One snapshot of all shards.

    Args:
        snapshots: one of each, at least one.
        settings: what holds for the daemon as a whole.
    """
    return Snapshot(
        slots=Slots(
            unbacked=sum(s.slots.unbacked for s in snapshots),
            lost=sum(s.slots.lost for s in snapshots),
            zero=sum(s.slots.zero for s in snapshots),
            zswap=sum(s.slots.zswap for s in snapshots),
            phys=sum(s.slots.phys for s in snapshots),
        ),
        pool=_pool([s.pool for s in snapshots]),
        table_bytes=sum(s.table_bytes for s in snapshots),
        clusters=sum(s.clusters for s in snapshots),
        devices=_each([s.devices for s in snapshots], lambda d: d.path, _device),
        shrinker=_shrinker([s.shrinker for s in snapshots]),
        stats=_stats([s.stats for s in snapshots]),
        groups=_each([s.groups for s in snapshots], lambda g: g.name, _group),
        spaces=_each([s.spaces for s in snapshots], lambda s: s.key or object(), _space),
        saved_bytes=sum(s.saved_bytes for s in snapshots),
        settings=settings,
    )


def _each(
    parts: Iterable[Iterable[T]], key: Callable[[T], Hashable], one_of: Callable[[list[T]], T]
) -> tuple[T, ...]:
    """What has the same key made one, in the order in which the keys come first."""
    found: dict[Hashable, list[T]] = {}
    for part in parts:
        for item in part:
            found.setdefault(key(item), []).append(item)
    return tuple(one_of(items) for items in found.values())


def _pool(pools: list[PoolState]) -> PoolState:
    # Each shard looks at memory by itself: the one that has found least holds for all.
    tightest = min(pools, key=lambda p: p.limit_bytes)
    return PoolState(
        limit_bytes=tightest.limit_bytes,
        pressure=tightest.pressure,
        bytes=sum(p.bytes for p in pools),
        live_bytes=sum(p.live_bytes for p in pools),
        original_bytes=sum(p.original_bytes for p in pools),
        segments=sum(p.segments for p in pools),
        full=any(p.full for p in pools),
        corrupt_entries=sum(p.corrupt_entries for p in pools),
        parts=_each(
            [p.parts for p in pools],
            lambda part: part.codec,
            lambda parts: PoolPart(
                codec=parts[0].codec,
                tier=parts[0].tier,
                bytes=sum(p.bytes for p in parts),
                entries=sum(p.entries for p in parts),
                live_bytes=sum(p.live_bytes for p in parts),
            ),
        ),
    )


def _device(parts: list[DeviceState]) -> DeviceState:
    return dataclasses.replace(
        parts[0],
        used_bytes=sum(p.used_bytes for p in parts),
        live_bytes=sum(p.live_bytes for p in parts),
        state=min((p.state for p in parts), key=_WORST.index),
        bad_extents=sum(p.bad_extents for p in parts),
        read_errors=sum(p.read_errors for p in parts),
        write_errors=sum(p.write_errors for p in parts),
    )


def _shrinker(parts: list[ShrinkerState]) -> ShrinkerState:
    """What one that works does; if none does, what one waits for; else why the first idles."""
    busy = min(parts, key=lambda p: _AT_REST.get(p.doing, 0))
    left = [p.budget_left_bytes for p in parts if p.budget_left_bytes is not None]
    return dataclasses.replace(
        busy,
        last_bytes=sum(p.last_bytes for p in parts),
        budget_left_bytes=min(left, default=None),
    )


def _stats(parts: list[Stats]) -> Stats:
    sums = {
        field.name: sum(getattr(p, field.name) for p in parts)
        for field in dataclasses.fields(Stats)
        if field.name != "rejects"
    }
    rejects = {reason: sum(p.rejects[reason] for p in parts) for reason in parts[0].rejects}
    return Stats(**sums, rejects=rejects)


def _group(parts: list[GroupState]) -> GroupState:
    return dataclasses.replace(
        parts[0],
        pool_bytes=sum(p.pool_bytes for p in parts),
        device_bytes=sum(p.device_bytes for p in parts),
        spaces=sum(p.spaces for p in parts),
    )


def _space(parts: list[SpaceState]) -> SpaceState:
    first = min(parts, key=lambda p: (p.joined, p.opened_at))
    return dataclasses.replace(
        first,
        slots=sum(p.slots for p in parts),
        zero=sum(p.zero for p in parts),
        original_bytes=sum(p.original_bytes for p in parts),
        compressed_bytes=sum(p.compressed_bytes for p in parts),
        attached=any(p.attached for p in parts),
    )
