"""Lines in the journal for what may go wrong a million times: the first, then ever fewer.

Invariants:
- Of n events of one kind at most log2(n) + 1 are told: the 1st, 2nd, 4th, 8th, ...

This module must not know what is done about it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Final

from vswapd_backends.base import IoKind, IoRequest

_LOG: Final = logging.getLogger(__name__)
_VERBS: Final = {IoKind.READ: "reads", IoKind.WRITE: "writes", IoKind.DISCARD: "discards"}


_PAGES: Final = "pages"
_NOT_OURS: Final = (OSError, ValueError, MemoryError)
"""What the system does, or says; anything else is a mistake of ours."""


class Trouble:
    """Counts events by kind, and says which are worth a line. Any thread may call."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._counts: Final[Counter[str]] = Counter()

    def of_devices(self, requests: Iterable[IoRequest]) -> None:
        """Tell of those requests that failed."""
        for request in requests:
            if request.error is None:
                continue
            what = f"{request.device.path}: {_VERBS[request.kind]} fail"
            if count := self._told(what):
                _LOG.error("%s (%d so far), the last with: %s", what, count, request.error)

    def of_pages(self, client: str, error: Exception) -> None:
        """Tell that a client has asked for pages that are lost."""
        if count := self._told(_PAGES):
            _LOG.error("%s: %s (%d such requests so far)", client, error, count)

    def of_housekeeping(self, what: str, error: Exception) -> None:
        """Tell that something besides requests has failed; a mistake of ours with its traceback."""
        if not (count := self._told(what)):
            return
        mistake = None if isinstance(error, _NOT_OURS) else error
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        _LOG.error("%s (%d so far), the last: %s%s", what, count, name, why, exc_info=mistake)

    def _told(self, kind: str) -> int:
        """One more of a kind: its number if it is to be told, else 0."""
        with self._lock:
            self._counts[kind] += 1
            count = self._counts[kind]
        return 0 if count & (count - 1) else count
