"""The demo, run as a user runs it, and what it does when something is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
from support.daemon import daemon_environment
from support.status_documents import BUSY, EMPTY
from vswapd import demo
from vswapd.capture import Capture, zero_pages

SMALL = ("--size", "64M", "--pool", "8M")


def start(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The demo as a process; its temporary files are in that directory, if that is on a disk.

    Ctrl-C ends it also where this process ignores SIGINT, as those that a script has put into the
    background do.
    """
    command = [sys.executable, "-W", "error", "-m", "vswapd.demo", *arguments]
    return subprocess.Popen(
        ["env", "--default-signal=INT", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=daemon_environment({"TMPDIR": str(directory)} | environment),
        start_new_session=True,
    )


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for that of a socket; empty again at the end."""
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        yield Path(name)


def test_the_demo_does_it_all_and_leaves_nothing(short_path: Path) -> None:
    """Stored, shown, loaded, compared, freed: exit code 0, no file left, all without a terminal."""
    process = start(short_path, *SMALL)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert "vswapctl status" in out
    assert "of RAM saved" in out
    assert "byte for byte" in out
    assert "freed: pool 0 B, table 0 B, device 0 B" in out
    assert "us per page" in out
    assert "\x1b" not in out
    assert not own_directory(out).exists()
    assert not list(short_path.iterdir())


def own_directory(out: str) -> Path:
    """Where the demo says that its files are."""
    found = re.search(r"^in (/.*), encrypted", out, re.MULTILINE)
    assert found, out
    return Path(found[1])


def test_ctrl_c_cleans_up(short_path: Path) -> None:
    """Interrupted while the daemon runs, it ends with 130, and leaves no file and no daemon."""
    process = start(short_path, *SMALL, PYTHONUNBUFFERED="1")
    assert process.stdout is not None
    out = ""
    for line in process.stdout:
        out += line
        if line.startswith("captured from"):
            break
    directory = own_directory(out)
    daemons = _pids_with(str(directory))
    assert daemons
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; everything was removed\n"
    assert not directory.exists()
    assert not list(short_path.iterdir())
    assert not _pids_with(str(directory))


def _pids_with(text: str) -> list[int]:
    """Processes whose command line has `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in line:
                found.append(int(entry.name))
    return found


# Parts of it


class FakeSpace:
    """A space that keeps pages, and may spoil one."""

    def __init__(self, pages: np.ndarray[Any, Any], spoil: int | None = None) -> None:
        self.pages = pages.copy()
        if spoil is not None:
            self.pages[spoil, 4095] ^= 1

    def load(self, slots: np.ndarray[Any, Any], into: np.ndarray[Any, Any]) -> None:
        into[:] = self.pages[slots]


def held(count: int, spoil: int | None = None) -> demo.Held:
    pages = np.random.default_rng(1).integers(0, 256, (count, 4096), np.uint8)
    space: Any = FakeSpace(pages, spoil)
    captured = Capture(pid=1, pages=pages, zero=zero_pages(pages))
    return demo.Held(
        name="fake", space=space, captured=captured, slots=np.arange(count, dtype=np.uint64)
    )


@pytest.mark.parametrize("spoil", [0, 1023, 1024, 2499])
def test_one_wrong_byte_is_found(spoil: int) -> None:
    """A single byte of any page that comes back different is an error."""
    with pytest.raises(demo.DemoError, match="1 pages came back with other bytes"):
        demo.load_back([held(300), held(2500, spoil)], lambda _: None)


def test_every_page_is_loaded_once() -> None:
    """All pages of all programs are loaded and compared, each once."""
    counts: list[int] = []
    demo.load_back([held(2500), held(300)], counts.append)
    assert sum(counts) == 2800


def test_a_wrong_byte_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """What the demo finds wrong ends it with 1, in one line."""

    def find(*_: object) -> None:
        raise demo.DemoError("7 pages came back with other bytes")

    monkeypatch.setattr(demo, "show", find)
    assert demo.main([]) == 1
    assert capfd.readouterr().err == "vswapctl demo: 7 pages came back with other bytes\n"


def changed(document: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    return {**document, **{key: {**document[key], **value} for key, value in parts.items()}}


def test_too_little_use_is_an_error() -> None:
    """If zero, zswap or phys has hardly a page, the demo has not shown what it is to show."""
    slots = {"allocated": 1000, "unbacked": 0, "lost": 0, "zero": 20, "zswap": 400, "phys": 580}
    demo.check_used(changed(BUSY, slots=slots))
    for state in ("zero", "zswap", "phys"):
        with pytest.raises(demo.DemoError, match=f"only 19 of 1000 pages are {state}"):
            demo.check_used(changed(BUSY, slots=slots | {state: 19}))


@pytest.mark.parametrize(
    "parts",
    [{"slots": {"allocated": 1}}, {"pool": {"bytes": 4096}}, {"table": {"bytes": 4096}}],
)
def test_empty_means_nothing_anywhere(parts: dict[str, Any]) -> None:
    """A slot, memory of the pool or the table, or device space: any of them is not empty."""
    assert demo.is_empty(EMPTY)
    assert not demo.is_empty(changed(EMPTY, **parts))
    assert not demo.is_empty({**EMPTY, "devices": [{"used_bytes": 262144}]})


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status that is never reached is an error that says what was waited for."""
    monkeypatch.setattr(demo, "_PATIENCE_S", 0.0)
    space: Any = type("Space", (), {"status": lambda self: EMPTY})()
    assert demo.await_status(space, "peace", lambda _: True) is EMPTY
    with pytest.raises(demo.DemoError, match="in vain: peace"):
        demo.await_status(space, "peace", lambda _: False)


def test_a_daemon_that_does_not_start_is_told_with_its_log(short_path: Path) -> None:
    """The log of a daemon that cannot start is in the error."""
    (short_path / "swap").mkdir()
    with (
        pytest.raises(demo.DemoError, match=r"(?s)did not start:.*is a directory"),
        demo.own_daemon(short_path, 8 << 20, 16 << 20),
    ):
        pass


def test_the_daemon_ends_with_its_block(short_path: Path) -> None:
    """When the block raises, the daemon is gone all the same."""
    with (  # noqa: PT012 - the block is what is tested
        pytest.raises(ZeroDivisionError),
        demo.own_daemon(short_path, 8 << 20, 16 << 20) as (socket_path, pid),
    ):
        with vswap.connect(socket_path) as space:
            assert space.status()["pid"] == pid
        raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "1M"], "at least 64M"),
        (["--size", "128M", "--pool", "48M"], "at most 1/6"),
        (["--size", "12Q"], "write 512M"),
        (["--colour"], "unrecognized"),
    ],
)
def test_wrong_options(arguments: list[str], text: str, capsys: Any) -> None:
    """Options that make no demo are refused with what would be right."""
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_no_room_is_told_before_anything_is_made() -> None:
    """A swap file that fits nowhere is refused with the places that were looked at."""
    with pytest.raises(demo.DemoError, match="no room for 1024 TiB"):
        demo._disk(1 << 50)


def test_file_systems_in_memory_are_known() -> None:
    """The file system of a directory is that of the nearest mount point above it."""
    mounts = {"/": "ext4", "/proc": "proc", "/dev/shm": "tmpfs"}
    assert demo._file_system("/proc/self", mounts) == "proc"
    assert demo._file_system("/usr/lib", mounts) == "ext4"
