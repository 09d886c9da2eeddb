"""The shrinker's policy: how much should go now (count), and making that much go (scan).

It does, in this order: discards, trimming of spare segments, compaction where enough lies waste,
merging of sparse extents on a device that is nearly full, recompression of pages that got old,
writeback down to the low watermark once the high one was passed, writeback for groups over their
limit, writeback of what has been idle for long. What is about to be written back is recompressed
first, as far as there is processor time for it.

Invariants:
- When nothing can be done (no device, device full, budget spent, writeback off) count is 0, and
  `why` says which it is; the thread that calls this then sleeps. Work that got nowhere is not tried
  again until something has changed, and keeps no other work from being done.
- When count is 0 the next wake-up is still to come.
- Of what all shards hold beyond a limit each makes its share go (see `share`), and no more.
- Recent loads from the device protect what is still in the pool from idle writeback (as
  nr_disk_swapins does in mm/zswap.c), not from writeback that the limits demand.

This module must not know threads or sleep: `wanted` and `next_wakeup` are for those who do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

import numpy as np

from vswapd.compaction import Compaction
from vswapd.core import Core
from vswapd.device_moves import DeviceMoves
from vswapd.groups import Group
from vswapd.ledger import IDLE, STUCK, Column
from vswapd.recompression import Recompression
from vswapd.retrial import Retrial
from vswapd.share import Share
from vswapd.writeback import Cause, Stop, Writeback
from vswapd_backends.base import I64, SEGMENT_BYTES, Operation

_SPARE_AGE: Final = 1.0
"""Seconds that freed pool memory is kept for reuse before it goes back to the system."""
_RETRY_S: Final = 60
"""Seconds after which work that got nowhere is tried again although nothing has changed."""
_WHY: Final = {
    Stop.NO_DEVICE: "no swap device",
    Stop.DEVICE_FULL: "swap devices are full",
    Stop.DEVICE_ERROR: "writes to the swap device fail",
    Stop.WRITE_BUDGET: "today's write budget is spent",
    Stop.WRITEBACK_DISABLED: "writeback is off for the groups that hold pages",
    Stop.GROUP_LIMIT: "the groups that hold pages are at their device limits",
    Stop.NOTHING_LEFT: "nothing left that could go",
}


class Doing(StrEnum):
    """What the shrinker does, in the order in which it looks for it."""

    DISCARDING = "discarding"
    TRIMMING = "trimming"
    COMPACTING = "compacting"
    MERGING = "merging extents"
    RECOMPRESSING = "recompressing"
    WRITING = "writing back"
    WAITING = "waits"
    IDLE = "idle"

    @property
    def works(self) -> bool:
        """Whether something is being done; else there is nothing to do, or it has to wait."""
        return self not in {Doing.WAITING, Doing.IDLE}


_MAY_STALL: Final = frozenset({Doing.COMPACTING, Doing.MERGING, Doing.RECOMPRESSING, Doing.WRITING})


@dataclass(frozen=True, slots=True)
class _Stall:
    """Work that got nowhere: how things stood after it, and why it did."""

    signature: tuple[int, ...]
    why: str


class Shrinker:
    """Count and scan, in the kernel's sense of a shrinker."""

    def __init__(
        self,
        core: Core,
        writeback: Writeback,
        compaction: Compaction,
        moves: DeviceMoves,
        recompression: Recompression,
    ) -> None:
        self._core = core
        self._writeback = writeback
        self._compaction = compaction
        self._moves = moves
        self.recompression: Final = recompression
        self._retrial: Final = Retrial(core)
        self.doing = Doing.IDLE
        self.why = "below the watermarks"
        """Why it idles, or why it works."""
        self.last_bytes = 0
        """Bytes that the last scan made go."""
        self._working = False
        """Whether the high watermark was passed, and the low one is not reached."""
        self._pressed = False
        """Whether what is to be recompressed would be written back otherwise."""
        self._only: Group | None = None
        """Whose pages are to be written back; None: the oldest, whosever they are."""
        self._pool_share: Final = Share(core.clock, core.ledger, (Column.POOL, Column.POOL_BASIS))
        self._group_shares: Final[dict[int, Share]] = {}
        """By group, of those that have a limit."""
        self._waits: list[float] = []
        """Until when other shards have time to give theirs, as the last count has found."""
        self._still: Callable[[], int] | None = None
        """How much is to go, asked anew while it goes; None: what was counted."""
        self._spare_since: float | None = None
        self._watching = False
        """Whether the next wake-up is early enough for pages that grow old."""
        self._protected = 0
        self._protected_at = core.clock()
        self._tokens = 0.0
        self._tokens_at = core.clock()
        self._held_back = False
        """Whether it would write if shrinker.rate let it."""
        self._stalls: Final[dict[Doing, _Stall]] = {}
        """By what it was that got nowhere."""

    # Signals

    def protect(self, length: int) -> None:
        """Entries of `length` compressed bytes were loaded from a device."""
        self._wear_off()
        self._protected += length

    def settings_changed(self) -> None:
        """Limits or devices have changed: what could not go before may go now."""
        self._stalls.clear()
        self._working = False

    def wanted(self) -> bool:
        """Whether waking the thread might be worth it. Cheap: asked after every request."""
        core = self._core
        core.look_when_due()
        return (
            (
                core.pool_use() > core.settings.high_watermark * core.pressure.limit
                and not self._pool_share.has_given(core.zswap.in_use_bytes)
            )
            or (self._spare_since is None and core.zswap.arena.spare_bytes > 0)
            or core.devices.discards_waiting
            or self._retrial.news
            or self._compaction.wanted()
            or (not self._watching and self._ages() and core.zswap.total_entries > 0)
        )

    def _ages(self) -> bool:
        """Whether time alone makes work of pages that stay in the pool."""
        return self._core.settings.idle_age > 0 or self.recompression.target is not None

    def next_wakeup(self) -> float | None:
        """The clock's time at which there may be work although nothing happens until then.

        To be asked when count has just been 0.
        """
        self._watching = True
        times = [] if self._spare_since is None else [self._spare_since + _SPARE_AGE]
        if (due := self._retrial.next_due()) is not None:
            times.append(due)
        if self._core.pressure.watching:
            times.append(self._core.pressure.next_look)
        if self._core.settings.shrinker_enabled:
            times += self._writing_times()
            times += self._recompressing_times()
            times += self._waits
            if self._ages() and not self._core.zswap.total_entries:
                # Nothing can grow old. Whoever stores the first page wakes us.
                self._watching = False
        return min(times, default=None)

    def _recompressing_times(self) -> list[float]:
        """When time alone may let it recompress: pages grown old, processor time, a new try."""
        work, now = self.recompression, self._core.clock()
        if work.target is None or not self._core.zswap.total_entries:
            return []
        if self._is_stalled(Doing.RECOMPRESSING):
            return [max((now // _RETRY_S + 1) * _RETRY_S, now + 1.0)]
        if work.seconds() <= 0:
            return [work.affordable_at()]
        due = work.next_due()
        later = now + max(1.0, self._core.settings.dense_age)
        return [later if due is None else max(due, now + 1.0)]

    def _writing_times(self) -> list[float]:
        """When time alone may let it write: a new day, a token, a new try, pages grown old."""
        settings, now = self._core.settings, self._core.clock()
        stop = self._writeback.obstacle()
        if stop is Stop.WRITE_BUDGET:
            return [self._core.budget.renews_at()]
        if stop is not None:
            return []
        if self._held_back:
            return [now + (SEGMENT_BYTES - self._allowed()) / settings.shrinker_rate]
        if self._is_stalled(Doing.WRITING):
            return [max((now // _RETRY_S + 1) * _RETRY_S, now + 1.0)]
        if not settings.idle_age or not self._core.zswap.total_entries:
            return []
        due = self._core.zswap.stamps_of(self._eligible()) + settings.idle_age
        times = [float(due[due > now].min(initial=now + settings.idle_age))]
        if (due <= now).any():
            times.append(self._protected_at + self._half_life())
        return times

    # Count

    def count(self) -> int:
        """Bytes that should go now; 0: nothing, or nothing can be done. Sets `doing` and `why`."""
        core, settings = self._core, self._core.settings
        core.look_when_due()
        self._retrial.look()
        self._held_back = False
        if core.devices.discards_waiting:
            return self._say(Doing.DISCARDING, "extents were given up", SEGMENT_BYTES)
        if self._trim_is_due():
            spare = core.zswap.arena.spare_bytes
            return self._say(Doing.TRIMMING, "segments that nobody reused", spare)
        if not settings.shrinker_enabled:
            core.ledger.enter(Column.SHRINKING, IDLE)
            return self._say(Doing.IDLE, "switched off (shrinker.enabled)", 0)
        if self._compaction.wanted() and not self._is_stalled(Doing.COMPACTING):
            return self._say(Doing.COMPACTING, "dead entries in the pool", self._compaction.waste())
        stop = self._writeback.obstacle()
        mergeable = stop in {None, Stop.DEVICE_FULL} and not self._is_stalled(Doing.MERGING)
        if mergeable and self._moves.merge_pays():
            return self._say(Doing.MERGING, "the device is nearly full", SEGMENT_BYTES)
        return self._count_leaving(stop)

    def _count_leaving(self, stop: Stop | None) -> int:
        """The same for what leaves its segment: to the dense pool, or to a device."""
        settings = self._core.settings
        excess, why = self._excess()
        stuck = excess > 0 and (stop is not None or self._is_stalled(Doing.WRITING))
        working = 1 + self._floor() if self._working else IDLE
        self._core.ledger.enter(Column.SHRINKING, STUCK if stuck else working)
        dense = self._recompressible(excess, why)
        if dense is not None:
            return self._say(Doing.RECOMPRESSING, dense, SEGMENT_BYTES)
        if not excess and (waits := self._recompression_waits()):
            return self._say(Doing.WAITING, waits, 0)
        if not excess:
            return self._say(Doing.IDLE, why, 0)
        if stop is not None:
            return self._say(Doing.IDLE, _WHY[stop], 0)
        if self._is_stalled(Doing.WRITING):
            return self._say(Doing.IDLE, self._stalls[Doing.WRITING].why, 0)
        if settings.shrinker_rate and self._allowed() < SEGMENT_BYTES:
            self._held_back = True
            return self._say(Doing.IDLE, "held back by shrinker.rate", 0)
        return self._say(Doing.WRITING, why, excess)

    def _recompressible(self, excess: int, why: str) -> str | None:
        """Why pages are to be recompressed now; None: they are not."""
        work = self.recompression
        if work.target is None or self._is_stalled(Doing.RECOMPRESSING) or work.seconds() <= 0:
            return None
        self._pressed = excess > 0
        if excess:
            return why if len(work.candidates(self._groups())) else None
        if len(work.due()) and not work.busy():
            return "pages older than pool.dense_age"
        return None

    def _recompression_waits(self) -> str | None:
        """What pages wait for that got old, and may not be recompressed yet; None: for nothing."""
        work = self.recompression
        if work.target is None or self._is_stalled(Doing.RECOMPRESSING) or not len(work.due()):
            return None
        if work.seconds() <= 0:
            return "its share of the processor is used up (shrinker.recompress_cpu)"
        return "the machine is busy"

    def _groups(self) -> I64 | None:
        """Whose pages are to go, by index; None: anybody's."""
        return None if self._only is None else np.array([self._only.index])

    def _trim_is_due(self) -> bool:
        if not self._core.zswap.arena.spare_bytes:
            self._spare_since = None
            return False
        now = self._core.clock()
        if self._spare_since is None:
            self._spare_since = now
        # Where it is too much for all shards together nobody keeps any of it.
        return now - self._spare_since >= _SPARE_AGE or self._core.crowded()

    def _say(self, doing: Doing, why: str, count: int) -> int:
        self.doing = doing
        self.why = why
        return count

    def _excess(self) -> tuple[int, str]:
        """Bytes over what the limits want to see in the pool, and which of them. Notes whose."""
        excess, why = self._over_limits()
        if excess:
            return excess, why
        self._still = None
        idle = self._idle_bytes()
        if idle > 0:
            return idle, "pages older than shrinker.idle_age"
        if why:
            return 0, why
        if self._waits:
            return 0, "its share has gone; the rest is for other shards to give"
        if self._protected and self._core.settings.idle_age:
            return 0, "recent loads from the device protect the pool"
        return 0, "below the watermarks"

    def _over_limits(self) -> tuple[int, str]:
        """This shard's share of what is over the limits; 0 and a reason if it cannot go."""
        self._only = None
        self._waits = []
        core, settings = self._core, self._core.settings
        used, floor = core.pool_use(), self._floor()
        if used > settings.high_watermark * core.pressure.limit or core.ledger.working(floor):
            self._working = True
        if not self._working:
            self._pool_share.forget()
        elif mine := self._pool_due():
            self._still = self._pool_due
            return mine, core.pressure.why or "the pool passed its high watermark"
        self._working = self._working and used > floor
        why = ""
        eligible = self._writeback.eligible()
        for group in core.groups:
            if not group.limits.writeback or not (mine := self._group_due(group)):
                continue
            if group.index in eligible:
                self._only = group
                self._still = partial(self._group_due, group)
                return mine, f"group {group.name} is over its pool limit"
            why = _WHY[Stop.GROUP_LIMIT]
        return 0, why

    def _floor(self) -> int:
        """Bytes that are to be left in all pools once the high watermark was passed."""
        return int(self._core.settings.low_watermark * self._core.pressure.limit)

    def _pool_due(self) -> int:
        """Bytes of this shard's pools that are to go for the low watermark of the sum."""
        core = self._core
        given = sum(group.written_back for group in core.groups)
        return self._due(self._pool_share, core.zswap.in_use_bytes, given, self._floor())

    def _group_due(self, group: Group) -> int:
        """Compressed bytes of a group that are to go for its limit, as far as this shard's."""
        limit = group.limits.pool_max
        share = self._group_shares.get(group.index)
        if limit is None:
            if share is not None:
                share.forget()
            return 0
        if share is None:
            columns, ledger = group.columns, self._core.ledger
            shared = None if columns is None else (columns[0], ledger.basis_of(columns))
            share = self._group_shares[group.index] = Share(self._core.clock, ledger, shared)
        return self._due(share, group.pool_bytes, group.written_back, limit)

    def _due(self, share: Share, own: int, given: int, floor: int) -> int:
        due = share.due(own, given, floor)
        if share.next_look is not None:
            self._waits.append(share.next_look)
        return due

    def _idle_bytes(self) -> int:
        """Compressed bytes in segments untouched for idle_age, less the protected ones.

        Those of one group, which is noted: the group with the coldest of them. Elsewhere there may
        be pages that are older and yet not idle, in a log that grows slowly.
        """
        core, settings = self._core, self._core.settings
        if not settings.idle_age:
            return 0
        segments = self._eligible()
        due = segments[core.zswap.stamps_of(segments) + settings.idle_age <= core.clock()]
        if not len(due):
            return 0
        self._wear_off()
        left = int(core.zswap.live_bytes[due].sum()) - self._protected
        self._only = core.groups[core.zswap.stream_of(int(due[0]))[1]]
        mine = due[core.zswap.in_groups(due, np.array([self._only.index]))]
        return max(0, min(left, int(core.zswap.live_bytes[mine].sum())))

    def _eligible(self) -> I64:
        """Segments that may be written back, coldest first."""
        return self._core.zswap.oldest_first(groups=self._writeback.eligible())

    def _half_life(self) -> float:
        """Seconds in which half of the protection wears off."""
        return max(1.0, self._core.settings.idle_age / 8)

    def _wear_off(self) -> None:
        """Let time do to the protection what it does."""
        now = self._core.clock()
        if not self._protected:
            self._protected_at = now
            return
        halvings = int((now - self._protected_at) // self._half_life())
        self._protected >>= halvings
        self._protected_at += halvings * self._half_life()

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
        self.last_bytes = gone
        if gone:
            self._stalls.pop(doing, None)
        elif doing in _MAY_STALL:
            self._stalls[doing] = _Stall(self._signature(), self.why)
        return gone

    def _scan(self, doing: Doing, nbytes: int) -> Operation[int]:
        match doing:
            case Doing.DISCARDING:
                extents = yield from self._core.devices.discard()
                return extents * SEGMENT_BYTES
            case Doing.TRIMMING:
                self._spare_since = None
                return (yield from self._compaction.trim())
            case Doing.COMPACTING:
                step = yield from self._compaction.paused_step()
                if not self._compaction.wanted():
                    yield from self._compaction.trim()
                if step is None:
                    self.why = "what is left of the dead entries is not worth copying"
                    return 0
                return max(1, step.moved_bytes)
            case Doing.MERGING:
                freed = yield from self._moves.merge()
                return freed * SEGMENT_BYTES
            case Doing.RECOMPRESSING:
                work = self.recompression.step(self._groups(), young=self._pressed)
                return (yield from work)
            case Doing.WRITING:
                return (yield from self._write(nbytes))
            case Doing.WAITING | Doing.IDLE:
                return 0

    def _write(self, nbytes: int) -> Operation[int]:
        if self._core.settings.shrinker_rate:
            nbytes = min(nbytes, int(self._allowed()))
        written = yield from self._writeback.write_back(
            nbytes, Cause.WRITEBACK, self._only, self._still
        )
        self._tokens -= written.bytes
        gone = written.bytes + written.moved
        if written.stopped is None:
            return max(1, gone)  # nothing: other shards have made it go meanwhile
        self.why = _WHY[written.stopped]
        return gone

    def _is_stalled(self, doing: Doing) -> bool:
        stall = self._stalls.get(doing)
        return stall is not None and stall.signature == self._signature()

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
            int(np.int64(core.clock()) // _RETRY_S),
        )
