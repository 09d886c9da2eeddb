"""What was measured, as numbers: medians, percentiles, the table, the JSON.

This module must not know how anything was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.peers.contract import PAGE_BYTES

US: Final = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Passes over all pages of all clients, round by round."""

    pages: int
    """Of all clients together, per pass."""
    walls_s: Sequence[float]
    client_cpu_s: float
    """Of all rounds and all clients."""
    server_cpu_s: float

    @property
    def pages_per_s(self) -> float:
        """The median of the rounds."""
        return self.pages / statistics.median(self.walls_s)

    @property
    def us_per_page(self) -> float:
        """Of wall time, all clients together."""
        return US / self.pages_per_s

    @property
    def client_us(self) -> float:
        """Processor time of clients per page, system calls included."""
        return self.client_cpu_s / (self.pages * len(self.walls_s)) * US

    @property
    def server_us(self) -> float:
        """Processor time of servers per page."""
        return self.server_cpu_s / (self.pages * len(self.walls_s)) * US

    def times_as_fast_as(self, other: Speed) -> float:
        """The median of the rounds' ratios: rounds were measured in turns."""
        pairs = zip(self.walls_s, other.walls_s, strict=True)
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        return ratio * self.pages / other.pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Single requests of all clients and rounds."""

    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Latency:
        """From every one that was measured."""
        return cls(
            p50_us=percentile(nanoseconds, 50) / 1e3, p99_us=percentile(nanoseconds, 99) / 1e3
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the pages of all clients take."""

    pages: int
    """That the memory is counted for."""
    resident_bytes: int
    compressed_bytes: int

    @property
    def per_page(self) -> float:
        """Resident bytes per stored page."""
        return self.resident_bytes / self.pages

    @property
    def per_compressed_byte(self) -> float:
        """Resident bytes per compressed byte."""
        return self.resident_bytes / self.compressed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One peer with one number of clients."""

    peer: str
    what: str
    counts: bool
    """Whether it stands in the picture."""
    clients: int
    store: Speed
    load: Speed
    store_one: Latency
    load_one: Latency
    ratio: float | None
    """Original by compressed bytes; None: it does not compress."""
    memory: Memory | None
    """None: the pages lie in the clients, among everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run has found."""

    machine: Mapping[str, Any]
    pages: int
    """Per client."""
    batch: int
    rounds: int
    cores: int
    measured: Sequence[Measured]
    missing: Mapping[str, str]
    """Why a peer was not measured, by its name."""

    def find(self, peer: str, clients: int) -> Measured | None:
        """One peer's figures, if it was measured."""
        for one in self.measured:
            if (one.peer, one.clients) == (peer, clients):
                return one
        return None

    @property
    def numbers_of_clients(self) -> list[int]:
        """Ascending."""
        return sorted({one.clients for one in self.measured})


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that is not below `percent` of all (nearest rank).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values, no percentile")
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


_COLUMNS: Final = (
    ("clients", "", ""),
    ("peer", "", ""),
    ("store", "pages/s", ",.0f"),
    ("load", "pages/s", ",.0f"),
    ("store", "us/page", ".2f"),
    ("load", "us/page", ".2f"),
    ("store one", "p50 us", ".1f"),
    ("", "p99", ".1f"),
    ("load one", "p50 us", ".1f"),
    ("", "p99", ".1f"),
    ("resident", "B/page", ",.0f"),
    ("per", "compr. B", ".3f"),
    ("", "ratio", ".2f"),
)
"""Title in two lines, and how a number is written."""


def _cells(one: Measured) -> list[str | float | None]:
    memory = one.memory
    compressed = memory is not None and one.ratio is not None
    return [
        str(one.clients),
        one.peer,
        one.store.pages_per_s,
        one.load.pages_per_s,
        one.store.us_per_page,
        one.load.us_per_page,
        one.store_one.p50_us,
        one.store_one.p99_us,
        one.load_one.p50_us,
        one.load_one.p99_us,
        memory.per_page if memory else None,
        memory.per_compressed_byte if memory and compressed else None,
        one.ratio,
    ]


def table(run: Run) -> str:
    """The table for people, and below it what each peer is and which are missing."""
    rows = [
        [
            "-" if cell is None else cell if isinstance(cell, str) else format(cell, form)
            for cell, (_, _, form) in zip(_cells(one), _COLUMNS, strict=True)
        ]
        for one in run.measured
    ]
    heads = [[column[line] for column in _COLUMNS] for line in (0, 1)]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
    lines = [_line(cells, widths) for cells in heads]
    clients = ""
    for row in rows:
        if clients not in {"", row[0]}:
            lines.append("")
        clients = row[0]
        lines.append(_line(row, widths))
    names = {one.peer: one.what for one in run.measured}
    width = max(map(len, [*names, *run.missing]), default=0)
    lines += ["", *(f"{name:{width}}  {what}" for name, what in names.items())]
    lines += [f"{name:{width}}  NOT MEASURED: {why}" for name, why in run.missing.items()]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    # The name of the peer is the one text among numbers.
    aligned = [
        f"{cell:<{width}}" if at == 1 else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def document(run: Run) -> dict[str, Any]:
    """The run as JSON values."""
    return {
        "machine": dict(run.machine),
        "page_bytes": PAGE_BYTES,
        "pages_per_client": run.pages,
        "batch": run.batch,
        "rounds": run.rounds,
        "cores": run.cores,
        "missing": dict(run.missing),
        "measured": [_entry(one) for one in run.measured],
    }


def _entry(one: Measured) -> dict[str, Any]:
    memory = one.memory
    return {
        "peer": one.peer,
        "what": one.what,
        "clients": one.clients,
        "store": _speed(one.store),
        "load": _speed(one.load),
        "store_one": {"p50_us": one.store_one.p50_us, "p99_us": one.store_one.p99_us},
        "load_one": {"p50_us": one.load_one.p50_us, "p99_us": one.load_one.p99_us},
        "ratio": one.ratio,
        "memory": None
        if memory is None
        else {
            "pages": memory.pages,
            "resident_bytes": memory.resident_bytes,
            "compressed_bytes": memory.compressed_bytes,
            "resident_bytes_per_page": memory.per_page,
            "resident_bytes_per_compressed_byte": memory.per_compressed_byte,
        },
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "pages": speed.pages,
        "pages_per_s": speed.pages_per_s,
        "us_per_page": speed.us_per_page,
        "client_cpu_us_per_page": speed.client_us,
        "server_cpu_us_per_page": speed.server_us,
        "seconds_per_round": list(speed.walls_s),
    }
