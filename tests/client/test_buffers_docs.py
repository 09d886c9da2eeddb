"""docs/buffers.md, row by row: each of its examples, with both clients and a real daemon."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import RunningDaemon
from support.sources import REPOSITORY
from vswap.protocol import PAGE_BYTES

TEXT = (REPOSITORY / "docs/buffers.md").read_text()
TIMEOUT_S = 30.0


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


OBJECTS = rows("Object by object")
SLOTS = rows("Slots")
NAMES: dict[str, Any] = {}
exec(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0], NAMES)


def make(example: str) -> Any:
    """A new one of what the example shows."""
    return eval(example.strip("`"), NAMES)


class Blocking:
    """The blocking client."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.space = vswap.connect(daemon.socket_path, timeout=TIMEOUT_S)

    def do(self, call: Any) -> Any:
        """What a call has returned."""
        return call

    def close(self) -> None:
        self.space.close()


class Asynchronous:
    """The client for asyncio, from outside of its loop."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self._runner = asyncio.Runner()
        self.space: Any = self._runner.run(self._open(daemon))

    async def _open(self, daemon: RunningDaemon) -> vswap.aio.Space:
        return await vswap.aio.connect(daemon.socket_path, timeout=TIMEOUT_S)

    def do(self, call: Any) -> Any:
        """What a call returns, awaited."""

        async def wait() -> Any:
            return await call

        return self._runner.run(wait())

    def close(self) -> None:
        self.do(self.space.close())
        self._runner.close()


@pytest.fixture(scope="module", params=[Blocking, Asynchronous])
def client(request: pytest.FixtureRequest, daemon: RunningDaemon) -> Iterator[Any]:
    client = request.param(daemon)
    try:
        yield client
    finally:
        client.close()


def content(thing: Any) -> bytes:
    """The bytes of an object as they lie in memory, found out without the client."""
    if isinstance(thing, np.ndarray | np.generic):
        return np.asarray(thing).tobytes("A")
    return memoryview(thing).tobytes("A")


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def refusal(cell: str) -> Any:
    """Awaits the refusal that a cell tells of."""
    return pytest.raises(vswap.BadBuffer, match=cell.removeprefix("refused: "))


@pytest.fixture
def nothing_is_left(client: Any) -> Iterator[None]:
    yield
    assert client.do(client.space.status())["slots"]["allocated"] == 0


def ids(table: list[list[str]]) -> list[str]:
    return [row[1].strip("`")[:60] for row in table]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("row", OBJECTS, ids=ids(OBJECTS))
def test_each_object_is_stored_as_the_table_says(client: Any, row: list[str]) -> None:
    """Stored, and stored over other pages, it is its bytes; or it is refused with that reason."""
    _, example, expected, *_ = row
    space, do, thing = client.space, client.do, make(example)
    if expected.startswith("refused"):
        with refusal(expected):
            do(space.store(thing))
        over = do(space.store(noise(PAGE_BYTES)))
        with refusal(expected):
            do(space.store(thing, slots=over))
        assert do(space.load(over)) == noise(PAGE_BYTES)
        do(space.free(over))
        return
    assert expected == "bytes"
    slots = do(space.store(thing))
    assert do(space.load(slots)) == content(thing)
    over = do(space.store(noise(len(slots) * PAGE_BYTES)))
    do(space.store(thing, slots=over))
    assert do(space.load(over)) == content(thing)
    do(space.free(slots))
    do(space.free(over))


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("row", OBJECTS, ids=ids(OBJECTS))
def test_each_object_is_put_as_the_table_says(client: Any, row: list[str]) -> None:
    """What was put comes back as its bytes, or as an array of its form; or it is refused."""
    _, example, _, expected, _ = row
    space, do, thing = client.space, client.do, make(example)
    if expected.startswith("refused"):
        with refusal(expected):
            do(space.put(thing))
        return
    handle = do(space.put(thing))
    got = do(handle.get())
    do(handle.free())
    if expected == "bytes":
        assert type(got) is memoryview
        assert got == content(thing)
        return
    assert expected == "array"
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (thing.dtype, thing.shape)
    whole = np.asarray(thing)
    whole = whole if whole.flags.forc else np.ascontiguousarray(whole)
    assert got.flags.f_contiguous == whole.flags.f_contiguous
    assert got.flags.c_contiguous == whole.flags.c_contiguous
    assert content(got) == content(whole)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("row", OBJECTS, ids=ids(OBJECTS))
def test_each_object_is_filled_as_the_table_says(client: Any, row: list[str]) -> None:
    """Loaded or got into, it has the bytes that were stored, or is refused as it is."""
    _, example, _, as_put, expected = row
    space, do, target = client.space, client.do, make(example)
    if not expected:
        assert target is None
        return
    if expected.startswith("refused"):
        slots, handle = do(space.store(noise(PAGE_BYTES))), do(space.put(b"x"))
        with refusal(expected):
            do(space.load(slots, into=target))
        with refusal(expected):
            do(handle.get(into=target))
        do(space.free(slots))
        do(handle.free())
        return
    assert expected == "filled"
    size = len(content(target))
    handle = do(space.put(noise(size)))
    assert do(handle.get(into=target)) is target
    assert content(target) == noise(size)
    do(handle.free())
    if as_put == "array":
        handle = do(space.put(make(example)))
        assert do(handle.get(into=target)) is target
        assert content(target) == content(make(example))
        do(handle.free())
    if not size % PAGE_BYTES:
        new = noise(size)[::-1]
        slots = do(space.store(new))
        assert do(space.load(slots, into=target)) is target
        assert content(target) == new
        do(space.free(slots))


@pytest.mark.parametrize("row", SLOTS, ids=ids(SLOTS))
def test_slots_are_taken_as_the_table_says(client: Any, row: list[str]) -> None:
    """A row of numbers names those slots, whatever it is made of; all else is refused."""
    _, example, expected = row
    space, do = client.space, client.do
    if expected.startswith("refused"):
        with refusal(expected):
            do(space.load(make(example)))
        with refusal(expected):
            do(space.load(make(example), into=bytearray(PAGE_BYTES)))
        with refusal(expected):
            do(space.free(make(example)))
        if example != "`None`":  # which here means new ones
            with refusal(expected):
                do(space.store(noise(PAGE_BYTES), slots=make(example)))
        return
    numbers = [int(number) for number in expected.split(", ") if number]
    if numbers:
        # None of these was ever given out: the daemon says of each that it is not.
        with pytest.raises(vswap.BadSlot) as caught:
            do(space.load(make(example)))
        assert set(caught.value.slots.tolist()) <= set(numbers)
    else:
        assert do(space.load(make(example))) == b""
        do(space.free(make(example)))


def test_the_tables_are_read_whole() -> None:
    """Rows and cells are found: so many at least, each with an example in backquotes."""
    assert len(OBJECTS) > 80
    assert len(SLOTS) > 40
    assert {len(row) for row in OBJECTS} == {5}
    assert {len(row) for row in SLOTS} == {3}
    assert all(row[1].startswith("`") and row[1].endswith("`") for row in OBJECTS + SLOTS)
