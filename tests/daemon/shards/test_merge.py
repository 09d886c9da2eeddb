"""Several engines' snapshots as one, and what a HELLO asks for."""

from __future__ import annotations

import dataclasses
import json
from zlib import crc32

import numpy as np
import pytest

from support.engine import MIB, make_engine, pages_of
from vswap.protocol import Flag, Op, pack_header
from vswapd import status
from vswapd.merge import merged
from vswapd.reception import parse_wish
from vswapd.snapshot import Snapshot


def snapshots() -> list[Snapshot]:
    found = []
    for number in range(3):
        rig = make_engine(4 * MIB, write_budget=100 * MIB)
        rig.swapon(16, path="shared")
        space = rig.engine.open_space(
            uid=0, group="0", client="all", key="one and the same", joined=number > 0
        )
        rig.put(space, pages_of("noise", 70, 100 * number))
        rig.put(space, pages_of("zero", 5))
        other = rig.engine.open_space(uid=7, group="7", client=f"only {number}")
        rig.put(other, pages_of("text", 10))
        rig.writeback(1)
        rig.clock.advance(number)
        found.append(rig.engine.snapshot())
    return found


def test_sums_are_sums() -> None:
    """Slots, pools, traffic and charges of all shards are added up."""
    parts = snapshots()
    whole = merged(parts, parts[0].settings)
    assert whole.slots.allocated == sum(part.slots.allocated for part in parts) == 3 * 85
    assert whole.pool.bytes == sum(part.pool.bytes for part in parts)
    assert whole.stats.writeback_bytes == sum(part.stats.writeback_bytes for part in parts)
    assert whole.stats.rejects == parts[0].stats.rejects
    (device,) = whole.devices
    assert device.live_bytes == sum(part.devices[0].live_bytes for part in parts) > 0
    assert device.size_bytes == parts[0].devices[0].size_bytes
    (pool,) = whole.pool.parts
    assert pool.entries == sum(part.pool.parts[0].entries for part in parts)
    by_name = {group.name: group for group in whole.groups}
    assert (by_name["0"].spaces, by_name["7"].spaces) == (1, 3)
    assert by_name["0"].pool_bytes == sum(part.groups[0].pool_bytes for part in parts)


def test_one_space_is_one() -> None:
    """The parts of a space are one; spaces of others are not, even with the same number."""
    parts = snapshots()
    whole = merged(parts, parts[0].settings)
    shared = [space for space in whole.spaces if space.client == "all"]
    assert [(space.slots, space.zero, space.joined) for space in shared] == [(225, 15, False)]
    assert sorted(s.client for s in whole.spaces if s not in shared) == [
        "only 0",
        "only 1",
        "only 2",
    ]


def test_the_worst_is_told() -> None:
    """A device that fails or drains for one shard does so for the daemon; who works is shown."""
    parts = snapshots()
    failing = dataclasses.replace(parts[1].devices[0], state="failing", write_errors=2)
    parts[1] = dataclasses.replace(parts[1], devices=(failing,))
    working = dataclasses.replace(parts[2].shrinker, doing="writing back", why="full")
    parts[2] = dataclasses.replace(parts[2], shrinker=working)
    whole = merged(parts, parts[0].settings)
    assert (whole.devices[0].state, whole.devices[0].write_errors) == ("failing", 2)
    assert (whole.shrinker.doing, whole.shrinker.why) == ("writing back", "full")
    left = [part.shrinker.budget_left_bytes for part in parts]
    assert whole.shrinker.budget_left_bytes == min(b for b in left if b is not None)


def test_one_alone_is_what_it_was() -> None:
    """The sum of one shard is that shard."""
    (only, *_) = snapshots()
    assert merged([only], only.settings) == only


def test_a_document_can_be_made_of_it() -> None:
    """What merging gives is what status documents are made of."""
    parts = snapshots()
    facts = status.Facts(
        version="1",
        state="running",
        pid=1,
        uptime_s=1.0,
        clients=2,
        shrinker_errors=0,
        locked=False,
        lock_trouble="",
        fits_bytes=0,
        lowered="",
        settings={},
    )
    document = status.document(merged(parts, parts[0].settings), facts, {"shared": True})
    json.dumps(document)
    assert document["spaces"] == len(document["top_spaces"]) == 4


def hello(said: object, *, op: int = Op.HELLO, flags: int = 0) -> bytes:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    return pack_header(op, len(body), flags=flags, request_id=1) + body


@pytest.mark.parametrize(
    ("frame", "wish"),
    [
        (hello({"shard": 2}), (2, False)),
        (hello({"shard": 0, "token": "ab"}), (0, True)),
        (hello({"token": "01" + "f" * 30}), (1, True)),
        (hello({"token": "ff" + "0" * 30}), (255 % 3, True)),
        (hello({"token": "ab"}), (None, True)),
        (hello({"name": "cache"}), (crc32(b"cache") % 3, False)),
        (hello({"name": "cache", "token": "0" * 32, "shard": 2}), (2, True)),
        (hello({}), (None, False)),
        (hello({}, flags=Flag.CONTROL), (None, False)),
        (hello({"shard": True}), (None, False)),
        (hello({"shard": "1"}), (None, False)),
        (hello({"shard": None}), (None, False)),
        (hello([1]), (None, False)),
        (hello(b"{"), (None, False)),
        (hello(b"[" * 3000), (None, False)),
        (hello(b"\xff\xfe"), (None, False)),
        (hello({"shard": 1}, op=Op.PING), (None, False)),
        (hello({"shard": 1})[:-1], (None, False)),
        (hello({"shard": 1}) + b"more behind it", (1, False)),
        (b"", (None, False)),
        (b"GET / HTTP/1.1\r\n\r\n", (None, False)),
        (np.random.default_rng(0).bytes(4096), (None, False)),
    ],
)
def test_a_hello_says_where_it_wants_to_go(frame: bytes, wish: tuple[int | None, bool]) -> None:
    """The shard of a whole HELLO is found; what is none asks for nothing, and nothing is raised."""
    assert parse_wish(frame, 3) == wish
