"""Slot ids: given out, taken back, wrong for ever; and clusters that have one owner each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.engine import ids
from vswapd.clusters import Clusters, SlotSet, bad_slots, refuse_duplicates, slots_of
from vswapd.errors import BadSlotError, DuplicateSlotError, NoSlotsError
from vswapd.swap_table import CLUSTER_SHIFT, CLUSTER_SLOTS, FREE_WORD, UNBACKED_WORD, SwapTable
from vswapd_backends.base import I64, U64

GENERATION = 1 << 40
LAST_GENERATION = (1 << 16) - 1


class Owners:
    """Clusters with their table, and spaces that store something in all that they are given."""

    def __init__(self, clusters: int = 4, shard: int = 0) -> None:
        self.table = SwapTable(clusters * CLUSTER_SLOTS)
        self.clusters = Clusters(self.table, shard)
        self.made = 0

    def space(self) -> SlotSet:
        self.made += 1
        return SlotSet(self.made)

    def take(self, space: SlotSet, count: int) -> U64:
        numbers = self.clusters.allocate(space, count)
        assert not self.table.words[numbers].any()
        assert len(np.unique(numbers)) == count
        self.table.words[numbers] = UNBACKED_WORD
        return self.clusters.ids_of(numbers)

    def give(self, space: SlotSet, slots: U64) -> None:
        numbers = self.clusters.resolve(space.owner, slots)
        assert self.table.words[numbers].all()
        self.table.words[numbers] = FREE_WORD
        self.clusters.release(space, numbers)

    def refused(self, space: SlotSet, slots: U64) -> list[int]:
        try:
            self.clusters.resolve(space.owner, slots)
        except BadSlotError as error:
            return [int(slot) for slot in error.slots]
        return []


def test_ids_lead_back_to_their_slots() -> None:
    """An id is shard, generation and number; it resolves to the number, in the order asked for."""
    owners = Owners(shard=200)
    space = owners.space()
    slots = owners.take(space, 600)
    assert {slot >> 56 for slot in slots.tolist()} == {200}
    assert {slot >> 40 & 0xFFFF for slot in slots.tolist()} == {1}
    order = np.array(random.Random(1).sample(range(600), 600))
    numbers = owners.clusters.resolve(space.owner, slots[order])
    assert numbers.tolist() == (slots[order] & np.uint64(GENERATION - 1)).tolist()


def test_slots_are_neighbours_where_they_can_be() -> None:
    """A fresh space's slots are consecutive, over several calls and clusters."""
    owners = Owners()
    space = owners.space()
    numbers = [owners.clusters.resolve(1, owners.take(space, n)) for n in (3, 64, 500, 1000)]
    assert np.concatenate(numbers).tolist() == list(range(1567))


@pytest.mark.parametrize("freed", [slice(7, 8), slice(7, 9), slice(0, None, 3)])
def test_holes_are_filled_before_a_new_cluster_is_opened(freed: slice) -> None:
    """Freed slots of a space's own clusters are given out again, all of them."""
    owners = Owners()
    space = owners.space()
    slots = owners.take(space, 2 * CLUSTER_SLOTS)
    gone = slots[freed]
    owners.give(space, gone)
    again = owners.take(space, len(gone))
    assert sorted(again.tolist()) == sorted(gone.tolist())
    assert owners.clusters.in_use == 2
    assert not space.partial


@pytest.mark.parametrize("freed", [[515], [515, 516], [3, 515]])
def test_a_freed_slot_of_the_newest_cluster_is_found(freed: list[int]) -> None:
    """A cluster is filled from its beginning only as long as nothing in it was freed."""
    owners = Owners(2)
    space = owners.space()
    slots = owners.take(space, CLUSTER_SLOTS + 10)
    owners.give(space, slots[freed])
    rest = owners.take(space, CLUSTER_SLOTS - 10 + len(freed))
    assert set(slots[freed].tolist()) <= set(rest.tolist())
    assert space.slots == 2 * CLUSTER_SLOTS


