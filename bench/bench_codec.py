"""The codecs by themselves: 64 pages of each corpus, compressed and decompressed."""

from __future__ import annotations

import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import corpora, rig
from vswapd import live_programs
from vswapd.capture import PAGE_BYTES
from vswapd_backends.codec import codec_from_spec

NAMES = [*live_programs.OURS, *live_programs.OTHERS]
SPECS = ["lz4", "lz4hc:9", "zstd:3"]


def folio_of(name: str) -> list[memoryview]:
    """64 pages from the middle of a corpus."""
    if name not in corpora.corpora():
        pytest.skip(f"{name} is not installed")
    pages = corpora.corpora()[name].pages
    middle = len(pages) // 2
    return [memoryview(page) for page in rig.single_pages(pages[middle : middle + rig.FOLIO])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
def bench_compress(benchmark: BenchmarkFixture, name: str, spec: str) -> None:
    benchmark.group = f"compress 64 pages, {spec}"
    codec, folio = codec_from_spec(spec), folio_of(name)
    entries = benchmark(codec.compress, folio)
    sizes = [min(len(entry), PAGE_BYTES) for entry in entries]
    benchmark.extra_info["ratio"] = rig.FOLIO * PAGE_BYTES / sum(sizes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
def bench_decompress(benchmark: BenchmarkFixture, name: str, spec: str) -> None:
    benchmark.group = f"decompress 64 pages, {spec}"
    codec, folio = codec_from_spec(spec), folio_of(name)
    entries = [entry for entry in codec.compress(folio) if len(entry) < PAGE_BYTES]
    found = benchmark(codec.decompress, entries)
    assert len(found) == len(entries)
    assert set(map(bytes, found)) <= set(map(bytes, itertools.chain(folio)))
