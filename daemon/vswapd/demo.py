"""The demo: a daemon of its own, the memory of live programs, there and back, every byte compared.

    vswapctl demo [--size 384M] [--pool 48M]        (also `make demo`, `python -m vswapd.demo`)

It tells the truth or fails: speeds are of the calls as an application makes them, zero pages are
said to be zero pages, and one wrong byte is an exit code of 1.

Invariants:
- No running daemon is touched, and nothing is left: not the daemon, not the programs, not a file.
- Memory: the programs' and one copy of their pages, never both whole and a third. Disk: the swap
  file, which is named with its size before it is made.

This module must not know the engine: it sees what any client and any operator sees.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import vswap
from vswap.protocol import PAGE_BYTES
from vswapd import live_programs, sizes
from vswapd.capture import Capture, CaptureError, capture
from vswapd.causes import explained
from vswapd.ctl.screen import render
from vswapd.entry import OutputError
from vswapd.sizes import human_size

MIB: Final = 1 << 20
BATCH: Final = 1024
"""Pages per call: 4 MiB."""
LEAST_SIZE: Final = 64 * MIB
SHARE_OF_SIZE: Final = 6
"""The pool is at most this part of the size: heaps shrink to about a third, and the rest of that
is to go to the swap file."""
_WELL_USED: Final = 0.02
"""Part of all pages that zero, zswap and phys must each have, or the demo shows too little."""
_PROGRAM_EXTRA_MB: Final = 48
"""Programs grow by this beyond their share: what they share and map from files is not captured."""
_PATIENCE_S: Final = 20.0
_POLL_S: Final = 0.05
_COLUMNS: Final = 80

Status = Mapping[str, Any]


class DemoError(Exception):
    """The demo cannot go on, or has found something wrong; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One program's pages, and where the daemon has them."""

    name: str
    space: vswap.Space
    captured: Capture
    slots: vswap.errors.U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Pages and the seconds that the calls for them took."""

    pages: int
    seconds: float

    def __str__(self) -> str:
        per_second = self.pages / self.seconds
        return (
            f"{per_second:,.0f} pages/s, {per_second * PAGE_BYTES / 1e6:,.0f} MB/s, "
            f"{self.seconds / self.pages * 1e6:.1f} us per page"
        )


# The daemon


@contextlib.contextmanager
def own_daemon(directory: Path, pool: int, swap_bytes: int) -> Iterator[tuple[Path, int]]:
    """A daemon that serves a socket in `directory` until the block ends; the socket, and its pid.

    Raises:
        DemoError: it did not start, or did not end with 0; the text ends with its log.
    """
    path, log_path = directory / "vswapd.sock", directory / "vswapd.log"
    # An empty file: the demo shows the defaults, not what this machine's administrator has set.
    (directory / "vswapd.toml").touch()
    settings = {
        "server.socket": path,
        "pool.max": pool,
        "device": f"{directory / 'swap'},size={swap_bytes}",
    }
    command = [sys.executable, "-m", "vswapd", "serve", f"--config={directory / 'vswapd.toml'}"]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        log_path.open("wb") as log,
    ):
        notify.bind(str(directory / "notify"))
        process = subprocess.Popen(  # noqa: S603 - the command is the one above
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(directory / "notify"),
            # Ctrl-C is for the demo: it stops the daemon in its turn.
            start_new_session=True,
        )
        try:
            _await_ready(process, notify, log_path)
            yield path, process.pid
            process.terminate()
            code = process.wait(_PATIENCE_S)
            if code:
                raise DemoError(f"the daemon ended with {code}:\n{log_path.read_text()}")
        except vswap.VswapError as error:
            raise DemoError(f"{error}; the daemon's log:\n{log_path.read_text()}") from None
        finally:
            process.kill()
            process.wait()


def _environment(notify: Path) -> dict[str, str]:
    """Ours, with nothing of a service manager's; Python finds there what we have found."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LISTEN_") and name not in {"WATCHDOG_USEC", "FDSTORE"}
    }
    paths = os.pathsep.join(filter(None, sys.path))
    return ours | {"NOTIFY_SOCKET": str(notify), "PYTHONPATH": paths}


