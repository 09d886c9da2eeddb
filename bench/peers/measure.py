"""One run: peers started, clients connected, everything warmed up, then measured in turns.

Invariants:
- Nothing is measured before every peer's pages were stored three times and compared.
- In each round every peer has its turn; which one is first changes from round to round.
- Peers and clients have ended when a number of clients is done, also after an error.

This module must not know any one peer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.peers import interrupts
from bench.peers.contract import BATCH, PAGE_BYTES, Held, MissingError, Peer, Plan
from bench.peers.crew import Crew, Pass
from bench.peers.lz4_codec import shrunk
from bench.peers.registry import peer_class
from bench.peers.results import Latency, Measured, Memory, Speed
from vswapd.capture import Pages

_SHARED_MEMORY: Final = "/dev/shm"
BATCHES: Final = ("store", "load")
SINGLES: Final = ("store_one", "load_one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much is measured."""

    pages: int
    """Per client; whole batches."""
    rounds: int
    singles: int
    """Single requests per client and round."""


FULL: Final = Amount(pages=8192, rounds=15, singles=500)
SHORT: Final = Amount(pages=512, rounds=2, singles=50)


@dataclass(slots=True, kw_only=True)
class _Standing:
    """A peer that is started and warm, and what was measured of it so far."""

    peer: Peer
    pages: int
    memory: Memory | None
    compressed_bytes: int
    passes: dict[str, list[Pass]] = field(default_factory=lambda: defaultdict(list))
    server_cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def measured(self, clients: int) -> Measured:
        """All rounds together."""
        kind = type(self.peer)
        singles = {
            name: Latency.of([ns for one in self.passes[name] for ns in one.latencies_ns])
            for name in SINGLES
        }
        ratio = self.pages * PAGE_BYTES / self.compressed_bytes if kind.compresses else None
        return Measured(
            peer=kind.name,
            what=kind.what,
            counts=kind.counts,
            clients=clients,
            store=self._speed("store"),
            load=self._speed("load"),
            store_one=singles["store_one"],
            load_one=singles["load_one"],
            ratio=ratio,
            memory=self.memory,
        )

    def _speed(self, what: str) -> Speed:
        passes = self.passes[what]
        return Speed(
            pages=self.pages,
            walls_s=[one.wall_s for one in passes],
            client_cpu_s=sum(one.cpu_s for one in passes),
            server_cpu_s=self.server_cpu_s[what],
        )


def measure(
    names: Sequence[str],
    pages: Pages,
    amount: Amount,
    clients: int,
    cores: int,
    missing: dict[str, str],
) -> list[Measured]:
    """Measure peers with one number of clients.

    Args:
        names: the peers, in the order of the table.
        pages: what every client stores.
        amount: how much.
        clients: how many processes store and load.
        cores: for peers that want to know.
        missing: peers that are not here are added, with the reason.

    Raises:
        PeerFailedError: one of them did not do what it should, or gave other bytes back.
    """
    stack = contextlib.ExitStack()
    try:
        with interrupts.held():
            plan = _plan(stack, amount, clients, cores)
        file = plan.memory / "pages"
        pages.tofile(file)
        started = []
        for name in names:
            with interrupts.held():
                peer = _started(stack, name, plan, missing)
            if peer is not None:
                started.append(peer)
        with interrupts.held():
            crew = stack.enter_context(Crew(file, clients))
        codec_bytes = sum(len(shrunk(page.data)) for page in pages) * clients
        standing = [_warmed(peer, crew, plan, codec_bytes) for peer in started]
        for turn in range(amount.rounds):
            at = turn % max(1, len(standing))
            for one in standing[at:] + standing[:at]:
                _one_round(one, crew, amount.singles)
        for one in standing:
            crew.disconnect(type(one.peer).name)
        return [one.measured(clients) for one in standing]
    finally:
        with interrupts.held():
            stack.close()


def _plan(stack: contextlib.ExitStack, amount: Amount, clients: int, cores: int) -> Plan:
    wanted = 4 * amount.pages * PAGE_BYTES * (clients + 1)
    prefix = f"vswapd-peers-{os.getpid()}-"
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
    memory = directory
    with contextlib.suppress(FileNotFoundError):
        if shutil.disk_usage(_SHARED_MEMORY).free > wanted:
            memory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=prefix, dir=_SHARED_MEMORY)
            )
    return Plan(
        clients=clients,
        pages=amount.pages,
        directory=Path(directory),
        memory=Path(memory),
        cores=cores,
    )


def _started(
    stack: contextlib.ExitStack, name: str, plan: Plan, missing: dict[str, str]
) -> Peer | None:
    if name in missing:
        return None
    with contextlib.ExitStack() as ours:
        try:
            peer = peer_class(name)()
            ours.callback(peer.stop)
            peer.start(plan)
        except MissingError as error:
            missing[name] = str(error)
            return None
        stack.push(ours.pop_all())
        return peer


def _warmed(peer: Peer, crew: Crew, plan: Plan, codec_bytes: int) -> _Standing:
    """Connect, let buffers grow, weigh, fill, weigh again, overwrite and compare."""
    name = type(peer).name
    crew.connect(name, [peer.address(client) for client in range(plan.clients)])
    crew.run(name, "touch")
    before = peer.held()
    crew.run(name, "fill")
    after = peer.held()
    pages = plan.clients * plan.pages
    memory = None if before is None or after is None else _grown(before, after, plan, codec_bytes)
    crew.run(name, "check")
    compressed = codec_bytes
    if after is not None and after.compressed_bytes is not None:
        compressed = after.compressed_bytes
    return _Standing(peer=peer, pages=pages, memory=memory, compressed_bytes=compressed)


def _grown(before: Held, after: Held, plan: Plan, codec_bytes: int) -> Memory:
    """What the pages took that came between: all but the first batch of each client."""
    all_pages = plan.clients * plan.pages
    pages = all_pages - plan.clients * BATCH
    if before.compressed_bytes is None or after.compressed_bytes is None:
        compressed = codec_bytes * pages // all_pages
    else:
        compressed = after.compressed_bytes - before.compressed_bytes
    return Memory(
        pages=pages,
        resident_bytes=after.resident_bytes - before.resident_bytes,
        compressed_bytes=compressed,
    )


def _one_round(one: _Standing, crew: Crew, singles: int) -> None:
    name = type(one.peer).name
    for what in BATCHES:
        before = one.peer.cpu_s()
        one.passes[what].append(crew.run(name, what))
        one.server_cpu_s[what] += one.peer.cpu_s() - before
    for what in SINGLES:
        one.passes[what].append(crew.run(name, what, singles))
