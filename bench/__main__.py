"""All benchmarks: the pieces, then what must come out."""

from __future__ import annotations

import sys

import pytest

from bench import targets

PIECES = [
    "bench",
    "--timeout=300",
    "--benchmark-columns=median,iqr,ops,rounds",
    "--benchmark-group-by=group",
    "--benchmark-sort=name",
    "--benchmark-warmup=on",
    "--benchmark-warmup-iterations=500",
    "--benchmark-max-time=0.25",
    "--quiet",
]

if __name__ == "__main__":
    failed = pytest.main(PIECES)
    sys.exit(targets.main() or failed)
