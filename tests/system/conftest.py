"""Machines with a real systemd for the tests of the installed services: one of a release at a time.

A test runs on this machine's release, or on those of its mark: `@pytest.mark.releases("trixie")`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import trees
from support.container import Container, booted_container
from support.installed import install


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "machine" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("releases")
        releases = (trees.this_release(),) if mark is None else mark.args
        # Tests of one release come together, so that each machine is booted once.
        metafunc.parametrize("machine", releases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """A booted machine on which vswapd is installed, with its socket unit enabled."""
    with booted_container(request.param) as container:
        install(container, tmp_path_factory.mktemp("wheels"))
        yield container
