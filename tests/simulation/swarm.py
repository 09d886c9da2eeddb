"""What one run of the simulation does, and how often: made of its seed.

A swarm: a run that does little but one thing finds what a run that does everything hides.

This module must not know how anything is done.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from support.engine import KIB, KINDS, MIB
from vswapd.settings import GroupLimits

VERBS: Final = (
    ["new", "new", "over", "load", "load", "load", "free"],
    ["new", "new", "new", "new", "over", "load", "free"],
    # Segments that nobody touches go to devices as they are, several at a time.
    ["new", "new", "new", "new", "free"],
    ["new", "over", "over", "over", "load"],
)
_BULKY: Final = 0.3
"""Of all runs."""
SETTINGS: Final = (
    *("codec", "dense", "pool", "enabled", "store", "verify"),
    *("budget", "idle", "rate", "watermarks", "groups", "memory"),
)


@dataclass
class Swarm:
    """See the module."""

    pool_max: int
    devices: list[int]
    limits: GroupLimits
    rates: dict[str, float]
    """Per moment; of what devices do, per request."""
    sizes: list[int]
    kinds: list[str]
    settings: list[str]
    """Which are changed."""
    clients: int
    eager: float
    """How often an idle client asks for something, per moment."""
    slow: float
    """How often a device request is put off for something else that can go on."""
    picks: str
    """Which of its slots a client asks for: any at `random`, the `oldest`, or a `run`."""
    verbs: list[str]
    """What clients ask for; what stands more often is asked for more often."""
    shards: int
    """How many share the limits; one of them is the engine."""
    pool_enabled: bool
    """Whether there is a pool at first; without one, pages go straight to devices."""
    dense: str
    """What old pages are compressed with again at first."""
    compute_s: float
    """Processor time that a computation takes."""

    @classmethod
    def of(cls, chooser: random.Random) -> Swarm:
        """Each thing that may happen does so in half of the runs."""

        def some(rate: float) -> float:
            return rate * chooser.random() if chooser.random() < 0.5 else 0.0

        limits = GroupLimits()
        if chooser.random() < 0.2:
            limits = GroupLimits(
                pool_max=chooser.choice([200, 500]) * KIB,
                device_max=chooser.choice([None, 500 * KIB, 2 * MIB]),
            )
        swarm = cls(
            pool_max=chooser.choice([300 * KIB, 700 * KIB, MIB, 3 * MIB]),
            devices=chooser.choice([[], [4], [6, 5], [24], [12, 3, 8]]),
            limits=limits,
            rates={
                "close": some(0.05),
                "kill": some(0.02),
                "swap": some(0.08),
                "settings": some(0.1),
                "stir": 0.05 + some(0.3),
                "shrink": 0.02 + some(0.5),
                "flip": some(0.03),
                "bad block": some(0.03),
                # Seldom enough something is damaged on a device that somebody wants back.
                "give up": 0.5 + some(0.5),
                "tear": some(0.05),
                "read error": some(0.1),
                "write error": some(0.2),
                "full disk": some(0.02),
                "hang": some(0.03),
                "dies": some(0.004),
                "gone": some(0.2),
                "cancel": some(0.05),
                "neighbour": some(0.05),
            },
            sizes=chooser.choice([[1], [1, 5, 30], [30, 120], [64, 250], [1, 120, 512]]),
            kinds=chooser.sample(KINDS, chooser.randint(1, len(KINDS))),
            settings=chooser.sample(SETTINGS, chooser.randint(1, len(SETTINGS))),
            clients=chooser.choice([3, 3, 8]),
            eager=chooser.choice([0.2, 0.2, 0.9]),
            slow=chooser.choice([0.0, 0.0, 0.8, 0.95]),
            picks=chooser.choice(["random", "oldest", "run"]),
            verbs=chooser.choice(VERBS),
            shards=chooser.choice([1, 1, 2]),
            pool_enabled=chooser.random() < 0.8,
            dense="",
            compute_s=chooser.choice([0.001, 0.001, 0.05, 0.5]),
        )
        if chooser.random() < _BULKY:
            swarm._make_bulky(chooser)
        return swarm

    def _make_bulky(self, chooser: random.Random) -> None:
        """Large pages that come and go in the order of their age: segments full and alive.

        These go to devices as they are, several at a time, or into the dense pool; where everything
        is made up at random there are few such.
        """
        self.pool_max = chooser.choice([2, 4, 6]) * MIB
        self.devices = chooser.choice([[24], [40], [20, 20]])
        self.limits = GroupLimits()
        self.sizes = chooser.choice([[64, 250], [1, 120, 250]])
        self.kinds = chooser.sample(["text", "mixed", "noise"], 2)
        self.picks = chooser.choice(["oldest", "run"])
        self.verbs = ["new", "new", "over", *chooser.choice(VERBS)]
        self.settings = chooser.choice([["dense"], ["codec", "dense", "rate", "verify", "idle"]])
        self.rates["close"] = 0.0
        self.pool_enabled = True
        self.dense = chooser.choice(["", "zstd:1", "zstd:3"])
