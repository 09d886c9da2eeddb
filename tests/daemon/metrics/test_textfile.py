"""The text file for node_exporter."""

from __future__ import annotations

import logging
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.status_documents import BUSY, EMPTY
from vswapd.metrics import TextfileWriter, write_textfile


def stored(path: Path) -> float:
    families = {f.name: f for f in text_string_to_metric_families(path.read_text())}
    return float(families["vswap_store_pages"].samples[0].value)


def test_file_is_what_node_exporter_reads(tmp_path: Path) -> None:
    """The file holds the exposition format, may be read by everybody, and stands alone."""
    path = tmp_path / "vswap.prom"
    usual = os.umask(0o077)
    try:
        write_textfile(path, lambda: BUSY)
    finally:
        os.umask(usual)
    assert stored(path) == BUSY["traffic"]["store_pages"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Whoever has the old file open goes on reading the old file, to its end."""
    path = tmp_path / "vswap.prom"
    write_textfile(path, lambda: EMPTY)
    with path.open() as old:
        write_textfile(path, lambda: BUSY)
        assert "vswap_store_pages_total 0.0" in old.read()
    assert stored(path) == BUSY["traffic"]["store_pages"]


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    """If the new file cannot be finished, the old one stays and nothing lies beside it."""
    path = tmp_path / "vswap.prom"
    write_textfile(path, lambda: BUSY)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            write_textfile(path, lambda: EMPTY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert stored(path) == BUSY["traffic"]["store_pages"]
    assert list(tmp_path.iterdir()) == [path]


def test_writer_writes_again_and_again_and_cleans_up(tmp_path: Path) -> None:
    """The writer renews the file each period, from its thread; closing removes the file."""
    path = tmp_path / "vswap.prom"
    before = set(threading.enumerate())
    third = threading.Event()
    seen: list[bool] = []

    def snapshot() -> dict[str, Any]:
        seen.append(path.exists())
        if len(seen) == 3:
            third.set()
        return BUSY

    with TextfileWriter(path, snapshot, period_s=0.001):
        assert third.wait(20)
    assert seen[:3] == [False, True, True]
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) == before


def test_failure_is_told_once_until_it_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory that is missing is one line in the log, not one every quarter of a minute."""
    path = tmp_path / "sub/vswap.prom"
    first = threading.Event()

    def snapshot() -> dict[str, Any]:
        first.set()
        return BUSY

    with TextfileWriter(path, snapshot, period_s=3600) as writer:
        assert first.wait(20)
    caplog.clear()
    writer.step()
    path.parent.mkdir()
    writer.step()
    assert path.exists()
    path.unlink()
    path.parent.rmdir()
    writer.step()
    writer.step()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert str(path) in errors[0].getMessage()


def test_another_file_in_its_place_stays(tmp_path: Path) -> None:
    """What somebody has put in place of the file is not removed with the writer."""
    path = tmp_path / "vswap.prom"
    with TextfileWriter(path, lambda: BUSY, period_s=3600):
        while not path.exists():
            os.sched_yield()
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"
    with TextfileWriter(path, lambda: BUSY, period_s=3600):
        while path.read_text() == "mine":
            os.sched_yield()
    assert not path.exists()
