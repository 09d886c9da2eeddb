"""The simulated world's devices: what they do wrong is known to the byte."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from simulation.devices import FaultyDevice, Span
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, WriteError


def device(**rates: float) -> FaultyDevice:
    """One of three extents that does what the rates say, and nothing else."""
    none = dict.fromkeys(("read error", "write error", "tear"), 0.0)
    return FaultyDevice(3, "mem0", random.Random(1), none | rates, lambda _: None, Counter())


def test_what_did_not_arrive_is_damage() -> None:
    """A torn write is damaged from where it was torn to its end, and no byte more."""
    torn = device(tear=1.0)
    torn.write(1, 0, b"x" * EXTENT_BYTES)
    ((begin, end),) = torn.damage
    assert end == 2 * EXTENT_BYTES
    assert torn.data[:end].rstrip(b"\0").endswith(b"x")
    assert len(torn.data[:end].rstrip(b"\0")) == begin


def test_an_error_is_no_damage() -> None:
    """What a write that failed has left is garbage, and its owner knows it."""
    failing = device(**{"tear": 1.0, "write error": 1.0})
    with pytest.raises(WriteError):
        failing.write(0, 0, bytes(BLOCK_BYTES))
    assert failing.damage == []
    assert any(failing.data[:BLOCK_BYTES])


def test_a_write_makes_sound_again() -> None:
    """Damage under a write or a discard is gone; what lies beside it stays."""
    rotten = device()
    rotten.damage = [(BLOCK_BYTES - 1, 2 * BLOCK_BYTES + 1), (EXTENT_BYTES, EXTENT_BYTES + 1)]
    rotten.write(0, BLOCK_BYTES, bytes(BLOCK_BYTES))
    assert rotten.damage == [
        (BLOCK_BYTES - 1, BLOCK_BYTES),
        (2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 1),
        (EXTENT_BYTES, EXTENT_BYTES + 1),
    ]
    rotten.discard(0, 2)
    assert rotten.damage == []


def test_a_flipped_bit_is_told_when_it_is_read() -> None:
    """Whoever reads a byte that has changed by itself is noticed, and nobody else."""
    rotten = device()
    told: list[Span] = []
    rotten.on_damage_read = lambda _, span: told.append(span)
    rotten.flip()
    ((at, _),) = rotten.damage
    assert rotten.data[at] != 0
    for block in range(3 * EXTENT_BYTES // BLOCK_BYTES):
        extent, within = divmod(block, EXTENT_BYTES // BLOCK_BYTES)
        rotten.read(extent, within * BLOCK_BYTES, BLOCK_BYTES)
    assert told == [(at, at + 1)]
