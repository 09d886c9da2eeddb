"""Requests larger than a client's frame, in turns between which anything may happen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.engine import KINDS, MIB, Rig, ids, make_engine, page, pages_of
from support.interleaving import Running
from vswapd.compressor import Compressor
from vswapd.errors import BadSlotError, PageLostError, UnbackedError
from vswapd.folio import join, prepare
from vswapd.groups import Space
from vswapd.swap_table import REFERENCED
from vswapd_backends.base import PAUSE, SHORT_PAGES, TURN_PAGES, U64, Compute, run, turns_of

MANY = 3 * SHORT_PAGES + 5


def _engine() -> Rig:
    return make_engine(40 * MIB, arena_bytes=64 * MIB, devices=[100])


def _mixture(count: int, first: int = 0) -> list[bytes]:
    return [page(KINDS[i % 5], first + i) for i in range(count)]


def _stored(rig: Rig, count: int = MANY) -> tuple[Space, U64, list[bytes]]:
    space = rig.space()
    pages = _mixture(count)
    return space, rig.put(space, pages), pages


def _bytes(pages: list[bytes | memoryview]) -> list[bytes]:
    return [bytes(one) for one in pages]


# Turns


@pytest.mark.parametrize("count", [1, SHORT_PAGES, SHORT_PAGES + 1, MANY, 4096])
@pytest.mark.parametrize("pages", [TURN_PAGES, 32])
def test_turns_are_bounded_and_cover_everything_once(count: int, pages: int) -> None:
    """A short request is one turn; a large one is cut into turns of so many pages."""
    turns = turns_of(count, pages)
    assert [i for turn in turns for i in range(count)[turn]] == list(range(count))
    if count <= SHORT_PAGES:
        assert len(turns) == 1
    else:
        assert max(turn.stop - turn.start for turn in turns) <= pages


def test_a_short_load_is_one_step() -> None:
    """A client's frame from the pool is carried out without a pause."""
    rig = _engine()
    space, slots, pages = _stored(rig, SHORT_PAGES)
    with pytest.raises(StopIteration) as end:
        next(rig.engine.load(space, slots))
    assert _bytes(end.value.value) == pages


@pytest.mark.parametrize("where", ["pool", "device", "both"])
def test_a_large_load_pauses_between_its_turns(where: str) -> None:
    """Wherever its pages are, no step decompresses more than a turn of them."""
    rig = _engine()
    space, slots, pages = _stored(rig)
    if where != "pool":
        rig.writeback()
    if where == "both":
        rig.store(space, pages[::2], slots[::2])
    decoded: list[int] = []
    codec = rig.engine.core.zswap.current.codec
    whole = codec.decompress

    def counting(entries: list[bytes | memoryview], *rest: object) -> list[bytes]:
        entries = list(entries)
        decoded.append(len(entries))
        return whole(entries, *rest)

    codec.decompress = counting  # type: ignore[method-assign, assignment]
    load = Running("load", rig.engine.load(space, slots))
    steps: list[int] = []
    while not load.ended:
        load.perform()
        decoded.clear()
        load.advance()
        steps.append(sum(decoded))
    assert _bytes(load.result) == pages
    assert max(steps) <= TURN_PAGES
    assert sum(steps) > 0
    assert len(steps) >= len(turns_of(MANY))
    rig.check()


@pytest.mark.parametrize("count", [SHORT_PAGES + 1, MANY])
def test_large_loads_count_and_mark_as_short_ones_do(count: int) -> None:
    """Every page is counted once, and has its second chance."""
    rig = _engine()
    space, slots, pages = _stored(rig, count)
    before = rig.engine.core.stats.load_pages
    assert rig.load(space, slots) == pages
    assert rig.engine.core.stats.load_pages == before + count
    in_pool = [i for i in range(count) if any(pages[i])]
    assert (rig.words(slots)[in_pool] & np.uint64(REFERENCED)).all()


# What others do between two turns


def _to_the_device(rig: Rig) -> None:
    rig.writeback()


def _off_the_device(rig: Rig) -> None:
    rig.swapoff(rig.devices[0])


@pytest.mark.parametrize("change", [_to_the_device, _off_the_device])
@pytest.mark.parametrize("turn", [1, 2, 5])
def test_pages_that_move_between_turns_are_found(change: Callable[[Rig], None], turn: int) -> None:
    """To a device or back from it: the load has them all, as they were stored."""
    rig = _engine()
    space, slots, pages = _stored(rig)
    if change is _off_the_device:
        rig.writeback()
    load = Running("load", rig.engine.load(space, slots))
    for _ in range(turn):
        assert load.advance() is PAUSE
    change(rig)
    assert _bytes(load.finish()) == pages
    rig.check()


def test_a_slot_freed_between_turns_is_an_error() -> None:
    """The client has freed it itself: never zeros, never another page."""
    rig = _engine()
    space, slots, _ = _stored(rig)
    load = Running("load", rig.engine.load(space, slots))
    assert load.advance() is PAUSE
    rig.free(space, slots[-1:])
    with pytest.raises(BadSlotError):
        load.finish()
    rig.check()


