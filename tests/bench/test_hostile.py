"""bench.hostile: one short run against a real daemon, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import hostile
from bench.hostile import KINDS, WAITS, Result
from support.engine import pages_of
from vswapd.capture import PAGE_BYTES

BUFFERS = 64 << 20
PATIENT_S = 30.0
"""The daemon's patience: on a busy machine it must not cut off a flood that only had no turn."""


@pytest.mark.parametrize("shards", ["1", "2"])
def test_a_short_run(tmp_path: Path, shards: str) -> None:
    """Beside every kind of flood the client gets on, and the daemon's memory is bounded."""
    joined = b"".join(pages_of("text", 512))
    pages = np.frombuffer(joined, np.uint8).reshape(-1, PAGE_BYTES)
    found = list(
        hostile.measure(tmp_path, shards, pages, rounds=1, turn_s=0.1, request_timeout_s=PATIENT_S)
    )
    assert [one.kind for one in found] == list(KINDS)
    for one in found:
        assert one.ratio > 0
        assert one.answered > 0 or one.kind in WAITS
        # Buffers in use and kept, replies that nobody reads, and what each process needs itself.
        assert one.grown_bytes < 2 * BUFFERS + int(shards) * (32 << 20), one
    text = hostile.table(found)
    for one in found:
        assert one.kind in text


def test_the_ratio_is_of_rounds_in_turns() -> None:
    """A round on a busy machine counts no more than the others."""
    alone, beside = [1000.0, 100.0, 1000.0], [500.0, 50.0, 700.0]
    found = Result.of("1", "pings", 2, list(zip(alone, beside, strict=True)), 5, 0)
    assert (found.ratio, found.alone, found.beside) == (0.5, 1000.0, 500.0)
