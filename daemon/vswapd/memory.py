"""The memory of one shard that outlives its process: three memfds, and how they are cut.

    table   one word per slot
    pool    the arena of segments
    state   what can be recomputed from neither: spaces, clusters' owners and generations, columns
            of segments and extents, names of groups and codecs, devices with their keys, settings

Whoever starts a shard keeps a copy of the descriptors (`fds`), and gives it to the next process,
which takes them over (`adopt`). Each file ends with a label that says what it is, of which layout
version, and which others it belongs to.

Invariants:
- Memory of another layout version, or that is not one shard's whole memory, is refused before
  anything of it is mapped or changed; the descriptors stay open, and the caller's.
- The version of a kind rises with every change of what stands in it (see `upgrades`).
- A shape, which never changes, says where everything is.

This module must not know what the parts are used for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from vswap.protocol import MAX_BATCH
from vswapd.groups import MOST_GROUPS, NAME_BYTES
from vswapd.swap_table import CLUSTER_SHIFT, CLUSTER_SLOTS, WORD_BYTES
from vswapd_backends.base import I64, SEGMENT_BYTES, U64
from vswapd_backends.kept import (
    DEVICE_ROWS,
    EXTENT_ROW,
    SEGMENT_COLUMNS,
    U8,
    ExtentColumns,
    Names,
    SegmentColumns,
)
from vswapd_backends.label import (
    LIFE_BYTES,
    ForeignMemoryError,
    Label,
    adopt_region,
    find_label,
    make_region,
)
from vswapd_backends.shared import SYSTEM_PAGE
from vswapd_backends.swapdev import MAX_DEVICES
from vswapd_backends.zpool import segments_in
from vswapd_backends.zswap import MOST_POOLS, SPEC_BYTES

VERSIONS: Final[Mapping[str, int]] = MappingProxyType({"table": 2, "pool": 2, "state": 3})
"""Of the layout of each kind."""
KINDS: Final = tuple(VERSIONS)
_DETAILS: Final = struct.Struct("<IQQ")

MOST_SPACES: Final = 1 << 16
SPACE_BYTES: Final = 1024
DEVICE_BYTES: Final = 8192
SETTINGS_BYTES: Final = 1 << 20
MOST_ANSWERED: Final = MAX_BATCH
"""Slots that one request is about."""
ANSWER_WORDS: Final = 512 + MOST_ANSWERED
"""Per space; whole pages."""
_DEVICE_ROW_BYTES: Final = DEVICE_ROWS * EXTENT_ROW.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one shard's memory is made for."""

    shard: int
    max_slots: int
    segments: int

    @classmethod
    def fitting(cls, *, shard: int, max_slots: int, arena_bytes: int) -> Shape:
        """At least so many slots and bytes of pool, rounded up to whole clusters and segments."""
        return cls(
            shard=shard,
            max_slots=-(-max_slots // CLUSTER_SLOTS) * CLUSTER_SLOTS,
            segments=segments_in(arena_bytes),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each memfd, without its label."""
        return {
            "table": self.max_slots * WORD_BYTES,
            "pool": self.segments * SEGMENT_BYTES,
            "state": sum(_areas(self).values()),
        }


def _areas(shape: Shape) -> dict[str, int]:
    """The parts of the state, in order, and their sizes: whole pages, most of them untouched."""
    sizes = {
        "head": SYSTEM_PAGE,
        "groups": MOST_GROUPS * NAME_BYTES,
        "specs": MOST_POOLS * SPEC_BYTES,
        "devices": MAX_DEVICES * DEVICE_BYTES,
        "settings": 2 * SETTINGS_BYTES,
        "spaces": MOST_SPACES * SPACE_BYTES,
        "answers": MOST_SPACES * ANSWER_WORDS * 8,
        "clusters": (shape.max_slots >> CLUSTER_SHIFT) * 8,
        "segments": shape.segments * SEGMENT_COLUMNS * 8,
        "extents": MAX_DEVICES * _DEVICE_ROW_BYTES,
    }
    return {name: -(-size // SYSTEM_PAGE) * SYSTEM_PAGE for name, size in sizes.items()}


class Head:
    """Single words of the state, by name: indices into the head."""

    NEXT_SPACE: Final = 0
    SEGMENTS: Final = 1
    """Two words; see SegmentColumns.head."""
    CLUSTERS: Final = 3
    GROUPS: Final = 4
    SPECS: Final = 5
    SPACES: Final = 6
    """Records of spaces in use are below it."""
    SETTINGS: Final = 7
    BUDGET_DAY: Final = 8
    BUDGET_USED: Final = 9
    DEVICES: Final = 10
    """Records of devices in use are below it."""
    BUDGET_BEGUN: Final = 11
    """Milliseconds of the engine's clock at which that day began."""


class ShardMemory:
    """See the module. The descriptors are closed with the object."""

    def __init__(self, shape: Shape, life: bytes, fds: Mapping[str, int] | None = None) -> None:
        """For `create` and `adopt`."""
        self.shape: Final = shape
        self.life: Final = life
        """LIFE_BYTES that all memfds of one shard have in common, and no others."""
        details = _DETAILS.pack(shape.shard, shape.max_slots, shape.segments)
        regions = {}
        for kind, size in shape.sizes.items():
            label = Label(kind=kind, version=VERSIONS[kind], life=life, size=size, details=details)
            regions[kind] = make_region(label) if fds is None else adopt_region(label, fds[kind])
        self.table: Final = regions["table"]
        self.pool: Final = regions["pool"]
        self.state: Final = regions["state"]
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, size in _areas(shape).items():
            self._offsets[name] = offset
            offset += size

    @classmethod
    def create(cls, shape: Shape) -> ShardMemory:
        """Memory in which nothing is kept yet."""
        return cls(shape, os.urandom(LIFE_BYTES))

    @classmethod
    def adopt(cls, fds: Mapping[str, int]) -> ShardMemory:
        """Take over the memory of a shard that is no more.

        Args:
            fds: a descriptor for each of KINDS; owned from now on, unless this raises.

        Raises:
            ForeignMemoryError: another layout version, or not one shard's whole memory; nothing was
                changed, and the descriptors are still the caller's.
        """
        if set(fds) != set(KINDS):
            raise ForeignMemoryError(
                f"a shard's memory is {', '.join(KINDS)}; there are {', '.join(fds) or 'none'}"
            )
        labels = {kind: find_label(kind, VERSIONS[kind], fd) for kind, fd in fds.items()}
        first = labels["table"]
        shard, max_slots, segments = _DETAILS.unpack_from(first.details)
        shape = Shape(shard=shard, max_slots=max_slots, segments=segments)
        for kind, label in labels.items():
            if (label.life, label.details) != (first.life, first.details):
                raise ForeignMemoryError(f"table and {kind} are not of the same shard's memory")
            if label.size != shape.sizes[kind]:
                raise ForeignMemoryError(f"{kind}: is not of the size that it should be")
        return cls(shape, first.life, fds)

    @property
    def fds(self) -> dict[str, int]:
        """The descriptors, by kind; they stay this object's."""
        return {"table": self.table.fd, "pool": self.pool.fd, "state": self.state.fd}

    def lock(self) -> None:
        """Keep it in RAM, each page from its first touch on; for this process.

        Raises:
            OSError: RLIMIT_MEMLOCK is too low, or the kernel refused; nothing is locked.
        """
        try:
            for region in (self.table, self.pool, self.state):
                region.lock()
        except OSError:
            self.unlock()
            raise

    def unlock(self) -> None:
        """Lock nothing of it any more."""
        for region in (self.table, self.pool, self.state):
            region.unlock()

    # The state's parts

    def _part(self, area: str, size: int) -> memoryview:
        offset = self._offsets[area]
        return self.state.view[offset : offset + size]

    def _words(self, area: str, count: int) -> I64:
        return np.frombuffer(self._part(area, count * 8), np.int64)

    @property
    def head(self) -> I64:
        """Single words; see `Head`."""
        return self._words("head", SYSTEM_PAGE // 8)

    @property
    def groups(self) -> Names:
        """The groups' names."""
        return self._names("groups", Head.GROUPS, MOST_GROUPS, NAME_BYTES)

    @property
    def specs(self) -> Names:
        """The pools' codecs."""
        return self._names("specs", Head.SPECS, MOST_POOLS, SPEC_BYTES)

    def _names(self, area: str, count: int, most: int, width: int) -> Names:
        records: U8 = np.frombuffer(self._part(area, most * width), np.uint8)
        return Names(self.head[count : count + 1].view(np.uint64), records.reshape(most, width))

    @property
    def devices(self) -> memoryview:
        """MAX_DEVICES records of DEVICE_BYTES."""
        return self._part("devices", MAX_DEVICES * DEVICE_BYTES)

    @property
    def settings(self) -> memoryview:
        """Two halves of SETTINGS_BYTES."""
        return self._part("settings", 2 * SETTINGS_BYTES)

    @property
    def spaces(self) -> memoryview:
        """MOST_SPACES records of SPACE_BYTES."""
        return self._part("spaces", MOST_SPACES * SPACE_BYTES)

    @property
    def answers(self) -> memoryview:
        """MOST_SPACES times ANSWER_WORDS, as bytes."""
        return self._part("answers", MOST_SPACES * ANSWER_WORDS * 8)

    def wipe_answers(self, record: int) -> None:
        """Make one space's answers zeros, and give their memory back."""
        size = ANSWER_WORDS * 8
        self.state.wipe(self._offsets["answers"] + record * size, size)

    @property
    def clusters(self) -> U64:
        """A word per cluster."""
        return self._words("clusters", self.shape.max_slots >> CLUSTER_SHIFT).view(np.uint64)

    @property
    def segments(self) -> SegmentColumns:
        """What is kept of each segment."""
        words = self._words("segments", self.shape.segments * SEGMENT_COLUMNS)
        return SegmentColumns.over(self.head[Head.SEGMENTS : Head.SEGMENTS + 2], words)

    @property
    def extents(self) -> ExtentColumns:
        """What is kept of each extent of each device."""
        rows = np.frombuffer(self._part("extents", MAX_DEVICES * _DEVICE_ROW_BYTES), EXTENT_ROW)
        return ExtentColumns(rows, self._wipe_device)

    def _wipe_device(self, index: int) -> None:
        offset = self._offsets["extents"] + index * _DEVICE_ROW_BYTES
        self.state.wipe(offset, _DEVICE_ROW_BYTES)