def test_a_cluster_belongs_to_one_space() -> None:
    """Two spaces share no cluster, and neither can resolve the other's ids."""
    owners = Owners()
    one, two = owners.space(), owners.space()
    mine, yours = owners.take(one, 5), owners.take(two, 5)
    assert not one.clusters & two.clusters
    assert owners.refused(one, yours) == yours.tolist()
    assert owners.refused(two, np.concatenate((yours, mine[2:3]))) == mine[2:3].tolist()
    assert owners.clusters.owners_of(np.array([0, 1, 2])).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        0,
        1,
        GENERATION - 1,
        GENERATION | 4 * CLUSTER_SLOTS,
        GENERATION | 5 * CLUSTER_SLOTS,
        GENERATION | (GENERATION - 1),
        2 * GENERATION,
        1 << 56 | GENERATION,
        (1 << 64) - 1,
        1 << 63,
    ],
)
def test_ids_that_were_never_given_out_are_refused(wrong: int) -> None:
    """No generation, a later one, another shard, numbers beyond the table: all are bad, by name."""
    owners = Owners()
    space = owners.space()
    good = owners.take(space, 3)
    assert good.tolist() == [GENERATION, GENERATION | 1, GENERATION | 2]
    assert owners.refused(space, ids(wrong)) == [wrong]
    for at in range(4):
        asked = np.insert(good, at, np.uint64(wrong))
        assert owners.refused(space, asked) == [wrong]


def test_ids_of_a_freed_cluster_are_wrong_for_ever() -> None:
    """The same slot number comes back under another generation, and the old id stays wrong."""
    owners = Owners(1)
    old: list[int] = []
    for generation in range(1, 20):
        space = owners.space()
        (slot,) = owners.take(space, 1).tolist()
        assert slot == generation << 40
        assert owners.refused(space, ids(*old)) == old
        owners.give(space, ids(slot))
        assert owners.refused(space, ids(slot)) == [slot]
        old.append(slot)


def test_an_id_freed_in_a_cluster_that_lives_is_not_told_here() -> None:
    """Whether a slot of a living cluster is FREE is for the table to say, not for the id."""
    owners = Owners()
    space = owners.space()
    slots = owners.take(space, 2)
    owners.give(space, slots[:1])
    assert owners.refused(space, slots) == []


def test_a_cluster_whose_generations_are_used_up_is_retired() -> None:
    """It is handed out once with the last generation, then never again; the others go on."""
    owners = Owners(2)
    owners.clusters._kept[0] = (LAST_GENERATION - 2) << 48
    space = owners.space()
    for generation in (LAST_GENERATION - 1, LAST_GENERATION):
        slots = owners.take(space, 1)
        assert slots.tolist() == [generation << 40]
        owners.give(space, slots)
    assert owners.clusters.retired == 1
    assert owners.clusters.in_use == 0
    slots = owners.take(space, CLUSTER_SLOTS)
    assert {slot & (GENERATION - 1) for slot in slots.tolist()} == set(
        range(CLUSTER_SLOTS, 2 * CLUSTER_SLOTS)
    )
    with pytest.raises(NoSlotsError):
        owners.take(space, 1)
    assert owners.refused(space, ids(LAST_GENERATION << 40)) == [LAST_GENERATION << 40]


def test_an_empty_cluster_gives_its_page_of_table_back() -> None:
    """The last slot that is freed takes the page with it, one that is left keeps it."""
    owners = Owners()
    space = owners.space()
    slots = owners.take(space, 3 * CLUSTER_SLOTS)
    assert owners.table.resident_bytes == 3 * 4096
    owners.give(space, slots[1:])
    assert owners.table.resident_bytes == 4096
    assert owners.clusters.open_clusters().tolist() == [0]
    assert owners.clusters.used_counts(np.array([0])).tolist() == [1]
    owners.give(space, slots[:1])
    assert (owners.table.resident_bytes, owners.clusters.in_use, space.slots) == (0, 0, 0)
    assert not owners.clusters.in_open_clusters(np.array([0, 511, 1024])).any()


def test_a_full_table_is_refused_before_anything_is_allocated() -> None:
    """More than is left is NoSlotsError with the number that is, and what is left can be had."""
    owners = Owners(2)
    one, two = owners.space(), owners.space()
    owners.take(one, 10)
    owners.take(two, 500)
    with pytest.raises(NoSlotsError, match="room for 502 more slots here, 503 are wanted"):
        owners.take(one, 503)
    with pytest.raises(NoSlotsError, match="room for 12 more"):
        owners.clusters.ensure(two, 13)
    assert (one.slots, two.slots) == (10, 500)
    owners.take(one, 502)
    owners.take(two, 12)
    with pytest.raises(NoSlotsError):
        owners.clusters.ensure(one, 1)
    owners.clusters.ensure(one, 0)


