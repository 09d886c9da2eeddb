"""The shrinker's policy: how much should go now (count), and making that much go (scan).

It does, in this order: discards, trimming of spare segments, compaction where enough lies waste,
merging of sparse extents on a device that is nearly full, writeback down to the low watermark once
the high one was passed, writeback for groups over their limit, writeback of what has been idle for
long.

Invariants:
- When nothing can be done (no device, device full, budget spent, writeback off) count is 0, and
  `why` says which it is; the thread that calls this then sleeps. A scan that got nowhere makes
  count 0 until something has changed.
- Recent loads from the device protect what is still in the pool from idle writeback (as
  nr_disk_swapins does in mm/zswap.c), not from writeback that the limits demand.

This module must not know threads or sleep: `wanted` and `next_wakeup` are for those who do.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vswapd.compaction import Compaction
from vswapd.core import Core
from vswapd.device_moves import DeviceMoves
from vswapd.groups import Group
from vswapd.writeback import Cause, Stop, Writeback
from vswapd_backends.base import SEGMENT_BYTES, Operation

_DAY: Final = 86400.0
_SPARE_AGE: Final = 1.0
"""Seconds that freed pool memory is kept for reuse before it goes back to the system."""
_WHY: Final = {
    Stop.NO_DEVICE: "no swap device",
    Stop.DEVICE_FULL: "swap devices are full",
    Stop.DEVICE_ERROR: "writes to the swap device fail",
    Stop.WRITE_BUDGET: "today's write budget is spent",
    Stop.WRITEBACK_DISABLED: "writeback is off for the groups that hold pages",
    Stop.GROUP_LIMIT: "the groups that hold pages are at their device limits",
    Stop.NOTHING_LEFT: "nothing left that could go",
}


class Shrinker:
    """Count and scan, in the kernel's sense of a shrinker."""

    def __init__(
        self, core: Core, writeback: Writeback, compaction: Compaction, moves: DeviceMoves
    ) -> None:
        self._core = core
        self._writeback = writeback
        self._compaction = compaction
        self._moves = moves
        self.doing = "idle"
        """`idle`, `discarding`, `trimming`, `compacting`, `merging extents`, `writing back`."""
        self.why = "below the watermarks"
        """Why it idles, or why it works."""
        self.last_bytes = 0
        """Bytes that the last scan made go."""
        self._working = False
        self._spare_since: float | None = None
        self._protected = 0
        self._tokens = 0.0
        self._tokens_at = core.clock()
        self._stalled_at: tuple[int, ...] | None = None
        self._stalled_why = ""

    # Signals

    def protect(self, length: int) -> None:
        """Entries of `length` compressed bytes were loaded from a device."""
        self._protected += length

    def settings_changed(self) -> None:
        """Limits or devices have changed: what could not go before may go now."""
        self._stalled_at = None
        self._working = False

    def wanted(self) -> bool:
        """Whether waking the thread might be worth it. Cheap: asked after every request."""
        core = self._core
        return (
            core.pool_use() > core.settings.high_watermark * core.settings.pool_max
            or (self._spare_since is None and core.zswap.arena.spare_bytes > 0)
            or core.devices.discards_waiting
            or self._compaction.wanted()
        )

    def next_wakeup(self) -> float | None:
        """The clock's time at which there may be work although nothing happens until then."""
        core, settings = self._core, self._core.settings
        times: list[float] = []
        if self._spare_since is not None:
            times.append(self._spare_since + _SPARE_AGE)
        if not settings.shrinker_enabled:
            return min(times, default=None)
        if settings.idle_age and core.devices.any:
            segments = core.zswap.oldest_first()
            if len(segments):
                times.append(core.zswap.stamp_of(int(segments[0])) + settings.idle_age)
        if self._writeback.obstacle() is Stop.WRITE_BUDGET:
            times.append((core.clock() // _DAY + 1) * _DAY)
        elif self._working and settings.shrinker_rate and self._allowed() < SEGMENT_BYTES:
            missing = SEGMENT_BYTES - self._allowed()
            times.append(core.clock() + missing / settings.shrinker_rate)
        if self._protected and settings.idle_age:
            times.append(core.clock() + max(1.0, settings.idle_age / 8))
        if not times:
            return None
        # A stalled shrinker has tried: it is not woken again for what it could not do.
        return max(min(times), core.clock() + (1.0 if self._is_stalled() else 0.0))

    # Count

    def count(self) -> int:
        """Bytes that should go now; 0: nothing, or nothing can be done. Sets `doing` and `why`."""
        settings = self._core.settings
        if self._core.devices.discards_waiting:
            return self._say("discarding", "extents were given up", SEGMENT_BYTES)
        if self._trim_is_due():
            spare = self._core.zswap.arena.spare_bytes
            return self._say("trimming", "segments that nobody reused", spare)
        if not settings.shrinker_enabled:
            return self._say("idle", "switched off (shrinker.enabled)", 0)
        if self._is_stalled():
            return self._say("idle", self._stalled_why, 0)
        if self._compaction.wanted():
            return self._say("compacting", "dead entries in the pool", self._compaction.waste())
        stop = self._writeback.obstacle()
        if stop in {None, Stop.DEVICE_FULL} and self._moves.merge_pays():
            return self._say("merging extents", "the device is nearly full", SEGMENT_BYTES)
        excess, why = self._excess()
        if not excess:
            return self._say("idle", why, 0)
        if stop is not None:
            return self._say("idle", _WHY[stop], 0)
        if settings.shrinker_rate and self._allowed() < SEGMENT_BYTES:
            return self._say("idle", "held back by shrinker.rate", 0)
        return self._say("writing back", why, excess)

    def _trim_is_due(self) -> bool:
        if not self._core.zswap.arena.spare_bytes:
            self._spare_since = None
            return False
        now = self._core.clock()
        if self._spare_since is None:
            self._spare_since = now
        return now - self._spare_since >= _SPARE_AGE

    def _say(self, doing: str, why: str, count: int) -> int:
        self.doing = doing
        self.why = why
        return count

    def _excess(self) -> tuple[int, str]:
        """Bytes over what the limits want to see in the pool, and which of them."""
        core, settings = self._core, self._core.settings
        used = core.pool_use()
        if used > settings.high_watermark * settings.pool_max:
            self._working = True
        floor = int(settings.low_watermark * settings.pool_max)
        if self._working and used > floor:
            # Each shard makes its own share go.
            mine = -(-(used - floor) * core.zswap.in_use_bytes // used)
            return mine, "the pool passed its high watermark"
        self._working = False
        group = self._over_limit()
        if group is not None:
            return group.pool_excess(), f"group {group.name} is over its pool limit"
        idle = self._idle_bytes()
        if idle > 0:
            return idle, "pages older than shrinker.idle_age"
        if self._protected and settings.idle_age:
            return 0, "recent loads from the device protect the pool"
        return 0, "below the watermarks"

    def _over_limit(self) -> Group | None:
        for group in self._core.groups:
            if group.pool_excess() and group.limits.writeback:
                return group
        return None

    def _idle_bytes(self) -> int:
        """Compressed bytes in segments untouched for idle_age, less the protected ones."""
        core, settings = self._core, self._core.settings
        if not settings.idle_age:
            return 0
        horizon = core.clock() - settings.idle_age
        total = 0
        for segment in core.zswap.oldest_first(groups=self._writeback.eligible()).tolist():
            if core.zswap.stamp_of(segment) > horizon:
                break
            total += int(core.zswap.live_bytes[segment])
        left = total - self._protected
        self._protected //= 2
        return max(0, left)

    def _allowed(self) -> float:
        """Bytes that shrinker.rate allows now; fills up to one second's worth."""
        rate = self._core.settings.shrinker_rate
        now = self._core.clock()
        most = max(float(rate), 2.0 * SEGMENT_BYTES)
        self._tokens = min(most, self._tokens + (now - self._tokens_at) * rate)
        self._tokens_at = now
        return self._tokens

    # Scan

    def scan(self, nbytes: int) -> Operation[int]:
        """Make up to `nbytes` (at least one segment's worth) go; returns how many did."""
        doing = self.doing
        gone = yield from self._scan(doing, nbytes)
        self._core.enter()
        self.last_bytes = gone
        if gone == 0 and doing not in {"discarding", "trimming"}:
            self._stalled_at = self._signature()
            self._stalled_why = self.why
        return gone

    def _scan(self, doing: str, nbytes: int) -> Operation[int]:
        match doing:
            case "discarding":
                extents = yield from self._core.devices.discard()
                return extents * SEGMENT_BYTES
            case "trimming":
                self._spare_since = None
                return self._core.zswap.arena.trim()
            case "compacting":
                step = self._compaction.step()
                if not self._compaction.wanted():
                    self._core.zswap.arena.trim()
                if step is None:
                    self.why = "what is left of the dead entries is not worth copying"
                    return 0
                return step.moved_bytes
            case "merging extents":
                freed = yield from self._moves.merge()
                return freed * SEGMENT_BYTES
            case "writing back":
                return (yield from self._write(nbytes))
            case _:
                return 0

    def _write(self, nbytes: int) -> Operation[int]:
        only = None if self._working else self._over_limit()
        if self._core.settings.shrinker_rate:
            nbytes = min(nbytes, int(self._allowed()))
        written = yield from self._writeback.write_back(nbytes, Cause.WRITEBACK, only)
        self._tokens -= written.bytes
        if written.stopped is not None:
            self.why = _WHY[written.stopped]
        return written.bytes + written.moved

    def _is_stalled(self) -> bool:
        return self._stalled_at is not None and self._stalled_at == self._signature()

    def _signature(self) -> tuple[int, ...]:
        """What would have to change before another scan can get further than the last one."""
        core = self._core
        budget = core.budget_left()
        return (
            # Not those that wait for a discard: after failed writes they go out of use, and if that
            # counted as news, a device on which all writes fail would be worn down at once.
            core.devices.ready_extents,
            core.stats.store_pages,
            core.stats.free_pages,
            core.stats.writeback_pages,
            -1 if budget is None else budget // SEGMENT_BYTES,
            int(np.int64(core.clock()) // 60),
        )
