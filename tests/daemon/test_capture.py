"""Capturing the memory of live processes, and the programs that are there to be captured."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vswapd import capture as capturing
from vswapd import live_programs
from vswapd.capture import CaptureError, capture, present_addresses

# Touches 300 pages of data and 100 zero pages, leaves 50 untouched, and shares or maps from a file
# what must not be captured.
PROGRAM = """
import mmap, os, signal, sys
data = mmap.mmap(-1, 450 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(300):
    data[i * 4096 : i * 4096 + 4096] = (b"%08d" % i) * 512
for i in range(300, 400):
    data[i * 4096] = 1
    data[i * 4096] = 0
shared = mmap.mmap(-1, 64 * 4096)
for i in range(64):
    shared[i * 4096 : i * 4096 + 4096] = b"shared.." * 512
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    sum(mapped[::4096])
    copied = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    copied[:8] = b"written."
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[int]:
    """A process with memory of every kind; its pid."""
    path = tmp_path / "file"
    path.write_bytes(b"fromfile" * 512 * 16)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)])
    # Stopped, it touches no further page.
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    yield process.pid
    process.kill()
    process.wait()


def count_pages(pages: capturing.Pages, start: bytes, rest: bytes = b"") -> int:
    """Pages that are wholly these bytes: parts of them lie elsewhere in the heap, too."""
    wanted = start + (rest or start) * 511
    return sum(page.tobytes() == wanted for page in pages)


def test_every_touched_anonymous_page_is_captured(program: int) -> None:
    """Each page that the process wrote to is captured, once, with its bytes."""
    pages = capture(program).pages
    for number in range(300):
        assert count_pages(pages, b"%08d" % number) == 1


def test_shared_and_file_pages_are_left_alone(program: int) -> None:
    """Shared memory and pages of files are no anonymous private pages; written copies are."""
    pages = capture(program).pages
    assert count_pages(pages, b"shared..") == 0
    assert count_pages(pages, b"fromfile") == 0
    assert count_pages(pages, b"written.", b"fromfile") == 1


def test_zero_pages_are_told_apart(program: int) -> None:
    """Zero pages that are present are counted as zero, and are not among the data."""
    found = capture(program)
    assert found.zero_pages >= 100
    assert len(found.data) == len(found.pages) - found.zero_pages
    assert found.data.any(axis=1).all()
    assert not found.pages[found.zero].any()


def test_nothing_is_faulted_in(program: int) -> None:
    """Capturing a process gives it no page that it did not have."""
    before = present_addresses(program)
    found = capture(program)
    assert np.array_equal(present_addresses(program), before)
    assert len(found.pages) == len(before)


@pytest.mark.parametrize("most", [1, 63, 64, 200])
def test_a_part_is_spread_over_the_process(program: int, most: int) -> None:
    """With a limit, at most so many pages are captured, none twice."""
    found = capture(program, most)
    assert most - 64 < len(found.pages) <= most
    data = [page.tobytes() for page in found.data if page[:8].tobytes().isdigit()]
    assert len(set(data)) == len(data)


def test_pages_that_go_meanwhile_are_passed_over(
    program: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is unmapped between looking and reading is left out; the others are captured."""
    present = present_addresses(program)
    gone = np.array([1 << 20, (1 << 20) + 4096])
    monkeypatch.setattr(
        capturing, "present_addresses", lambda _: np.concatenate((gone, present)).astype(np.int64)
    )
    found = capture(program)
    assert len(found.pages) == len(present)
    assert count_pages(found.pages, b"00000299") == 1


def test_a_process_that_is_gone() -> None:
    """The pid of no process is one clear error."""
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(CaptureError, match=f"no process {process.pid}"):
        capture(process.pid)


def test_a_process_that_forbids_it(program: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that may not be read is one clear error."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(CaptureError, match=f"the memory of process {program} may not be read"):
        capture(program)


@pytest.mark.parametrize(
    ("scope", "reason"), [("0", "another user's"), ("1", "children"), ("2", "root"), ("9", "is 9")]
)
def test_the_error_names_what_forbids_it(tmp_path: Path, scope: str, reason: str) -> None:
    """The error says what the kernel's setting means."""
    (tmp_path / "scope").write_text(scope + "\n")
    assert reason in capturing._why_forbidden(7, tmp_path / "scope")


def test_without_yama_the_error_says_so(tmp_path: Path) -> None:
    """A kernel without that setting is no reason for a traceback."""
    assert "container" in capturing._why_forbidden(7, tmp_path / "missing")


# The programs


@contextmanager
def grown(name: str, megabytes: int = 64) -> Iterator[live_programs.LiveProgram]:
    with live_programs.running({name: megabytes}) as (one,):
        yield one


@pytest.mark.parametrize("name", [*live_programs.OURS, *live_programs.OTHERS])
def test_programs_grow_to_their_size(name: str) -> None:
    """Each program is as big as it was told, and most of its pages are data."""
    if not live_programs.installed(name):
        pytest.skip(f"{name} is not installed")
    with grown(name) as program:
        found = capture(program.pid)
    assert len(found.data) * 4096 > 24 << 20
    assert len(found.pages) * 4096 < 128 << 20


def test_a_program_may_warn_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perl complains of a locale that is not installed: the program is ready all the same."""
    script = "print('warning: no locale %d'); print('ready', flush=True); input()"
    monkeypatch.setattr(
        live_programs, "_FOREIGN", {"perl": ("warns", (sys.executable, "-c", script))}
    )
    with grown("perl") as program:
        os.kill(program.pid, 0)


def test_programs_end_with_the_block() -> None:
    """After the block no program is left."""
    with grown("arrays") as program:
        os.kill(program.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(program.pid, 0)


def test_programs_end_with_their_starter() -> None:
    """A program whose starter is killed reads the end of its input, and ends."""
    script = (
        "from vswapd import live_programs\n"
        "with live_programs.running({'arrays': 64}) as (one,):\n"
        "    print(one.pid, flush=True)\n"
        "    input()\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert starter.stdout is not None
    pidfd = os.pidfd_open(int(starter.stdout.readline()))
    try:
        starter.send_signal(signal.SIGKILL)
        starter.communicate()
        waiting = select.poll()
        waiting.register(pidfd)
        assert waiting.poll(30_000), "the program outlives its starter"
    finally:
        os.close(pidfd)


def test_a_program_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends before it is ready is an error with what it said."""
    monkeypatch.setattr(
        live_programs,
        "_FOREIGN",
        {"perl": ("broken", (sys.executable, "-c", "import sys; sys.exit('no %d today')"))},
    )
    with (
        pytest.raises(live_programs.ProgramFailedError, match="no 64 today"),
        live_programs.running({"perl": 64}),
    ):
        pass
