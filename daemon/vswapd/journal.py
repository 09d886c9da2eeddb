"""Logging: one line per event, in the form that whoever reads it understands.

To the journal, lines begin with their level as sd-daemon(3) has it (`<6>`), and carry no time of
their own; to a terminal or a file they carry time and level.

This module must not know what is logged.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

_LEVELS: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class _Journal(logging.Formatter):
    """Every line of a record is given its level: the journal makes an entry of each."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_LEVELS.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def set_up(level: str) -> None:
    """Log to standard error from now on; may be called again to change the level."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        if _is_journal():
            handler.setFormatter(_Journal("%(message)s"))
        else:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
    root.setLevel(level.upper())


def _is_journal() -> bool:
    """Whether standard error is the journal's stream: device and inode are in $JOURNAL_STREAM."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(sys.stderr.fileno())
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
