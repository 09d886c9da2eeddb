"""Groups and spaces: who holds what, and within which limits.

Invariants:
- A group's charges are the compressed bytes of its words: `pool_bytes` of its ZSWAP words,
  `device_bytes` of its PHYS words.
- Zero pages are charged to nobody.

This module must not know where pages lie or how they get there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vswapd.clusters import SlotSet
from vswapd.errors import BadSlotError, OutOfServiceError
from vswapd.ledger import Ledger
from vswapd.settings import GroupLimits, Settings
from vswapd_backends.kept import Names, NamesFullError

MOST_GROUPS: Final = 1 << 16
NAME_BYTES: Final = 64


@dataclass(slots=True)
class Group:
    """The unit that limits apply to."""

    index: int
    name: str
    limits: GroupLimits
    pool_bytes: int = 0
    device_bytes: int = 0
    device_pending: int = 0
    """Compressed bytes on their way to devices, not charged yet: operations that overlap cannot
    pass the limit together."""
    written_back: int = 0
    """Compressed bytes that have gone from the pools to devices since this process began."""
    spaces: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    columns: tuple[int, int] | None = None
    """Where the ledger has what other shards hold for this group, in pools and on devices."""

    def pool_room(self) -> int | None:
        """Compressed bytes that may still go to the pool; None: any number."""
        limit = self.limits.pool_max
        return None if limit is None else max(0, limit - self.pool_bytes - self._others(0))

    def device_room(self) -> int | None:
        """Compressed bytes that may still go to devices; None: any number."""
        limit = self.limits.device_max
        if limit is None:
            return None
        return max(0, limit - self.device_bytes - self.device_pending - self._others(1))

    def take_device(self, length: int) -> bool:
        """Count bytes as on their way to devices, if the limit leaves room; whether it does.

        Looked at and entered under the ledger's lock: shards cannot pass the limit together.
        """
        with self.ledger.hold():
            room = self.device_room()
            if room is not None and length > room:
                return False
            self.device_pending += length
            self.enter()
            return True

    def settle_device(self, length: int) -> None:
        """Undo that: the bytes are charged by now, or they will never be there."""
        self.device_pending -= length
        self.enter()

    def _others(self, which: int) -> int:
        return 0 if self.columns is None else self.ledger.others(self.columns[which])

    def enter(self, growth: int = 0) -> None:
        """Tell the other shards what this one holds for the group, and `growth` that is coming."""
        if self.columns is not None:
            self.ledger.enter(self.columns[0], self.pool_bytes + growth)
            self.ledger.enter(self.columns[1], self.device_bytes + self.device_pending)


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever has a space, or had it last."""

    pid: int = 0
    """The client's process; 0: it cannot be seen from here."""
    started: int = 0
    """What tells that process from another one of its number; 0: that is not known."""
    token: int = 0
    """What tells it from other clients of its user, of 64 bits: by it, it is known again."""


NOBODY: Final = Holder()


@dataclass(slots=True)
class Space:
    """One client's slots."""

    id: int
    """Unique in a daemon's life, from 1; what clusters call their owner."""
    group: Group
    client: str
    holder: Holder
    uid: int
    opened_at: float
    slots: SlotSet
    zero_pages: int = 0
    backed_pages: int = 0
    """ZERO, ZSWAP and PHYS slots."""
    compressed_bytes: int = 0
    """Of ZSWAP and PHYS slots, wherever they lie."""
    closed: bool = False
    key: str = ""
    """The same for all parts of a space that several shards share; empty: there is one part."""
    joined: bool = False
    """Whether this is a part that came after the first: its space is counted where that one is."""
    name: str = ""
    """Of a space that is to outlive its client; empty: it has none."""
    record: int = -1
    """Where it is kept."""
    attached: bool = True
    """Whether a client is connected to it."""
    since: float = 0.0
    """The clock's time at which that became so."""


def refuse_closed(space: Space) -> None:
    """Raise if a space is closed.

    Raises:
        BadSlotError: it is.
    """
    if space.closed:
        raise BadSlotError("the space is closed: connect again")


class Groups:
    """All groups that have ever had a space, by name and by index."""

    def __init__(self, settings: Settings, ledger: Ledger, names: Names | None = None) -> None:
        """The groups that there were, none of which holds anything as far as is known.

        Args:
            settings: their limits.
            ledger: what the limits are shared through.
            names: the groups by index; new ones are added to it.
        """
        self._settings = settings
        self._ledger = ledger
        self._names = names or Names.private(MOST_GROUPS, NAME_BYTES)
        self._by_name: dict[str, Group] = {}
        self._by_index: Final[list[Group]] = []
        for name in self._names.all():
            self._add(name)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._by_index)

    def __len__(self) -> int:
        return len(self._by_index)

    def __getitem__(self, index: int) -> Group:
        return self._by_index[index]

    def get(self, name: str) -> Group:
        """The group of that name, made if there is none yet.

        Raises:
            OutOfServiceError: it cannot be made; nothing was changed.
        """
        found = self._by_name.get(name)
        if found is None:
            try:
                index = self._names.add(name)
            except NamesFullError as error:
                raise OutOfServiceError(f"no more groups: {error}") from None
            found = self._add(name)
            assert index == found.index
        return found

    def _add(self, name: str) -> Group:
        group = Group(
            len(self._by_index),
            name,
            self._settings.limits_of(name),
            ledger=self._ledger,
            columns=self._ledger.columns_of(name),
        )
        self._by_name[name] = group
        self._by_index.append(group)
        return group

    def apply(self, settings: Settings) -> None:
        """Take over limits that were changed at run time."""
        self._settings = settings
        for group in self._by_index:
            group.limits = settings.limits_of(group.name)
