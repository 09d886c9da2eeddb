"""The answer to HELLO: what this client makes of a daemon of its own time, and of one of before."""

from __future__ import annotations

import json
from typing import Any

import pytest

import vswap
from support.fake_daemon import HELLO
from vswap.peer import parse_hello

SLOTS = [(1 << 64) - 1, (1 << 53) + 1, 1 << 40, 0]


def answer(**last: Any) -> bytes:
    whole = {"request": 7, "status": 0, "flags": 0, "slots": [], **last}
    return json.dumps(HELLO | {"last": whole}).encode()


@pytest.mark.parametrize("form", [str, int])
def test_slots_are_text_or_numbers(form: type) -> None:
    """A daemon says text, since many round numbers; one of before says numbers. Both are exact."""
    last = parse_hello(answer(slots=[form(slot) for slot in SLOTS])).last
    assert last is not None
    assert last.slots.tolist() == SLOTS


@pytest.mark.parametrize(
    "slots",
    [
        ["-1"],
        [str(1 << 64)],
        [1 << 64],
        [-1],
        ["1 "],
        ["0x1"],
        ["1_0"],
        ["\N{ARABIC-INDIC DIGIT ONE}"],
        [""],
        [1.0],
        [True],
        [None],
        [["1"]],
        "12",
        {},
        None,
        7,
    ],
)
def test_what_is_no_slot_is_a_protocol_error(slots: Any) -> None:
    """Nothing that only looks like a slot is taken for one."""
    with pytest.raises(vswap.ProtocolError, match="last"):
        parse_hello(answer(slots=slots))
