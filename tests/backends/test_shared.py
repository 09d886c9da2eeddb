"""Sparse shared memory: free until it is written, and free again when it is punched."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from support.privileges import skip_unless_locking
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion

MANY = 1 << 40
WITHOUT_RIGHTS = """
import os, resource
from vswapd_backends.shared import SharedRegion

resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
region = SharedRegion("test", 65536)
try:
    region.lock()
except OSError as error:
    print(error.errno, error.strerror.partition(":")[0])
region.view[0] = 7
print(region.view[0])
"""


def test_an_untouched_region_costs_nothing() -> None:
    """A terabyte of address space takes no memory, and reads as zeros where it is looked at."""
    region = SharedRegion("test", MANY)
    assert region.size == MANY
    assert region.resident_bytes == 0


def test_pages_appear_when_written_and_go_when_punched() -> None:
    """Memory is what was written, to the page; what is punched is zeros, its neighbours are not."""
    region = SharedRegion("test", 1 << 30)
    array = region.bytes_array()
    for number in (3, 4, 5, 100):
        array[number * SYSTEM_PAGE] = number
    assert region.resident_bytes == 4 * SYSTEM_PAGE
    region.punch(4 * SYSTEM_PAGE, 2 * SYSTEM_PAGE)
    assert region.resident_bytes == 2 * SYSTEM_PAGE
    assert [int(array[n * SYSTEM_PAGE]) for n in (3, 4, 5, 100)] == [3, 0, 0, 100]
    region.punch(0, region.size)
    assert region.resident_bytes <= 2 * SYSTEM_PAGE  # pages of zeros that were just looked at
    assert not array[100 * SYSTEM_PAGE]


def test_the_size_is_rounded_up_to_pages() -> None:
    """A region is whole pages, at least as large as was asked for."""
    assert SharedRegion("test", 1).size == SYSTEM_PAGE
    assert SharedRegion("test", SYSTEM_PAGE).size == SYSTEM_PAGE
    assert SharedRegion("test", SYSTEM_PAGE + 1).size == 2 * SYSTEM_PAGE


def test_all_views_are_the_same_bytes() -> None:
    """Bytes, words, the view, and another mapping of the descriptor show one memory."""
    region = SharedRegion("test", SYSTEM_PAGE)
    region.words_array()[1] = 0x0807060504030201
    assert region.bytes_array()[8:16].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert bytes(region.view[8:10]) == b"\1\2"
    with mmap.mmap(region.fd, region.size) as other:
        assert other[8:16] == bytes(range(1, 9))
        other[0] = 7
    assert region.view[0] == 7


def test_nobody_can_truncate_it() -> None:
    """The file is sealed: shrinking (a SIGBUS for its readers) and growing are refused."""
    region = SharedRegion("test", 4 * SYSTEM_PAGE)
    for size in (0, SYSTEM_PAGE, 8 * SYSTEM_PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    assert fcntl.fcntl(region.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_punching_what_cannot_be_punched_is_an_error() -> None:
    """The kernel's refusal is an OSError that names the place; the bytes are what they were."""
    region = SharedRegion("test", SYSTEM_PAGE)
    region.view[0] = 9
    with pytest.raises(OSError, match=f"punching 0 bytes at {SYSTEM_PAGE}"):
        region.punch(SYSTEM_PAGE, 0)
    assert region.view[0] == 9


def test_locking_does_not_fill_the_region() -> None:
    """Pages are locked from their first touch on, not made by the lock."""
    skip_unless_locking(64 * SYSTEM_PAGE)
    region = SharedRegion("test", 64 * SYSTEM_PAGE)
    region.view[0] = 1
    region.lock()
    assert region.resident_bytes == SYSTEM_PAGE
    region.view[SYSTEM_PAGE] = 1
    assert region.resident_bytes == 2 * SYSTEM_PAGE


def test_a_region_that_cannot_be_locked_says_so() -> None:
    """Beyond what may be locked it is an OSError that names the size; the region stays usable."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # ENOMEM where RLIMIT_MEMLOCK is all that is in the way, EPERM of a filter of system calls.
    assert ended.stdout.partition(" ")[2] == "locking 65536 bytes in memory\n7\n"
    assert int(ended.stdout.partition(" ")[0]) in {errno.ENOMEM, errno.EPERM}
    assert ended.stderr == ""


def test_the_descriptor_is_closed_with_the_region() -> None:
    """No descriptor is left behind, and arrays of the region live on without it."""
    region = SharedRegion("test", SYSTEM_PAGE)
    fd, array = region.fd, region.bytes_array()
    array[0] = 5
    del region
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert array[0] == 5
    assert np.count_nonzero(array) == 1
