"""What a well-behaved client keeps of its throughput beside others that flood the daemon.

    .venv/bin/python -m bench.hostile [--shards N|auto ...] [--kinds KIND ...]
        [--floods N] [--rounds N] [--json FILE]

A daemon of its own, started as a user would. The well-behaved client stores folios of 64 pages,
loads them, frees them, one call after the other. Beside it work, each in a process of its own,
clients that do one thing as fast as they can:

- connections: connect, greet, and go;
- pings: the smallest request, pipelined without end, all replies read;
- statuses: the request that costs the daemon most for its size, pipelined;
- lists: slots of a space, as many as may be asked for, pipelined;
- huge stores: the largest request that may be, over the same slots again and again;
- huge loads: the same, the other way;
- descriptors: pings, each with as many descriptors as a message can carry;
- half frames: the first part of a huge store, then nothing, until it is cut off; then again;
- deaf: huge loads whose replies nobody reads, until it is cut off; then again.

A round measures the client alone, then beside one kind, for the same time each. The ratio of a
kind is the median over the rounds of (beside by alone). It can be no more than the machine's cores
allow: the floods' own processes compete for them, too.

This module must not know the engine: it speaks the protocol.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import dataclasses
import json
import multiprocessing
import os
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

import vswap
from bench import corpora
from bench.peers.processes import Server
from vswap import control
from vswap.protocol import HEADER, HEADER_BYTES, SLOT_BYTES, SLOTS_BIT, Op, pack_header
from vswapd.capture import PAGE_BYTES, Pages

ROUNDS: Final = 7
TURN_S: Final = 1.5
FLOODS: Final = 2
DISTINCT: Final = 4096
_FOLIO: Final = 64
_POOL_MAX: Final = 1 << 30
_BUFFERS: Final = 64 << 20
_PATIENCE_S: Final = 30.0
REQUEST_TIMEOUT_S: Final = 2.0
_PIPELINED: Final = 64
_UNDER_WAY: Final = 8
_SCM_MAX_FD: Final = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One kind over all rounds; medians of the rounds."""

    shards: str
    kind: str
    floods: int
    """Processes of it."""
    alone: float
    beside: float
    """Pages per second, stored and loaded."""
    ratio: float
    spread: float
    """Half the distance between the quartiles of the rounds' ratios."""
    answered: int
    """What the floods have got done, of all rounds together: their requests, or connections."""
    grown_bytes: int
    """Most anonymous memory of the daemon beyond that before the first round."""

    @classmethod
    def of(
        cls,
        shards: str,
        kind: str,
        floods: int,
        rates: Sequence[tuple[float, float]],
        answered: int,
        grown_bytes: int,
    ) -> Result:
        """From the rates of its rounds, alone and beside; at least one."""
        ratios = [beside / alone for alone, beside in rates]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return cls(
            shards=shards,
            kind=kind,
            floods=floods,
            alone=statistics.median(alone for alone, _ in rates),
            beside=statistics.median(beside for _, beside in rates),
            ratio=statistics.median(ratios),
            spread=(quartiles[2] - quartiles[0]) / 2,
            answered=answered,
            grown_bytes=grown_bytes,
        )


# Floods: each does its thing until `stop`, and counts what was answered.


class _Line:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))

    def greet(self) -> dict[str, Any]:
        """HELLO; what it says."""
        body = json.dumps({"client": "flood"}).encode()
        self.socket.sendall(pack_header(Op.HELLO, len(body)) + body)
        found: dict[str, Any] = json.loads(self.reply())
        return found

    def reply(self) -> bytes:
        """The next one's body.

        Raises:
            ConnectionError: the daemon has closed.
        """
        (length, _, _, code, *_) = HEADER.unpack(self._exactly(HEADER_BYTES))
        body = self._exactly(length - HEADER_BYTES)
        if code:
            raise ConnectionError(body)
        return body

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self.socket.recv_into(view)
            if not got:
                raise ConnectionError("closed")
            view = view[got:]
        return bytes(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


Done = Callable[[], bool]
"""Counts one thing that was done; whether it is enough."""


def _connections(path: Path, _: Pages, done: Done) -> None:
    while not done():
        with _Line(path) as line:
            line.greet()


def _pings(path: Path, _: Pages, done: Done, rights: Sequence[int] = ()) -> None:
    ping = pack_header(Op.PING, 0)
    gifts = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights).tobytes())]
    with _Line(path) as line:
        line.greet()

        def send() -> None:
            with contextlib.suppress(OSError):  # the end of the other thread's connection
                while True:
                    if rights:
                        line.socket.sendmsg([ping], gifts)
                    else:
                        line.socket.sendall(ping * _PIPELINED)

        threading.Thread(target=send, daemon=True).start()
        while not done():
            line.reply()


