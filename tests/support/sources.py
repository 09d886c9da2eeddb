"""A copy of the repository's sources, for tests that build in it or change it."""

from __future__ import annotations

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".*", "build", "dist", "__pycache__", "*.egg-info")


def copy_sources(to: Path) -> Path:
    """Copy everything that is neither built nor hidden to the new directory `to`."""
    shutil.copytree(REPOSITORY, to, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return to
