"""Coverage-guided fuzzing of the frame parser and of whole sessions, for as long as is wanted.

    make fuzz SECONDS=900
    .venv/bin/python tests/torture/fuzz.py --replay build/fuzz/finding-...

Atheris watches which branches of the daemon some bytes reach, and goes on from those that reached
new ones; `support.fuzzing` says what the bytes mean and what must not be. What is worth going on
from is kept in build/fuzz/corpus, from one run to the next. Seeds are random, and printed. A
finding ends the run, is written to build/fuzz, and is played again by `--replay`.

This module must not know what is held: it only runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

REPOSITORY: Final = Path(__file__).resolve().parents[2]
for _root in ("tests", "client", "daemon", "backends", "blockdev"):
    sys.path.insert(0, str(REPOSITORY / _root))

_PLACE: Final = REPOSITORY / "build" / "fuzz"
_WATCHED: Final = ["vswap", "vswapd", "vswapd_backends", "vswapd_blockdev"]
_LONGEST: Final = {"frames": 64, "plays": 2048}
_FRAMES_SHARE: Final = 0.05
"""Of the time, for the parser alone: it has few branches."""
_HANG_S: Final = 60
_MOST_MB: Final = 3072
_LEG_S: Final = 150
"""Seconds after which a worker ends and another goes on from the corpus: what watches the branches
grows by 0.1 MB per play. So memory that the daemon loses is looked for without it, at the end."""
_MAY_GROW_MB: Final = 48
"""Between two passes over the corpus: what was not collected yet differs by some 20 MB."""
_TALLY_S: Final = 2.0
_PASSES: Final = 4
_FIRST: Final = 200
"""Random plays that a run without a corpus begins with."""


def _target(name: str) -> Callable[[bytes], None]:
    """What is done with the bytes. The daemon must not have been imported before."""
    from support import fuzzing

    return fuzzing.parse if name == "frames" else fuzzing.Theatre().play


def work(name: str, seconds: int, seed: int, tally: Path) -> None:
    """One worker: does not return."""
    import atheris

    with atheris.instrument_imports(include=_WATCHED):
        target = _target(name)
    from support.fuzzing import TALLY

    told = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal told
        target(data)
        if time.monotonic() - told > _TALLY_S:
            told = time.monotonic()
            tally.write_text(json.dumps(TALLY))

    corpus = _PLACE / "corpus" / name
    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={_LONGEST[name]}",
        f"-timeout={_HANG_S}",
        f"-rss_limit_mb={_MOST_MB}",
        f"-artifact_prefix={_PLACE}/finding-{name}-",
        "-len_control=20",
        "-verbosity=1",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, one, internal_libfuzzer=True)
    atheris.Fuzz()


def run(seconds: int, jobs: int) -> int:
    """Workers for both targets; 0 if nothing was found."""
    totals: Counter[str] = Counter()
    failed = 0
    for name in ("frames", "plays"):
        share = _FRAMES_SHARE if name == "frames" else 1 - _FRAMES_SHARE
        _prepare(name)
        end = time.monotonic() + max(1, seconds * share)
        while (left := round(end - time.monotonic())) > 0 and not failed:
            failed += _leg(name, min(left, _LEG_S), jobs, totals)
        found = len(os.listdir(_PLACE / "corpus" / name))
        print(f"{name}: {found} in the corpus", flush=True)
    for what, count in sorted(totals.items()):
        print(f"{count:12,} {what}")
    failed += not _memory_stays()
    print("something was found" if failed else "nothing was found")
    return int(failed > 0)


def _leg(name: str, seconds: int, jobs: int, totals: Counter[str]) -> int:
    """Workers side by side, on one corpus; how many have found something."""
    seeds = [random.SystemRandom().randrange(1, 1 << 31) for _ in range(jobs)]
    print(f"{name}: {seconds} s, seeds {seeds}", flush=True)
    workers, failed = [], 0
    for number, seed in enumerate(seeds):
        tally, log = _PLACE / f"tally-{name}-{number}", _PLACE / f"log-{name}-{number}"
        tally.unlink(missing_ok=True)
        options = [f"--work={name}", f"--seconds={seconds}", f"--seed={seed}", f"--tally={tally}"]
        with log.open("wb") as file:
            command = [sys.executable, __file__, *options]
            workers.append((subprocess.Popen(command, stdout=file, stderr=file), tally, log))
    for worker, tally, log in workers:
        if worker.wait():
            failed += 1
            print(f"{name}: a worker ended with {worker.returncode}; the end of {log}:")
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]))
        if tally.exists():
            totals.update(json.loads(tally.read_text()))
    return failed


def _memory_stays() -> bool:
    """Play the whole corpus again and again, unwatched: the process does not grow."""
    play = _target("plays")
    files = sorted((_PLACE / "corpus" / "plays").iterdir())
    sizes = []
    for _ in range(_PASSES):
        for file in files:
            play(file.read_bytes())
        sizes.append(psutil.Process().memory_info().rss >> 20)
    print(f"MB after each pass over the corpus: {sizes}")
    return sizes[-1] - sizes[0] <= _MAY_GROW_MB


def _prepare(name: str) -> None:
    corpus = _PLACE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number in range(_FIRST):
            size = random.randrange(8, _LONGEST[name] // 4)
            (corpus / f"first-{number}").write_bytes(random.randbytes(size))


def replay(files: Sequence[Path]) -> int:
    """Play what was found again; it raises if it still is there."""
    for file in files:
        _target("frames" if "-frames-" in file.name else "plays")(file.read_bytes())
        print(f"{file}: nothing is wrong")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `--work` is what it starts itself with."""
    parser = argparse.ArgumentParser(prog="fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=900)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--work", choices=_LONGEST, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tally", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.replay:
        return replay(options.replay)
    if options.work:
        work(options.work, options.seconds, options.seed, options.tally)
    return run(options.seconds, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
