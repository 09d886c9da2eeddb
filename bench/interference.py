"""How long a page alone takes to load while the shrinker works, against a daemon at rest.

    .venv/bin/python -m bench.interference [--shards N|auto ...] [--rounds N] [--json FILE]

A daemon of its own, started as a user would, with a swap file, and a client that loads one page
after the other over the socket. Its pages are the youngest and stay in the pool: what is measured
is the shrinker's work, not the disk. A round goes through every kind of work, and for each:

1. With the shrinker off, the pool is filled with pages that nobody will ask for (and some are
   freed, where dead entries are what is wanted).
2. At rest: loads are timed.
3. The shrinker is turned on, and has a backlog: loads are timed until it has nothing left to do. It
   works as fast as it can. Nothing is stored meanwhile.

Loads are timed in short turns. Between two turns, when no load is under way, the daemon is asked
for its counters: a turn counts as busy only if what the work is counted by has risen during it (and
nothing was loaded from the disk).
What the daemon did in those turns stands in the table.

The ratio of a kind is the median over the rounds of (p99 busy by p99 at rest, of the same round).
For orientation, the same with a client beside that stores folios of 64 pages all the time, the
shrinker being off.

This module must not know the engine: it steers the daemon as an operator would.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import vswap
from bench import corpora
from bench.peers.processes import Server
from bench.peers.results import percentile
from vswap import control
from vswapd.capture import PAGE_BYTES, Pages
from vswapd_backends.base import U64

ROUNDS: Final = 7
DISTINCT: Final = 40_960
"""Pages that are stored, and how often the same ones: 480 MiB, some 150 of them compressed."""
COPIES: Final = 3
LOADED: Final = 1024
"""Pages that are loaded, in random order."""
TURN: Final = 100
"""Loads between two looks at the counters: some 10 ms."""
REST_TURNS: Final = 20
MOST_TURNS: Final = 400
_FOLIO: Final = 64
_CALL: Final = 1024
_POOL_MAX: Final = 2 << 30
_SWAP_BYTES: Final = 512 << 20
_LIMIT: Final = 1.15
"""The pool's limit by its compressed bytes: below it even if up to 0.12 of them lie waste ..."""
_HIGH: Final = "85%"
"""... and above this share of it even if nothing does."""
_PATIENCE_S: Final = 30.0
_LOOK_S: Final = 0.02
_ATTEMPTS: Final = 5


class NotDoneError(RuntimeError):
    """The shrinker did not do what was to be measured, in no turn that counts."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of work, and how the shrinker is brought to it."""

    name: str
    counters: Mapping[str, str]
    """What it is counted by in the status, and what to call that."""
    settings: Mapping[str, str] = field(default_factory=dict)
    freed: float = 0.0
    """Share of the backlog that is freed, at random, before it begins."""
    pressed: bool = False
    """Whether the pool's limit is brought so near that it is above the high watermark."""


_WRITTEN: Final = {"writeback_bytes": "MB written"}
_COMPACTED: Final = {"compact_bytes": "MB compacted"}
_RECOMPRESSED: Final = {"recompress_pages": "pages recompressed"}
_ON: Final = {"groups.default.writeback": "true"}
_OFF: Final = {"groups.default.writeback": "false"}
KINDS: Final = (
    Kind(
        "writeback",
        _WRITTEN,
        {**_ON, "shrinker.recompress_cpu": "0%", "shrinker.low_watermark": "30%"},
        pressed=True,
    ),
    Kind(
        "compaction",
        _COMPACTED,
        {**_OFF, "shrinker.recompress_cpu": "0%", "shrinker.low_watermark": "30%"},
        freed=0.5,
    ),
    Kind(
        "recompression",
        _RECOMPRESSED,
        {**_OFF, "shrinker.recompress_cpu": "100%", "shrinker.low_watermark": "65%"},
        pressed=True,
    ),
    Kind(
        "all three",
        {**_WRITTEN, **_COMPACTED, **_RECOMPRESSED},
        {**_ON, "shrinker.recompress_cpu": "25%", "shrinker.low_watermark": "30%"},
        freed=0.3,
        pressed=True,
    ),
)
STORING: Final = "a client storing beside"


