"""What the engine can be told: plain values, sizes in bytes, shares between 0 and 1.

The service makes one from the configuration; `Engine.apply` takes a new one at run time. The fields
are checked where the configuration is read; here they are only held.

This module must not know files, TOML, or the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """What one group may hold. None: no limit; 0: none of this kind."""

    pool_max: int | None = None
    """Compressed bytes in pools."""
    device_max: int | None = None
    """Compressed bytes on devices."""
    writeback: bool = True
    """Whether pages of this group may be written to a device at all."""


NO_LIMITS = GroupLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that steers an engine. `max_slots` alone is fixed for its life."""

    max_slots: int = 1 << 30
    """Slots the table has room for; costs address space, not memory."""
    pool_max: int
    """Bytes that all pools together may occupy."""
    pool_reserve: int = 0
    """Bytes of memory to be left free: the pools take less than pool_max for it. 0: whatever."""
    accept_threshold: float = 0.90
    """Share of the limit that holds: once full, the pool refuses until it is at or below this."""
    codec: str = "lz4"
    """`lz4`, `lz4hc:N`, `zstd:N`: what new pages are compressed with."""
    dense: str = ""
    """What pages that got old are compressed with again; empty: they are left as they are."""
    dense_age: float = 60.0
    """Seconds without a new page in their segment after which pages are old. Sooner if the pool
    passes its high watermark."""
    recompress_share: float = 0.25
    """Share of one core that recompression may take; 0: none."""
    pool_enabled: bool = True
    """Off: new pages go straight to the device; what is in the pool stays readable."""
    verify: Literal["never", "always"] = "never"
    """Whether checksums are compared on loads from the pool too (device reads: always)."""
    store_enabled: bool = True
    """Off: every store is rejected with `disabled`."""
    shrinker_enabled: bool = True
    high_watermark: float = 0.95
    """Share of the limit at which the shrinker begins to write back."""
    low_watermark: float = 0.85
    """Share of the limit down to which it goes on."""
    shrinker_rate: int = 0
    """Most bytes per second it writes by itself; 0: no bound."""
    idle_age: float = 0.0
    """Seconds after which a page that was not loaded is written back anyway; 0: never."""
    write_budget: int = 0
    """Bytes per day (see `budget`) that writeback may put on devices; 0: no bound."""
    groups: Mapping[str, GroupLimits] = field(default_factory=lambda: MappingProxyType({}))
    """By group name: the peer's uid in decimal."""
    default_group: GroupLimits = NO_LIMITS

    def limits_of(self, group: str) -> GroupLimits:
        """The limits of a group: its own, else the default ones."""
        return self.groups.get(group, self.default_group)

    def of_one(self, shards: int) -> Settings:
        """What each of so many shards is told: what is not shared through the ledger is divided."""
        if shards == 1:
            return self
        return dataclasses.replace(
            self,
            max_slots=-(-self.max_slots // shards),
            shrinker_rate=-(-self.shrinker_rate // shards),
            recompress_share=self.recompress_share / shards,
        )
