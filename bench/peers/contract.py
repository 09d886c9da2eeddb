"""What a peer is: a server that somebody starts, and clients that store and load pages.

Invariants:
- `Peer` objects live in the process that steers, `Client` objects in those that measure. Between
  them goes a text, the address, and nothing else.
- A store overwrites what the same pages' keys held, and is over when it is acknowledged.

This module must not know any one peer, or how time is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol

BATCH: Final = 64
"""Pages in one call."""
PAGE_BYTES: Final = 4096

Buffer = memoryview | bytes | bytearray


class MissingError(Exception):
    """A peer cannot be measured here; the text says why."""


class PeerFailedError(Exception):
    """A peer was there, and did not do what it should; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all peers are started for."""

    clients: int
    pages: int
    """Per client; whole batches."""
    directory: Path
    """For sockets and logs; short enough for sockaddr_un. Goes when the peers have stopped."""
    memory: Path
    """For files that are to lie in memory: on a tmpfs where there is one with room."""
    cores: int

    @property
    def bytes_in_all(self) -> int:
        """Of the pages of all clients."""
        return self.clients * self.pages * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring pages, in every form that a client may want them in, made beforehand."""

    first: int
    """The number of the first page among its client's."""
    whole: memoryview
    """All of them, writable, aligned to a page."""
    pages: Sequence[memoryview]


class Client(Protocol):
    """One process's end. Loads may fill the same buffer again and again."""

    def store(self, batch: Batch) -> None:
        """Keep a batch's pages under its numbers, instead of what was there."""

    def load(self, batch: Batch) -> Buffer | Sequence[Buffer]:
        """What is kept under a batch's numbers: in one piece, or page by page. Its pages are not
        looked at."""

    def store_one(self, number: int, page: memoryview) -> None:
        """Keep one page under a number."""

    def load_one(self, number: int) -> Buffer:
        """The page kept under a number."""

    def close(self) -> None:
        """Give up what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a peer takes at one moment."""

    resident_bytes: int
    """Memory, seen from outside where that can be."""
    compressed_bytes: int | None = None
    """Of the pages alone, as the peer says; None: it keeps what the clients' codec made."""


class Peer(ABC):
    """One way to keep pages. Used once: `start`, clients come and go, `stop`."""

    name: ClassVar[str]
    what: ClassVar[str]
    """For people, in the table."""
    compresses: ClassVar[bool] = True
    """Whether anything is compressed."""
    counts: ClassVar[bool] = True
    """Whether it stands for itself in the picture, or is there to judge the others by."""

    @abstractmethod
    def start(self, plan: Plan) -> None:
        """Make it ready for the plan's clients.

        Raises:
            MissingError: it is not here, or this user may not use it.
            PeerFailedError: it did not start.
        """

    @abstractmethod
    def address(self, client: int) -> str:
        """Where the client of this number finds it."""

    def held(self) -> Held | None:
        """What it takes now; None: the pages lie in the clients."""
        return None

    def cpu_s(self) -> float:
        """Processor time of its own processes so far; not of the clients'."""
        return 0.0

    @abstractmethod
    def stop(self) -> None:
        """Leave nothing behind. Also after a `start` that failed, and twice."""

    @classmethod
    @abstractmethod
    def connect(cls, address: str, client: int, pages: int) -> Client:
        """A client that will keep `pages` pages; called in the process that measures."""
