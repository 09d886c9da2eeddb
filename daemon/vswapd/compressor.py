"""Compresses the pages of requests outside the engine's lock: large requests a turn at a time.

This module must not know requests, or where their pages come from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Final

from vswapd.folio import Folio, join, prepare
from vswapd.vswap import Engine
from vswapd_backends.base import PAUSE, Compute, Operation, turns_of

_SLOW_S: Final = 0.008
"""A turn that takes longer is compressed in a worker: all connections would wait. A worker costs
50 us and takes turns with the loop for the interpreter, so that short ones lose."""
_TURN_PAGES: Final = 16
"""Pages that are compressed in one turn of a large request: 0.1 ms with lz4."""
_UNKNOWN_S: Final = 0.001
"""What a page is thought to cost before the codec was measured."""

Read = Callable[[slice], memoryview]
"""Some pages of a request. Called once for each, in any thread."""


class Compressor:
    """Makes folios, and measures the codecs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._page_s: dict[str, float] = {}
        """Seconds per page, by codec: a running mean."""

    def prepare(self, count: int, read: Read) -> Operation[Folio]:
        """A folio of `count` pages, 1 or more; see `folio.prepare`."""
        core = self._engine.core
        # One codec for all of them, whatever is set meanwhile.
        codec, pool = core.settings.codec, core.zswap.current
        parts = []
        for turn in turns_of(count, _TURN_PAGES):
            if turn.start:
                yield PAUSE

            def compress(turn: slice = turn) -> Folio:
                begun = perf_counter()
                folio = prepare(pool, read(turn))
                cost = (perf_counter() - begun) / folio.pages
                self._page_s[codec] = cost + 0.9 * (self._page_s.get(codec, cost) - cost)
                return folio

            known = self._page_s.get(codec, _UNKNOWN_S)
            part = Compute(compress, (turn.stop - turn.start) * known > _SLOW_S)
            yield part
            parts.append(part.result())
        if len(parts) == 1:
            return parts[0]
        yield PAUSE
        whole = Compute(partial(join, parts))
        yield whole
        return whole.result()