def test_a_space_that_is_being_closed_ends_the_load() -> None:
    """At its next turn, whether its slots have been freed yet or not."""
    rig = _engine()
    space = rig.space()
    slots = np.concatenate([rig.put(space, [bytes(4096)] * 4096) for _ in range(9)])
    load = Running("load", rig.engine.load(space, slots[-MANY:]))
    assert load.advance() is PAUSE
    closing = Running("close", rig.engine.close_space(space))
    assert closing.advance() is PAUSE
    assert rig.words(slots[-1:]).all()
    with pytest.raises(BadSlotError):
        load.finish()
    closing.finish()
    rig.check()


def test_a_page_overwritten_between_turns_is_the_old_or_the_new_one() -> None:
    """By another connection of the space: whole, and never anything else."""
    rig = _engine()
    space, slots, pages = _stored(rig)
    load = Running("load", rig.engine.load(space, slots))
    assert load.advance() is PAUSE
    fresh = pages_of("text", MANY, 5000)
    rig.store(space, fresh, slots)
    assert _bytes(load.finish()) == pages[:TURN_PAGES] + fresh[TURN_PAGES:]


# What is wrong


@pytest.mark.parametrize("at", [0, MANY - 1])
def test_what_is_wrong_from_the_beginning_is_told_before_anything_is_read(at: int) -> None:
    """A slot of nobody, or without content, in the first turn or the last."""
    rig = _engine()
    space, slots, _ = _stored(rig)
    rig.free(space, slots[at : at + 1])
    with pytest.raises(BadSlotError):
        next(rig.engine.load(space, slots))
    rig.set(store_enabled=False)
    kept = np.delete(slots, at)
    rig.store(space, [page("text", 1)], kept[at - 1 : at] if at else kept[:1])
    with pytest.raises(UnbackedError):
        next(rig.engine.load(space, kept))


def test_lost_pages_of_all_turns_are_named_together() -> None:
    """In the pool and on a device, in several turns: one error, each slot once, counted once."""
    rig = _engine()
    space = rig.space()
    cold = rig.put(space, pages_of("text", 2 * SHORT_PAGES))
    rig.writeback()
    warm = rig.put(space, pages_of("mixed", 2 * SHORT_PAGES, 900))
    slots = np.concatenate([warm, cold])
    bad = [cold[3], cold[2 * SHORT_PAGES - 1], warm[0], warm[SHORT_PAGES + 7]]
    rig.set(verify="always")
    for slot in bad:
        rig.damage(int(slot), byte=9)
    with pytest.raises(PageLostError) as caught:
        rig.load(space, slots)
    assert caught.value.slots.tolist() == sorted(int(slot) for slot in bad)
    assert rig.engine.core.stats.lost_pages == len(bad)
    good = slots[~np.isin(slots, ids(*map(int, bad)))]
    assert len(rig.load(space, good)) == 4 * SHORT_PAGES - len(bad)


# Stores


@pytest.mark.parametrize("kinds", [("text",), ("zero",), ("noise", "zero"), KINDS])
def test_a_folio_joined_from_parts_is_the_one_prepared_at_once(kinds: tuple[str, ...]) -> None:
    """The same zero marks, lengths and payload."""
    rig = _engine()
    pool = rig.engine.core.zswap.current
    pages = [page(kinds[i // 40 % len(kinds)], i) for i in range(300)]
    whole = prepare(pool, b"".join(pages))
    joined = join([prepare(pool, b"".join(pages[at : at + 32])) for at in range(0, 300, 32)])
    assert joined.pages == whole.pages
    assert (joined.zero is None) == (whole.zero is None)
    if joined.zero is not None and whole.zero is not None:
        assert joined.zero.tolist() == whole.zero.tolist()
    assert (joined.compressed is None) == (whole.compressed is None)
    if joined.compressed is not None and whole.compressed is not None:
        assert bytes(joined.compressed.payload) == bytes(whole.compressed.payload)
        assert joined.compressed.lengths.tolist() == whole.compressed.lengths.tolist()
        assert joined.compressed.compressed_bytes == whole.compressed.compressed_bytes


def test_a_large_folio_is_compressed_in_turns_by_the_codec_it_began_with() -> None:
    """A codec that is set in the middle is the next folio's."""
    rig = _engine()
    pages = _mixture(MANY)
    body = memoryview(b"".join(pages))
    asked: list[int] = []

    def read(turn: slice) -> memoryview:
        asked.append(turn.stop - turn.start)
        return body[turn.start * 4096 : turn.stop * 4096]

    task = Running("prepare", Compressor(rig.engine).prepare(MANY, read))
    while task.need is not PAUSE:
        task.perform()
        task.advance()
    rig.set(codec="zstd:1")
    pauses = 1
    while not task.ended:
        task.perform()
        pauses += task.advance() is PAUSE
    assert sum(asked) == MANY
    assert max(asked) <= TURN_PAGES
    assert pauses >= len(asked) - 1
    folio = task.result
    assert folio.compressed is not None
    assert folio.compressed.pool == rig.engine.core.zswap.pool_of("lz4").index
    space = rig.space()
    stored = run(rig.engine.store(space, folio))
    assert rig.load(space, stored.slots) == pages


def test_a_short_folio_is_one_turn() -> None:
    """One computation, and nothing else is asked for."""
    rig = _engine()
    body = memoryview(b"".join(_mixture(SHORT_PAGES)))
    task = Compressor(rig.engine).prepare(SHORT_PAGES, lambda _: body)
    need = next(task)
    assert isinstance(need, Compute)
    need.perform()
    with pytest.raises(StopIteration) as end:
        next(task)
    assert end.value.value.pages == SHORT_PAGES
