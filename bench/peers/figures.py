"""What must come out of a run: ratios within it, each beside its target.

Invariants:
- A figure compares what was measured in the same rounds; one whose peers were not measured is
  left out, and `unmeasured` names what this benchmark says nothing of.

This module must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

from bench.peers.results import Measured, Run, Speed
from bench.targets import Figure

Operation = Literal["store", "load"]
OPERATIONS: Final[Sequence[Operation]] = ("store", "load")

_ZRAM: Final = 1.0
_ONE_CLIENT: Final[Mapping[str, Mapping[Operation, float]]] = {
    "redis": {"store": 1.6, "load": 3.0},
    "memcached": {"store": 1.4, "load": 3.0},
}
_ALL_CORES: Final[Mapping[str, Mapping[Operation, float]]] = {
    "redis": {"store": 2.0, "load": 3.0},
    "memcached": {"store": 2.0, "load": 3.0},
}
_SHARDS: Final = 3.4
_LEAST_CPU_S: Final = 0.5
"""Less, and the system's ticks of 10 ms are too coarse to compare."""
_ABOVE_FLOOR_US: Final = 10.0
_RESIDENT: Final = 1.05

UNMEASURED: Final = (
    "p99 of single loads while writeback, compaction and recompression run",
    "ratio of a zstd tier by that of lz4",
)
"""Targets that this benchmark says nothing of."""


def figures(run: Run) -> Iterator[Figure]:
    """All figures whose peers were measured."""
    fewest, most = run.numbers_of_clients[0], run.numbers_of_clients[-1]
    if most > 1:
        yield from _against(run, most, {"zram": dict.fromkeys(OPERATIONS, _ZRAM)})
        yield from _against(run, most, _ALL_CORES)
        yield from _shards(run, most)
    if fewest == 1:
        yield from _against(run, 1, _ONE_CLIENT)
        yield from _single(run)
    ours = best_of_ours(run, most)
    if ours is not None and ours.memory is not None:
        memory = ours.memory
        yield Figure(
            name="resident / compressed bytes",
            value=memory.per_compressed_byte,
            target=_RESIDENT,
            detail=f"{memory.resident_bytes / 1e6:.1f} MB more in the daemon for "
            f"{memory.compressed_bytes / 1e6:.1f} MB compressed",
        )


def best_of_ours(run: Run, clients: int) -> Measured | None:
    """vswapd as a client finds it best: with the window, if there is one."""
    return run.find("vswapd-window", clients) or run.find("vswapd", clients)


def _against(
    run: Run, clients: int, targets: Mapping[str, Mapping[Operation, float]]
) -> Iterator[Figure]:
    ours = best_of_ours(run, clients)
    for name, by_operation in targets.items():
        theirs = run.find(name, clients)
        if ours is None or theirs is None:
            continue
        for operation, target in by_operation.items():
            a, b = _speed(ours, operation), _speed(theirs, operation)
            yield Figure(
                name=f"{operation}, {_clients(clients)}: {ours.peer} / {name}",
                value=a.times_as_fast_as(b),
                target=target,
                at_least=True,
                detail=f"{a.us_per_page:.2f} and {b.us_per_page:.2f} us/page",
            )


def _shards(run: Run, clients: int) -> Iterator[Figure]:
    """From one shard to one per core, as the daemon's own processor time has it.

    Clients and shards share the cores: what the clients take is no shard's fault.
    """
    one, all_of_them = run.find("vswapd-1", clients), run.find("vswapd", clients)
    if one is None or all_of_them is None:
        return
    for operation in OPERATIONS:
        few, many = _speed(one, operation), _speed(all_of_them, operation)
        if min(few.server_cpu_s, many.server_cpu_s) < _LEAST_CPU_S:
            continue
        yield Figure(
            name=f"{operation}, shards 1 to {run.cores}, by the daemon's processor time",
            value=run.cores * few.server_us / many.server_us,
            target=_SHARDS,
            at_least=True,
            detail=f"by the clock {many.times_as_fast_as(few):.2f}, with {_clients(clients)} "
            "on the same cores",
        )


def _single(run: Run) -> Iterator[Figure]:
    ours, floor = best_of_ours(run, 1), run.find("ping-pong", 1)
    codec = run.find("codec", 1)
    if ours is None or floor is None or codec is None:
        return
    for operation in OPERATIONS:
        a, b, c = (
            (one.store_one if operation == "store" else one.load_one).p50_us
            for one in (ours, floor, codec)
        )
        yield Figure(
            name=f"{operation} one page, p50 us above ping-pong and codec",
            value=a - b - c,
            target=_ABOVE_FLOOR_US,
            detail=f"{a:.1f}; ping-pong {b:.1f}, codec {c:.1f}",
        )


def _speed(one: Measured, operation: Operation) -> Speed:
    return one.store if operation == "store" else one.load


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"