def test_slots_of_clusters_are_in_order() -> None:
    """Each cluster stands for its 512 numbers."""
    found = slots_of(np.array([3, 1]))
    assert found.tolist() == [*range(1536, 2048), *range(512, 1024)]
    assert slots_of(np.array([], np.int64)).tolist() == []


def test_the_error_for_bad_slots_names_them() -> None:
    """Text and slots of the error are the ids as the client knows them."""
    error = bad_slots(ids(0x1234, 7))
    assert "2 bad slot(s), first 0x1234" in str(error)
    assert error.slots.tolist() == [0x1234, 7]


@settings(deadline=None)
@given(slots=st.lists(st.integers(0, 12), max_size=12))
def test_doubles_agree_with_a_plain_count(slots: list[int]) -> None:
    """A slot that stands twice or more is named once, wherever it stands; else nothing is said."""
    twice = sorted({slot for slot in slots if slots.count(slot) > 1})
    if not twice:
        refuse_duplicates(ids(*slots))
        return
    with pytest.raises(DuplicateSlotError) as caught:
        refuse_duplicates(ids(*slots))
    assert caught.value.slots.tolist() == twice


@settings(deadline=None, max_examples=80)
@given(
    total=st.integers(1, 4),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "give", "all"]),
            st.integers(0, 1),
            st.integers(1, 700),
            st.integers(0, 1 << 16),
        ),
        max_size=25,
    ),
)
def test_agrees_with_sets(total: int, steps: list[tuple[str, int, int, int]]) -> None:
    """Any sequence of takes and gives: no slot has two owners, no id comes back, counts agree."""
    owners = Owners(total)
    spaces = [owners.space(), owners.space()]
    held: list[set[int]] = [set(), set()]
    numbers: list[set[int]] = [set(), set()]
    stale: set[int] = set()
    for verb, who, count, seed in steps:
        space = spaces[who]
        if verb == "take":
            room = _room(total, numbers, who)
            if count > room:
                with pytest.raises(NoSlotsError):
                    owners.take(space, count)
                continue
            got = set(owners.take(space, count).tolist())
            assert not got & (held[0] | held[1])
            held[who] |= got
            stale -= got
        elif held[who]:
            some = sorted(held[who])
            chosen = (
                some if verb == "all" else random.Random(seed).sample(some, min(len(some), count))
            )
            owners.give(space, ids(*chosen))
            held[who] -= set(chosen)
            stale |= set(chosen)
        numbers = [{slot & (GENERATION - 1) for slot in mine} for mine in held]
        _check(owners, spaces, held, numbers, stale)


def _clusters(numbers: set[int]) -> set[int]:
    return {number // CLUSTER_SLOTS for number in numbers}


def _room(total: int, numbers: list[set[int]], who: int) -> int:
    own = _clusters(numbers[who])
    free = total - len(own) - len(_clusters(numbers[1 - who]))
    return free * CLUSTER_SLOTS + len(own) * CLUSTER_SLOTS - len(numbers[who])


def _check(
    owners: Owners,
    spaces: list[SlotSet],
    held: list[set[int]],
    numbers: list[set[int]],
    stale: set[int],
) -> None:
    assert not _clusters(numbers[0]) & _clusters(numbers[1])
    for who, space in enumerate(spaces):
        assert space.slots == len(held[who])
        assert space.clusters == _clusters(numbers[who])
        mine: I64 = owners.clusters.resolve(space.owner, ids(*sorted(held[who])))
        assert mine.tolist() == [slot & (GENERATION - 1) for slot in sorted(held[who])]
        assert owners.refused(space, ids(*sorted(held[1 - who]))) == sorted(held[1 - who])
        alive = {slot >> CLUSTER_SHIFT for slot in held[who]}  # with their generations
        gone = ids(*sorted(slot for slot in stale if slot >> CLUSTER_SHIFT not in alive))
        assert owners.refused(space, gone) == gone.tolist()
    used = len(_clusters(numbers[0])) + len(_clusters(numbers[1]))
    assert owners.clusters.in_use == used
    assert owners.table.resident_bytes == used * 4096
