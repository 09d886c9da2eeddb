"""Codecs: every page comes back, and what is no entry of theirs is an error that says which."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine import KINDS, page
from vswapd_backends.base import PAGE_BYTES
from vswapd_backends.codec import Codec, CorruptError, UnknownCodecError, codec_from_spec

SPECS = ("lz4", "lz4hc:1", "lz4hc:9", "lz4hc:12", "zstd:1", "zstd:3", "zstd:22")
FAST = ("lz4", "lz4hc:3", "zstd:1")
LEVELS = [f"lz4hc:{level}" for level in range(1, 13)] + [f"zstd:{n}" for n in range(1, 23)]


def _corrupt(codec: Codec, entries: list[bytes]) -> list[int]:
    """The entries that are called corrupt; if none is, all of them are whole pages."""
    try:
        pages = codec.decompress(entries)
    except CorruptError as error:
        return error.indices
    assert {len(found) for found in pages} == {PAGE_BYTES}
    return []


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_page_comes_back(spec: str) -> None:
    """Pages that shrink much, little or not at all come back as they were, in their order."""
    codec = codec_from_spec(spec)
    pages = [page(kind, seed) for seed in range(6) for kind in KINDS]
    entries = codec.compress(pages)
    assert codec.decompress(entries) == pages
    assert codec.decompress([memoryview(entry) for entry in entries]) == pages


@pytest.mark.parametrize("spec", FAST)
@settings(deadline=None)
@given(pattern=st.binary(min_size=1, max_size=300))
def test_any_page_comes_back(spec: str, pattern: bytes) -> None:
    """A page of any pattern, repeated and cut anywhere, comes back as it was."""
    any_page = (pattern * PAGE_BYTES)[:PAGE_BYTES]
    codec = codec_from_spec(spec)
    assert codec.decompress(codec.compress([any_page])) == [any_page]


@pytest.mark.parametrize("spec", SPECS)
def test_noise_grows_and_is_no_error(spec: str) -> None:
    """A page that cannot shrink becomes more bytes than it was; compressing never fails."""
    codec = codec_from_spec(spec)
    noise = page("noise", 1)
    (entry,) = codec.compress([noise])
    assert len(entry) >= PAGE_BYTES
    assert codec.decompress([entry]) == [noise]


@pytest.mark.parametrize("spec", SPECS)
def test_no_pages_are_no_entries(spec: str) -> None:
    """An empty batch is one."""
    codec = codec_from_spec(spec)
    assert codec.compress([]) == []
    assert codec.decompress([]) == []


@pytest.mark.parametrize("spec", SPECS)
def test_buffers_of_all_kinds_are_pages(spec: str) -> None:
    """bytes, bytearrays and memoryviews are compressed alike."""
    codec = codec_from_spec(spec)
    plain = page("text", 3)
    entries = codec.compress([plain, bytearray(plain), memoryview(plain)])
    assert len(set(entries)) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_corrupt_entries_are_named_and_no_others(spec: str) -> None:
    """What does not decompress to exactly one page is named by its index; the rest is fine."""
    codec = codec_from_spec(spec)
    entries = codec.compress([page("text", seed) for seed in range(6)])
    (short,) = codec.compress([page("text", 9)[: PAGE_BYTES // 2]])
    entries[1] = entries[1][: len(entries[1]) // 2]
    entries[3] = b""
    entries[4] = short
    with pytest.raises(CorruptError) as caught:
        codec.decompress(entries)
    assert caught.value.indices == [1, 3, 4]
    assert str(PAGE_BYTES) in str(caught.value)


@pytest.mark.parametrize("spec", SPECS)
def test_an_entry_of_more_than_a_page_is_corrupt(spec: str) -> None:
    """What would decompress to more than a page is not cut off but an error."""
    codec = codec_from_spec(spec)
    good, long = codec.compress([page("text", 1), page("text", 2) * 2])
    with pytest.raises(CorruptError) as caught:
        codec.decompress([good, long])
    assert caught.value.indices == [1]


@pytest.mark.parametrize("spec", FAST)
@settings(deadline=None)
@given(entry=st.binary(max_size=64))
def test_random_bytes_are_a_page_or_corrupt(spec: str, entry: bytes) -> None:
    """Bytes that no codec has made are a CorruptError (or, by chance, a page), and no other."""
    codec = codec_from_spec(spec)
    assert _corrupt(codec, [entry]) in ([], [0])


@pytest.mark.parametrize("spec", FAST)
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 3))
def test_damaged_entries_are_pages_or_corrupt(spec: str, seed: int, flips: int) -> None:
    """Flipped bits give a page of full length (which checks are there to find) or CorruptError."""
    codec = codec_from_spec(spec)
    chooser = random.Random(seed)
    (good,) = codec.compress([page(chooser.choice(("text", "mixed", "repeat")), seed % 50)])
    damaged = bytearray(good)
    for _ in range(flips):
        damaged[chooser.randrange(min(len(damaged), 40))] ^= 1 << chooser.randrange(8)
    assert _corrupt(codec, [bytes(damaged)]) in ([], [0])


@pytest.mark.parametrize("descriptor", [0x20, 0x40, 0x60, 0x80, 0xA0, 0xC0, 0xE0])
def test_a_zstd_frame_that_names_a_size_is_corrupt(descriptor: int) -> None:
    """Damage that reads as a size of its own does not have that much memory asked for."""
    codec = codec_from_spec("zstd:3")
    frame = bytes([descriptor]) + (1 << 60).to_bytes(8, "little") + b"\x01\0\0"
    with pytest.raises(CorruptError):
        codec.decompress([frame])


@pytest.mark.parametrize("spec", ["lz4", *LEVELS])
def test_specs_name_their_codecs(spec: str) -> None:
    """Each level there is works, and the codec knows its own spec."""
    codec = codec_from_spec(spec)
    assert codec.spec == spec
    pages = [page("text", 1)]
    assert codec.decompress(codec.compress(pages)) == pages


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "lz5",
        "LZ4",
        "lz4 ",
        " lz4",
        "lz4:",
        "lz4:1",
        "lz4hc",
        "lz4hc:",
        "lz4hc:0",
        "lz4hc:13",
        "zstd",
        "zstd:",
        "zstd:0",
        "zstd:23",
        "zstd:-1",
        "zstd:+3",
        "zstd:03",
        "zstd:3.0",
        "zstd: 3",
        "zstd:3:3",
        "zstd:\u0663",
        "zstd:\u00b3",
        "zstd:" + "1" * 5000,
    ],
)
def test_other_specs_are_unknown(spec: str) -> None:
    """Codecs and levels that do not exist, and misspelt ones, are refused by one error."""
    with pytest.raises(UnknownCodecError, match=r"lz4hc:N .*zstd:N"):
        codec_from_spec(spec)


@pytest.mark.parametrize("spec", FAST)
def test_threads_can_share_a_codec(spec: str) -> None:
    """Several threads compress and decompress with one codec at a time, each its own pages."""
    codec = codec_from_spec(spec)
    together = threading.Barrier(4)
    right: list[int] = []

    def work(number: int) -> None:
        pages = [page("text", 40 * number + i) for i in range(40)]
        together.wait()
        for _ in range(5):
            assert codec.decompress(codec.compress(pages)) == pages
        right.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == [0, 1, 2, 3]
