"""Extents of one device that several shards take and give back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vswapd_backends.shared_extents import SharedExtents, chunk_extents, owners_region

STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["take", "take", "take", "give", "give", "bad", "forgive"]),
        st.integers(0),
    ),
    max_size=300,
)


def maps(extents: int, shards: int = 3) -> list[SharedExtents]:
    region = owners_region(extents, shards)
    return [SharedExtents(extents, region, shard, shards) for shard in range(shards)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 150), STEPS)
def test_no_extent_has_two_owners(extents: int, steps: list[tuple[int, str, int]]) -> None:
    """Whatever shards take, give and lose, an extent is in the hands of one, and counted once."""
    shards = maps(extents)
    held: list[list[int]] = [[], [], []]
    bad_of: list[set[int]] = [set(), set(), set()]
    for who, what, which in steps:
        mine = held[who]
        if what == "take":
            extent = shards[who].take()
            if extent is None:
                assert shards[who].free == 0
                continue
            assert 0 <= extent < extents
            assert extent not in set.union(*bad_of)
            assert all(extent not in others for others in held)
            mine.append(extent)
        elif what == "forgive":
            forgiven = set(shards[who].forgive(which % 5))
            assert forgiven <= bad_of[who] - set(mine)
            assert len(forgiven) == min(which % 5, len(bad_of[who] - set(mine)))
            bad_of[who] -= forgiven
        elif mine:
            extent = mine[which % len(mine)]
            if what == "bad":
                shards[who].mark_bad(extent)
                bad_of[who].add(extent)
            else:
                mine.remove(extent)
                shards[who].give(extent)
        out_of_use = set.union(*bad_of) - {extent for others in held for extent in others}
        most = extents - sum(map(len, held)) - len(out_of_use)
        assert 0 <= shards[who].free <= most
        assert shards[who].used == len(held[who])


def test_one_shard_can_have_all() -> None:
    """A shard that takes on gets every extent there is, in ascending order, the last ones too."""
    first, *_ = maps(1000)
    assert [first.take() for _ in range(1000)] == list(range(1000))
    assert first.take() is None
    assert first.free == 0


def test_what_is_given_back_is_there_for_others() -> None:
    """A shard keeps one free chunk at most: what it has no more use for, others can take."""
    first, second, _ = maps(600)
    chunk = chunk_extents(600, 3)
    taken = [first.take() for _ in range(600)]
    assert second.free == 0
    assert second.take() is None
    for extent in taken:
        assert extent is not None
        first.give(extent)
    assert second.free >= 600 - chunk
    assert first.free == 600


def test_what_is_forgiven_goes_back_with_its_chunk() -> None:
    """Extents that were out of use count in their chunk again: others can have it in the end."""
    first, second, _ = maps(600)
    for forgiven in (False, True):
        taken = [first.take() for _ in range(600)]
        for extent in taken:
            assert extent is not None
            if not forgiven:
                first.mark_bad(extent)
            first.give(extent)
        if not forgiven:
            assert (first.free, second.free) == (0, 0)
            assert len(first.forgive(1000)) == 600
    assert second.free >= 600 - chunk_extents(600, 3)


def test_leaving_gives_everything_back() -> None:
    """A shard that has left a device has no chunk of it, and others can take all of it."""
    first, second, third = maps(96)
    extent = first.take()
    assert extent is not None
    third.take()
    first.give(extent)
    before = second.free
    first.leave()
    assert second.free == before + chunk_extents(96, 3)


def test_who_died_while_it_left_forgives_nothing_of_others() -> None:
    """What went out of use in chunks that it has given back is for their next owner to find out."""
    region = owners_region(100, 2)
    left, other = (SharedExtents(100, region, shard, 2) for shard in range(2))
    bad = left.take()
    assert bad is not None
    left.mark_bad(bad)
    left.leave()
    theirs = {other.take() for _ in range(4)}
    assert bad in theirs
    heir = SharedExtents(100, region, 0, 2)
    heir.restore([], [bad])
    assert heir.forgive(5) == []
    assert heir.take() not in theirs


def test_small_devices_are_dealt_out_in_small_chunks() -> None:
    """Every shard can have a part of a device that has an extent for each."""
    assert chunk_extents(1, 8) == 1
    assert chunk_extents(64, 8) == 1
    assert chunk_extents(4096, 8) == 64
    assert chunk_extents(1 << 22, 8) == 64
    assert all(each.take() is not None for each in maps(3))
