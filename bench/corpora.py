"""Pages to measure with: captured from live processes that are started for it, never made up.

`python -m bench.corpora` prints what there is.

Invariants:
- No page is zero: a zero page costs nothing, and would flatter everything that is measured.
- A corpus is captured once per run and never kept: what is measured is what runs on this machine.
- Corpora of programs that are not installed are missing, and `missing` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import lz4.block
import numpy as np

from vswapd import live_programs
from vswapd.capture import PAGE_BYTES, Pages, capture

MOST_PAGES: Final = 12_288
"""Pages per corpus: 48 MiB."""
_PROGRAM_MB: Final = 80
"""Programs grow to this, so that what the interpreter itself takes is a small part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Pages of one program."""

    name: str
    what: str
    pages: Pages
    """Not zero, in the order in which they lay in memory; shape (n, PAGE_BYTES)."""
    zero_pages: int
    """How many more there were that are zero."""

    @property
    def ratio(self) -> float:
        """Original by compressed bytes, with lz4; what does not shrink counts as it is."""
        sizes = [min(len(blob), PAGE_BYTES) for blob in compressed(self.pages)]
        return len(self.pages) * PAGE_BYTES / sum(sizes)


def compressed(pages: Pages) -> list[bytes]:
    """Each page as lz4 has it, without its size in front."""
    return [lz4.block.compress(page, store_size=False) for page in pages]


@lru_cache(maxsize=1)
def corpora() -> dict[str, Corpus]:
    """All corpora of this machine, by name."""
    names = [n for n in (*live_programs.OURS, *live_programs.OTHERS) if live_programs.installed(n)]
    found = {}
    with live_programs.running(dict.fromkeys(names, _PROGRAM_MB)) as programs:
        for program in programs:
            taken = capture(program.pid, MOST_PAGES)
            found[program.name] = Corpus(
                name=program.name,
                what=program.what,
                pages=taken.data,
                zero_pages=taken.zero_pages,
            )
    return found


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in live_programs.OTHERS if not live_programs.installed(name)]


def mixed(count: int) -> Pages:
    """`count` pages, as many of each corpus, in runs of 64 as applications hand them out.

    Raises:
        ValueError: there are not so many.
    """
    runs = []
    for corpus in corpora().values():
        whole = len(corpus.pages) // 64 * 64
        runs.append(corpus.pages[:whole].reshape(-1, 64, PAGE_BYTES))
    fewest = min(map(len, runs))
    woven = np.stack([run[:fewest] for run in runs], axis=1).reshape(-1, PAGE_BYTES)
    if len(woven) < count:
        raise ValueError(f"{count} pages were asked for, there are {len(woven)}")
    return np.ascontiguousarray(woven[:count])


def describe() -> str:
    """A table of the corpora for people."""
    lines = ["corpus     pages   zero  ratio  captured from"]
    lines += [
        f"{c.name:9} {len(c.pages):6} {c.zero_pages:6}  {c.ratio:5.2f}  {c.what}"
        for c in corpora().values()
    ]
    if missing():
        lines.append(f"not installed here: {', '.join(missing())}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
