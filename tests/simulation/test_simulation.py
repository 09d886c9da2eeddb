"""The engine in a simulated world: a fixed set of seeds here, random ones with `make simulate`."""

from __future__ import annotations

import pytest

from simulation.world import World, simulate

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


@pytest.mark.parametrize("kind", [AssertionError, IndexError])
def test_a_failure_says_how_to_do_it_again(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks, also what nobody thought of: the seed, and for how long."""

    def breaks(_: World) -> None:
        raise kind("broken")

    monkeypatch.setattr(World, "_end", breaks)
    with pytest.raises(kind) as caught:
        simulate(7, 20)
    assert "make simulate SEED=7 MOMENTS=20" in "".join(caught.value.__notes__)
