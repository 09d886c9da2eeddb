"""Logging: one line per event, in the form that whoever reads it understands.

To the journal, lines begin with their level as sd-daemon(3) has it (`<6>`) and carry no time of
their own; to a terminal or a file they carry time and level.

This module must not know what is logged.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Final, TextIO

_LEVELS: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class _OneLine(logging.Formatter):
    """A record is one line, its traceback included: what a client wrote cannot begin another."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        lines = super().format(record).splitlines()
        text = " | ".join(line.rstrip() for line in lines if line.strip())
        return "".join(c if c.isprintable() else "?" for c in text)


class _Journal(_OneLine):
    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return f"<{_LEVELS.get(record.levelno, 6)}>{super().format(record)}"


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Log to standard error (or `stream`) from now on; called again, it changes the level."""
    root = logging.getLogger()
    if not any(isinstance(handler.formatter, _OneLine) for handler in root.handlers):
        stream = stream or sys.stderr
        handler = logging.StreamHandler(stream)
        if is_journal(stream):
            handler.setFormatter(_Journal("%(message)s"))
        else:
            handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
        logging.captureWarnings(capture=True)
    root.setLevel(level.upper())


def is_journal(stream: TextIO) -> bool:
    """Whether a stream is the journal's: its device and inode are in $JOURNAL_STREAM."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(stream.fileno())
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