def _await_ready(process: subprocess.Popen[bytes], notify: socket.socket, log: Path) -> None:
    notify.settimeout(_POLL_S)
    give_up = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in notify.recv(65536).splitlines():
                return
    raise DemoError(f"the daemon did not start:\n{log.read_text()}")


# The way there and back


def take(programs: Sequence[live_programs.LiveProgram], pages: int) -> dict[str, Capture]:
    """An equal share of `pages` from each program."""
    share = pages // len(programs)
    return {program.name: capture(program.pid, share) for program in programs}


def offload(
    socket_path: Path, name: str, captured: Capture, tick: Tick, made: contextlib.ExitStack
) -> tuple[Held, float]:
    """Store a program's pages in a space of their own; also the seconds that the calls took.

    `made` closes the space, whenever Ctrl-C comes.
    """
    with _uninterrupted():  # or what is connected, and not yet in `made`, would be left
        space = made.enter_context(vswap.connect(socket_path, label=name))
    slots, seconds = [], 0.0
    for at in range(0, len(captured.pages), BATCH):
        batch = captured.pages[at : at + BATCH]
        start = time.perf_counter()
        slots.append(space.store(batch))
        seconds += time.perf_counter() - start
        tick(len(batch))
    return Held(name=name, space=space, captured=captured, slots=np.concatenate(slots)), seconds


def load_back(held: Sequence[Held], tick: Tick) -> float:
    """Load every page, all in random order, and compare; the seconds that the calls took.

    Raises:
        DemoError: some bytes are not those that were stored.
    """
    random = np.random.default_rng()
    batches = []
    for one in held:
        order = random.permutation(len(one.slots))
        batches += [(one, order[at : at + BATCH]) for at in range(0, len(order), BATCH)]
    buffer = np.empty((BATCH, PAGE_BYTES), np.uint8)
    seconds, wrong = 0.0, 0
    for index in random.permutation(len(batches)):
        one, which = batches[index]
        room = buffer[: len(which)]
        start = time.perf_counter()
        one.space.load(one.slots[which], into=room)
        seconds += time.perf_counter() - start
        wrong += int((room != one.captured.pages[which]).any(axis=1).sum())
        tick(len(which))
    if wrong:
        raise DemoError(f"{wrong} pages came back with other bytes: this must never happen")
    return seconds


def check_used(status: Status) -> None:
    """Hold the status to what the demo is to show.

    Raises:
        DemoError: zero, zswap or phys has hardly any page.
    """
    slots = status["slots"]
    for state in ("zero", "zswap", "phys"):
        if slots[state] < _WELL_USED * slots["allocated"]:
            raise DemoError(
                f"only {slots[state]} of {slots['allocated']} pages are {state}: "
                "try another --size or --pool"
            )


def await_status(space: vswap.Space, what: str, reached: Callable[[Status], bool]) -> Status:
    """The first status for which `reached` holds.

    Raises:
        DemoError: none did for _PATIENCE_S.
    """
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        status = space.status()
        if reached(status):
            return status
        if time.monotonic() > give_up:
            raise DemoError(f"waited {_PATIENCE_S:.0f} s in vain: {what}")
        time.sleep(_POLL_S)


def is_empty(status: Status) -> bool:
    """Whether nothing is held anywhere: no slot, no memory, no device space."""
    return not (
        status["slots"]["allocated"]
        or status["pool"]["bytes"]
        or status["table"]["bytes"]
        or any(device["used_bytes"] for device in status["devices"])
    )


# The show

Tick = Callable[[int], None]


@contextlib.contextmanager
def _progress(console: Console, text: str, pages: int) -> Iterator[Tick]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pages"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=pages)
        yield lambda count: progress.advance(task, count)


