"""put, get, free: whole objects of any length, and arrays of any form."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import vswap
from support.fake_daemon import FakeDaemon
from vswap.buffers import padded_pages_of
from vswap.handle import Receiver, take_apart
from vswap.protocol import Header, Op, Status

ARRAYS = {
    "row": np.arange(5000, dtype=np.float64),
    "matrix": np.arange(60000, dtype=np.uint16).reshape(200, 300),
    "Fortran order": np.asfortranarray(np.arange(60000.0).reshape(200, 300)),
    "transposed": np.arange(60000.0).reshape(200, 300).T,
    "cube in Fortran order": np.asfortranarray(np.arange(24000).reshape(20, 30, 40)),
    "no dimensions": np.array(3.5),
    "empty": np.empty((0, 7), np.int8),
    "empty in Fortran order": np.empty((3, 0, 7), np.int8, order="F"),
    "one byte": np.array([1], np.uint8),
    "exactly a page": np.arange(512, dtype=np.uint64),
    "times": np.arange(700).astype("M8[s]"),
    "records": np.zeros(999, [("a", "u1"), ("b", "f8")]),
    "big-endian": np.arange(3000, dtype=">i4"),
    "booleans": np.arange(9999) % 3 == 0,
    "texts": np.array(["a", "bcd"] * 3000),
    "complex": np.arange(2000) * 1j,
    "no width": np.empty(5, "S0"),
    "with gaps": np.arange(20000)[::3],
    "reversed": np.arange(3000)[::-1],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back_as_they_were(space: vswap.Space, name: str) -> None:
    """Bytes, dtype, shape and order in memory survive; an array with gaps comes without them."""
    array = ARRAYS[name]
    with space.put(array) as handle:
        got = handle.get()
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert np.array_equal(got, array)
        assert got.flags.writeable
        if array.flags.f_contiguous:
            assert got.flags.f_contiguous
        assert handle.nbytes == array.nbytes


@given(array=npst.arrays(npst.scalar_dtypes(), npst.array_shapes(min_dims=0, min_side=0)))
def test_every_form_is_built_again(array: Any) -> None:
    """Taking apart and building is the identity for arrays of any dtype and shape."""
    content, form = take_apart(array)
    receiver = Receiver(form, None)
    source = padded_pages_of(content)
    receiver.pages.whole[:] = b"".join(source.cut(slice(0, source.count)))
    got = receiver.finish()
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=10000))
def test_bytes_of_any_length_come_back(space: vswap.Space, content: bytes) -> None:
    """An object that is no array comes back as its bytes, into a buffer too."""
    with space.put(content) as handle:
        assert handle.get() == content
        target = bytearray(len(content))
        assert handle.get(into=target) is target
        assert target == content
        assert len(handle) == handle.nbytes == len(content)


def test_a_mapping_can_be_put_and_closed(space: vswap.Space) -> None:
    """After put returned, nothing of the client holds the source's memory."""
    mapping = mmap.mmap(-1, 10000)
    mapping[:3] = b"abc"
    handle = space.put(mapping)
    mapping.close()
    assert bytes(handle.get()[:4]) == b"abc\0"


CALLS: dict[str, Callable[[vswap.Space, mmap.mmap], object]] = {
    "overwrite": lambda space, mapping: space.store(mapping, slots=range(1000, 1100)),
    "store": lambda space, mapping: space.store(mapping),
    "put": lambda space, mapping: space.put(mapping),
    "load": lambda space, mapping: space.load(range(1000, 1100), into=mapping),
}


class RefusingDaemon(FakeDaemon):
    """Answers the first frame of a call with an error, or with its end."""

    hang_up_first = False

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op not in {Op.STORE, Op.LOAD}:
            yield from super().answer(header, body)
        elif self.hang_up_first:
            self.hang_up()
        else:
            yield self.refusal(header, Status.BAD_SLOT, "no", [1])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hang_up", [False, True])
