"""Groups: one per name, with limits of their own or the default ones, and room within these."""

from __future__ import annotations

import dataclasses

from support.engine import make_engine, pages_of
from vswapd.groups import Group, Groups
from vswapd.ledger import Ledger
from vswapd.settings import GroupLimits, Settings


def _settings(**groups: GroupLimits) -> Settings:
    return Settings(pool_max=1 << 20, groups=groups, default_group=GroupLimits(pool_max=77))


def test_a_group_is_made_once() -> None:
    """The same name is the same group, found by name and by index, in the order of their making."""
    groups = Groups(_settings(), Ledger())
    one, two = groups.get("1000"), groups.get("7")
    assert groups.get("1000") is one
    assert (groups[0], groups[1], len(groups)) == (one, two, 2)
    assert list(groups) == [one, two]
    assert (one.index, two.index, one.name) == (0, 1, "1000")


def test_limits_are_a_groups_own_or_the_default_ones() -> None:
    """A group that the settings name has its limits as a whole; all others share the default."""
    own = GroupLimits(device_max=5, writeback=False)
    groups = Groups(_settings(own=own), Ledger())
    assert groups.get("own").limits == own
    assert groups.get("own").limits.pool_max is None
    assert groups.get("other").limits == GroupLimits(pool_max=77)


def test_limits_change_for_groups_that_are_there() -> None:
    """New settings reach groups that exist, those that come to be named, and later ones."""
    groups = Groups(_settings(own=GroupLimits(pool_max=1)), Ledger())
    own, other = groups.get("own"), groups.get("other")
    groups.apply(
        dataclasses.replace(_settings(other=GroupLimits(pool_max=2)), default_group=GroupLimits())
    )
    assert own.limits == GroupLimits()
    assert other.limits == GroupLimits(pool_max=2)
    assert groups.get("late").limits == GroupLimits()


def test_room_is_what_the_limit_leaves() -> None:
    """No limit is room without end, 0 is none, and over the limit there is none either."""
    group = Group(0, "g", GroupLimits())
    assert (group.pool_room(), group.device_room()) == (None, None)
    group.limits = GroupLimits(pool_max=100, device_max=100)
    group.pool_bytes, group.device_bytes = 30, 40
    assert (group.pool_room(), group.device_room()) == (70, 60)
    group.device_pending = 50
    assert group.device_room() == 10
    group.pool_bytes, group.device_bytes = 101, 90
    assert (group.pool_room(), group.device_room()) == (0, 0)
    group.limits = GroupLimits(pool_max=0, device_max=0)
    group.pool_bytes = group.device_bytes = group.device_pending = 0
    assert (group.pool_room(), group.device_room()) == (0, 0)


def test_zero_pages_are_charged_to_nobody() -> None:
    """A group that may hold nothing at all may hold zero pages."""
    rig = make_engine(default_group=GroupLimits(pool_max=0, device_max=0))
    space = rig.space()
    slots = rig.put(space, pages_of("zero", 100))
    assert (space.group.pool_bytes, space.group.device_bytes) == (0, 0)
    assert rig.load(space, slots) == pages_of("zero", 100)


def test_spaces_of_one_name_share_a_group() -> None:
    """Charges of several spaces add up in their group, and go with them."""
    rig = make_engine()
    one, two, other = rig.space("5"), rig.space("5"), rig.space("6")
    assert one.group is two.group
    assert one.group.spaces == 2
    rig.put(one, pages_of("text", 5))
    rig.put(two, pages_of("text", 5, 50))
    assert one.group.pool_bytes == one.compressed_bytes + two.compressed_bytes
    assert other.group.pool_bytes == 0
    rig.close(one)
    assert two.group.spaces == 1
    assert two.group.pool_bytes == two.compressed_bytes > 0
