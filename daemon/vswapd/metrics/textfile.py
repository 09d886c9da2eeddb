"""The metrics as a text file, for node_exporter's textfile collector.

Invariants:
- The file is replaced as a whole: a reader never sees half of it.
- It is gone when its writer is closed: old numbers would look like new ones. What somebody else has
  put in its place is not.

This module must not know what is measured.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final, Self

from prometheus_client import generate_latest

from vswapd.causes import explained
from vswapd.metrics.families import Snapshot, registry
from vswapd.whole_file import WholeFile

PERIOD_S: Final = 15.0
"""How often it is written: Prometheus's usual interval of scraping."""
MODE: Final = 0o644
"""node_exporter runs as a user of its own."""

_log = logging.getLogger(__name__)


def write_textfile(path: Path, snapshot: Snapshot) -> WholeFile:
    """Replace the file with the numbers of now.

    Raises:
        OSError: it cannot be written; the old one is as it was and nothing is left beside it.
    """
    return WholeFile.write(path, generate_latest(registry(snapshot)), mode=MODE)


class TextfileWriter:
    """Writes the file every `period_s` seconds, in a thread of its own; a context manager.

    Args:
        path: the file; its directory must exist.
        snapshot: gives a STATUS document; called from the thread.
        period_s: seconds between two times.
        first: the file as it was written a moment ago; owned from now on. None: it was not.
    """

    def __init__(
        self,
        path: Path,
        snapshot: Snapshot,
        *,
        period_s: float = PERIOD_S,
        first: WholeFile | None = None,
    ) -> None:
        self._path = path
        self._snapshot = snapshot
        self._period_s = period_s
        self._file = first
        """What was written last."""
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-textfile")
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the file, unless somebody has put another one in its place."""
        self._stop.set()
        self._thread.join()
        if self._file is not None:
            self._file.remove()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        """Write the file once; a failure is told once, until there is a success again."""
        try:
            written = write_textfile(self._path, self._snapshot)
        except Exception as error:  # noqa: BLE001 - the thread must go on, and it is told
            if not self._failing:
                why = explained(error)
                _log.error("metrics.textfile: %s cannot be written: %s", self._path, why)
            self._failing = True
        else:
            if self._file is not None:
                self._file.close()
            self._file = written
            self._failing = False

    def _run(self) -> None:
        if self._file is None:
            self.step()
        while not self._stop.wait(self._period_s):
            self.step()
