"""Extents that went out of use after a failed write are tried again: few first, then more.

A disk that was full for a moment must not cost space until the next swapon. A try that fails loses
nothing, since entries stay where they were; so it costs one write.

Invariants:
- A device on which writes went on failing has one extent tried at a time, after twice as long each
  time; another one twice as many each time, until all are back in use.

This module must not know why writes fail, or what is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vswapd.core import Core

_FIRST_S: Final = 60.0
"""Seconds until the first try, and between tries that go well."""
_LONGEST_S: Final = 3600.0


@dataclass(slots=True)
class _Try:
    """What is known of one device."""

    at: float
    """The clock's time of the next one."""
    errors: int
    """Failed writes as of the last one."""
    pause: float = _FIRST_S
    extents: int = 0
    """How many were tried at a time."""


class Retrial:
    """Gives extents back to their devices. All calls are made under the engine's lock."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tries: dict[int, _Try] = {}
        """By the device's place in the order of swapon."""
        self._seen = 0
        """Failed writes of all devices, as of the last look."""

    @property
    def news(self) -> bool:
        """Whether writes have failed since the last look. Cheap: asked after every request."""
        return self._core.devices.failures != self._seen

    def look(self) -> None:
        """Give back what is due."""
        self._seen = self._core.devices.failures
        now = self._core.clock()
        found: dict[int, _Try] = {}
        for device in self._core.devices:
            if device.draining:
                continue
            known = self._tries.get(device.added)
            if known is None and device.map.retired:
                known = _Try(now + _FIRST_S, device.write_errors)
            if known is None:
                continue
            found[device.added] = known
            if now < known.at:
                continue
            if device.write_errors == known.errors:
                known.pause, known.extents = _FIRST_S, max(1, 2 * known.extents)
            else:
                known.pause, known.extents = min(2 * known.pause, _LONGEST_S), 1
            known.at = now + known.pause
            known.errors = device.write_errors
            if not self._core.devices.forgive(device, known.extents):
                del found[device.added]
        self._tries = found

    def next_due(self) -> float | None:
        """The clock's time of the next try; None: there is nothing to be tried."""
        return min((known.at for known in self._tries.values()), default=None)
