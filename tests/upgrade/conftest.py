"""Earlier versions, for all tests of upgrades."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.versions import MAKERS, PREVIOUS, sources_of


def _sources(factory: pytest.TempPathFactory, commit: str) -> Path:
    return sources_of(commit, factory.mktemp("version"))


@pytest.fixture(scope="session", params=sorted({PREVIOUS, *MAKERS.values()}), ids=lambda c: c[:7])
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sources of a version are that can be upgraded: the previous one, and others."""
    return _sources(tmp_path_factory, request.param)


@pytest.fixture(scope="session", params=MAKERS.items(), ids=lambda item: f"layout {item[0]}")
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sources of a version are whose memory has to be converted."""
    return _sources(tmp_path_factory, request.param[1])
