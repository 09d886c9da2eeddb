"""Random seeds for so long, or one seed: `make simulate SECONDS=60`, `make simulate SEED=7`."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter

from simulation.world import EVENTS, simulate

MOMENTS = int(os.environ.get("MOMENTS", "1500"))


def main() -> None:
    """Simulate, and say how much."""
    if seed := os.environ.get("SEED"):
        world = simulate(int(seed), MOMENTS)
        print(f"seed {seed}: {world.pages:,} pages, trace {world.trace}")
        tell(world.happened)
        return
    seconds = float(os.environ.get("SECONDS", "60"))
    cores = len(os.sched_getaffinity(0))
    chooser = random.SystemRandom()
    begun = time.monotonic()
    runs = pages = 0
    used = 0.0
    happened: Counter[str] = Counter()
    # What killed processes had under way stays for ever: in processes that do not.
    with multiprocessing.Pool(cores, maxtasksperchild=10) as pool:
        while time.monotonic() - begun < seconds:
            some = [chooser.randrange(1 << 32) for _ in range(8 * cores)]
            for pages_of_one, used_by_one, happened_in_one in pool.map(one, some, chunksize=1):
                runs += 1
                pages += pages_of_one
                used += used_by_one
                happened += happened_in_one
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{runs} seeds: {pages:,} pages stored, loaded and freed: {pages / minutes:,.0f} per "
        f"minute on {cores} cores, {pages / used * 60:,.0f} per minute of processor time"
    )
    tell(happened)


def tell(happened: Counter[str]) -> None:
    """Print how often each thing has happened that there is."""
    for event in EVENTS:
        print(f"{happened[event]:>12,} {event}")


def one(seed: int) -> tuple[int, float, Counter[str]]:
    """One run, in a process of the pool: pages, seconds of processor time, and what happened."""
    begun = time.process_time()
    world = simulate(seed, MOMENTS)
    return world.pages, time.process_time() - begun, world.happened


if __name__ == "__main__":
    main()
