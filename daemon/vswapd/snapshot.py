"""A frozen picture of the engine, for status, metrics and tests.

This module must not know JSON, screens, or how often it is asked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vswapd.core import Core
from vswapd.settings import Settings
from vswapd.shrinker import Shrinker
from vswapd.stats import Stats
from vswapd.swap_table import Tag
from vswapd_backends.base import PAGE_BYTES
from vswapd_backends.zswap import Pool
from vswapd_blockdev.device import EXTENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Allocated slots by state."""

    unbacked: int
    lost: int
    """Their device was taken out of use, and could not be read."""
    zero: int
    zswap: int
    phys: int

    @property
    def allocated(self) -> int:
        """All of them."""
        return self.unbacked + self.lost + self.zero + self.zswap + self.phys


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPart:
    """One codec's entries."""

    codec: str
    tier: str
    """`new`: for new pages; `dense`: for pages that got old; `former`: until its pages are gone."""
    bytes: int
    """Memory that its segments take."""
    entries: int
    live_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """All pools together."""

    bytes: int
    """Memory that they really occupy: segments, directories included."""
    live_bytes: int
    """Compressed bytes of live entries."""
    original_bytes: int
    """What these pages are uncompressed."""
    limit_bytes: int
    """What they may occupy as things stand: pool_max, or less where memory is short."""
    pressure: str
    """Why that is less; empty: it is not."""
    segments: int
    full: bool
    corrupt_entries: int
    parts: tuple[PoolPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """One swap device."""

    path: str
    size_bytes: int
    used_bytes: int
    live_bytes: int
    priority: int
    state: str
    direct: bool
    encrypted: bool
    bad_extents: int
    read_errors: int
    write_errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkerState:
    """What the shrinker does and why."""

    enabled: bool
    doing: str
    why: str
    last_bytes: int
    budget_bytes: int
    budget_left_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """One group's charges and limits."""

    name: str
    pool_bytes: int
    pool_max_bytes: int | None
    device_bytes: int
    device_max_bytes: int | None
    writeback: bool
    spaces: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceState:
    """One space's holdings."""

    id: int
    client: str
    pid: int
    uid: int
    group: str
    slots: int
    zero: int
    original_bytes: int
    compressed_bytes: int
    opened_at: float
    key: str
    """The same for all parts of a space that several shards share; empty: there is one part."""
    joined: bool
    """Whether this is a part that came after the first."""
    name: str
    """Of one that outlives its client; empty: it has none."""
    attached: bool
    """Whether a client is connected to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything at one moment."""

    slots: Slots
    pool: PoolState
    table_bytes: int
    clusters: int
    devices: tuple[DeviceState, ...]
    shrinker: ShrinkerState
    stats: Stats
    groups: tuple[GroupState, ...]
    spaces: tuple[SpaceState, ...]
    saved_bytes: int
    settings: Settings


def take(core: Core, shrinker: Shrinker) -> Snapshot:
    """See Engine.snapshot."""
    counts = core.slot_counts
    return Snapshot(
        slots=Slots(
            unbacked=int(counts[Tag.UNBACKED]),
            lost=int(counts[Tag.LOST]),
            zero=int(counts[Tag.ZERO]),
            zswap=int(counts[Tag.ZSWAP]),
            phys=int(counts[Tag.PHYS]),
        ),
        pool=_pool(core),
        table_bytes=core.table.resident_bytes,
        clusters=core.clusters.in_use,
        devices=tuple(_devices(core)),
        shrinker=ShrinkerState(
            enabled=core.settings.shrinker_enabled,
            doing=shrinker.doing,
            why=shrinker.why,
            last_bytes=shrinker.last_bytes,
            budget_bytes=core.settings.write_budget,
            budget_left_bytes=core.budget_left(),
        ),
        stats=dataclasses.replace(core.stats, rejects=dict(core.stats.rejects)),
        groups=tuple(
            GroupState(
                name=group.name,
                pool_bytes=group.pool_bytes,
                pool_max_bytes=group.limits.pool_max,
                device_bytes=group.device_bytes,
                device_max_bytes=group.limits.device_max,
                writeback=group.limits.writeback,
                spaces=group.spaces,
            )
            for group in core.groups
        ),
        spaces=tuple(
            SpaceState(
                id=space.id,
                client=space.client,
                pid=space.holder.pid,
                uid=space.uid,
                group=space.group.name,
                slots=space.slots.slots,
                zero=space.zero_pages,
                original_bytes=space.backed_pages * PAGE_BYTES,
                compressed_bytes=space.compressed_bytes,
                opened_at=space.opened_at,
                key=space.key,
                joined=space.joined,
                name=space.name,
                attached=space.attached,
            )
            for space in core.spaces.values()
        ),
        saved_bytes=core.saved_bytes,
        settings=core.settings,
    )


def _pool(core: Core) -> PoolState:
    zswap = core.zswap
    return PoolState(
        bytes=zswap.resident_bytes,
        live_bytes=zswap.total_live_bytes,
        original_bytes=zswap.total_entries * PAGE_BYTES,
        limit_bytes=core.pressure.limit,
        pressure=core.pressure.why,
        segments=zswap.arena.in_use,
        full=core.pool_was_full,
        corrupt_entries=zswap.corrupt_entries,
        parts=tuple(
            PoolPart(
                codec=pool.codec.spec,
                tier=_tier(core, pool),
                bytes=zswap.resident_of(pool),
                entries=pool.entries,
                live_bytes=pool.live_bytes,
            )
            for pool in zswap.pools
            if pool.entries or pool is zswap.current or pool is zswap.dense
        ),
    )


def _tier(core: Core, pool: Pool) -> str:
    if pool is core.zswap.current:
        return "new"
    return "dense" if pool is core.zswap.dense else "former"


def _devices(core: Core) -> list[DeviceState]:
    return [
        DeviceState(
            path=entry.device.path,
            size_bytes=entry.device.extents * EXTENT_BYTES,
            used_bytes=entry.used * EXTENT_BYTES,
            live_bytes=int(entry.live_bytes.sum()),
            priority=entry.priority,
            state=entry.state,
            direct=entry.device.direct,
            encrypted=entry.device.encrypted,
            bad_extents=entry.map.bad,
            read_errors=entry.read_errors,
            write_errors=entry.write_errors,
        )
        for entry in core.devices
    ]