@dataclass(slots=True)
class Timed:
    """Loads of one phase."""

    nanoseconds: list[int] = field(default_factory=list)

    def us(self, percent: float) -> float:
        """A percentile, in microseconds."""
        return percentile(self.nanoseconds, percent) / 1e3


@dataclass(frozen=True, slots=True)
class Round:
    """One kind in one round."""

    rest: Timed
    busy: Timed
    done: Mapping[str, float]
    """What the daemon's counters rose by in the busy turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One kind over all rounds: times in microseconds, medians of the rounds."""

    shards: str
    kind: str
    loads: int
    """Busy ones, of all rounds together."""
    rest_p50: float
    rest_p99: float
    rest_p999: float
    busy_p50: float
    busy_p99: float
    busy_p999: float
    ratio: float
    """Of the p99s, round by round."""
    spread: float
    """Half the distance between the quartiles of that."""
    done: Mapping[str, float]
    """By the daemon's counters, in the busy turns of all rounds."""

    @classmethod
    def of(cls, shards: str, kind: str, rounds: Sequence[Round]) -> Result:
        """From its rounds, at least one."""
        ratios = [one.busy.us(99) / one.rest.us(99) for one in rounds]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3

        def median(phase: str, percent: float) -> float:
            timed: list[Timed] = [getattr(one, phase) for one in rounds]
            return statistics.median(one.us(percent) for one in timed)

        return cls(
            shards=shards,
            kind=kind,
            loads=sum(len(one.busy.nanoseconds) for one in rounds),
            rest_p50=median("rest", 50),
            rest_p99=median("rest", 99),
            rest_p999=median("rest", 99.9),
            busy_p50=median("busy", 50),
            busy_p99=median("busy", 99),
            busy_p999=median("busy", 99.9),
            ratio=statistics.median(ratios),
            spread=(quartiles[2] - quartiles[0]) / 2,
            done={name: sum(one.done[name] for one in rounds) for name in rounds[0].done},
        )


