"""The metrics as a text file, for node_exporter's textfile collector.

Invariants:
- The file is replaced as a whole: a reader never sees half of it.
- It is gone when its writer is closed: old numbers would look like new ones.

This module must not know what is measured.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Final, Self

from prometheus_client import generate_latest

from vswapd.metrics.families import Snapshot, registry

PERIOD_S: Final = 15.0
"""How often it is written: Prometheus's usual interval of scraping."""
MODE: Final = 0o644
"""node_exporter runs as a user of its own."""

_log = logging.getLogger(__name__)


def write_textfile(path: Path, snapshot: Snapshot) -> None:
    """Replace the file with the numbers of now.

    Raises:
        OSError: it cannot be written; the old one is as it was and nothing is left beside it.
    """
    text = generate_latest(registry(snapshot))
    # node_exporter reads *.prom: what is not finished must be called otherwise.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(text)
        unfinished.chmod(MODE)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class TextfileWriter:
    """Writes the file every `period_s` seconds, in a thread of its own; a context manager.

    Args:
        path: the file; its directory must exist.
        snapshot: gives a STATUS document; called from the thread.
        period_s: seconds between two times.
    """

    def __init__(self, path: Path, snapshot: Snapshot, *, period_s: float = PERIOD_S) -> None:
        self._path = path
        self._snapshot = snapshot
        self._period_s = period_s
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-textfile")
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the file."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        """Write the file once; a failure is told once, until there is a success again."""
        try:
            write_textfile(self._path, self._snapshot)
        except Exception as error:  # noqa: BLE001 - the thread must go on, and it is told
            if not self._failing:
                _log.error("metrics.textfile: %s cannot be written: %s", self._path, error)
            self._failing = True
        else:
            self._failing = False

    def _run(self) -> None:
        self.step()
        while not self._stop.wait(self._period_s):
            self.step()
