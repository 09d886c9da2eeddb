"""Files of the system's that are looked at again and again, whatever becomes of them."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswapd.kept_file import KeptFile


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """As long as this lasts, nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_stands_in_it_now(tmp_path: Path) -> None:
    """Each read is from the beginning, of what was written meanwhile."""
    path = tmp_path / "file"
    path.write_text("one")
    file = KeptFile(path)
    assert file.read() == b"one"
    path.write_text("another")
    assert file.read() == file.read() == b"another"


def test_no_descriptor_is_needed(tmp_path: Path) -> None:
    """Once it is open it is read where nothing can be opened; that another is missing shows too."""
    path = tmp_path / "file"
    path.write_text("one")
    file, missing, late = KeptFile(path), KeptFile(tmp_path / "none"), KeptFile(path)
    file.read()
    with no_descriptors():
        assert file.read() == b"one"
        assert missing.read() is None
        with pytest.raises(OSError, match="Too many open files"):
            late.read()
    assert late.read() == b"one"


def test_one_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    """What has the name counts, not what had it; one that comes later is found."""
    path = tmp_path / "file"
    file = KeptFile(path)
    assert file.read() is None
    path.write_text("one")
    assert file.read() == b"one"
    path.unlink()
    assert file.read() is None
    path.write_text("two")
    assert file.read() == b"two"
    (tmp_path / "new").write_text("three")
    (tmp_path / "new").rename(path)
    assert file.read() == b"three"


def test_a_process_that_has_ended() -> None:
    """A file of /proc whose process has gone is not there, though it is open."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    file = KeptFile(Path(f"/proc/{process.pid}/stat"))
    assert file.read() is not None
    process.communicate()
    assert file.read() is None


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """What was opened is closed with it, and when it is opened anew."""
    path = tmp_path / "file"
    before = os.listdir("/proc/self/fd")
    for text in ("one", "two"):
        path.unlink(missing_ok=True)
        path.write_text(text)
        file = KeptFile(path)
        assert file.read() == text.encode()
        path.unlink()
        path.write_text(text)
        assert file.read() == text.encode()
    del file
    assert os.listdir("/proc/self/fd") == before