def show(console: Console, size: int, pool: int) -> None:
    """Everything, from the start of the daemon to the last file removed.

    Raises:
        DemoError, VswapError, CaptureError, ProgramFailedError: it went wrong.
    """
    swap_bytes = size + 16 * MIB
    with tempfile.TemporaryDirectory(prefix="vswapd-demo-", dir=_disk(swap_bytes)) as name:
        directory = Path(name)
        console.print(
            f"starting vswapd: a pool of at most {human_size(pool)}, and a swap file of "
            f"{human_size(swap_bytes)}\nin {directory}, encrypted, removed at the end"
        )
        with own_daemon(directory, pool, swap_bytes) as (socket_path, pid):
            _show_with(console, socket_path, pid, size)
    console.print("stopped the daemon, removed its files: nothing is left")


def _show_with(console: Console, socket_path: Path, pid: int, size: int) -> None:
    taken = _taken(console, size)
    pages = sum(len(one.pages) for one in taken.values())
    with contextlib.ExitStack() as stack:
        held, seconds = [], 0.0
        with _progress(console, "offloading", pages) as tick:
            for name, captured in taken.items():
                one, took = offload(socket_path, name, captured, tick, stack)
                held.append(one)
                seconds += took
        stored = Speed(pages=pages, seconds=seconds)
        looking = held[0].space
        status = await_status(
            looking, "the shrinker to rest", lambda s: s["shrinker"]["doing"] in {"waits", "idle"}
        )
        console.print(Panel(render(status), title="vswapctl status", border_style="dim"))
        check_used(status)
        with _progress(console, "loading back in random order", pages) as tick:
            loaded = Speed(pages=pages, seconds=load_back(held, tick))
        console.print(f"all {pages:,} pages are what they were, byte for byte", style="green")
        memory = _resident(pid)
        start = time.perf_counter()
        for one in held:
            one.space.free(one.slots)
        freed = Speed(pages=pages, seconds=time.perf_counter() - start)
        empty = await_status(looking, "pool, table and device to be empty", is_empty)
        console.print(
            f"freed: pool {human_size(empty['pool']['bytes'])}, "
            f"table {human_size(empty['table']['bytes'])}, "
            f"device {human_size(empty['devices'][0]['used_bytes'])}"
        )
        console.print(_summary(status, memory, stored, loaded, freed))


