"""The engine in a simulated world: a fixed set of seeds here, random ones with `make simulate`."""

from __future__ import annotations

import pytest

from simulation.world import simulate

MOMENTS = 500


@pytest.mark.parametrize("seed", range(40))
def test_promises_are_kept(seed: int) -> None:
    """Whatever happens, each page is what its client stored, or was really hit; nothing leaks."""
    simulate(seed, MOMENTS)


@pytest.mark.parametrize("seed", [3, 17])
def test_a_seed_is_a_run(seed: int) -> None:
    """The same seed does the same again, to the last request; another one does not."""
    assert simulate(seed, 300).trace == simulate(seed, 300).trace
    assert simulate(seed, 300).trace != simulate(seed + 1, 300).trace