class Daemon:
    """A daemon with one shard or several, the pages in it, and the client that is measured."""

    def __init__(self, directory: Path, shards: str, pages: Pages) -> None:
        self._stack: Final = contextlib.ExitStack()
        socket = directory / "vswapd.sock"
        config = directory / "vswapd.toml"
        config.write_text(f'[[device]]\npath = "{directory}/swap"\nsize = {_SWAP_BYTES}\n')
        settings = {
            "server.socket": socket,
            "server.shards": shards,
            "pool.max": _POOL_MAX,
            "pool.dense_age": "1d",
            "shrinker.high_watermark": _HIGH,
            "shrinker.low_watermark": "30%",
        }
        command = [sys.executable, "-m", "vswapd", "serve", f"--config={config}"]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        with contextlib.ExitStack() as made:
            server = Server(command, socket)
            made.callback(server.stop)
            self.socket: Final = socket
            self._control = made.enter_context(control.Control(socket))
            self._space = made.enter_context(vswap.connect(socket, name="loads"))
            self._beside = made.enter_context(vswap.connect(socket, name="backlog"))
            self._stack.push(made.pop_all())
        self._loaded, self._backlog = pages[:LOADED], pages[LOADED:]
        self._slots: U64 = np.empty(0, np.uint64)
        self._old: list[U64] = []
        self._chooser = np.random.default_rng(0)

    def close(self) -> None:
        """End the daemon."""
        self._stack.close()

    def set(self, settings: Mapping[str, object]) -> None:
        """Change settings, in their order."""
        for key, value in settings.items():
            self._control.call("set", key=key, value=str(value))

    def counters(self) -> tuple[dict[str, Any], str]:
        """The engine's counters, and what the shrinker does."""
        status = self._control.status()
        return status["traffic"], status["shrinker"]["doing"]

    def await_idle(self) -> None:
        """Until the shrinker has nothing to do, though it is off: discards, spare memory.

        Raises:
            TimeoutError: it always has.
        """
        give_up = time.monotonic() + _PATIENCE_S
        while self.counters()[1] not in {"waits", "idle"}:
            if time.monotonic() > give_up:
                raise TimeoutError("the shrinker does not come to rest")
            time.sleep(_LOOK_S)

    def fill(self, freed: float) -> None:
        """The backlog anew, then the pages that are loaded; some of the backlog is freed."""
        for slots in self._old:
            self._beside.free(slots)
        if len(self._slots):
            self._space.free(self._slots)
        pages = self._backlog
        self._old = [
            self._beside.store(pages[at : at + _CALL])
            for _ in range(COPIES)
            for at in range(0, len(pages), _CALL)
        ]
        self._slots = self._space.store(self._loaded)
        if freed:
            slots = self._chooser.permutation(np.concatenate(self._old))
            count = int(freed * len(slots))
            self._beside.free(slots[:count])
            self._old = [slots[count:]]

    def live_bytes(self) -> int:
        """Compressed bytes in the pool."""
        return int(self._control.status()["pool"]["live_bytes"])

    def turn(self, count: int = TURN) -> list[int]:
        """Load so many pages one by one; nanoseconds of each."""
        which = self._chooser.integers(len(self._slots), size=count)
        asked = [self._slots[at : at + 1] for at in which.tolist()]
        page = np.empty(PAGE_BYTES, np.uint8)
        load, now = self._space.load, time.perf_counter_ns
        times = []
        for slots in asked:
            begun = now()
            load(slots, into=page)
            times.append(now() - begun)
        assert page.tobytes() == self._loaded[which[-1]].tobytes()
        return times

    def rest(self) -> Timed:
        """Turns with nothing else to do for the daemon."""
        timed = Timed()
        self.turn()
        for _ in range(REST_TURNS):
            self.counters()
            timed.nanoseconds += self.turn()
        return timed

    def work(self, kind: Kind) -> tuple[Timed, dict[str, float]]:
        """Turns while the shrinker works a backlog off: those in which it got further with it."""
        timed, done = Timed(), dict.fromkeys(kind.counters, 0.0)
        before, _ = self.counters()
        for _ in range(MOST_TURNS):
            times = self.turn()
            after, doing = self.counters()
            grown = {name: after[name] - before[name] for name in kind.counters}
            if after["swapin_pages"] > before["swapin_pages"]:
                pass  # a page was written back before the shrinker was done: the disk was measured
            elif any(grown.values()):
                timed.nanoseconds += times
                for name, count in grown.items():
                    done[name] += count
            elif doing in {"waits", "idle"}:
                break
            before = after
        return timed, done

    def measure(self, kind: Kind) -> Round:
        """One kind in one round."""
        self.set({"shrinker.enabled": "false", "pool.max": _POOL_MAX, **kind.settings})
        self.fill(kind.freed)
        self.await_idle()
        rest = self.rest()
        if kind.pressed:
            self.set({"pool.max": int(self.live_bytes() * _LIMIT)})
        self.set({"shrinker.enabled": "true"})
        busy, done = self.work(kind)
        if not all(done.values()):
            raise NotDoneError(f"{kind.name}: the shrinker was to do it, and did not: {done}")
        return Round(rest, busy, done)

    def measure_storing(self, pages: Pages) -> Round:
        """The same with a client beside that stores."""
        self.set({"shrinker.enabled": "false", "pool.max": _POOL_MAX})
        self.await_idle()
        rest = self.rest()
        context = multiprocessing.get_context("fork")
        ready, stop = context.Event(), context.Event()
        process = context.Process(target=_store, args=(self.socket, pages, ready, stop))
        process.start()
        try:
            if not ready.wait(_PATIENCE_S):
                raise TimeoutError("the client that stores does not start")
            busy, done = Timed(), {"store_pages": 0.0}
            for _ in range(REST_TURNS):
                before, _ = self.counters()
                busy.nanoseconds += self.turn()
                after, _ = self.counters()
                done["store_pages"] += after["store_pages"] - before["store_pages"]
        finally:
            stop.set()
            process.join()
        return Round(rest, busy, done)


