"""What the benchmarks of the pieces share. `python -m bench` runs them, and then the targets.

Every piece is measured on the mixed corpus, 64 pages (one folio) at a time; codecs are also
measured on each corpus by itself.
"""

from __future__ import annotations

import pytest

from bench import corpora, rig
from bench.rig import Rig
from vswapd.capture import Pages
from vswapd_backends.base import U64

PAGES = 4096


def pytest_configure(config: pytest.Config) -> None:
    """What is measured is called bench_: `pytest bench` finds it, and `pytest` does not."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(scope="session", autouse=True)
def _corpora(pytestconfig: pytest.Config) -> None:
    """Capture before anything is measured, and say what was captured."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    text = corpora.describe()
    if reporter is not None:
        reporter.write_line(f"\n{text}")


@pytest.fixture(scope="session")
def pages() -> Pages:
    """Pages of all programs, none zero; shape (PAGES, 4096)."""
    return corpora.mixed(PAGES)


@pytest.fixture(scope="session")
def folios(pages: Pages) -> list[bytes]:
    """The same in folios of 64."""
    return rig.folios_of(pages)


@pytest.fixture
def bench_rig() -> Rig:
    """An empty engine."""
    return Rig()


@pytest.fixture
def stored(bench_rig: Rig, folios: list[bytes]) -> list[U64]:
    """The slots of all folios, stored in that engine."""
    return bench_rig.store(folios)
