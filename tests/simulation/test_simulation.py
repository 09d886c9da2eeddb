"""The engine in a simulated world: a fixed set of seeds here, random ones with `make simulate`."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection
from typing import NamedTuple

import pytest

from simulation.world import EVENTS, World, simulate
from vswapd import recovery
from vswapd.retrial import Retrial
from vswapd_backends.base import IoKind, IoRequest
from vswapd_backends.segment import CHECK_BYTES
from vswapd_backends.swapdev import SwapDevices

MOMENTS = 500
SEEDS = range(40)
_FORK = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    """Of a whole run."""

    trace: str
    happened: Counter[str]
    problem: str
    """What broke, and how to do it again; empty: nothing did."""


def simulated(seed: int, moments: int) -> Outcome:
    """A run in a process of its own: what was under way at a kill stays there for ever."""
    here, there = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_simulate, args=(seed, moments, there))
    process.start()
    there.close()
    outcome: Outcome = here.recv()
    process.join()
    here.close()
    return outcome


def _simulate(seed: int, moments: int, pipe: Connection) -> None:
    try:
        world = simulate(seed, moments)
    except Exception as error:  # noqa: BLE001 - whatever breaks first
        pipe.send(Outcome("", Counter(), "".join(traceback.format_exception(error))))
    else:
        pipe.send(Outcome(world.trace, world.happened, ""))


@cache
def happened_in(seed: int) -> Counter[str]:
    """What a run has done; each is run once."""
    outcome = simulated(seed, MOMENTS)
    assert not outcome.problem, outcome.problem
    return outcome.happened


@pytest.mark.parametrize("seed", SEEDS)
def test_promises_are_kept(seed: int) -> None:
    """Whatever happens, each page is what its client stored, or was really hit; nothing leaks."""
    happened_in(seed)


def test_everything_happens() -> None:
    """Each kind of fault, and each thing that the engine does about them, is among the runs."""
    happened = sum(map(happened_in, SEEDS), Counter[str]())
    assert {event for event in EVENTS if not happened[event]} == set()
    assert set(happened) <= set(EVENTS)


def _no_write_fails(request: IoRequest) -> None:
    perform(request)
    if request.kind is IoKind.WRITE:
        request.error = None


def _any_check_agrees(
    _: SwapDevices, found: Sequence[memoryview | None], *__: object
) -> list[memoryview | None]:
    return [None if entry is None else entry[CHECK_BYTES:] for entry in found]


def _nothing(*_: object) -> None:
    """What should be done is not."""


def _nobody_reads_again(*_: object) -> list[IoRequest]:
    return []


perform = IoRequest.perform


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (IoRequest, "perform", _no_write_fails),
        (SwapDevices, "_checked", _any_check_agrees),
        (SwapDevices, "abandon", _nothing),
        (SwapDevices, "_apart", _nobody_reads_again),
        (recovery, "_finish_request", _nothing),
        (Retrial, "look", _nothing),
    ],
)
def test_planted_bugs_are_found(
    where: object, name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that breaks a promise does not get through the fixed seeds."""
    monkeypatch.setattr(where, name, bug)
    assert any(map(_fails, SEEDS))


def _fails(seed: int) -> bool:
    return "make simulate SEED=" in simulated(seed, MOMENTS).problem


@pytest.mark.parametrize("seed", [3, 17])
def test_a_seed_is_a_run(seed: int) -> None:
    """The same seed does the same again, to the last request; another one does not."""
    trace = simulated(seed, 300).trace
    assert trace == simulated(seed, 300).trace
    assert trace != simulated(seed + 1, 300).trace


@pytest.mark.parametrize("seed", [5, 9])
def test_a_run_does_not_depend_on_the_machine(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow processor changes nothing: the time that work takes is simulated, too."""
    trace = simulated(seed, 300).trace
    ticks = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: 10.0 * next(ticks))
    assert simulated(seed, 300).trace == trace


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