def _store(socket: Path, pages: Pages, ready: Any, stop: Any) -> None:
    """Overwrite the same slots with folios, until told to stop. In a process of its own."""
    with vswap.connect(socket, name="stores") as space:
        folios = [pages[at : at + _FOLIO] for at in range(0, len(pages), _FOLIO)]
        slots = [space.store(folio) for folio in folios]
        ready.set()
        while not stop.is_set():
            for folio, where in zip(folios, slots, strict=True):
                space.store(folio, where)


def measure(
    directory: Path, shards: str, pages: Pages, *, rounds: int = ROUNDS
) -> Iterator[Result]:
    """All kinds in turns, with a daemon of so many shards.

    Args:
        directory: where the socket and the swap file are made.
        shards: as in the configuration.
        pages: LOADED that are loaded, and the backlog, of which each is stored COPIES times.
        rounds: how often each kind is measured.

    Raises:
        NotDoneError: again and again the shrinker did not do what was to be measured.
    """
    found: dict[str, list[Round]] = {kind.name: [] for kind in KINDS}
    beside = []
    daemon = Daemon(directory, shards, pages)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(KINDS)
            for kind in KINDS[first:] + KINDS[:first]:
                found[kind.name].append(_attempted(daemon, kind))
            beside.append(daemon.measure_storing(pages[: 16 * _FOLIO]))
    finally:
        gc.enable()
        daemon.close()
    for name, measured in (*found.items(), (STORING, beside)):
        yield Result.of(shards, name, measured)


def _attempted(daemon: Daemon, kind: Kind) -> Round:
    """One round; again if the work was done in turns that do not count."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(NotDoneError):
            return daemon.measure(kind)
    return daemon.measure(kind)


def some_pages() -> Pages:
    """As many captured pages as `measure` wants."""
    return corpora.mixed(LOADED + DISTINCT)


def table(results: Sequence[Result]) -> str:
    """The table for people."""
    names = {name: text for kind in KINDS for name, text in kind.counters.items()}
    names["store_pages"] = "pages stored"
    lines = [
        "                                        at rest, us            busy, us     p99 busy/rest",
        "shards  busy with                    p50   p99   p99.9     p50   p99   p99.9",
    ]
    for one in results:
        done = ", ".join(
            f"{count / 1e6 if name.endswith('_bytes') else count:,.0f} {names[name]}"
            for name, count in one.done.items()
        )
        lines.append(
            f"{one.shards:6}  {one.kind:24} "
            f"{one.rest_p50:7.0f} {one.rest_p99:5.0f} {one.rest_p999:7.0f} "
            f"{one.busy_p50:7.0f} {one.busy_p99:5.0f} {one.busy_p999:7.0f}   "
            f"{one.ratio:5.2f} +-{one.spread:.2f}  {one.loads} loads; {done}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="bench.interference", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shards", nargs="+", default=["1", "auto"], help="default: 1 auto")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--directory", help="where the swap file is made (default: the temporary)")
    options = parser.parse_args(argv)
    results: list[Result] = []
    for shards in options.shards:
        with tempfile.TemporaryDirectory(prefix="vswapd-bench-", dir=options.directory) as place:
            results += measure(Path(place), shards, some_pages(), rounds=options.rounds)
    print(table(results))
    if options.json:
        document = [dataclasses.asdict(one) for one in results]
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
