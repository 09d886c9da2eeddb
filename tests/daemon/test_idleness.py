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
