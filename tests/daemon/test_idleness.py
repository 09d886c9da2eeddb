"""Whether the machine is busy, as the system's counters have it."""

from __future__ import annotations

from vswapd.idleness import Busy, CpuTimes, cpu_times


def test_busy_is_what_was_measured_since_the_last_look() -> None:
    """Less than a quarter idle is busy; between looks the last answer holds."""
    now, times = [100.0], [CpuTimes(1000.0, 4000.0)]
    busy = Busy(lambda: now[0], lambda: times[0])
    assert not busy()
    now[0], times[0] = 101.0, CpuTimes(1000.5, 4004.0)
    assert busy()
    now[0], times[0] = 101.5, CpuTimes(1002.5, 4006.0)
    assert busy()
    now[0] = 102.0
    assert not busy()
    now[0] = 103.0
    assert not busy()


def test_the_systems_counters_rise() -> None:
    """They are of this machine: idle is a part of all, and time passes."""
    one = cpu_times()
    assert 0 < one.idle < one.total
    assert cpu_times().total >= one.total


def test_a_look_that_fails_leaves_the_answer_as_it_was() -> None:
    """Where the counters cannot be read it is told, and what was found last still holds."""
    now, told = [100.0], list[str]()
    found: list[CpuTimes | OSError] = [CpuTimes(1000.0, 4000.0)]

    def times() -> CpuTimes:
        if isinstance(found[0], OSError):
            raise found[0]
        return found[0]

    busy = Busy(lambda: now[0], times, tell=lambda what, error: told.append(f"{what}: {error}"))
    now[0], found[0] = 101.0, CpuTimes(1000.5, 4004.0)
    assert busy()
    now[0], found[0] = 103.0, OSError("no more descriptors")
    assert busy()
    assert told == ["the processors' times cannot be looked at: no more descriptors"]
    now[0], found[0] = 105.0, CpuTimes(1016.0, 4020.0)
    assert not busy()


def test_where_nothing_can_be_looked_at_the_machine_is_not_busy() -> None:
    """Counters that cannot be read at the start keep nothing from starting."""
    now = [100.0]

    def times() -> CpuTimes:
        raise FileNotFoundError("no /proc")

    busy = Busy(lambda: now[0], times)
    now[0] = 102.0
    assert not busy()
