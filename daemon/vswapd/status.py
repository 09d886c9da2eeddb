"""The status document: what STATUS answers, `vswapctl status` shows, and metrics are made of.

The names in it are relied on by others; docs/protocol.md lists them. Sizes are in bytes.

This module must not know sockets, or who asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from vswapd.snapshot import PoolPart, Snapshot, SpaceState
from vswapd_backends.base import PAGE_BYTES

_TOP: Final = 10
"""Spaces that are named in the document."""
_MOST_SPACES: Final = 512
"""So many of the longest names, in JSON, are less than the MiB that clients take of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the engine does not know of the service."""

    version: str
    state: str
    pid: int
    uptime_s: float
    clients: int
    shrinker_errors: int
    locked: bool
    """Whether table and pool are locked into RAM."""
    lock_trouble: str
    """Why not, where it was wanted."""
    fits_bytes: int
    """What the pool can have at most beside the processes."""
    lowered: str
    """Why that is less than its maximum; empty: it is not."""
    settings: Mapping[str, str]
    config_error: str | None = None
    """Why the configuration's file does not hold; None: it does."""


def document(snapshot: Snapshot, facts: Facts, discards: Mapping[str, bool]) -> dict[str, Any]:
    """The status as JSON values.

    Args:
        snapshot: the engine at one moment.
        facts: of the service.
        discards: by the path of a device, whether what is discarded gives its space back.
    """
    pool = snapshot.pool
    slots = snapshot.slots
    settings = snapshot.settings
    stats = dataclasses.asdict(snapshot.stats)
    rejects = stats.pop("rejects")
    return {
        "version": facts.version,
        "state": facts.state,
        "pid": facts.pid,
        "uptime_s": round(facts.uptime_s, 1),
        "config_error": facts.config_error,
        "shards": 1,
        "silent_shards": [],
        "slots": {"allocated": slots.allocated, **dataclasses.asdict(slots)},
        "pool": {
            "enabled": settings.pool_enabled,
            "bytes": pool.bytes,
            "max_bytes": settings.pool_max,
            "limit_bytes": pool.limit_bytes,
            "pressure": pool.pressure,
            "fits_bytes": facts.fits_bytes,
            "lowered": facts.lowered,
            "locked": facts.locked,
            "lock_trouble": facts.lock_trouble,
            "reserve_bytes": settings.pool_reserve,
            "accept_bytes": int(pool.limit_bytes * settings.accept_threshold),
            "live_bytes": pool.live_bytes,
            "original_bytes": pool.original_bytes,
            "codec": settings.codec,
            "dense_codec": settings.dense or None,
            "verify": settings.verify,
            "full": pool.full,
            "segments": pool.segments,
            "corrupt_entries": pool.corrupt_entries,
            "tiers": [_tier(part) for part in pool.parts],
        },
        "table": {
            "bytes": snapshot.table_bytes,
            "max_slots": settings.max_slots,
            "clusters": snapshot.clusters,
        },
        "devices": [
            dataclasses.asdict(device) | {"discard": discards.get(device.path, False)}
            for device in snapshot.devices
        ],
        "shrinker": {**dataclasses.asdict(snapshot.shrinker), "errors": facts.shrinker_errors},
        "traffic": stats,
        "rejects": rejects,
        "groups": [dataclasses.asdict(group) for group in snapshot.groups],
        "top_spaces": [
            {
                "id": str(space.id),
                "name": space.name or None,
                "client": _client(space),
                "slots": space.slots,
                "original_bytes": space.original_bytes,
                "compressed_bytes": space.compressed_bytes,
            }
            for space in _largest(snapshot.spaces)[:_TOP]
        ],
        "clients": facts.clients,
        "spaces": len(snapshot.spaces),
        "saved_bytes": snapshot.saved_bytes,
        "ratio": round(pool.original_bytes / pool.live_bytes, 3) if pool.live_bytes else 0.0,
        "settings": dict(facts.settings),
    }


def spaces(snapshot: Snapshot, now: float, uid: int | None) -> dict[str, Any]:
    """What the verb `spaces` answers: the largest spaces, largest first, and how many are left out.

    Args:
        snapshot: of the engine.
        now: the engine's clock.
        uid: whose; None: everybody's.
    """
    found = [space for space in _largest(snapshot.spaces) if uid in {None, space.uid}]
    return {
        "spaces": [
            {
                "id": str(space.id),
                "name": space.name or None,
                "client": _client(space),
                "pid": space.pid if space.attached else None,
                "uid": space.uid,
                "group": space.group,
                "slots": space.slots,
                "zero": space.zero,
                "original_bytes": space.original_bytes,
                "compressed_bytes": space.compressed_bytes,
                "connected_s": round(now - space.opened_at, 1),
            }
            for space in found[:_MOST_SPACES]
        ],
        "left_out": max(0, len(found) - _MOST_SPACES),
        "silent_shards": [],
    }


def _client(space: SpaceState) -> str | None:
    """How the client calls itself that is connected; None: none is, whoever it was before."""
    return space.client if space.attached else None


def _largest(found: tuple[SpaceState, ...]) -> list[SpaceState]:
    return sorted(found, key=lambda space: (-space.original_bytes, space.id))


def _tier(part: PoolPart) -> dict[str, Any]:
    original = part.entries * PAGE_BYTES
    return {
        "codec": part.codec,
        "tier": part.tier,
        "pages": part.entries,
        "bytes": part.bytes,
        "live_bytes": part.live_bytes,
        "original_bytes": original,
        "ratio": round(original / part.live_bytes, 3) if part.live_bytes else None,
    }
