"""Both ways out for metrics, switched on and off as the configuration says, also at run time.

This module must not know what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from vswapd.metrics.families import Snapshot
from vswapd.metrics.page import MetricsServer, start
from vswapd.metrics.textfile import TextfileWriter


class Exporter:
    """Nothing at first; `apply` says what is to be served and written. A context manager.

    Args:
        snapshot: gives a STATUS document; called from threads.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._listen = self._textfile = ""
        self._page: MetricsServer | None = None
        self._writer: TextfileWriter | None = None

    def apply(self, listen: str, textfile: str) -> None:
        """Serve and write what metrics.listen and metrics.textfile say; "" is off.

        Only what differs from before is touched, and the old page goes only once the new one is
        there.

        Raises:
            ConfigError: the new page cannot be served; all is as it was.
        """
        if listen != self._listen:
            page = start(listen, self._snapshot) if listen else None
            if self._page is not None:
                self._page.close()
            self._page, self._listen = page, listen
        if textfile != self._textfile:
            # The old one first: it removes its file, which may be the same one.
            if self._writer is not None:
                self._writer.close()
            self._writer = TextfileWriter(Path(textfile), self._snapshot) if textfile else None
            self._textfile = textfile

    def close(self) -> None:
        """Switch both off."""
        self.apply("", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
