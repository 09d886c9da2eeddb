"""Room on the stack of every thread, however little the shell or container allows by itself.

A codec takes 256 KiB of stack for a page, and reading JSON that a client has nested as deep as
Python lets it takes more than 1 MiB (Python 3.13). A stack that is too small ends the process, and
with it a shard, at a client's request. The first thread's grows as far as RLIMIT_STACK says when it
grows; those of other threads are made as large as they will ever be, which takes address space. So
where the limit cannot be raised, what would run on the first thread's has another one of its own.

This module must not know what runs on them.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

_WANTED: Final = 8 << 20
"""What Linux gives by default."""
_LEAST: Final = 2 << 20


def call_with_room(work: Callable[[], T]) -> T:
    """Call what a process does, with enough stack for it and for all threads that it starts.

    Processes that are forked in it have the same.
    """
    threading.stack_size(_WANTED)
    if _first_has_room():
        return work()
    with ThreadPoolExecutor(1, "first") as executor:
        return executor.submit(work).result()


def _first_has_room() -> bool:
    """Whether the first thread's stack may grow far enough, by now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if _below(soft, _WANTED):
        # Root may pass the hard limit, others may get as far as that.
        for limits in ((_WANTED, _larger(hard, _WANTED)), (hard, hard)):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_STACK, limits)
                break
        soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return not _below(soft, _LEAST)


def _below(limit: int, amount: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < amount


def _larger(limit: int, amount: int) -> int:
    return amount if _below(limit, amount) else limit
