"""Callers' objects as bytes: what is taken, what is refused, what is not copied."""

from __future__ import annotations

import array
import ctypes
import mmap
from typing import Any

import numpy as np
import pytest

import vswap
from vswap.buffers import byte_view, padded_pages_of, pages_of, slots_of, target_of
from vswap.protocol import PAGE_BYTES

PAGE = bytes(range(256)) * 16


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda page: array.array("d", page),
        lambda page: memoryview(page).cast("I", (32, 32)),
        lambda page: np.frombuffer(page, np.uint8),
        lambda page: np.frombuffer(page, ">u4").reshape(16, 64),
        lambda page: np.frombuffer(page, "M8[s]"),
        lambda page: np.frombuffer(page, [("a", "<u2"), ("b", "<u8"), ("c", "<u2"), ("d", "<u4")]),
        (ctypes.c_double * 512).from_buffer_copy,
        lambda page: np.frombuffer(page, np.uint16).reshape(32, 64).T,
    ],
)
def test_any_contiguous_buffer_is_its_bytes_in_memory(make: Any) -> None:
    """Whatever type, format, shape and order: the bytes are taken as they lie."""
    assert byte_view(make(PAGE)).tobytes() == PAGE
    assert pages_of(make(PAGE)).count == 1


def test_a_mapping_can_be_closed_after_its_view() -> None:
    """The view of an mmap looks into it and does not outlive its use."""
    with mmap.mmap(-1, PAGE_BYTES) as mapping:
        view = byte_view(mapping)
        mapping[0] = 7
        assert view[0] == 7
        view.release()


@pytest.mark.parametrize(
    "make", [bytearray, lambda page: np.frombuffer(bytearray(page), np.uint32).reshape(4, -1)]
)
def test_views_copy_nothing(make: Any) -> None:
    """What is written through the target view is written into the caller's buffer."""
    buffer = make(PAGE)
    target_of(buffer, PAGE_BYTES)[:] = bytes(PAGE_BYTES)
    assert bytes(buffer) == bytes(PAGE_BYTES)


@pytest.mark.parametrize("size", [1, 4095, 4097, 8191])
def test_pages_must_be_whole(size: int) -> None:
    """A length that is no multiple of 4096 is refused, with the length and the way out."""
    with pytest.raises(vswap.BadBuffer, match=f"{size} bytes are not whole pages .* put"):
        pages_of(bytes(size))


def test_no_bytes_are_no_pages() -> None:
    """An empty buffer is zero pages."""
    assert pages_of(b"").count == 0
    assert pages_of(np.empty((0, 4096), np.uint8)).count == 0


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        ("text", "str has no bytes"),
        (None, "NoneType has no bytes"),
        (np.zeros(8192, np.uint8)[::2], "has gaps"),
        (memoryview(bytes(8192))[::2], "has gaps"),
        (np.zeros((64, 128, 2), np.uint8)[:, :64], "has gaps"),
        (np.array([object()] * 512), "Python objects"),
    ],
)
def test_what_has_no_plain_bytes_is_refused(thing: Any, says: str) -> None:
    """Things without a buffer, with gaps in it, or of Python objects are named and refused."""
    with pytest.raises(vswap.BadBuffer, match=says):
        byte_view(thing)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (PAGE, "read-only"),
        (bytearray(4095), "do not fit into a buffer of 4095"),
        (bytearray(8192), "do not fit into a buffer of 8192"),
    ],
)
def test_a_target_must_be_writable_and_of_the_size(target: Any, says: str) -> None:
    """Read-only targets, and those that are too small or too large, are refused."""
    with pytest.raises(vswap.BadBuffer, match=says):
        target_of(target, PAGE_BYTES)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 9000])
def test_padding_fills_the_last_page_with_zeros(size: int) -> None:
    """Bytes of any length are pages; what follows the last byte is zero."""
    content = bytes(n % 251 + 1 for n in range(size))
    pages = padded_pages_of(memoryview(content))
    assert pages.count == -(-size // PAGE_BYTES)
    joined = b"".join(pages.cut(slice(0, pages.count)))
    assert joined == content + bytes(-size % PAGE_BYTES)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([1, 2], [1, 2]),
        (7, [7]),
        (np.array([3, 4], np.int32), [3, 4]),
        ((2**64 - 1,), [2**64 - 1]),
        (np.arange(6, dtype=np.uint64)[::2], [0, 2, 4]),
        (np.array([5], ">u8"), [5]),
    ],
)
def test_slots_may_be_any_row_of_numbers(given: Any, expected: list[int]) -> None:
    """Lists, tuples, single numbers and strided or foreign arrays become a plain row of u64."""
    slots = slots_of(given)
    assert slots.tolist() == expected
    assert slots.dtype == np.uint64
    assert slots.dtype.isnative
    assert slots.flags.c_contiguous


@pytest.mark.parametrize("given", [[-1], [1.5], ["a"], [[1, 2]], [None], [2**64], [True]])
def test_what_is_no_row_of_numbers_is_refused(given: Any) -> None:
    """Negative, fractional, nested or other things are no slots."""
    with pytest.raises(vswap.BadBuffer, match="slots are a row of numbers"):
        slots_of(given)


def test_slots_are_copied() -> None:
    """The caller may change his array while the call runs."""
    mine = np.array([1, 2], np.uint64)
    copy = slots_of(mine)
    mine[0] = 9
    assert copy.tolist() == [1, 2]
