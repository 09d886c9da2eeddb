"""The command: measures, prints the table and the targets, writes JSON and SVG if asked to.

The exit code is 0 whether or not a target is met; the table says so. It is 1 if a peer that is
there failed, or gave other bytes back than were stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import corpora
from bench.peers import chart, figures, interrupts, machine, measure, results
from bench.peers.contract import BATCH, PeerFailedError
from bench.peers.registry import NAMES
from bench.peers.results import Run
from bench.targets import table as table_of_figures


def run(names: Sequence[str], numbers: Sequence[int], amount: measure.Amount) -> Run:
    """Measure peers with each number of clients.

    Raises:
        PeerFailedError: see `measure.measure`.
    """
    pages = corpora.mixed(amount.pages)
    cores = machine.cores()
    missing: dict[str, str] = {}
    measured = []
    for clients in numbers:
        start = time.monotonic()
        measured += measure.measure(names, pages, amount, clients, cores, missing)
        print(f"clients: {clients}, measured in {time.monotonic() - start:.0f} s", flush=True)
    return Run(
        machine=machine.facts(),
        pages=amount.pages,
        batch=BATCH,
        rounds=amount.rounds,
        cores=cores,
        measured=measured,
        missing=missing,
    )


def numbers_of_clients(cores: int) -> list[int]:
    """1, 2, 4, ... and as many as there are cores."""
    powers = [1 << bit for bit in range(cores.bit_length())]
    return sorted({*powers, cores})


def report(found: Run, *, short: bool) -> Iterator[str]:
    """What is printed, piece by piece."""
    if not found.measured:
        yield results.table(found)
        return
    yield results.table(found)
    lines = list(figures.figures(found))
    if lines:
        yield table_of_figures(lines)
    yield "\n".join(f"no figure here: {what}" for what in figures.UNMEASURED)
    if short:
        yield "the short form: it shows that all of this works, its figures mean little"


def document(found: Run, *, short: bool) -> dict[str, object]:
    """The JSON."""
    lines = figures.figures(found) if found.measured else ()
    return results.document(found) | {
        "short": short,
        "figures": [dataclasses.asdict(line) | {"ok": line.ok} for line in lines],
        "corpora": {
            one.name: {"pages": len(one.pages), "ratio": one.ratio}
            for one in corpora.corpora().values()
        },
    }


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise ValueError
    return numbers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description="vswapd beside what people would use instead, on the same captured pages.",
    )
    parser.add_argument(
        "--short", action="store_true", help="few pages and rounds: seconds, not minutes"
    )
    parser.add_argument(
        "--clients",
        type=_numbers,
        metavar="1,2,4",
        help="numbers of client processes (default: 1, 2, 4, ... and the number of cores)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"measure this peer, and others named so; one of {', '.join(NAMES)}",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured there")
    parser.add_argument("--svg", metavar="FILE", help="draw the picture for the README there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Everything.

    Raises:
        SystemExit: the command line is wrong (2), or asks for help (0).
    """
    options = build_parser().parse_args(argv)
    names = [name for name in NAMES if options.only is None or name in options.only]
    numbers = options.clients or numbers_of_clients(machine.cores())
    amount = measure.SHORT if options.short else measure.FULL
    print(corpora.describe(), flush=True)
    try:
        with interrupts.interruptible():
            found = run(names, numbers, amount)
    except PeerFailedError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130
    for piece in report(found, short=options.short):
        print(f"\n{piece}")
    if options.json:
        text = json.dumps(document(found, short=options.short), indent=1)
        Path(options.json).write_text(text + "\n")
    if options.svg and found.measured:
        Path(options.svg).write_text(chart.chart(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
