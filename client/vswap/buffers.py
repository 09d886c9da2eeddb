"""Callers' objects as plain bytes: pages to send, pages to fill, slots.

docs/buffers.md has, object by object, what is taken and what is refused; a test holds it.

Invariants:
- Nothing is copied: views look into the caller's memory. The two exceptions are slot lists (8 bytes
  a page) and the last, short page of an object.
- Every view is one row of single bytes (format "B", item size 1): its length and its slices are
  those that go over the wire.
- What cannot be taken is refused with BadBuffer before anything is sent, without a warning.

This module must not know frames, sockets, or the daemon.
"""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Sequence
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

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
_WHOLE: Final = (int, np.integer)
_NO_COUNT: Final = (bool, np.timedelta64)
"""Their classes are derived from those of whole numbers all the same."""
_NUMPY: Final = (np.ndarray, np.generic)
_CTYPES: Final[type] = ctypes.Structure.__mro__[-2]
"""The base of all instances of ctypes; it has no public name."""
_FIELD_NAME: Final = re.compile(":[^:]*:")
"""As it stands in the format of a structure, which is otherwise letters for types."""
_NUMBERS: Final = frozenset("hHiIlLqQ")
"""Formats of whole numbers of more than one byte: what is of single bytes is no row of slots."""


def byte_view(buffer: Buffer) -> View:
    """The bytes of a contiguous buffer of any type and shape, in the order they have in memory.

    Raises:
        BadBuffer: it has no buffer, one with gaps, or one whose bytes are not all of it.
    """
    try:
        view = memoryview(cast("_Buffer", buffer))
    except TypeError:
        raise BadBuffer(
            f"{type(buffer).__name__} has no bytes to take: give bytes, an array, a memoryview, ..."
        ) from None
    except (ValueError, BufferError) as error:
        view = _nameless_view(buffer, error)
    check_whole(view.obj, view.format)
    # A format alone says little: ctypes gives "B" to unions of 8 bytes.
    if view.format == "B" and view.itemsize == 1 and view.ndim == 1 and view.c_contiguous:
        return view
    try:
        # Any format, any shape, in C order or Fortran's; memoryview.cast takes few of them. Of the
        # view, not of the buffer: PickleBuffer crashes where a buffer is refused half way (records
        # of numpy that have a datetime64).
        return PickleBuffer(view).raw()
    except BufferError:
        raise BadBuffer(
            "the buffer has gaps, or shows some bytes twice:"
            " pass a contiguous one (numpy.ascontiguousarray)"
        ) from None


def _nameless_view(buffer: Buffer, error: Exception) -> View:
    """A view of numpy's types that memoryview has no name for, such as datetime64.

    Raises:
        BadBuffer: it is nothing of the kind, but a view that was released, for instance.
    """
    if not isinstance(buffer, _NUMPY):
        raise BadBuffer(f"{type(buffer).__name__} gives no bytes: {error}") from None
    check_whole(buffer)  # the view below is of plain bytes, and knows of no mask
    anything = np.dtype((np.void, buffer.dtype.itemsize))
    view = np.asarray(buffer).view(anything).data
    return view if isinstance(buffer, np.ndarray) else view.toreadonly()


def check_whole(owner: object, form: str = "") -> None:
    """Refuse what is not all in its bytes.

    Args:
        owner: Whose bytes they are.
        form: Their format, for owners of which nothing else is known.

    Raises:
        BadBuffer: it is of Python objects, has a mask beside its data, or is a text.
    """
    if isinstance(owner, _NUMPY):
        if owner.dtype.hasobject:
            _refuse_objects()
        if _has_mask(owner):
            raise BadBuffer("a masked array would lose its mask: pass its data, and its mask")
        if isinstance(owner, str):
            raise BadBuffer(f"{type(owner).__name__} is text: encode it first")
    elif isinstance(owner, _CTYPES):
        if _has_objects(type(owner)):
            _refuse_objects()
    elif "O" in form and "O" in _FIELD_NAME.sub("", form):
        _refuse_objects()


def _has_mask(array: npt.NDArray[Any] | np.generic) -> bool:
    # numpy imports np.ma when it is first asked for: not to be done for plain arrays, in a call.
    if type(array) is np.ndarray or not isinstance(array, np.ndarray):
        return False
    return isinstance(array, np.ma.MaskedArray)


def _has_objects(kind: Any) -> bool:
    """Whether a type of ctypes holds Python objects; a union's format does not say so."""
    if issubclass(kind, ctypes.Array):
        return _has_objects(kind._type_)
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        return any(
            _has_objects(field[1])
            for base in kind.__mro__
            for field in vars(base).get("_fields_", ())
        )
    return issubclass(kind, ctypes.py_object)


def _refuse_objects() -> NoReturn:
    raise BadBuffer("the buffer is of Python objects: addresses, not data; convert it first")


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
    given = slots if isinstance(slots, np.ndarray) else _array_of(slots)
    if _has_mask(given):
        _refuse_slots("a masked array")
    if given.dtype == _U64 and given.ndim == 1:
        return np.array(given, _U64)  # a copy in one row, whatever it was
    if given.ndim == 1 and not given.size:
        return np.empty(0, _U64)
    if given.ndim > 1 or given.dtype.kind not in "ui" or (given < 0).any():
        _refuse_slots(f"{given.dtype} of shape {given.shape}")
    return np.array(np.atleast_1d(given), _U64)


def _array_of(slots: object) -> npt.NDArray[Any]:
    """What is no array as one. numpy is shown only what it does not guess, or warn, about.

    Raises:
        BadBuffer: there are no numbers in it.
    """
    name = type(slots).__name__
    if isinstance(slots, _WHOLE):
        return _row_of([slots])
    if isinstance(slots, Sequence) and not isinstance(slots, str | bytes | bytearray | memoryview):
        return _row_of(slots)
    try:
        view = memoryview(slots)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        if not hasattr(slots, "__array__"):  # such as a column of a table
            _refuse_slots(name)
    else:
        if view.itemsize == 1 or view.format.lstrip("@=<>!") not in _NUMBERS:
            _refuse_slots(f"{name} of format {view.format}")
    try:
        return np.asarray(slots)
    except (TypeError, ValueError) as error:
        _refuse_slots(f"{name}: {error}")


def _row_of(slots: Sequence[Any]) -> npt.NDArray[np.uint64]:
    kinds = set(map(type, slots))
    wrong = [kind for kind in kinds if not issubclass(kind, _WHOLE) or issubclass(kind, _NO_COUNT)]
    if wrong:
        _refuse_slots("of " + ", ".join(sorted(kind.__name__ for kind in wrong)))
    try:
        return np.frombuffer(array("Q", slots), _U64) if kinds else np.empty(0, _U64)
    except OverflowError:
        _refuse_slots("negative, or of more than 64 bits")


def _refuse_slots(what: str) -> NoReturn:
    raise BadBuffer(f"slots are a row of numbers as store() returned them, not {what}")
