"""The memory of a shard: made, handed on by its descriptors, and refused when it is another's."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vswapd.memory import KINDS, VERSIONS, Shape, ShardMemory
from vswapd_backends.label import ForeignMemoryError
from vswapd_backends.shared import SYSTEM_PAGE, read_label

SHAPE = Shape.fitting(shard=3, max_slots=5000, arena_bytes=3 << 20)
_VERSION_AT = 8
_CHECKED = 8 + 4 + 16 + 16 + 8 + 32


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    """Descriptors of a memory whose maker is gone."""
    found = _left(ShardMemory.create(SHAPE))
    yield found
    for fd in found.values():
        os.close(fd)


def _left(memory: ShardMemory) -> dict[str, int]:
    memory.table.words_array()[7] = 77
    memory.pool.bytes_array()[123] = 45
    memory.head[5] = 55
    return {kind: os.dup(fd) for kind, fd in memory.fds.items()}


def _contents(fds: dict[str, int]) -> list[tuple[int, bytes]]:
    return [(os.fstat(fd).st_blocks, read_label(fd)) for fd in fds.values()]


def test_a_shape_is_rounded_up() -> None:
    """Whole clusters, whole segments."""
    assert (SHAPE.max_slots, SHAPE.segments) == (5120, 12)


def test_what_was_written_is_there_for_the_next(fds: dict[str, int]) -> None:
    """All three memfds say the same to whoever takes them over."""
    memory = ShardMemory.adopt({kind: os.dup(fd) for kind, fd in fds.items()})
    assert memory.shape == SHAPE
    assert memory.table.words_array()[7] == 77
    assert memory.pool.bytes_array()[123] == 45
    assert memory.head[5] == 55


def test_new_memory_costs_its_labels() -> None:
    """A page each, however large they are; and the label is not part of what is accounted."""
    memory = ShardMemory.create(Shape.fitting(shard=0, max_slots=1 << 30, arena_bytes=1 << 38))
    for region in (memory.table, memory.pool, memory.state):
        assert os.fstat(region.fd).st_blocks * 512 == SYSTEM_PAGE
        assert region.resident_bytes == 0


def test_the_parts_of_the_state_do_not_overlap() -> None:
    """Each word belongs to one of them."""
    memory = ShardMemory.create(SHAPE)
    parts: dict[str, np.ndarray[Any, Any]] = {
        "head": memory.head,
        "devices": np.frombuffer(memory.devices, np.uint8),
        "settings": np.frombuffer(memory.settings, np.uint8),
        "spaces": np.frombuffer(memory.spaces, np.uint8),
        "clusters": memory.clusters,
        "age": memory.segments.age,
        "sealed": memory.segments.sealed,
        "extents": memory.extents.of(0, 1 << 24),
        "more extents": memory.extents.of(31, 1 << 24),
    }
    spans = sorted(
        (part.__array_interface__["data"][0], part.__array_interface__["data"][0] + part.nbytes)
        for part in parts.values()
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    base = memory.state.bytes_array().__array_interface__["data"][0]
    assert spans[0][0] == base
    assert spans[-1][1] <= base + memory.state.size


def _other_version(label: bytearray) -> None:
    label[_VERSION_AT : _VERSION_AT + 4] = struct.pack("<I", 99)


def _other_magic(label: bytearray) -> None:
    label[0] ^= 1


def _other_size(label: bytearray) -> None:
    label[44] ^= 1


def _other_shape(label: bytearray) -> None:
    label[56] ^= 1


def _damaged(label: bytearray) -> None:
    label[20] ^= 1


Change = Callable[[bytearray], None]


@pytest.mark.parametrize(
    ("change", "sealed", "text"),
    [
        (
            _other_version,
            True,
            r"version 99, .* version VERSION only: .* left alone",
        ),
        (_other_version, False, "version 99, and this vswapd knows version"),
        (_other_magic, True, "no memory of a vswapd"),
        (_other_size, True, "not its"),
        (_other_shape, True, "not of the s"),  # same shard, or size
        (_damaged, False, "not its"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_known_is_refused_and_left_alone(
    fds: dict[str, int], kind: str, change: Change, *, sealed: bool, text: str
) -> None:
    """One memfd of another version is enough; nothing of any is changed, and all stay open."""
    label = bytearray(read_label(fds[kind])[:_CHECKED])
    check = read_label(fds[kind])[_CHECKED : _CHECKED + 4]
    change(label)
    if sealed:
        check = struct.pack("<I", zlib.crc32(label))
    os.pwrite(fds[kind], bytes(label) + check, os.fstat(fds[kind]).st_size - SYSTEM_PAGE)
    before = _contents(fds)
    text = text.replace("VERSION", str(VERSIONS[kind]))
    with pytest.raises(ForeignMemoryError, match=rf"{kind}.*{text}"):
        ShardMemory.adopt(fds)
    assert _contents(fds) == before


def test_a_part_that_is_missing_is_refused(fds: dict[str, int]) -> None:
    """The text says what there is."""
    with pytest.raises(ForeignMemoryError, match=r"there are table, pool$"):
        ShardMemory.adopt({kind: fds[kind] for kind in ("table", "pool")})


def test_parts_of_two_shards_are_refused(fds: dict[str, int]) -> None:
    """Of equal shape, but not made together."""
    others = _left(ShardMemory.create(SHAPE))
    mixed = {**fds, "state": others["state"]}
    with pytest.raises(ForeignMemoryError, match="not of the same"):
        ShardMemory.adopt(mixed)
    swapped = {**fds, "pool": fds["table"]}
    with pytest.raises(ForeignMemoryError, match="not its pool"):
        ShardMemory.adopt(swapped)
    for fd in others.values():
        os.close(fd)


def test_what_is_no_memory_is_refused(fds: dict[str, int]) -> None:
    """Pipes, files that are too short, descriptors that are closed."""
    reading, writing = os.pipe()
    short = os.memfd_create("short")
    for fd, text in ((reading, "cannot be read"), (short, "no memory"), (-1, "cannot be read")):
        with pytest.raises(ForeignMemoryError, match=f"^pool: .*{text}"):
            ShardMemory.adopt({**fds, "pool": fd})
    for fd in (reading, writing, short):
        os.close(fd)
