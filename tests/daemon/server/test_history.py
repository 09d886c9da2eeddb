"""Several real clients at once, while everything moves behind their slots: each page is right.

`VSWAPD_SOAK=20 make test` does twenty times as much.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any, Final

import pytest

import vswap
import vswap.aio
from support.clients import run_tasks
from support.daemon import running_daemon
from support.history import Event, History
from vswap.control import Control

CLIENTS: Final = 4
STEPS: Final = 200 * int(os.environ.get("VSWAPD_SOAK", "1"))
"""Requests of one task."""
_FORK = multiprocessing.get_context("fork")


def event(kind: str, slot: int, value: bytes, begin: float, end: float) -> Event:
    assert kind in {"store", "load"}
    return Event(kind, slot, value, begin, end)  # type: ignore[arg-type]


def test_the_checker_sees_what_is_wrong() -> None:
    """A stale page, a page of nobody's, and one from the future are found; overlap is allowed."""
    old, new = event("store", 1, b"old", 0, 1), event("store", 1, b"new", 2, 3)

    def problems(*loads: Event) -> int:
        return len(History([old, new, *loads]).problems())

    assert problems(event("load", 1, b"new", 4, 5), event("load", 1, b"old", 1, 1.5)) == 0
    assert problems(event("load", 1, b"old", 2.5, 5), event("load", 1, b"new", 2.5, 5)) == 0
    assert problems(event("load", 1, b"old", 4, 5)) == 1
    assert problems(event("load", 1, b"new", 1, 1.5)) == 1
    assert problems(event("load", 1, b"nobody's", 4, 5)) == 1
    assert problems(event("load", 2, b"old", 4, 5)) == 1


TIERS = ["lz4", "lz4,zstd:1", "zstd:1,zstd:9", "lz4hc:4,zstd:3", "lz4,zstd:3"]


def _enough(steps: int) -> bool:
    return steps >= STEPS


def _operate(control: Control, chooser: random.Random, extra: Path) -> None:
    """Something that operators do; what cannot be done now is no failure."""
    verbs: list[tuple[str, dict[str, Any]]] = [
        ("writeback", {"bytes": chooser.choice([1, 1 << 20, 1 << 30])}),
        ("compact", {}),
        ("verify", {}),
        ("set", {"key": "pool.tiers", "value": chooser.choice(TIERS)}),
        ("set", {"key": "pool.dense_age", "value": "0s"}),
        ("set", {"key": "pool.verify", "value": chooser.choice(["always", "never"])}),
        ("set", {"key": "pool.max", "value": chooser.choice(["2M", "3M", "6M"])}),
        ("swapon", {"path": str(extra), "size": 24 << 20}),
        ("swapoff", {"path": str(extra)}),
    ]
    verb, arguments = chooser.choice(verbs)
    try:
        answer = control.call(verb, **arguments)
    except vswap.OutOfService:
        return
    if verb == "verify":
        assert answer["ok"], answer["problems"]


@pytest.mark.parametrize("shards", [1, 3])
def test_every_page_is_what_it_can_be(shards: int, tmp_path: Path) -> None:
    """Concurrent clients with overlapping requests, a tiny pool, a device, an operator at work."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    with running_daemon("pool.max=3M", f"server.shards={shards}") as daemon:
        with Control(daemon.socket_path) as control:
            control.call("swapon", path=str(tmp_path / "swap"), size=64 << 20)
            pipes = []
            processes = []
            for number in range(CLIENTS):
                here, there = _FORK.Pipe()
                process = _FORK.Process(
                    target=run_tasks,
                    args=(daemon.socket_path, seed + number, there, _enough),
                    daemon=True,
                )
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            chooser = random.Random(seed)
            while not all(pipe.poll() for pipe in pipes):
                _operate(control, chooser, tmp_path / "extra")
            results = [pipe.recv() for pipe in pipes]
            for process in processes:
                process.join()
            assert [problem for problems, _, _ in results for problem in problems] == []
            assert all(events for _, events, _ in results)
            document = control.status()
            assert control.call("verify")["ok"]
        assert document["slots"]["allocated"] == 0
        assert document["traffic"]["writeback_pages"] > 0
        assert document["pool"]["live_bytes"] == 0
