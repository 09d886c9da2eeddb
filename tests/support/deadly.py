"""A daemon that dies of certain pages: whichever process of it compresses or expands one is killed.

Run as `python deadly.py COMMAND...`, it becomes what `COMMAND` is: `python [options] -m module`.

This module must not know clients.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Final

PAGE_BYTES: Final = 4096
KILLS_STORES: Final = b"the process that compresses this page dies of it".ljust(PAGE_BYTES, b"x")
KILLS_LOADS: Final = b"the process that expands this page dies of it".ljust(PAGE_BYTES, b"y")
UNDER: Final = (sys.executable, __file__)
"""What to put before a daemon's command."""


def _patch() -> None:
    from vswapd_backends.codec import Buffer, Lz4

    compress, decompress = Lz4.compress, Lz4.decompress

    def deadly_compress(codec: Lz4, pages: Iterable[Buffer]) -> list[bytes]:
        known = list(pages)
        if any(bytes(page) == KILLS_STORES for page in known):
            os.kill(os.getpid(), signal.SIGKILL)
        return compress(codec, known)

    def deadly_decompress(codec: Lz4, entries: Sequence[Buffer]) -> list[bytes]:
        pages = decompress(codec, entries)
        if KILLS_LOADS in pages:
            os.kill(os.getpid(), signal.SIGKILL)
        return pages

    setattr(Lz4, "compress", deadly_compress)  # noqa: B010 - a method is not to be assigned to
    setattr(Lz4, "decompress", deadly_decompress)  # noqa: B010


def main() -> None:
    """Be the daemon."""
    words = sys.argv[1:]
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    _patch()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
