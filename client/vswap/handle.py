"""Whole objects: their bytes cut into pages, and what builds them again.

Invariants:
- What `take_apart` takes from an object, `Form.build` gives back: bytes, dtype, shape, order.
- A handle is freed once; afterwards every use of its slots is HandleFreed.

This module must not know sockets, or whether the caller waits or awaits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vswap.buffers import byte_view, check_whole, empty_bytes, target_of
from vswap.errors import U64, BadBuffer, HandleFreed
from vswap.pages import Pages, View
from vswap.protocol import PAGE_BYTES

if TYPE_CHECKING:
    from vswap.buffers import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an object was, beside its bytes: enough to build it again from them."""

    nbytes: int
    length: int | None
    """What len() of it was; None for arrays without dimensions."""
    dtype: np.dtype[Any] | None = None
    """None: it was no array, and its bytes are all of it."""
    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"

    def build(self, content: View) -> Any:
        """The object again, over `content` (`nbytes` bytes): an array, or the bytes themselves."""
        if self.dtype is None:
            return content
        if not self.nbytes:
            return np.empty(self.shape, self.dtype, order=self.order)
        flat = np.frombuffer(content, self.dtype)
        return flat.reshape(self.shape, order=self.order)

    def target(self, into: Buffer) -> View:
        """The bytes of `into`, after a check that it can hold this object.

        An array must be of the same kind, shape and order in memory; any other buffer gets the
        bytes.

        Raises:
            BadBuffer: it cannot.
        """
        if self.dtype is not None and isinstance(into, np.ndarray):
            same_order = into.flags.f_contiguous if self.order == "F" else into.flags.c_contiguous
            if into.dtype != self.dtype or into.shape != self.shape or not same_order:
                raise BadBuffer(
                    f"the array that was put is {self.dtype} {self.shape} in order {self.order},"
                    f" and does not fit into {into.dtype} {into.shape}"
                )
        return target_of(into, self.nbytes)


def take_apart(source: Buffer) -> tuple[View, Form]:
    """An object's bytes and its form. An array with gaps is copied, in C order.

    Raises:
        BadBuffer: it has no bytes, or they are not all of it.
    """
    if not isinstance(source, np.ndarray):
        view = byte_view(source)
        return view, Form(nbytes=view.nbytes, length=view.nbytes)
    check_whole(source)
    array: npt.NDArray[Any] = np.asarray(source)
    order: Literal["C", "F"] = "C"
    if not array.flags.c_contiguous:
        if array.flags.f_contiguous:
            order = "F"
        else:
            array = np.ascontiguousarray(array)
    form = Form(
        nbytes=array.nbytes,
        length=array.shape[0] if array.ndim else None,
        dtype=array.dtype,
        shape=array.shape,
        order=order,
    )
    return byte_view(array), form


class Receiver:
    """Where an object's pages are loaded to, and the object once they are there.

    Args:
        form: The object's.
        into: What to fill; None: something new.

    Raises:
        BadBuffer: `into` cannot hold it.
    """

    def __init__(self, form: Form, into: Buffer | None) -> None:
        self._form = form
        self._into = into
        self._whole_bytes = form.nbytes - form.nbytes % PAGE_BYTES
        short = self._whole_bytes < form.nbytes
        if into is None:
            self._fresh = empty_bytes(self._whole_bytes + short * PAGE_BYTES)
            self.pages = Pages(self._fresh)
        else:
            self._tail = empty_bytes(PAGE_BYTES) if short else None
            self.pages = Pages(form.target(into)[: self._whole_bytes], self._tail)

    def finish(self) -> Any:
        """The object; its pages have been loaded."""
        if self._into is None:
            return self._form.build(self._fresh[: self._form.nbytes])
        if self._tail is not None:
            left = self._form.nbytes - self._whole_bytes
            self._form.target(self._into)[self._whole_bytes :] = self._tail[:left]
        return self._into


class StoredObject:
    """What blocking and asynchronous handles have in common."""

    def __init__(self, slots: U64, form: Form) -> None:
        self._slots: U64 | None = slots
        self.form = form

    @property
    def slots(self) -> U64:
        """The slots it stands in; the last page is filled up with zeros.

        Raises:
            HandleFreed: it stands nowhere any more.
        """
        if self._slots is None:
            raise HandleFreed("this handle was freed, and its pages are gone")
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of the object."""
        return self.form.nbytes

    @property
    def freed(self) -> bool:
        """Whether it was freed."""
        return self._slots is None

    def give_up(self) -> U64:
        """Its slots, for the last time.

        Raises:
            HandleFreed: it had been freed before.
        """
        slots, self._slots = self.slots, None
        return slots

    def __len__(self) -> int:
        """What len() of the object was."""
        if self.form.length is None:
            raise TypeError("an array without dimensions has no length")
        return self.form.length

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.nbytes} bytes{', freed' if self.freed else ''}>"