def test_a_mapping_can_be_closed_while_its_error_is_handled(
    socket_path: Path,
    name: str,
    hang_up: bool,  # noqa: FBT001
) -> None:
    """Even with a failed call's exception at hand, its buffers are let go of."""
    mapping = mmap.mmap(-1, 100 * 4096)
    with RefusingDaemon(socket_path) as refusing, vswap.connect(socket_path) as space:
        refusing.hang_up_first = hang_up
        with pytest.raises(vswap.ConnectionLost if hang_up else vswap.BadSlot) as caught:
            CALLS[name](space, mapping)
        assert caught.value.__traceback__ is not None
        mapping.close()
    assert mapping.closed


def test_get_into_an_array_needs_the_same_form(space: vswap.Space) -> None:
    """Filling an array of another dtype, shape or order would garble it, and is refused."""
    array = np.asfortranarray(np.arange(6000.0).reshape(60, 100))
    with space.put(array) as handle:
        target = np.empty_like(array)
        assert handle.get(into=target) is target
        assert np.array_equal(target, array)
        wrong = (
            np.empty((60, 100)),
            np.empty((100, 60), order="F"),
            np.empty((60, 100), np.int64, order="F"),
        )
        for other in wrong:
            with pytest.raises(vswap.BadBuffer, match="does not fit into"):
                handle.get(into=other)
        raw = bytearray(array.nbytes)
        handle.get(into=raw)
        assert raw == array.tobytes(order="F")


@pytest.mark.parametrize("size", [5999, 6001, 0])
def test_get_into_needs_the_right_size(space: vswap.Space, size: int) -> None:
    """A target of another length is refused."""
    with space.put(bytes(6000)) as handle, pytest.raises(vswap.BadBuffer, match="6000 bytes"):
        handle.get(into=bytearray(size))


def test_len_is_that_of_the_object(space: vswap.Space) -> None:
    """len() of a handle is len() of what was put."""
    with space.put(np.zeros((3, 5))) as handle:
        assert len(handle) == 3
        assert handle.nbytes == 120
    with space.put(np.array(1)) as scalar, pytest.raises(TypeError, match="no length"):
        len(scalar)


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (np.array([None, 1]), "Python objects"),
        (np.ma.masked_array([1, 2], [False, True]), "lose its mask"),
        ("text", "no bytes"),
    ],
)
def test_what_would_come_back_different_is_refused(
    space: vswap.Space, fake: FakeDaemon, thing: Any, says: str
) -> None:
    """Objects, masks and texts are refused before anything is sent."""
    sent = len(fake.requests)
    with pytest.raises(vswap.BadBuffer, match=says):
        space.put(thing)
    assert len(fake.requests) == sent


def test_a_freed_handle_is_an_error(space: vswap.Space, fake: FakeDaemon) -> None:
    """After free every use is HandleFreed, and the daemon has the pages no more."""
    handle = space.put(b"x" * 5000)
    assert len(fake.pages) == 2
    assert not handle.freed
    handle.free()
    assert not fake.pages
    assert handle.freed
    for use in (handle.get, handle.free, lambda: handle.slots):
        with pytest.raises(vswap.HandleFreed):
            use()
    assert "freed" in repr(handle)


def test_leaving_the_block_frees_once(space: vswap.Space, fake: FakeDaemon) -> None:
    """The context manager frees what was not freed, and only that."""
    with space.put(b"x"):
        assert len(fake.pages) == 1
    assert not fake.pages
    with space.put(b"x") as handle:
        handle.free()
    assert not fake.pages


def test_leaving_the_block_after_the_space_is_quiet(fake: FakeDaemon) -> None:
    """A space that was closed has freed everything; the handle's block does not complain."""
    with vswap.connect(fake.path) as space, space.put(b"x"):
        space.close()


@pytest.fixture
def large(space: vswap.Space) -> Iterator[tuple[vswap.Handle, bytes]]:
    content = np.random.default_rng(1).bytes(300 * 4096 + 77)
    with space.put(content) as handle:
        yield handle, content


def test_objects_of_many_frames_come_back(large: tuple[vswap.Handle, bytes]) -> None:
    """An object larger than a frame is whole, its short last page included."""
    handle, content = large
    assert handle.get() == content
    target = bytearray(len(content))
    handle.get(into=target)
    assert target == content
