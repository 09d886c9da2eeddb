"""bench.interference: one short run against a real daemon, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import interference
from bench.interference import KINDS, LOADED, STORING, Result, Round, Timed
from support.engine import pages_of
from vswapd.capture import PAGE_BYTES

BACKLOG = 4096


@pytest.mark.parametrize("shards", ["1", "2"])
def test_a_short_run(tmp_path: Path, shards: str) -> None:
    """Each kind of work is done while loads are timed, or `measure` raises."""
    joined = b"".join(pages_of("text", LOADED + BACKLOG))
    pages = np.frombuffer(joined, np.uint8).reshape(-1, PAGE_BYTES)
    found = list(interference.measure(tmp_path, shards, pages, rounds=1))
    assert [one.kind for one in found] == [*(kind.name for kind in KINDS), STORING]
    for one in found:
        assert one.loads > 0
        assert one.ratio > 0
        assert all(one.done.values())
    text = interference.table(found)
    for one in found:
        assert one.kind in text
    assert "MB written" in text


def test_the_ratio_is_of_rounds_in_turns() -> None:
    """A round that was slow at rest and busy alike counts no more than the others."""
    slow = Round(Timed([10_000] * 100), Timed([20_000] * 100), {"writeback_bytes": 1.0})
    quick = Round(Timed([1000] * 100), Timed([2000] * 100), {"writeback_bytes": 2.0})
    found = Result.of("1", "writeback", [slow, quick, quick])
    assert (found.ratio, found.busy_p99, found.rest_p99) == (2.0, 2.0, 1.0)
    assert found.done == {"writeback_bytes": 5.0}