def _taken(console: Console, size: int) -> dict[str, Capture]:
    """The memory of live programs, which have ended when this returns."""
    names = [n for n in (*live_programs.OURS, *live_programs.OTHERS) if live_programs.installed(n)]
    megabytes = size // len(names) // MIB + _PROGRAM_EXTRA_MB
    with (
        console.status(f"starting {len(names)} programs with real memory"),
        live_programs.running(dict.fromkeys(names, megabytes)) as programs,
    ):
        taken = take(programs, size // PAGE_BYTES)
    table = Table("captured from", "pages", "of them zero", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for program in programs:
        one = taken[program.name]
        table.add_row(program.what, f"{len(one.pages):,}", f"{one.zero_pages:,}")
    console.print(table)
    lacking = [name for name in live_programs.OTHERS if name not in names]
    if lacking:
        console.print(f"not installed, so left out: {', '.join(lacking)}", style="dim")
    return taken


def _summary(status: Status, memory: str, stored: Speed, loaded: Speed, freed: Speed) -> Table:
    slots, pool, device = status["slots"], status["pool"], status["devices"][0]
    held = slots["allocated"] * PAGE_BYTES
    in_memory = pool["bytes"] + status["table"]["bytes"]
    rows = {
        "held": f"{human_size(held)} of pages ({human_size(slots['zero'] * PAGE_BYTES)} of them "
        f"zero) in {human_size(in_memory)} of RAM and {human_size(device['live_bytes'])} of disk",
        "saved": f"{human_size(status['saved_bytes'])} of RAM; what is in the pool shrank "
        f"{status['ratio']:.2f} : 1",
        "daemon": f"{memory} resident in all, Python included",
        "store": str(stored),
        "load": f"{loaded}; in random order, {slots['phys'] / slots['allocated']:.0%} from disk",
        "free": str(freed),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, text in rows.items():
        table.add_row(f"[bold cyan]{label}[/]", text)
    return table


def _resident(pid: int) -> str:
    """Memory of a process and its children: what they share counts once, where that can be told.

    Nobody but root can look into a daemon (`undumpable`). Everybody else sees what each process
    has, and what they have shared since the fork counts once for each of them.
    """
    daemon = psutil.Process(pid)
    processes = [daemon, *daemon.children(recursive=True)]
    try:
        return human_size(sum(int(process.memory_full_info().pss) for process in processes))
    except psutil.AccessDenied:
        most = sum(int(process.memory_info().rss) for process in processes)
        return f"at most {human_size(most)}"


def _disk(wanted: int) -> str:
    """A directory for temporary files that is on a disk with room; not in memory if that can be.

    Raises:
        DemoError: there is none with room.
    """
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    places = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]  # noqa: S108 - names are made by tempfile
    # Sockets lie there, too, and their paths are at most 107 bytes long.
    fits = [p for p in places if len(p) < 64 and os.access(p, os.W_OK)]  # noqa: PLR2004
    fits = [p for p in fits if shutil.disk_usage(p).free > wanted]
    if not fits:
        raise DemoError(f"no room for {human_size(wanted)} in any of {', '.join(places)}")
    return min(fits, key=lambda place: _file_system(place, mounts) in {"tmpfs", "ramfs"})


def _file_system(place: str, mounts: Mapping[str, str]) -> str:
    path = os.path.realpath(place)
    while path not in mounts and path != "/":
        path = os.path.dirname(path)
    return mounts.get(path, "")


def build_parser() -> argparse.ArgumentParser:
    """The demo's own command line."""
    parser = argparse.ArgumentParser(
        prog="vswapctl demo",
        description="Store the memory of live programs in a vswapd of the demo's own, load it "
        "back, compare every byte. Needs no root and touches no running daemon.",
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=384 * MIB,
        metavar="SIZE",
        help="how much memory to capture (default: 384M); about twice that is needed for a moment",
    )
    parser.add_argument(
        "--pool",
        type=_size,
        default=48 * MIB,
        metavar="SIZE",
        help="pool.max (default: 48M), at most a sixth of --size",
    )
    return parser


def _size(text: str) -> int:
    try:
        return sizes.parse_size(text)
    except sizes.UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all went well, 1 if not, 130 if it was interrupted.

    Raises:
        SystemExit: the command line is wrong (2), or asks for help (0).
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.size < LEAST_SIZE:
        parser.error(f"--size is at least {sizes.format_size(LEAST_SIZE)}")
    if options.pool * SHARE_OF_SIZE > options.size:
        parser.error(f"--pool is at most 1/{SHARE_OF_SIZE} of --size: else nothing is swapped out")
    console = Console(width=None if sys.stdout.isatty() else _COLUMNS, highlight=False)
    start = time.perf_counter()
    try:
        with _terminated_as_interrupted():
            show(console, options.size, options.pool)
    except KeyboardInterrupt:
        print("interrupted; everything was removed", file=sys.stderr)
        return 130
    except (DemoError, CaptureError, live_programs.ProgramFailedError, vswap.VswapError) as error:
        print(f"vswapctl demo: {error}", file=sys.stderr)
        return 1
    except OutputError:
        raise  # whoever has started us knows what to say
    except OSError as error:
        print(f"vswapctl demo: {explained(error)}", file=sys.stderr)
        return 1
    console.print(f"that took {time.perf_counter() - start:.0f} s", style="dim")
    return 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM strike when the block is over, not within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
