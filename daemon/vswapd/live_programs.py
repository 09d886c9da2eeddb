"""Programs with real memory, to be captured: started, grown to a size, kept alive, ended.

Each is a process of its own that builds what programs of its kind hold (objects and strings out of
real text, parsed source, arrays, a database) until it is as big as it was told, and then sits
still until its standard input ends. So none outlives whoever started it.

`python -m vswapd.live_programs NAME MEGABYTES` is one of them.

Invariants:
- Nothing is written to disk, and nothing is read but the standard library's own source.
- A program that is not installed is left out and named, never a failure.

This module must not know captures, pages, or the daemon.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import select
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

_READY: Final = b"ready\n"
_PATIENCE_S: Final = 120.0
"""Growing takes seconds, on a busy machine some dozens."""
_MOST_SOURCES: Final = 400
MIB: Final = 1 << 20


class ProgramFailedError(Exception):
    """A program did not get ready; the text has what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveProgram:
    """A program that is ready and sits still."""

    name: str
    what: str
    """What fills its memory, for people."""
    pid: int


# Growing: each is an iterator that keeps what it builds, and grows by a few MB per step.


def _sources() -> Iterator[tuple[Path, str]]:
    """Files of the standard library and their text, over and over."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted([*root.glob("*.py"), *root.glob("*/*.py")])[:_MOST_SOURCES]
    for path in itertools.cycle(paths):
        yield path, path.read_text(errors="replace")


def _objects() -> Iterator[None]:
    """Records as web applications hold them: dicts of strings, numbers, lists."""
    kept: list[object] = []
    for number, (path, text) in enumerate(_sources()):
        lines = text.splitlines()
        records = [
            {
                "id": number * 100_000 + at,
                "path": str(path),
                "line": line,
                "words": line.split(),
                "at": {"row": at, "part": at / len(lines), "hash": hash(line)},
            }
            for at, line in enumerate(lines)
        ]
        kept.append((records, json.dumps(records[::8]), {r["id"]: r for r in records}))
        yield


def _parsed() -> Iterator[None]:
    """Syntax trees of the standard library, as linters and compilers hold them."""
    kept: list[object] = []
    for path, text in _sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Some files are there to show syntax that is wrong.
            with contextlib.suppress(SyntaxError):
                tree = ast.parse(text)
                kept.append((tree, compile(text, str(path), "exec"), list(ast.walk(tree))))
        yield


def _arrays() -> Iterator[None]:
    """Arrays as numeric work has them: measurements, indices, sums, and a mostly empty grid."""
    random = np.random.default_rng(1)
    kept: list[object] = []
    for _ in itertools.count():
        samples = np.round(random.normal(20.0, 5.0, 100_000), 2)
        order = np.argsort(samples)
        grid = np.full((600, 600), 0.0)
        np.add.at(grid, (random.integers(0, 600, 90), random.integers(0, 600, 90)), 1.0)
        counts, _ = np.histogram(samples, 50_000)
        kept.append((samples, order, np.cumsum(samples), grid, counts, samples > np.pi))
        yield


def _database() -> Iterator[None]:
    """An SQLite database in memory, with an index."""
    base = sqlite3.connect(":memory:", isolation_level=None)
    base.execute("create table lines (id integer primary key, file text, row int, text text)")
    base.execute("create index by_text on lines (text)")
    for path, text in _sources():
        rows = [(str(path), at, line) for at, line in enumerate(text.splitlines())]
        base.execute("begin")
        base.executemany("insert into lines (file, row, text) values (?, ?, ?)", rows)
        base.execute("commit")
        yield


_GROWERS: Final[Mapping[str, tuple[str, Callable[[], Iterator[None]]]]] = {
    "objects": ("Python: dicts, strings, lists", _objects),
    "parsed": ("Python: parsed source", _parsed),
    "arrays": ("numpy: arrays", _arrays),
    "sqlite": ("SQLite: a database in memory", _database),
}

# Other languages, if they are there: what makes one grow by a few MB per step is their own words.
# %d is the number of MB to grow to.
_PERL: Final = """
my @kept; my $n = 0;
sub rss { open(my $f, '<', '/proc/self/statm'); (split ' ', <$f>)[1] * 4096 }
while (rss() < %d * 1048576) {
    my %%h;
    for (1 .. 20000) { $n++; $h{"key$n"} = { id => $n, name => "user number $n", at => $n / 7 } }
    push @kept, \\%%h;
}
$| = 1; print "ready\\n"; <STDIN>;
"""
_NODE: Final = """
const kept = []; let n = 0;
while (process.memoryUsage().rss < %d * 1048576) {
    const some = new Map();
    for (let i = 0; i < 20000; i++) {
        n++; some.set(`key${n}`, { id: n, name: `user number ${n}`, at: n / 7, tags: [`t${n}`] });
    }
    kept.push(some);
}
process.stdin.on('end', () => process.exit(0)); process.stdin.resume();
console.log('ready');
"""
_FOREIGN: Final[Mapping[str, tuple[str, Sequence[str]]]] = {
    "perl": ("Perl: hashes", ("perl", "-e", _PERL)),
    "node": ("Node.js: objects", ("node", "-e", _NODE)),
}

OURS: Final = tuple(_GROWERS)
"""The programs that run wherever the daemon does."""
OTHERS: Final = tuple(_FOREIGN)
"""The programs that run where their language is installed."""


def installed(name: str) -> bool:
    """Whether a program can be started here."""
    return name in _GROWERS or shutil.which(_FOREIGN[name][1][0]) is not None


@contextlib.contextmanager
def running(sizes: Mapping[str, int]) -> Iterator[list[LiveProgram]]:
    """Start programs at the same time, wait until all are ready; they end with the block.

    Args:
        sizes: how many MB each is to grow to, by name (of OURS and OTHERS).

    Raises:
        ProgramFailedError: one of them ended before it was ready, or is not for too long.
    """
    with contextlib.ExitStack() as stack:
        started = [(name, _start(stack, name, size)) for name, size in sizes.items()]
        yield [_await_ready(name, process) for name, process in started]


def _start(stack: contextlib.ExitStack, name: str, megabytes: int) -> subprocess.Popen[bytes]:
    if name in _GROWERS:
        command = [sys.executable, "-m", "vswapd.live_programs", name, str(megabytes)]
    else:
        *head, script = _FOREIGN[name][1]
        command = [*head, script % megabytes]
    process = subprocess.Popen(  # noqa: S603 - the commands are those above
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # Ctrl-C is for whoever started them: they are ended by the end of their input.
        start_new_session=True,
    )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _await_ready(name: str, process: subprocess.Popen[bytes]) -> LiveProgram:
    """Wait until it says so. What it says before (warnings of a locale, say) is for the error."""
    assert process.stdout is not None
    said = b""
    ready = select.poll()
    ready.register(process.stdout)
    give_up = time.monotonic() + _PATIENCE_S
    while _READY not in said.splitlines(keepends=True):
        if not ready.poll(max(0.0, give_up - time.monotonic()) * 1000):
            raise _failed(name, f"was not ready within {_PATIENCE_S:.0f} s", said)
        some = os.read(process.stdout.fileno(), 65536)
        if not some:
            raise _failed(name, f"ended with {process.wait()}", said)
        said += some
    what = _GROWERS[name][0] if name in _GROWERS else _FOREIGN[name][0]
    return LiveProgram(name=name, what=what, pid=process.pid)


def _failed(name: str, what: str, said: bytes) -> ProgramFailedError:
    text = said.decode(errors="replace").strip()
    return ProgramFailedError(f"the program {name} {what}" + (f": {text}" if text else ""))


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str]) -> int:
    """Be one of OURS: grow, say so, sit still until standard input ends."""
    name, megabytes = arguments
    kept: list[Any] = [_GROWERS[name][1]()]
    while _resident_bytes() < int(megabytes) * MIB:
        next(kept[0])
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
