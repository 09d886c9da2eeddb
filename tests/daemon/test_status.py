"""What operators are told, of daemons that are larger than most."""

from __future__ import annotations

import dataclasses
import json

from support.engine import make_engine, pages_of
from vswap.protocol import MAX_TEXT_BYTES
from vswapd import status
from vswapd.control import MOST_NAME


def test_more_spaces_than_a_reply_has_room_for() -> None:
    """The largest are listed, the others counted; clients take what is sent."""
    rig = make_engine()
    rig.put(rig.engine.open_space(uid=1, group="1"), pages_of("text", 3))
    snapshot = rig.engine.snapshot()
    (space,) = snapshot.spaces
    longest = "\u00e9" * (MOST_NAME // 2)
    many = tuple(
        dataclasses.replace(
            space, id=1 << 62 | i, uid=i % 2, name=longest, client=longest, original_bytes=i << 40
        )
        for i in range(3000)
    )
    snapshot = dataclasses.replace(snapshot, spaces=many)
    answer = status.spaces(snapshot, 0.0, None)
    assert len(answer["spaces"]) + answer["left_out"] == 3000
    assert [one["original_bytes"] >> 40 for one in answer["spaces"][:3]] == [2999, 2998, 2997]
    assert len(json.dumps(answer)) < MAX_TEXT_BYTES
    of_one = status.spaces(snapshot, 0.0, 1)
    assert {one["uid"] for one in of_one["spaces"]} == {1}
    assert len(of_one["spaces"]) + of_one["left_out"] == 1500
