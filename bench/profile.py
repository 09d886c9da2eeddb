"""Where a shard's processor time goes while one client stores or loads: by library, with perf.

    .venv/bin/python -m bench.profile        # a table for docs/benchmarks.md; needs perf, and root

What is the codec is what any daemon that compresses would need; the rest is what there is to gain.
The client works in batches of 64 captured pages that lie in its window.

This module must not know the daemon from inside: perf looks at its process.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import vswap
from bench import corpora
from bench.peers.contract import BATCH, PAGE_BYTES
from bench.peers.processes import Server

SECONDS: Final = 5.0
PAGES: Final = 4096
_LINE: Final = re.compile(r"^\s*([\d.]+)%\s+(\S+)")
_NAMES: Final = {
    "_block": "lz4",
    "mmh3": "mmh3 (checks)",
    "libpython": "the interpreter",
    "python": "the interpreter",
    "_multiarray": "numpy",
    "[kernel": "kernel (sockets, wakeups)",
    "libc": "libc (copies, malloc)",
    "ld-linux": "libc (copies, malloc)",
}
"""How what perf names begins, and what it is."""


def serve(directory: Path, window: int) -> Server:
    """A daemon of one shard."""
    path = directory / "vswapd.sock"
    config = directory / "vswapd.toml"
    config.touch()
    settings = (
        f"server.socket={path}",
        "server.shards=1",
        f"server.window={window}",
        "pool.max=2G",
    )
    command = [sys.executable, "-m", "vswapd", "serve", f"--config={config}"]
    return Server([*command, *(f"--set={setting}" for setting in settings)], path)


def profile(server: Server, work: Callable[[], object], data: Path) -> dict[str, float]:
    """Shares of the daemon's processor time while `work` is done again and again."""
    pid = server.pid
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-e", "cpu-clock", "-F", "4000", "-o", str(data), "-p", str(pid)],
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        work()
    perf.terminate()
    perf.wait()
    report = subprocess.run(
        ["perf", "report", "-i", str(data), "--stdio", "--sort", "dso"],
        capture_output=True,
        text=True,
        check=True,
    )
    shares: dict[str, float] = {}
    for line in report.stdout.splitlines():
        if found := _LINE.match(line):
            name = next((what for begin, what in _NAMES.items() if found[2].startswith(begin)), "")
            shares[name or "other"] = shares.get(name or "other", 0.0) + float(found[1])
    return shares


def measure() -> dict[str, dict[str, float]]:
    """The shares of a store and of a load."""
    pages = corpora.mixed(PAGES)
    whole = pages.tobytes()
    found = {}
    size = (PAGES + BATCH) * PAGE_BYTES
    with tempfile.TemporaryDirectory() as name:
        server = serve(Path(name), size)
        try:
            with vswap.connect(server.socket_path, window=size) as space:
                kept = space.buffer(PAGES)
                kept[:] = whole
                room = space.buffer(BATCH)
                span = BATCH * PAGE_BYTES
                batches = [kept[at : at + span] for at in range(0, len(whole), span)]
                slots = [space.store(batch) for batch in batches]

                def store() -> None:
                    for batch, where in zip(batches, slots, strict=True):
                        space.store(batch, slots=where)

                def load() -> None:
                    for where in slots:
                        space.load(where, into=room)

                for what in (store, load):
                    what()
                    found[what.__name__] = profile(server, what, Path(name) / "perf.data")
        finally:
            server.stop()
    return found


def main() -> int:
    """Measure, print."""
    if shutil.which("perf") is None:
        print("bench.profile: there is no perf here (Debian: apt-get install linux-perf)")
        return 1
    found = measure()
    names = sorted({name for shares in found.values() for name in shares})
    names.sort(key=lambda name: -found["store"].get(name, 0.0))
    print(f"{'share of the daemon':28}{'store':>8}{'load':>8}")
    for name in names:
        cells = "".join(f"{found[what].get(name, 0.0):7.1f}%" for what in ("store", "load"))
        print(f"{name:28}{cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
