"""Room on the stack of every thread, however little the shell or container allows by itself.

A codec takes 256 KiB of stack for a page, and reading JSON that a client has nested as deep as
Python lets it takes more than 1 MiB (Python 3.13). A stack that is too small ends the process, and
with it a shard, at a client's request. The first thread's grows as far as RLIMIT_STACK says when it
grows; those of other threads are made as large as they will ever be, which takes address space.

This module must not know what runs on them.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from typing import Final

from vswapd.sizes import format_size

_WANTED: Final = 8 << 20
"""What Linux gives by default."""
_LEAST: Final = 2 << 20


def make_room() -> str | None:
    """Give the first thread, and all that come after this call, enough; forks inherit it.

    Returns:
        None, or what to do where enough cannot be had.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if _below(soft, _WANTED):
        # Root may pass the hard limit, others may get as far as that.
        for limits in ((_WANTED, _larger(hard, _WANTED)), (hard, hard)):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_STACK, limits)
                break
        soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if _below(soft, _LEAST):
        return (
            f"the stack may grow to {format_size(soft)} only (RLIMIT_STACK), where codecs and "
            f"requests need {format_size(_LEAST)}: raise it (ulimit -s {_WANTED >> 10}; "
            "LimitSTACK=8M in a unit)"
        )
    threading.stack_size(_WANTED)
    return None


def _below(limit: int, amount: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < amount


def _larger(limit: int, amount: int) -> int:
    return amount if _below(limit, amount) else limit
