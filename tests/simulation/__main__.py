"""Random seeds for so long, or one seed: `make simulate SECONDS=60`, `make simulate SEED=7`."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

from simulation.world import simulate

MOMENTS = int(os.environ.get("MOMENTS", "1500"))


def main() -> None:
    """Simulate, and say how much."""
    if seed := os.environ.get("SEED"):
        world = simulate(int(seed), MOMENTS)
        print(f"seed {seed}: {world.pages:,} pages, {world.kills} kills, trace {world.trace}")
        return
    seconds = float(os.environ.get("SECONDS", "60"))
    cores = len(os.sched_getaffinity(0))
    chooser = random.SystemRandom()
    begun = time.monotonic()
    sums = [0, 0, 0, 0]
    # What killed processes had under way stays for ever: in processes that do not.
    with multiprocessing.Pool(cores, maxtasksperchild=10) as pool:
        while time.monotonic() - begun < seconds:
            some = [chooser.randrange(1 << 32) for _ in range(8 * cores)]
            for found in pool.map(one, some, chunksize=1):
                sums = [a + b for a, b in zip(sums, found, strict=True)]
    runs, pages, kills, lost = sums
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{runs} seeds: {pages:,} pages stored, loaded and freed ({pages / minutes:,.0f} per "
        f"minute on {cores} cores), {kills} kills, {lost} lost pages, each hit by a fault"
    )


def one(seed: int) -> tuple[int, int, int, int]:
    """One run, in a process of the pool."""
    world = simulate(seed, MOMENTS)
    return 1, world.pages, world.kills, world.lost


if __name__ == "__main__":
    main()
