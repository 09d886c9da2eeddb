"""Both ways out for metrics, switched on and off as the configuration says, also at run time.

This module must not know what is measured.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

from vswapd.config import ConfigError
from vswapd.metrics.families import Snapshot
from vswapd.metrics.page import MetricsServer, start
from vswapd.metrics.textfile import TextfileWriter, write_textfile


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

    def apply(self, listen: str, textfile: str, *, tried: bool = True) -> None:
        """Serve and write what metrics.listen and metrics.textfile say; "" is off.

        Args:
            listen: where to serve the page.
            textfile: the file to write.
            tried: whether a new file has to be written once before this is done; else the journal
                says so if it cannot be, and it is tried again for ever.

        Only what differs from before is touched, and the old page and file go only once the new
        ones are there.

        Raises:
            ConfigError: the new page cannot be served, or the new file not be written; all is as
                it was.
        """
        page, writer = self._page, self._writer
        with contextlib.ExitStack() as undo:
            if listen != self._listen:
                page = start(listen, self._snapshot) if listen else None
                if page is not None:
                    undo.callback(page.close)
            if textfile != self._textfile:
                writer = self._write(Path(textfile), tried=tried) if textfile else None
            undo.pop_all()
        if self._page is not None and page is not self._page:
            self._page.close()
        if self._writer is not None and writer is not self._writer:
            self._writer.close()
        self._page, self._listen = page, listen
        self._writer, self._textfile = writer, textfile

    def _write(self, path: Path, *, tried: bool) -> TextfileWriter:
        if not tried:
            return TextfileWriter(path, self._snapshot)
        try:
            # At once: later nobody would hear of it who has asked for it.
            first = write_textfile(path, self._snapshot)
        except OSError as error:
            text = (
                f"{path} cannot be written: {error.strerror}: name a file in a folder that exists"
            )
            raise ConfigError(text, key="metrics.textfile") from None
        try:
            return TextfileWriter(path, self._snapshot, first=first)
        except BaseException:
            first.remove()
            raise

    def close(self) -> None:
        """Switch both off."""
        self.apply("", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
