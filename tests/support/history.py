"""What clients did and saw, and whether one store can have behaved so.

A slot is a register: a load may return what a store wrote that began before the load ended, unless
another store came wholly after that one and wholly before the load. That is all that a client can
rely on when its requests overlap, and exactly what it may rely on.

This module must not know daemons or clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["store", "load"]


@dataclass(frozen=True, slots=True)
class Event:
    """One page of one request."""

    kind: Kind
    slot: int
    value: bytes
    """What was written or read: the page, or what tells it from all others."""
    begin: float
    end: float


@dataclass(slots=True)
class History:
    """Events of one space, in any order."""

    events: list[Event] = field(default_factory=list)

    def add(self, kind: Kind, slot: int, value: bytes, begin: float, end: float) -> None:
        self.events.append(Event(kind, slot, value, begin, end))

    def problems(self) -> list[str]:
        """Loads that no order of the stores explains."""
        stores: dict[int, list[Event]] = {}
        for event in self.events:
            if event.kind == "store":
                stores.setdefault(event.slot, []).append(event)
        found = []
        for load in self.events:
            if load.kind != "load":
                continue
            written = stores.get(load.slot, [])
            if not any(_explains(store, load, written) for store in written):
                found.append(
                    f"slot {load.slot:#x} gave {load.value[:24]!r} between {load.begin:.6f} and "
                    f"{load.end:.6f}, and the stores were "
                    f"{[(s.value[:24], s.begin, s.end) for s in written]}"
                )
        return found


def _explains(store: Event, load: Event, others: list[Event]) -> bool:
    return (
        store.value == load.value
        and store.begin <= load.end
        and not any(store.end < other.begin and other.end < load.begin for other in others)
    )
