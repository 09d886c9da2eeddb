"""The picture for the README: pages per second of each peer, with one client and with most.

Invariants:
- It is readable on light and on dark ground, and refers to nothing outside of itself.
- Both halves have the same scale.

This module must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from bench.peers.results import Measured, Run

_WIDTH: Final = 860
_NAMES: Final = 118
"""For the peers' names, on the left."""
_GAP: Final = 24
_NUMBERS: Final = 52
"""For the numbers behind the bars."""
_TOP: Final = 78
_ROW: Final = 38
_BAR: Final = 13
_STYLE: Final = """
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .head { font-weight: 600 } .small { font-size: 11px; fill: #57606a }
    .store { fill: #0969da } .load { fill: #54aeff } .other { opacity: .55 }
    .line { stroke: #d0d7de }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9198a1 }
      .store { fill: #4493f8 } .load { fill: #1f5fa8 } .line { stroke: #3d444d }
    }"""


def chart(run: Run) -> str:
    """The SVG; empty halves and peers that were not measured are left out."""
    numbers = run.numbers_of_clients
    halves = sorted({numbers[0], numbers[-1]})
    shown = [one for one in run.measured if one.clients in halves]
    names = list(dict.fromkeys(one.peer for one in shown if one.counts))
    # What the others are judged by stands below: it is nothing to choose.
    names += ["codec"] if any(one.peer == "codec" for one in shown) else []
    most = max(max(one.store.pages_per_s, one.load.pages_per_s) for one in shown)
    height = _TOP + _ROW * len(names) + 8
    width = (_WIDTH - _NAMES - _GAP * len(halves)) // len(halves)
    size = f'viewBox="0 0 {_WIDTH} {height}"'
    words = quoteattr(_alt(shown))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={words}>',
        f"  <style>{_STYLE}\n  </style>",
        *_legend(run),
    ]
    for row, name in enumerate(names):
        y = _TOP + row * _ROW + _BAR + 4
        label = "codec alone" if name == "codec" else name
        lines.append(_text(_NAMES - 8, y, label, anchor="end"))
    for at, clients in enumerate(halves):
        left = _NAMES + at * (width + _GAP)
        head = "1 client" if clients == 1 else f"{clients} clients on {run.cores} cores"
        lines.append(_text(left, _TOP - 12, head, kind="head"))
        bottom = _TOP + _ROW * len(names) - 4
        lines.append(
            f'  <line class="line" x1="{left}" x2="{left}" y1="{_TOP - 4}" y2="{bottom}"/>'
        )
        for row, name in enumerate(names):
            one = run.find(name, clients)
            if one is not None:
                lines += _bars(one, left, _TOP + row * _ROW, (width - _NUMBERS) / most)
    return "\n".join([*lines, "</svg>", ""])


def _legend(run: Run) -> Iterator[str]:
    yield _text(8, 20, "Pages of 4 KiB per second, in thousands: more is better", kind="head")
    yield '  <rect class="store" x="8" y="31" width="10" height="10"/>'
    yield _text(23, 40, "store", kind="small")
    yield '  <rect class="load" x="63" y="31" width="10" height="10"/>'
    text = f"load; {run.batch} pages per call, pages of live programs, lz4 everywhere"
    yield _text(78, 40, text, kind="small")


def _bars(one: Measured, left: int, top: int, scale: float) -> Iterator[str]:
    judged = "" if one.peer.startswith("vswapd") else " other"
    for at, (kind, speed) in enumerate((("store", one.store), ("load", one.load))):
        y = top + at * (_BAR + 2)
        length = max(1.0, speed.pages_per_s * scale)
        yield (
            f'  <rect class="{kind}{judged}" x="{left}" y="{y}" width="{length:.1f}"'
            f' height="{_BAR}"/>'
        )
        yield _text(left + length + 5, y + 10, f"{speed.pages_per_s / 1e3:,.0f}", kind="small")


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'  <text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(text)}</text>'


def _alt(shown: Sequence[Measured]) -> str:
    """The same in words."""
    return "Thousands of pages per second, store and load. " + "; ".join(
        f"{one.peer}, clients: {one.clients}: {one.store.pages_per_s / 1e3:.0f} and "
        f"{one.load.pages_per_s / 1e3:.0f}"
        for one in shown
        if one.counts
    )
