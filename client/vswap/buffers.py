"""Callers' objects as plain bytes: pages to send, pages to fill, slots.

Invariants:
- Nothing is copied: views look into the caller's memory. The two exceptions are slot lists (8 bytes
  a page) and the last, short page of an object.
- What cannot be taken is refused with BadBuffer before anything is sent.

This module must not know frames, sockets, or the daemon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt

from vswap.errors import U64, BadBuffer
from vswap.pages import Pages, View
from vswap.protocol import PAGE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer as _Buffer

    # numpy's own stubs say only from Python 3.12 on that arrays are buffers
    Buffer = _Buffer | npt.NDArray[Any]
    Slots = npt.NDArray[np.uint64] | Sequence[int] | int

_U64: Final = np.dtype(np.uint64)


def byte_view(buffer: Buffer) -> View:
    """The bytes of a contiguous buffer of any type and shape, in the order they have in memory.

    Raises:
        BadBuffer: it has no buffer, or one with gaps.
    """
    try:
        view = memoryview(cast("_Buffer", buffer))
    except TypeError:
        raise BadBuffer(
            f"{type(buffer).__name__} has no bytes to take: give bytes, an array, a memoryview, ..."
        ) from None
    except ValueError:  # numpy types that memoryview cannot name, such as datetime64
        return bytes_of_array(np.asarray(buffer)).data
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    return bytes_of_array(np.asarray(buffer)).data


def bytes_of_array(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """An array's bytes in the order they have in memory, as a row.

    Raises:
        BadBuffer: it has gaps, or holds Python objects.
    """
    if array.dtype.hasobject:
        raise BadBuffer("an array of Python objects holds addresses, not data: convert it first")
    if not array.flags.c_contiguous:
        array = array.T
    if not array.flags.c_contiguous:
        raise BadBuffer("the buffer has gaps: pass a contiguous one (numpy.ascontiguousarray)")
    if not array.nbytes:
        return np.empty(0, np.uint8)
    return array.reshape(-1).view(np.uint8)


def pages_of(buffer: Buffer) -> Pages:
    """A buffer of n*4096 bytes as n pages.

    Raises:
        BadBuffer: its length is something else.
    """
    view = byte_view(buffer)
    if view.nbytes % PAGE_BYTES:
        raise BadBuffer(
            f"{view.nbytes} bytes are not whole pages of {PAGE_BYTES}: pad them, or use put()"
        )
    return Pages(view)


def padded_pages_of(view: View) -> Pages:
    """Bytes of any length as pages; zeros follow the last byte."""
    short = view.nbytes % PAGE_BYTES
    if not short:
        return Pages(view)
    tail = bytearray(PAGE_BYTES)
    tail[:short] = view[view.nbytes - short :]
    return Pages(view[: view.nbytes - short], memoryview(tail))


def target_of(buffer: Buffer, size: int) -> View:
    """The bytes of a buffer that `size` bytes are to be put into.

    Raises:
        BadBuffer: it is read-only, has gaps, or is of another size.
    """
    view = byte_view(buffer)
    if view.readonly:
        raise BadBuffer("the buffer is read-only: pass a bytearray or a writable array")
    if view.nbytes != size:
        raise BadBuffer(f"{size} bytes do not fit into a buffer of {view.nbytes} exactly")
    return view


def empty_bytes(size: int) -> View:
    """A new writable buffer; its content is undefined.

    Of numpy, because it asks for huge pages: a bytearray of 256 MB took 2.2 us a page to make and
    fill, this 0.4.
    """
    return np.empty(size, np.uint8).data


def slots_of(slots: Slots) -> U64:
    """A copy of slot ids as a contiguous array, shape (n,). The caller may change his meanwhile.

    Raises:
        BadBuffer: these are no slot ids.
    """
    given = np.asarray(slots)
    if given.dtype == _U64 and given.ndim == 1:
        return given.astype(_U64)  # a copy in one row, whatever it was
    if not given.size:
        return np.empty(0, np.uint64)
    if given.dtype.kind == "f" and isinstance(slots, Sequence):
        given = _mixed(slots, given)
    if given.ndim > 1 or given.dtype.kind not in "ui" or (given < 0).any():
        raise BadBuffer(
            f"slots are a row of numbers as store() returned them,"
            f" not {given.dtype} of shape {given.shape}"
        )
    return np.array(np.atleast_1d(given), np.uint64)


def _mixed(slots: Sequence[int], given: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A list of numpy's numbers and Python's, which together numpy would make into floats."""
    if not all(isinstance(slot, int | np.integer) for slot in slots):
        return given
    try:
        return np.array([int(slot) for slot in slots], np.uint64)
    except OverflowError:
        return given
