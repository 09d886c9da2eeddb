"""What a denser form of a page is worth, and what it costs: codecs, and blocks of several pages.

    .venv/bin/python -m bench.density        # a table for docs/density.md

Neighbouring pages of one process are compressed alone and in blocks of 4 and 16. A block has to be
decompressed whole to load one page of it. Every time is a median of rounds in which all forms take
turns, per page; ratios are against the pages themselves.

This module must not know pools or the daemon: it is about codecs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import lz4.block
import zstandard

from bench import corpora

PAGE_BYTES: Final = 4096
PAGES: Final = 4096
ROUNDS: Final = 5
BLOCKS: Final = (1, 4, 16)


@dataclass
class Form:
    """One codec over blocks of one size."""

    name: str
    pages: int
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]
    compressed: list[bytes] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)


def forms() -> list[Form]:
    """All that is compared."""
    found = []
    for pages in BLOCKS:
        found.append(
            Form(
                "lz4",
                pages,
                lambda block: lz4.block.compress(block, store_size=False),
                lambda entry, size: lz4.block.decompress(entry, uncompressed_size=size),
            )
        )
        for level in (1, 3, 6, 9):
            parameters = zstandard.ZstdCompressionParameters.from_level(
                level,
                source_size=pages * PAGE_BYTES,
                format=zstandard.FORMAT_ZSTD1_MAGICLESS,
                write_content_size=0,
                write_checksum=0,
            )
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
            found.append(
                Form(
                    f"zstd:{level}",
                    pages,
                    compressor.compress,
                    decompressor.decompress,
                )
            )
    return found


def blocks_of(pages: list[bytes], size: int) -> list[bytes]:
    """Neighbouring pages joined."""
    return [b"".join(pages[at : at + size]) for at in range(0, len(pages), size)]


def measure(pages: list[bytes]) -> list[Form]:
    """Every form over the same pages, in turns.

    Args:
        pages: neighbours in the memory of their process; a multiple of 16.
    """
    compared = forms()
    blocks = {size: blocks_of(pages, size) for size in BLOCKS}
    for turn in range(ROUNDS + 1):
        for form in compared:
            begun = time.perf_counter()
            form.compressed = [form.compress(block) for block in blocks[form.pages]]
            middle = time.perf_counter()
            for entry in form.compressed:
                form.decompress(entry, form.pages * PAGE_BYTES)
            ended = time.perf_counter()
            if turn:  # the first is to warm up
                form.compress_s.append((middle - begun) / len(pages))
                # To load one page its whole block is decompressed.
                form.load_s.append((ended - middle) / len(form.compressed))
    return compared


def stored_bytes(form: Form) -> int:
    """What is kept: a block that does not shrink is kept as it is."""
    return sum(min(len(entry), form.pages * PAGE_BYTES) for entry in form.compressed)


def table(compared: list[Form], pages: int) -> list[str]:
    """The lines of the table."""
    base = compared[0]
    lines = [
        "codec    pages  ratio  by lz4's  compress      load one page",
        "         /block                  us/page       us    by lz4's",
    ]
    for form in compared:
        ratio = pages * PAGE_BYTES / stored_bytes(form)
        gain = stored_bytes(base) / stored_bytes(form)
        compress = statistics.median(form.compress_s) * 1e6
        load = statistics.median(form.load_s) * 1e6
        slower = load / (statistics.median(base.load_s) * 1e6)
        lines.append(
            f"{form.name:8} {form.pages:5}  {ratio:5.2f}  {gain:8.2f}  {compress:8.1f}"
            f"  {load:11.1f}  {slower:8.1f}"
        )
    return lines


def main() -> None:
    """Capture, measure, print."""
    print(corpora.describe(), end="\n\n")
    total: dict[str, list[bytes]] = {}
    for name, corpus in corpora.corpora().items():
        count = min(len(corpus.pages), PAGES) // BLOCKS[-1] * BLOCKS[-1]
        total[name] = [bytes(page.data) for page in corpus.pages[:count]]
    pages = [page for some in total.values() for page in some]
    print(f"all of them, {len(pages)} pages")
    print("\n".join(table(measure(pages), len(pages))))


if __name__ == "__main__":
    main()
