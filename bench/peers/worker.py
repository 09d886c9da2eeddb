"""One client as a process: it has pages of its own, and does what it is told, when the gate opens.

    python -m bench.peers.worker PAGES_FILE NUMBER GATE_FD      (what the crew starts)

Commands come as lines of JSON on standard input, answers go to standard output the same way. What
is measured begins when a byte can be read from the gate, which all clients of a crew share.

Invariants:
- Everything that a pass needs is made before it: pages in aligned memory, cut and touched.
- Times are of CLOCK_MONOTONIC, which all processes share.
- An error is an answer, too; the worker ends with its standard input.

This module must not know which peers there are to be measured, or what for.
"""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

from bench.peers.contract import BATCH, PAGE_BYTES, Batch, Buffer, Client, PeerFailedError
from bench.peers.registry import peer_class

_STEP: Final = 61
"""Single pages are asked for in this step, so that they are not neighbours."""


def batches_of(memory: memoryview) -> list[Batch]:
    """Pages, which are whole batches, cut."""
    pages = [memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES)]
    return [
        Batch(
            first=first,
            whole=memory[first * PAGE_BYTES : (first + BATCH) * PAGE_BYTES],
            pages=pages[first : first + BATCH],
        )
        for first in range(0, len(pages), BATCH)
    ]


def wrong_pages(loaded: Buffer | Sequence[Buffer], batch: Batch) -> int:
    """How many pages are not those of the batch."""
    if isinstance(loaded, memoryview | bytes | bytearray):
        whole = memoryview(loaded)
        loaded = [whole[at : at + PAGE_BYTES] for at in range(0, len(whole), PAGE_BYTES)]
    missing = abs(len(batch.pages) - len(loaded))
    # Bytes are compared at once; memoryviews item by item.
    pairs = zip(loaded, batch.pages, strict=False)
    return missing + sum(bytes(a) != bytes(b) for a, b in pairs)


def check(client: Client, batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    """Overwrite everything that is kept, in both ways, and compare all that is loaded.

    Args:
        client: holds `batches`, and holds them again when this returns.
        batches: its pages.
        others: the same numbers with other pages.

    Raises:
        PeerFailedError: some pages came back with other bytes.
    """
    wrong = 0
    for kept in (others, batches):
        for batch in kept:
            client.store(batch)
        wrong += sum(wrong_pages(client.load(batch), batch) for batch in kept)
    for kept in (others, batches):
        # One of each batch, everywhere in it.
        places = itertools.cycle(range(0, BATCH, 5))
        ones = [
            (batch.first + at, batch.pages[at]) for batch, at in zip(kept, places, strict=False)
        ]
        for number, page in ones:
            client.store_one(number, page)
        wrong += sum(bytes(client.load_one(number)) != bytes(page) for number, page in ones)
    if wrong:
        raise PeerFailedError(f"{wrong} pages came back with other bytes")


class Worker:
    """The state between commands: pages, and a client of each peer."""

    def __init__(self, pages: bytes, number: int, gate: int) -> None:
        self._number: Final = number
        self._gate: Final = gate
        memory = memoryview(mmap.mmap(-1, len(pages)))
        memory[:] = pages
        self._batches: Final = batches_of(memory)
        # Every batch gets the pages of the one behind it.
        other = memoryview(mmap.mmap(-1, len(pages)))
        other[: -BATCH * PAGE_BYTES] = memory[BATCH * PAGE_BYTES :]
        other[-BATCH * PAGE_BYTES :] = memory[: BATCH * PAGE_BYTES]
        self._others: Final = batches_of(other)
        count = len(pages) // PAGE_BYTES
        self._singles: Final = [
            (number, self._batches[number // BATCH].pages[number % BATCH])
            for number in (at * _STEP % count for at in range(count))
        ]
        self._clients: Final[dict[str, Client]] = {}

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one thing, and return how it went; say when the gate is all that is waited for."""
        verb, peer = command["do"], command["peer"]
        if verb == "connect":
            count = len(self._batches) * BATCH
            self._clients[peer] = peer_class(peer).connect(command["address"], self._number, count)
            return {}
        client = self._clients[peer]
        if verb == "disconnect":
            self._clients.pop(peer).close()
            return {}
        gc.collect()
        gc.freeze()
        singles = self._singles[: command.get("count", 1)]
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "touch": lambda: _touch(client, self._batches[0]),
            "fill": lambda: _each(client.store, self._batches),
            "check": lambda: _checked(client, self._batches, self._others),
            "store": lambda: _each(client.store, self._batches),
            "load": lambda: _each(client.load, self._batches),
            "store_one": lambda: _timed(lambda one: client.store_one(*one), singles),
            "load_one": lambda: _timed(lambda one: client.load_one(one[0]), singles),
        }
        say({})
        os.read(self._gate, 1)
        cpu, start = time.process_time(), time.monotonic()
        answer = work[verb]()
        end = time.monotonic()
        return {"start_s": start, "end_s": end, "cpu_s": time.process_time() - cpu, **answer}


def _each(call: Callable[[Batch], object], batches: Sequence[Batch]) -> dict[str, Any]:
    for batch in batches:
        call(batch)
    return {}


def _touch(client: Client, batch: Batch) -> dict[str, Any]:
    """One of everything, so that connections have their buffers; hardly anything to be reused."""
    client.store(batch)
    client.load(batch)
    client.store_one(batch.first, batch.pages[0])
    client.load_one(batch.first)
    return {}


def _checked(client: Client, batches: Sequence[Batch], others: Sequence[Batch]) -> dict[str, Any]:
    check(client, batches, others)
    return {}


def _timed(
    call: Callable[[tuple[int, memoryview]], object], singles: Sequence[tuple[int, memoryview]]
) -> dict[str, Any]:
    clock = time.perf_counter_ns
    taken = []
    for one in singles:
        start = clock()
        call(one)
        taken.append(clock() - start)
    return {"latencies_ns": taken}


def say(answer: dict[str, Any]) -> None:
    """Tell whoever steers."""
    print(json.dumps(answer), flush=True)


def main(pages_file: str, number: str, gate: str) -> None:
    """Obey until there are no more commands."""
    with open(pages_file, "rb") as file:
        worker = Worker(file.read(), int(number), int(gate))
    for line in sys.stdin:
        try:
            answer = worker.obey(json.loads(line))
        except Exception:  # noqa: BLE001 - whoever steers is told, and ends the run
            answer = {"error": traceback.format_exc()}
        say(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