def _statuses(path: Path, pages: Pages, done: Done) -> None:  # noqa: ARG001 - a flood
    with _Line(path) as line:
        line.greet()
        _pipelined(line, pack_header(Op.STATUS, 0), done)


def _lists(path: Path, pages: Pages, done: Done) -> None:
    with _Line(path) as line:
        slots, _ = _stored(line, pages)
        head = pack_header(Op.LIST, SLOT_BYTES, count=len(slots) // SLOT_BYTES)
        _pipelined(line, head + bytes(SLOT_BYTES), done)


def _pipelined(line: _Line, frame: bytes, done: Done) -> None:
    """The same request again and again, always some of them under way."""
    line.socket.sendall(frame * _UNDER_WAY)
    while True:
        line.reply()
        if done():
            return
        line.socket.sendall(frame)


def _descriptors(path: Path, pages: Pages, done: Done) -> None:
    _pings(path, pages, done, [os.memfd_create("gift")] * _SCM_MAX_FD)


def _stored(line: _Line, pages: Pages) -> tuple[bytes, bytes]:
    """Pages stored in one request as large as may be: their slots, and the pages."""
    count = min(int(line.greet()["max_batch"]), len(pages))
    body = pages[:count].tobytes()
    line.socket.sendall(pack_header(Op.STORE, len(body), count=count) + body)
    return line.reply(), body


def _stores(path: Path, pages: Pages, done: Done) -> None:
    with _Line(path) as line:
        slots, body = _stored(line, pages)
        count = len(slots) // SLOT_BYTES
        head = pack_header(Op.STORE, len(slots) + len(body), count=count, flags=SLOTS_BIT)
        while not done():
            line.socket.sendall(head + slots + body)
            line.reply()


def _loads(path: Path, pages: Pages, done: Done) -> None:
    with _Line(path) as line:
        slots, _ = _stored(line, pages)
        frame = pack_header(Op.LOAD, len(slots), count=len(slots) // SLOT_BYTES) + slots
        while not done():
            line.socket.sendall(frame)
            line.reply()


def _half_frames(path: Path, pages: Pages, done: Done) -> None:
    while not done():
        with _Line(path) as line:
            count = min(int(line.greet()["max_batch"]), len(pages))
            frame = pack_header(Op.STORE, count * PAGE_BYTES, count=count) + pages[:count].tobytes()
            _until_cut_off(line, frame[:-1])


def _deaf(path: Path, pages: Pages, done: Done) -> None:
    while not done():
        with _Line(path) as line:
            slots, _ = _stored(line, pages)
            frame = pack_header(Op.LOAD, len(slots), count=len(slots) // SLOT_BYTES) + slots
            _until_cut_off(line, frame * 8)


def _until_cut_off(line: _Line, data: bytes) -> None:
    """Send, read nothing, and wait for the daemon to close."""
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        line.socket.sendall(data)
    # POLLHUP needs no reading.
    hang_up = select.poll()
    hang_up.register(line.socket, 0)
    hang_up.poll(_PATIENCE_S * 1000)


KINDS: Final[Mapping[str, Callable[[Path, Pages, Done], None]]] = {
    "connections": _connections,
    "pings": _pings,
    "statuses": _statuses,
    "lists": _lists,
    "huge stores": _stores,
    "huge loads": _loads,
    "descriptors": _descriptors,
    "half frames": _half_frames,
    "deaf": _deaf,
}


WAITS: Final = frozenset({"half frames", "deaf"})
"""Kinds that have done something only when they were cut off, so not in every turn."""


def _flood(kind: str, path: Path, pages: Pages, count: Any, ready: Any, stop: Any) -> None:
    """A flood's process."""

    def done() -> bool:
        count.value += 1
        if count.value == 1:
            ready.release()
        return bool(stop.is_set())

    KINDS[kind](path, pages, done)


@contextlib.contextmanager
def flooding(kind: str, path: Path, pages: Pages, floods: int) -> Iterator[Callable[[], int]]:
    """Floods of one kind until the block ends; what it gives tells how much they have got done.

    Raises:
        TimeoutError: they do not start.
    """
    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Semaphore(0), fork.Event()
    counts = [fork.Value("Q", 0, lock=False) for _ in range(floods)]
    processes = [
        fork.Process(target=_flood, args=(kind, path, pages, count, ready, stop), daemon=True)
        for count in counts
    ]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if not ready.acquire(timeout=_PATIENCE_S):
                raise TimeoutError(f"{kind}: the floods do not start")
        yield lambda: sum(int(count.value) for count in counts)
    finally:
        stop.set()
        for process in processes:
            # What waits to be cut off is not waited for.
            process.terminate()
            process.join()


def _moved(kind: str, count: Callable[[], int]) -> Callable[[], bool]:
    """Whether floods have done something from now on: a turn may be over before they have had one.

    On a busy machine it is.
    """
    first = count()
    return lambda: kind in WAITS or count() > first


# The client, and the daemon


class Daemon:
    """A daemon, and the client that is measured."""

    def __init__(
        self, directory: Path, shards: str, pages: Pages, request_timeout_s: float
    ) -> None:
        self._stack: Final = contextlib.ExitStack()
        self.socket: Final = directory / "vswapd.sock"
        config = directory / "vswapd.toml"
        config.write_text("")
        settings = {
            "server.socket": self.socket,
            "server.shards": shards,
            "server.buffer_memory": _BUFFERS,
            "server.request_timeout": f"{request_timeout_s:g}s",
            "pool.max": _POOL_MAX,
        }
        command = [sys.executable, "-m", "vswapd", "serve", f"--config={config}"]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        with contextlib.ExitStack() as made:
            server = Server(command, self.socket)
            made.callback(server.stop)
            self._control = made.enter_context(control.Control(self.socket))
            self._space = made.enter_context(vswap.connect(self.socket))
            self._stack.push(made.pop_all())
        self._folios = [pages[at : at + _FOLIO] for at in range(0, len(pages), _FOLIO)]
        self._into = np.empty((_FOLIO, PAGE_BYTES), np.uint8)

    def close(self) -> None:
        """End the daemon."""
        self._stack.close()

    def work(self, seconds: float, until: Callable[[], bool] = lambda: True) -> float:
        """Store, load and free for so long, one folio at least, and `until`; pages per second.

        Raises:
            TimeoutError: `until` does not come true.
        """
        space, folios, into = self._space, self._folios, self._into
        number = 0
        begun = time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds or not number or not until():
            if spent > seconds + _PATIENCE_S:
                raise TimeoutError(f"nothing was done beside the client for {spent:.0f} s")
            folio = folios[number % len(folios)]
            slots = space.store(folio)
            space.load(slots, into=into)
            space.free(slots)
            number += 1
        assert into.tobytes() == folio.tobytes()
        return 2 * number * _FOLIO / spent

    def anonymous_bytes(self) -> int:
        """Memory of all its processes that is no pool and no window."""
        pid = int(self._control.status()["pid"])
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        found = 0
        for one in [pid, *map(int, text.split())]:
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    found += int(line.split()[1]) * 1024
        return found


def measure(
    directory: Path,
    shards: str,
    pages: Pages,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    rounds: int = ROUNDS,
    floods: int = FLOODS,
    turn_s: float = TURN_S,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
) -> Iterator[Result]:
    """All kinds in turns, with a daemon of so many shards.

    Args:
        directory: where the socket is made.
        shards: as in the configuration.
        pages: what is stored.
        kinds: which; all by default.
        rounds: how often each kind is measured.
        floods: processes that flood at a time.
        turn_s: seconds of each measurement.
        request_timeout_s: the daemon's, after which it cuts off who lets it wait.
    """
    rates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    answered = dict.fromkeys(kinds, 0)
    grown = dict.fromkeys(kinds, 0)
    daemon = Daemon(directory, shards, pages, request_timeout_s)
    try:
        daemon.work(turn_s)
        before = daemon.anonymous_bytes()
        for _ in range(rounds):
            for kind in kinds:
                alone = daemon.work(turn_s)
                with flooding(kind, daemon.socket, pages, floods) as count:
                    first = count()
                    rates[kind].append((alone, daemon.work(turn_s, _moved(kind, count))))
                    answered[kind] += count() - first
                    grown[kind] = max(grown[kind], daemon.anonymous_bytes() - before)
    finally:
        daemon.close()
    for kind in kinds:
        yield Result.of(shards, kind, floods, rates[kind], answered[kind], grown[kind])


def table(results: Sequence[Result]) -> str:
    """The table for people."""
    lines = [
        "shards  beside floods of    pages/s alone    beside    ratio        answered  MB more"
    ]
    lines += [
        f"{one.shards:6}  {one.floods} x {one.kind:14} {one.alone:13,.0f} {one.beside:11,.0f}   "
        f"{one.ratio:5.2f} +-{one.spread:.2f} {one.answered:9,} {one.grown_bytes / 1e6:8.1f}"
        for one in results
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench.hostile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shards", nargs="+", default=["1", "auto"], help="default: 1 auto")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND")
    parser.add_argument("--floods", type=int, default=FLOODS, help="processes at a time")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    results: list[Result] = []
    for shards in options.shards:
        with tempfile.TemporaryDirectory(prefix="vswapd-bench-") as place:
            pages = corpora.mixed(DISTINCT)
            results += measure(
                Path(place),
                shards,
                pages,
                kinds=options.kinds,
                rounds=options.rounds,
                floods=options.floods,
            )
    print(table(results))
    if options.json:
        document = [dataclasses.asdict(one) for one in results]
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
