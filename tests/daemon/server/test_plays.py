"""Hostile clients whose doings are random bytes: the short form of `make fuzz`.

What is held is told in support/fuzzing.py. `make fuzz` plays the same, guided by coverage.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import fuzzing
from support.fuzzing import Finding, Theatre
from support.sources import REPOSITORY
from vswapd.buffers import Lane
from vswapd.connection import Connection
from vswapd.session import Session
from vswapd.vswap import Engine
from vswapd.window import Window

EXAMPLES: Final = 150 * int(os.environ.get("VSWAPD_SOAK", "1"))


@pytest.fixture
def theatre() -> Iterator[Theatre]:
    one = Theatre()
    yield one
    one.close()


@settings(max_examples=EXAMPLES)
@given(data=st.binary(min_size=8, max_size=1024))
def test_random_plays_hurt_nobody(data: bytes) -> None:
    """Replies in order, nobody else's pages, nothing left behind: whatever the clients do."""
    one = Theatre()
    try:
        one.play(data)
    finally:
        one.close()


def test_plays_come_far(theatre: Theatre) -> None:
    """Random plays are not all refused at the door: pages are stored and loaded in them."""
    before = fuzzing.TALLY.copy()
    for data in plays(EXAMPLES):
        theatre.play(data)
    done = fuzzing.TALLY - before
    assert done["plays"] == EXAMPLES
    assert done["frames"] > 5 * EXAMPLES
    assert done["status OK"] > EXAMPLES
    assert len([what for what in done if what.startswith("status ")]) > 8


def plays(count: int) -> Iterator[bytes]:
    """The same ones each time."""
    chooser = random.Random(11)
    for _ in range(count):
        yield chooser.randbytes(chooser.randrange(100, 1000))


def _nothing(*_: object, **__: object) -> Any:
    return
    yield


def _fails(*_: object, **__: object) -> Any:
    raise RuntimeError("a mistake")


def _all_there_is(window: Window, offset: int, count: int) -> bytes:
    return fuzzing.page_of(fuzzing.WITNESS_UID, 0) * count


def _play_all(theatre: Theatre) -> None:
    for data in plays(3 * EXAMPLES):
        theatre.play(data)


@pytest.mark.parametrize(
    ("broken", "name", "instead", "found"),
    [
        (Session, "close", _nothing, "left behind|spaces"),
        (Engine, "free", _fails, "INTERNAL|by a mistake of ours"),
        (Lane, "give", lambda *_: None, "buffers are out|hangs"),
        (Window, "take", _all_there_is, "<this is 2000's own page>"),
        (Connection, "_skip", lambda *_: None, "hangs"),
    ],
    ids=["spaces stay", "requests fail", "memory is kept", "pages leak", "no replies"],
)
def test_a_broken_daemon_is_found(
    theatre: Theatre,
    monkeypatch: pytest.MonkeyPatch,
    broken: type,
    name: str,
    instead: object,
    found: str,
) -> None:
    """The judge is no yes-man: each of these mistakes comes to light."""
    monkeypatch.setattr(fuzzing, "HANG_S", 1.0)
    monkeypatch.setattr(broken, name, instead)
    with pytest.raises(Finding, match=found):
        _play_all(theatre)


@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    """What a header says is what stands there; everything else costs the connection."""
    fuzzing.parse(data)


def test_what_was_found_is_played_again(tmp_path: Path) -> None:
    """`--replay` plays files without the fuzzer, which not every Python has."""
    files = [tmp_path / "finding-plays-1", tmp_path / "finding-frames-1"]
    for file in files:
        file.write_bytes(next(plays(1)))
    command = [sys.executable, "tests/torture/fuzz.py", "--replay", *map(str, files)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing is wrong") == 2
