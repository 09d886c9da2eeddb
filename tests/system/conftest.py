"""One machine with a real systemd for all tests of the installed service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.container import Container, booted_container
from support.installed import install


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted machine on which vswapd is installed, with its socket unit enabled."""
    with booted_container() as container:
        install(container, tmp_path_factory.mktemp("wheels"))
        yield container
