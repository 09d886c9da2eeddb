"""Pages of live processes: their anonymous private memory that is present, as an array.

What a swap would be given is taken as it lies in memory: heaps, stacks, anonymous maps, and the
pages of files' private maps that were written to. What is shared, backed by a file, or not there
is left alone, so nothing is faulted in.

Invariants:
- A page is captured at most once, and only if the kernel says that it is present and anonymous.
- Zero pages are kept and told apart: they are never counted as data.
- The process goes on running; what it changes meanwhile is captured before or after the change.

This module must not know what is done with the pages.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

PAGE_BYTES: Final = 4096
Pages = npt.NDArray[np.uint8]
"""Pages, shape (n, PAGE_BYTES)."""

_PRESENT: Final = np.uint64(1 << 63)
_NOT_ANONYMOUS: Final = np.uint64(1 << 61)
"""Bits of /proc/PID/pagemap: see Documentation/admin-guide/mm/pagemap.rst of Linux."""
_NOT_MEMORY: Final = ("[vvar", "[vsyscall]", "[vdso]")
_SPREAD_PAGES: Final = 64
"""Part of a process is taken in runs of so many neighbouring pages."""
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
_GONE: Final = frozenset({errno.EIO, errno.EFAULT})
"""What a read of /proc/PID/mem answers where nothing is mapped any more."""


class CaptureError(Exception):
    """The memory of a process cannot be read; the text says what forbids it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """The memory of one process at one time."""

    pid: int
    pages: Pages
    """In the order of their addresses, zero pages among them; shape (n, PAGE_BYTES)."""
    zero: npt.NDArray[np.bool_]
    """Which of them are zero, shape (n,)."""

    @property
    def zero_pages(self) -> int:
        """How many are zero."""
        return int(self.zero.sum())

    @property
    def data(self) -> Pages:
        """A copy of the pages that are not zero, shape (n - zero_pages, PAGE_BYTES)."""
        return self.pages[~self.zero]


def capture(pid: int, most: int | None = None) -> Capture:
    """Read the anonymous private pages of a process that are present.

    Works without privileges on one's own children.

    Args:
        pid: the process.
        most: at most this many pages, in runs spread over all of them; None: all.

    Raises:
        CaptureError: there is no such process, or its memory may not be read.
    """
    try:
        addresses = present_addresses(pid)
        if most is not None and len(addresses) > most:
            addresses = _spread(addresses, most)
        pages = _read(pid, addresses)
    except (ProcessLookupError, FileNotFoundError):
        raise CaptureError(f"there is no process {pid}") from None
    except PermissionError:
        raise CaptureError(_why_forbidden(pid, _YAMA)) from None
    return Capture(pid=pid, pages=pages, zero=zero_pages(pages))


def zero_pages(pages: Pages) -> npt.NDArray[np.bool_]:
    """Which pages are zero, shape (n,)."""
    empty: npt.NDArray[np.bool_] = np.logical_not(np.any(pages.view(np.uint64), axis=1))
    return empty


def present_addresses(pid: int) -> npt.NDArray[np.int64]:
    """Where a process has anonymous private pages that are present; ascending, shape (n,).

    Raises:
        OSError: no such process, or it may not be looked at.
    """
    found = [np.empty(0, np.int64)]
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end in _private_maps(pid):
            count = (end - start) // PAGE_BYTES
            bits = np.frombuffer(
                os.pread(pagemap.fileno(), count * 8, start // PAGE_BYTES * 8), np.uint64
            )
            wanted = np.flatnonzero((bits & (_PRESENT | _NOT_ANONYMOUS)) == _PRESENT)
            found.append(wanted * PAGE_BYTES + start)
    return np.concatenate(found)


def _private_maps(pid: int) -> Iterator[tuple[int, int]]:
    """Start and end of every private map that is memory and can be read."""
    # A file's name is in the file system's encoding, and may hold anything but a newline.
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").split("\n")[:-1]:
        span, modes, _, _, _, *name = line.split(maxsplit=5)
        if modes[0] == "r" and modes[3] == "p" and not "".join(name).startswith(_NOT_MEMORY):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)


def _spread(addresses: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """`most` of more addresses, in runs that lie evenly over all of them."""
    runs = max(1, most // _SPREAD_PAGES)
    length = min(most, _SPREAD_PAGES)
    starts = np.linspace(0, len(addresses) - length, runs).astype(np.int64)
    chosen: npt.NDArray[np.int64] = addresses[(starts[:, None] + np.arange(length)).ravel()]
    return chosen


def _read(pid: int, addresses: npt.NDArray[np.int64]) -> Pages:
    """The pages at ascending addresses, without those that have gone meanwhile."""
    pages = np.empty((len(addresses), PAGE_BYTES), np.uint8)
    buffer = pages.reshape(-1).data
    breaks = np.flatnonzero(np.diff(addresses) != PAGE_BYTES) + 1
    edges = [0, *breaks.tolist(), len(addresses)]
    filled = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, last in itertools.pairwise(edges):
            page = first
            while page < last:
                room = buffer[filled * PAGE_BYTES : (filled + last - page) * PAGE_BYTES]
                got = _read_run(memory, room, int(addresses[page]))
                filled += got
                # A page that has gone is passed over.
                page += max(got, 1)
    finally:
        os.close(memory)
    return pages[:filled]


def _read_run(memory: int, room: memoryview, address: int) -> int:
    """Read neighbouring pages; how many whole ones there were before the first that has gone."""
    try:
        return os.preadv(memory, [room], address) // PAGE_BYTES
    except OSError as error:
        if error.errno in _GONE:
            return 0
        raise


def _why_forbidden(pid: int, yama: Path) -> str:
    text = f"the memory of process {pid} may not be read"
    try:
        scope = int(yama.read_text())
    except (OSError, ValueError):
        return f"{text}: it is another user's, or the container forbids it"
    reasons = {
        0: "it is another user's",
        1: "kernel.yama.ptrace_scope is 1: only that of one's own children may",
        2: "kernel.yama.ptrace_scope is 2: only root may",
        3: "kernel.yama.ptrace_scope is 3: nobody may, until the next boot",
    }
    return f"{text}: {reasons.get(scope, f'kernel.yama.ptrace_scope is {scope}')}"
