"""Codecs that remember compress like those that do not."""

from __future__ import annotations

import pytest

from simulation.codecs import Remembering
from support.engine import KINDS, pages_of
from vswapd_backends.codec import codec_from_spec


@pytest.mark.parametrize("spec", ["lz4", "lz4hc:1", "zstd:1"])
def test_the_same_bytes(spec: str) -> None:
    """Each page, the first time and the next, also one of which a byte has changed meanwhile."""
    codec = codec_from_spec(spec)
    pages = [page for kind in KINDS for page in pages_of(kind, 3)]
    pages.append(b"!" + pages[0][1:])
    for _ in range(2):
        entries = Remembering(codec).compress(pages)
        assert entries == codec.compress(pages)
    assert Remembering(codec).decompress(entries) == pages
