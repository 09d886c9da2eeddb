"""STATUS documents of daemons in various states, for tests of what shows them.

This module must not know who shows them.
"""

from __future__ import annotations

import copy
from typing import Any

from vswap.protocol import Reason
from vswapd.config import Config

MIB = 1 << 20


def tier(codec: str, name: str, pages: int, live_bytes: int) -> dict[str, Any]:
    """One codec's part of the pool."""
    original = pages * 4096
    return {
        "codec": codec,
        "tier": name,
        "pages": pages,
        "bytes": live_bytes + live_bytes // 64,
        "live_bytes": live_bytes,
        "original_bytes": original,
        "ratio": round(original / live_bytes, 3) if live_bytes else None,
    }


EMPTY: dict[str, Any] = {
    "version": "0.1.0",
    "state": "running",
    "pid": 4242,
    "uptime_s": 3.5,
    "shards": 1,
    "silent_shards": [],
    "slots": {"allocated": 0, "unbacked": 0, "lost": 0, "zero": 0, "zswap": 0, "phys": 0},
    "pool": {
        "enabled": True,
        "bytes": 0,
        "max_bytes": 256 * MIB,
        "limit_bytes": 256 * MIB,
        "pressure": "",
        "fits_bytes": 256 * MIB,
        "lowered": "",
        "locked": False,
        "lock_trouble": "",
        "reserve_bytes": 128 * MIB,
        "accept_bytes": 230 * MIB,
        "live_bytes": 0,
        "original_bytes": 0,
        "codec": "lz4",
        "verify": "never",
        "full": False,
        "segments": 0,
        "corrupt_entries": 0,
        "dense_codec": "zstd:3",
        "tiers": [tier("lz4", "new", 0, 0), tier("zstd:3", "dense", 0, 0)],
    },
    "table": {"bytes": 0, "max_slots": 1 << 30, "clusters": 0},
    "devices": [],
    "shrinker": {
        "enabled": True,
        "doing": "idle",
        "why": "below the watermarks",
        "last_bytes": 0,
        "budget_bytes": 0,
        "budget_left_bytes": None,
        "errors": 0,
    },
    "traffic": {
        "store_pages": 0,
        "load_pages": 0,
        "free_pages": 0,
        "writeback_pages": 0,
        "writeback_bytes": 0,
        "recompress_pages": 0,
        "recompress_saved_bytes": 0,
        "recompress_seconds": 0.0,
        "swapin_pages": 0,
        "fallback_pages": 0,
        "fallback_bytes": 0,
        "reclaim_bytes": 0,
        "swapoff_bytes": 0,
        "compact_bytes": 0,
        "device_compact_bytes": 0,
        "lost_pages": 0,
        "housekeeping_errors": 0,
    },
    "rejects": {reason.word: 0 for reason in Reason},
    "groups": [],
    "top_spaces": [],
    "clients": 0,
    "spaces": 0,
    "saved_bytes": 0,
    "ratio": None,
    "settings": Config().flat(),
}
"""A daemon that has just been started with its defaults."""


def _changed(base: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A copy of `base` with the parts merged in, one level deep."""
    made = copy.deepcopy(base)
    for key, value in parts.items():
        if isinstance(value, dict):
            made[key].update(value)
        else:
            made[key] = value
    return made


def device(**keys: Any) -> dict[str, Any]:
    """One device of a status document."""
    return {
        "path": "/var/lib/vswapd/swap",
        "size_bytes": 4096 * MIB,
        "used_bytes": 70 * MIB,
        "live_bytes": 61 * MIB,
        "priority": 0,
        "state": "on",
        "direct": True,
        "encrypted": True,
        "bad_extents": 0,
        "read_errors": 0,
        "write_errors": 0,
    } | keys


def group(**keys: Any) -> dict[str, Any]:
    """One group of a status document."""
    return {
        "name": "1000",
        "pool_bytes": 185 * MIB,
        "pool_max_bytes": None,
        "device_bytes": 61 * MIB,
        "device_max_bytes": None,
        "writeback": True,
        "spaces": 1,
    } | keys


BUSY = _changed(
    EMPTY,
    uptime_s=11105.0,
    slots={
        "allocated": 164240,
        "unbacked": 12,
        "lost": 0,
        "zero": 20480,
        "zswap": 110000,
        "phys": 33748,
    },
    pool={
        "bytes": 190 * MIB,
        "live_bytes": 185 * MIB,
        "original_bytes": 110000 * 4096,
        "segments": 760,
        "tiers": [tier("lz4", "new", 110000, 185 * MIB)],
    },
    table={"bytes": MIB, "clusters": 256},
    devices=[device()],
    shrinker={
        "doing": "writing back",
        "why": "the pool passed its high watermark",
        "last_bytes": 262144,
        "budget_bytes": 10 << 30,
        "budget_left_bytes": 3 << 30,
    },
    traffic={
        "store_pages": 412034,
        "load_pages": 200100,
        "free_pages": 247794,
        "writeback_pages": 40123,
        "writeback_bytes": 80 * MIB,
        "recompress_pages": 20000,
        "recompress_saved_bytes": 20 * MIB,
        "recompress_seconds": 0.75,
        "swapin_pages": 6012,
        "reclaim_bytes": 12 * MIB,
    },
    groups=[group()],
    top_spaces=[
        {
            "id": "1",
            "name": None,
            "client": "python 4301",
            "slots": 150000,
            "original_bytes": 586 * MIB,
            "compressed_bytes": 219 * MIB,
        },
        {
            "id": "2",
            "name": None,
            "client": "a-program-with-a-long-name 4310",
            "slots": 14240,
            "original_bytes": 55 * MIB,
            "compressed_bytes": 11 * MIB,
        },
    ],
    clients=2,
    spaces=2,
    saved_bytes=164228 * 4096 - 191 * MIB,
    ratio=110000 * 4096 / (185 * MIB),
)
"""Two clients, all kinds of backing in use, the shrinker at work."""

FULL = _changed(
    BUSY,
    pool={
        "bytes": 256 * MIB,
        "live_bytes": 248 * MIB,
        "full": True,
        "codec": "zstd:3",
        "tiers": [
            tier("lz4", "new", 90000, 200 * MIB),
            tier("zstd:3", "dense", 20000, 18 * MIB),
        ],
    },
    devices=[],
    shrinker={"doing": "idle", "why": "no swap device", "budget_bytes": 0},
    slots={"allocated": 130492, "phys": 0},
    rejects={"pool_full": 1203, "group_limit": 77},
    groups=[group(pool_max_bytes=200 * MIB, device_max_bytes=0), group(name="1001")],
    saved_bytes=130480 * 4096 - 257 * MIB,
)
"""The pool is full and there is no device: pages are refused."""

FAILING = _changed(
    BUSY,
    state="stopping",
    pool={"enabled": False},
    devices=[
        device(
            state="failing",
            write_errors=3,
            bad_extents=1,
            read_errors=2,
            direct=False,
            encrypted=False,
        ),
        device(path="/mnt/second/" + "x" * 90, state="draining", priority=5, used_bytes=4096 * MIB),
    ],
    shrinker={"enabled": False, "doing": "idle", "why": "switched off (shrinker.enabled)"},
    slots={"lost": 7, "zswap": 109993},
    traffic={"lost_pages": 4},
)
"""A device that fails, one that is being drained, and a daemon that is about to end."""

ALL = {"empty": EMPTY, "busy": BUSY, "full": FULL, "failing": FAILING}
