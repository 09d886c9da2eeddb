"""A client that can be killed: in a process of its own, with pages that it has stored.

This module must not know what becomes of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.wire import Wire

_FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def mortal(path: Path, pages: bytes, **said: Any) -> Iterator[str]:
    """One that has greeted and stored; gives its token. At the end of the block it is killed."""
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_live, args=(path, pages, said, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()


def _live(path: Path, pages: bytes, said: dict[str, Any], pipe: Connection) -> None:
    with Wire(path) as wire:
        token = wire.hello(**said)["token"]
        assert wire.store(pages).status == 0
        pipe.send(token)
        pipe.recv()
