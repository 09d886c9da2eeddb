"""Logging: one line per event, in the form that whoever reads it understands.

To the journal, lines begin with their level as sd-daemon(3) has it (`<6>`) and carry no time of
their own; to a terminal or a file they carry time and level.

Invariants:
- Whoever logs never waits for who reads it. A line is written at once if it is taken at once, and
  waits if not; from `begin` on a thread writes what waits.
- What waits is bounded. What has no room is dropped and counted, and the number stands in the log
  where the lines would have stood.
- A process that ends gives its last lines a moment, and no more.

This module must not know what is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TextIO

_LEVELS: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
_MOST_WAITING: Final = 256 << 10
"""Bytes of lines that wait for their reader: some 2000. A pipe holds 64 KiB itself."""
_PIECE: Final = select.PIPE_BUF
"""What a pipe takes at once if poll(2) says that it takes something."""
_LAST_S: Final = 1.0
"""How long the last lines may take of a process that ends."""


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


class _Quick:
    """Writes what a descriptor takes at once, whatever others who have it do meanwhile."""

    def __init__(self, send: Callable[[memoryview], int], close: Callable[[], None]) -> None:
        """For `of`."""
        self.send: Final = send
        """How many bytes were taken. Raises BlockingIOError: none; OSError: none ever."""
        self.close: Final = close

    @classmethod
    def of(cls, fd: int) -> _Quick | None:
        """For a descriptor; None: it may always have to be waited for."""
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return cls(partial(os.write, fd), lambda: None)
        try:
            if stat.S_ISSOCK(mode):
                sock = socket.socket(fileno=os.dup(fd))
                return cls(lambda data: sock.send(data, socket.MSG_DONTWAIT), sock.close)
            # Opened anew: others who have it are not to be told that they need not wait.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            own = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:
            return None  # a pipe of another user's
        return cls(partial(os.write, own), partial(os.close, own))


class _Lines(logging.Handler):
    """Lines on their way to a descriptor."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._fd = stream.fileno()
        self._encoding = stream.encoding or "utf-8"
        self._quick: _Quick | None = None
        self._forget()
        # Of a process that is forked nothing but its own lines is written, by a thread of its own.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        """Lines that had no room, or that could not be written."""
        self._thread: threading.Thread | None = None
        self._writing = False
        """Whether the thread has a line in its hands."""
        self._broken = False
        """Whether the last line could not be written."""
        self._torn = False
        """Whether a part of it was."""
        if self._quick is not None:
            self._quick.close()
        self._quick = None

    # Who logs

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            line = self._line(record)
        except Exception as error:  # noqa: BLE001 - whoever logs is not to fail by it
            line = self._line(_record(logging.ERROR, f"{record.msg}: cannot be logged: {error}"))
        with self._changed:
            if self._bytes + len(line) > _MOST_WAITING:
                self._dropped += 1
                return
            if self._dropped and not self._broken:
                self._append(self._told(self._dropped))
                self._dropped = 0
            self._append(line)
            if self._thread is None:
                self._write_what_is_taken(0.0)
            elif self._writing or not self._write_at_once():
                self._changed.notify_all()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")

    def _told(self, dropped: int) -> bytes:
        text = f"{dropped} lines of the log were dropped here: nobody took them"
        return self._line(_record(logging.WARNING, text))

    def _append(self, line: bytes) -> None:
        self._waiting.append(line)
        self._bytes += len(line)

    def _next(self) -> tuple[bytes, int]:
        """What is to be written next, and how many lost lines it tells of."""
        line = self._waiting.popleft()
        self._bytes -= len(line)
        if not self._broken or not self._dropped:
            return line, 0
        # Before this one, where they stood: if it can be written, they can be told.
        lost, self._dropped = self._dropped, 0
        return self._told(lost) + line, lost

    # Writing without a thread

    def _write_what_is_taken(self, patience_s: float) -> None:
        """Write what is taken without waiting, or within so many seconds."""
        end = time.monotonic() + patience_s
        while self._waiting and _takes(self._fd, max(0.0, end - time.monotonic())):
            line, lost = self._next()
            if self._write(line[:_PIECE], partial(os.write, self._fd)) is None:
                self._dropped += lost + 1
            elif rest := line[_PIECE:]:
                self._waiting.appendleft(rest)
                self._bytes += len(rest)

    def _write_at_once(self) -> bool:
        """Write what is taken without waiting; whether that was all."""
        while self._waiting and self._quick is not None:
            line, lost = self._next()
            rest = self._write(line, self._quick.send, patient=False)
            if rest is None:
                self._dropped += lost + 1
            elif rest:
                self._waiting.appendleft(rest)
                self._bytes += len(rest)
                break
        return not self._waiting

    # Writing in a thread

    def begin(self) -> None:
        """Have a thread write from now on. Without one to be had, all stays as it was."""
        with self._changed:
            if self._thread is not None:
                return
            # It may be stuck in a write at the end, which is no reason for a process not to end.
            thread = threading.Thread(target=self._run, name="journal", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
                self._quick = _Quick.of(self._fd)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._dropped and not self._broken:
                        self._append(self._told(self._dropped))
                        self._dropped = 0
                    else:
                        self._changed.wait()
                line, lost = self._next()
                self._writing = True
            rest = self._write(line, partial(os.write, self._fd))
            with self._changed:
                self._writing = False
                if rest is None:
                    self._dropped += lost + 1
                self._changed.notify_all()

    def _write(
        self, data: bytes, send: Callable[[memoryview], int], *, patient: bool = True
    ) -> bytes | None:
        """Write it; what is left of it if that is not to take long, None if it cannot be done."""
        view = memoryview(b"\n" + data if self._torn else data)
        whole = len(view)
        while view:
            try:
                view = view[send(view) :]
            except BlockingIOError:
                if not patient:
                    break
                _takes(self._fd, None)  # somebody else has set it so
            except OSError:
                # The reader has gone, the disk is full: the next line finds out if it still is.
                self._torn = self._torn or len(view) < whole
                self._broken = True
                return None
        self._torn = self._broken = False
        return bytes(view)

    # The end

    def flush(self) -> None:
        """Give the lines that wait a moment."""
        with self._changed:
            if self._thread is None:
                self._write_what_is_taken(_LAST_S)
            else:
                self._changed.wait_for(
                    lambda: not self._waiting and not self._writing, timeout=_LAST_S
                )


def _record(level: int, text: str) -> logging.LogRecord:
    found = {"levelno": level, "levelname": logging.getLevelName(level), "msg": text}
    return logging.makeLogRecord(found)


def _takes(fd: int, patience_s: float | None) -> bool:
    """Whether a descriptor takes something, now or within so many seconds; None: sometime."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(None if patience_s is None else 1000 * patience_s))


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Log to standard error (or `stream`) from now on; called again, it changes the level."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        stream = stream or sys.stderr
        handler = _Lines(stream)
        if is_journal(stream):
            handler.setFormatter(_Journal("%(message)s"))
        else:
            handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
        logging.captureWarnings(capture=True)
        sys.unraisablehook = _unraisable
        threading.excepthook = _ended_thread
    root.setLevel(level.upper())


def begin() -> None:
    """Have a thread write: for each process, once it has forked those that it does at the start."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Lines):
            handler.begin()


def last_words(command: str, text: str, mistake: BaseException | None = None) -> None:
    """One line about why a command ends: in its log if it has one, else on standard error.

    Args:
        command: its name.
        text: why.
        mistake: an error whose traceback goes with it.
    """
    root = logging.getLogger()
    if any(isinstance(handler, _Lines) for handler in root.handlers):
        root.error("%s", text, exc_info=mistake)
        return
    handler = _Lines(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    record = _record(logging.ERROR, f"{command}: {text}")
    if mistake is not None:
        record.exc_info = (type(mistake), mistake, mistake.__traceback__)
    handler.emit(record)
    handler.flush()


def is_journal(stream: TextIO) -> bool:
    """Whether a stream is the journal's: its device and inode are in $JOURNAL_STREAM."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(stream.fileno())
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _unraisable(found: Any) -> None:
    """See sys.unraisablehook: an error where nobody can be told, in one line."""
    what = found.err_msg or "Exception ignored in"
    logging.getLogger().error("%s: %s", what, _shown(found.object), exc_info=found.exc_value)


def _ended_thread(found: threading.ExceptHookArgs) -> None:
    """See threading.excepthook."""
    name = "a thread" if found.thread is None else found.thread.name
    text = "%s has ended by a mistake of ours"
    logging.getLogger().error(text, name, exc_info=found.exc_value)


def _shown(thing: object) -> str:
    return getattr(thing, "__qualname__", type(thing).__name__)
