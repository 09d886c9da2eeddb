"""The previous version, for all tests of upgrades."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.versions import previous_sources


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the previous version's sources are."""
    return previous_sources(tmp_path_factory.mktemp("previous"))
