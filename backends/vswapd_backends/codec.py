"""Codecs: one call per page in, one call per page out, in batches.

A codec is named by its spec: `lz4`, `lz4hc:N` (N 1 to 12), `zstd:N` (N 1 to 22). The spec is what
configuration, status and segment headers carry.

Invariants:
- `compress` never fails and may return more bytes than it was given: whoever stores them decides.
- `decompress` returns exactly PAGE_BYTES per entry, or raises CorruptError naming the entries.
- Both may be called from several threads at a time.

This module must not know pools, segments or checksums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Final, Protocol

import lz4.block
import zstandard

from vswapd_backends.base import PAGE_BYTES

Buffer = bytes | bytearray | memoryview

_DESCRIPTOR: Final = 0
"""What a frame of ours begins with: no size, checksum or dictionary (RFC 8878, 3.1.1.1.1). A frame
that names a size of its own is damaged, and would have that much memory allocated for it."""


class UnknownCodecError(ValueError):
    """A spec that names no codec; the text names those that exist."""

    def __init__(self, spec: str) -> None:
        super().__init__(
            f"no codec is called {spec!r}: use lz4, lz4hc:N (N 1 to 12) or zstd:N (N 1 to 22)"
        )


class CorruptError(Exception):
    """Entries that do not decompress to a page; `indices` says which of the batch."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"{len(indices)} entries do not decompress to {PAGE_BYTES} bytes")
        self.indices = indices


class Codec(Protocol):
    """Compresses pages, one by one, in batches."""

    @property
    def spec(self) -> str:
        """`lz4`, `lz4hc:9`, `zstd:3`."""

    def compress(self, pages: Iterable[Buffer]) -> list[bytes]:
        """The compressed bytes of each page."""

    def decompress(self, entries: Sequence[Buffer]) -> list[bytes]:
        """The page of each entry.

        Raises:
            CorruptError: some entries are no page; all others were fine.
        """


class Lz4:
    """LZ4 blocks without a length of their own: the page's is known."""

    def __init__(self, spec: str = "lz4", level: int = 0) -> None:
        self.spec: Final = spec
        self._level = level

    def compress(self, pages: Iterable[Buffer]) -> list[bytes]:
        """See Codec."""
        compress = lz4.block.compress
        # Positional (mode, store_size, acceleration, compression): keywords cost 0.1 us a page, and
        # so does a loop in Python.
        if not self._level:
            return list(map(compress, pages, repeat("default"), repeat(False)))
        mode, level = repeat("high_compression"), repeat(self._level)
        return list(map(compress, pages, mode, repeat(False), repeat(1), level))

    def decompress(self, entries: Sequence[Buffer]) -> list[bytes]:
        """See Codec."""
        try:
            pages = list(map(lz4.block.decompress, entries, repeat(PAGE_BYTES)))
        except lz4.block.LZ4BlockError:
            raise _corrupt(entries, self._one, lz4.block.LZ4BlockError) from None
        # None can be longer than it was allowed to be: the sum is right only if each of them is.
        if sum(map(len, pages)) == PAGE_BYTES * len(pages):
            return pages
        raise _corrupt(entries, self._one, lz4.block.LZ4BlockError)

    @staticmethod
    def _one(entry: Buffer) -> bytes:
        page: bytes = lz4.block.decompress(entry, PAGE_BYTES)
        return page


class Zstd:
    """Zstandard frames without magic, size and checksum: 3 to 9 bytes less per page."""

    def __init__(self, level: int) -> None:
        self.spec: Final = f"zstd:{level}"
        self._level = level
        # Compressor objects are not thread-safe: one pair per thread.
        self._local = threading.local()

    def _compressor(self) -> zstandard.ZstdCompressor:
        found: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if found is None:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                self._level,
                source_size=PAGE_BYTES,
                format=zstandard.FORMAT_ZSTD1_MAGICLESS,
                write_content_size=0,
                write_checksum=0,
                write_dict_id=0,
            )
            found = zstandard.ZstdCompressor(compression_params=parameters)
            self._local.compressor = found
        return found

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        found: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if found is None:
            found = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
            self._local.decompressor = found
        return found

    def compress(self, pages: Iterable[Buffer]) -> list[bytes]:
        """See Codec."""
        compress = self._compressor().compress
        return [compress(page) for page in pages]

    def decompress(self, entries: Sequence[Buffer]) -> list[bytes]:
        """See Codec."""
        decompress = self._decompressor().decompress
        try:
            pages = [
                decompress(entry, PAGE_BYTES) if entry and entry[0] == _DESCRIPTOR else b""
                for entry in entries
            ]
        except zstandard.ZstdError:
            raise _corrupt(entries, self._one, zstandard.ZstdError) from None
        if all(len(page) == PAGE_BYTES for page in pages):
            return pages
        raise _corrupt(entries, self._one, zstandard.ZstdError)

    def _one(self, entry: Buffer) -> bytes:
        if not entry or entry[0] != _DESCRIPTOR:
            return b""
        return self._decompressor().decompress(entry, PAGE_BYTES)


def _corrupt(
    entries: Sequence[Buffer], decompress: Callable[[Buffer], bytes], error: type[Exception]
) -> CorruptError:
    """Which entries of a batch that failed are to blame: slow, one by one."""
    indices = []
    for index, entry in enumerate(entries):
        try:
            if len(decompress(entry)) != PAGE_BYTES:
                indices.append(index)
        except error:
            indices.append(index)
    return CorruptError(indices)


_LEVELS: Final = {"lz4hc": 12, "zstd": 22}


def codec_from_spec(spec: str) -> Codec:
    """The codec that a spec names.

    Raises:
        UnknownCodecError: it names none.
    """
    name, _, level = spec.partition(":")
    if spec == "lz4":
        return Lz4()
    if name not in _LEVELS or level not in map(str, range(1, _LEVELS[name] + 1)):
        raise UnknownCodecError(spec)
    return Lz4(spec, int(level)) if name == "lz4hc" else Zstd(int(level))
