"""Bars of coloured parts, which stay readable without colour and in plain ASCII.

This module must not know what the parts mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.segment import Segment

EMPTY: Final = "░"
FULL: Final = "█"
_ASCII: Final = {"░": ".", "█": "#", "▓": "=", "▒": "o", "·": "-", "!": "!"}
"""What stands for a part's glyph where the terminal has none but ASCII."""


_NOISE: Final = 1e-9
"""Shares that were divided add up to one only nearly."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a bar: its share of the whole, 0 to 1, its style and its glyph."""

    share: float
    style: str
    glyph: str = FULL


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts side by side, then emptiness; as wide as it may be."""

    parts: tuple[Part, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """One line of cells."""
        cells = widths([part.share for part in self.parts], options.max_width)
        for part, count in zip(self.parts, cells, strict=True):
            glyph = _ASCII[part.glyph] if options.ascii_only else part.glyph
            yield Segment(glyph * count, console.get_style(part.style))
        empty = _ASCII[EMPTY] if options.ascii_only else EMPTY
        yield Segment(empty * (options.max_width - sum(cells)), console.get_style("dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Whatever there is."""
        return Measurement(4, options.max_width)


def widths(shares: Sequence[float], columns: int) -> list[int]:
    """Cells for each share: at least one for what is not nothing, at most `columns` together.

    A bar is only full if the shares are the whole, and only empty if they are nothing.
    """
    # What is over its limit fills the bar: the number beside it says by how much.
    shares = [min(share, 1.0) for share in shares]
    cells = [max(1, int(share * columns)) if share > 0 else 0 for share in shares]
    total = sum(shares)
    target = min(columns, max(round(total * columns), sum(count > 0 for count in cells)))
    if total < 1 - _NOISE:
        target = min(target, columns - 1)
    # What rounding gave or took is settled with the largest, where it shows least.
    while sum(cells) > target and max(cells) > 1:
        cells[cells.index(max(cells))] -= 1
    if cells and sum(cells) < target:
        cells[cells.index(max(cells))] += target - sum(cells)
    return cells
