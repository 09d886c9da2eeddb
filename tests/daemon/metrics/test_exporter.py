"""Metrics switched on and off at run time."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from support.status_documents import BUSY
from vswapd.config import ConfigError
from vswapd.metrics import Exporter


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(20)
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_nothing_until_it_is_asked_for() -> None:
    """Without metrics configured there is no thread and no socket."""
    before = set(threading.enumerate())
    with Exporter(lambda: BUSY) as exporter:
        exporter.apply("", "")
        assert set(threading.enumerate()) == before


def test_changes_take_effect_and_are_undone(tmp_path: Path) -> None:
    """Each apply serves and writes what it says, leaves the rest alone, ends what is not said."""
    before = set(threading.enumerate())
    first, second = free_port(), free_port()
    file, other = tmp_path / "a.prom", tmp_path / "b.prom"
    written = threading.Event()

    def snapshot() -> dict[str, object]:
        written.set()
        return BUSY

    with Exporter(snapshot) as exporter:
        exporter.apply(f"127.0.0.1:{first}", str(file))
        assert written.wait(20)
        page = {t for t in threading.enumerate() if t.name == "metrics"}
        assert answers(first)
        exporter.apply(f"127.0.0.1:{first}", str(other))
        assert page <= set(threading.enumerate())
        assert not file.exists()
        exporter.apply(f"127.0.0.1:{second}", "")
        assert not answers(first)
        assert answers(second)
    assert not answers(second)
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) == before


def test_page_that_cannot_be_served_changes_nothing() -> None:
    """If the new port is taken, the old page goes on."""
    port = free_port()
    with Exporter(lambda: BUSY) as exporter, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        exporter.apply(f"127.0.0.1:{port}", "")
        with pytest.raises(ConfigError, match=r"metrics\.listen: cannot listen"):
            exporter.apply(f"127.0.0.1:{taken.getsockname()[1]}", "")
        assert answers(port)


@pytest.mark.parametrize("place", ["missing/a.prom", "folder.prom"])
def test_file_that_cannot_be_written_changes_nothing(tmp_path: Path, place: str) -> None:
    """It is tried before it is taken: else the old file and the old page go on."""
    (tmp_path / "folder.prom").mkdir()
    first, second = free_port(), free_port()
    file = tmp_path / "a.prom"
    before = set(threading.enumerate())
    with Exporter(lambda: BUSY) as exporter:
        exporter.apply(f"127.0.0.1:{first}", str(file))
        with pytest.raises(ConfigError, match=r"metrics\.textfile: .*prom cannot be written: "):
            exporter.apply(f"127.0.0.1:{second}", str(tmp_path / place))
        assert answers(first)
        assert not answers(second)
        assert file.exists()
        exporter.apply("", "")
        assert not file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder.prom"]
    assert set(threading.enumerate()) == before


def test_file_is_there_when_it_was_taken(tmp_path: Path) -> None:
    """Who has set metrics.textfile finds the file, without having to wait for it."""
    with Exporter(lambda: BUSY) as exporter:
        for name in ("a.prom", "b.prom", "../" + tmp_path.name + "/b.prom"):
            exporter.apply("", str(tmp_path / name))
            assert (tmp_path / name).read_text().startswith("# HELP")
    assert list(tmp_path.iterdir()) == []
