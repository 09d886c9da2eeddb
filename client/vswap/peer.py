"""HELLO: what this client says of itself, and what it learns of the daemon.

Invariants:
- A daemon whose numbers this client cannot work with is refused here, not found out later.

This module must not know sockets.
"""

from __future__ import annotations

import json
import numbers
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vswap.errors import U64, BadArgument, ProtocolError
from vswap.planner import Ask, frame_limit
from vswap.protocol import PAGE_BYTES, VERSION, Flag, Op

FRAME_PAGES: Final = 128
"""Pages in one frame of a large call.

Measured with 32 MiB of heap pages and lz4, wall time of one client as a multiple of a bare loop of
lz4.block over the same pages (store, load), and what another client's load of one page takes beside
two such clients (median):

    pages     16       32       64       128      256      512
    store     2.5      1.75     1.7      1.5      1.4      1.4
    load      3.0      2.2      2.8      2.4      2.2      5.1
    beside                      0.9 ms   1.9 ms   2.3 ms   0.9 ms

Each frame costs the daemon about 100 us beside its pages, so larger ones are faster until a reply
no longer fits the daemon's buffers; but one frame is also what everybody else has to wait for.
"""

UNANSWERED_PAGES: Final = 4096
"""No window is larger than this many pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request, as the daemon remembers it."""

    request_id: int
    status: int
    flags: int
    slots: U64
    """New slots of a STORE, or those that an error is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What the daemon answered to HELLO."""

    daemon: str
    """Name and version, for people."""
    max_batch: int
    """Most pages in one request."""
    max_frame_bytes: int
    """Longest request, header included."""
    max_pipeline: int
    """Most unanswered requests."""
    space: str | None
    """The space's name in `vswapctl spaces`; None on a connection without one."""
    token: str | None
    """The space's secret, hexadecimal."""
    shards: int
    """How many shards the daemon has."""
    shard: int
    """Which of them serves this connection."""
    window_bytes: int
    """Memory that the connection shares with the daemon; 0: none."""
    resumable: bool = False
    """Whether the space is there again after the shard has died and come back."""
    kept: bool = False
    """Whether it is also after the whole daemon has stopped, or died, and come back."""
    last: Outcome | None = None
    """The last request of the connection before this one that changed anything."""

    @property
    def frame_pages(self) -> int:
        """Pages in one frame: FRAME_PAGES, or less if the daemon takes less."""
        return frame_limit(FRAME_PAGES, self.max_batch, self.max_frame_bytes)

    @property
    def window(self) -> int:
        """Requests that may be unanswered."""
        return max(1, min(self.max_pipeline, UNANSWERED_PAGES // self.frame_pages))


def hello(
    client: str,
    *,
    control: bool = False,
    shard: int | None = None,
    token: str | None = None,
    window_bytes: int = 0,
    resume: bool = False,
    name: str | None = None,
) -> Ask:
    """The first request of every connection.

    Args:
        client: How the daemon names this client.
        control: For steering; no space is opened.
        shard: Which shard is to serve it; None: any.
        token: The space that it belongs to; None: a new one.
        window_bytes: How much shared memory is wished for.
        resume: Whether it takes up what an earlier connection to this shard left.
        name: Of the space, if it is to outlive this client.

    Raises:
        BadArgument: `window_bytes` is no number of bytes, or something else no text or too long.
    """
    whole = isinstance(window_bytes, numbers.Integral) and not isinstance(window_bytes, bool)
    if not whole or window_bytes < 0:
        raise BadArgument(f"window is a number of bytes, 0 or more, not {window_bytes!r}")
    said: dict[str, Any] = {"client": client}
    if shard is not None:
        said["shard"] = shard
    if token is not None:
        said["token"] = token
    if window_bytes:
        said["window"] = int(window_bytes)
    if name is not None:
        said["name"] = name
    if resume:
        said["resume"] = True
    return Ask(Op.HELLO, said, Flag.CONTROL if control else 0)


def parse_document(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ProtocolError: it is none.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"the daemon's {what} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ProtocolError(f"the daemon's {what} is no JSON object")
    return document


def parse_hello(text: bytes) -> Peer:
    """The answer to `hello`.

    Raises:
        ProtocolError: it lacks something, or this client cannot work with it.
    """
    document = parse_document(text, "answer to HELLO")
    if document.get("version") != VERSION or document.get("page_bytes") != PAGE_BYTES:
        raise ProtocolError(
            f"the daemon speaks version {document.get('version')} with pages of"
            f" {document.get('page_bytes')} bytes, this client version {VERSION} with {PAGE_BYTES}"
        )
    peer = Peer(
        daemon=str(document.get("daemon", "unknown")),
        max_batch=_positive(document, "max_batch"),
        max_frame_bytes=_positive(document, "max_frame_bytes"),
        max_pipeline=_positive(document, "max_pipeline"),
        space=_text_or_none(document, "space"),
        token=_text_or_none(document, "token"),
        shards=_positive(document, "shards") if "shards" in document else 1,
        shard=_count(document, "shard"),
        window_bytes=_count(document, "window"),
        resumable=document.get("resumable") is True,
        kept=document.get("kept") is True,
        last=_outcome(document.get("last")),
    )
    if peer.shard >= peer.shards:
        raise ProtocolError(f"the daemon says that shard {peer.shard} of {peer.shards} answers")
    frame_limit(1, peer.max_batch, peer.max_frame_bytes)
    return peer


def _outcome(found: object) -> Outcome | None:
    if found is None:
        return None
    try:
        assert isinstance(found, dict)
        numbers = [found[key] for key in ("request", "status", "flags")]
        assert all(type(number) is int and number >= 0 for number in numbers)
        assert isinstance(found["slots"], list)
        slots = np.array([_slot(each) for each in found["slots"]], np.uint64)
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
        raise ProtocolError(f"the daemon's answer to HELLO has last = {found!r}") from None
    return Outcome(request_id=numbers[0], status=numbers[1], flags=numbers[2], slots=slots)


def _slot(said: object) -> int:
    """A slot id: text, as JSON's numbers are rounded by many; a daemon of before says a number."""
    if isinstance(said, str):
        assert said.isascii()
        assert said.isdecimal()
        return int(said)
    assert type(said) is int
    return said


def _positive(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProtocolError(f"the daemon's answer to HELLO has {key} = {value!r}")
    return value


def _count(document: dict[str, Any], key: str) -> int:
    value = document.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"the daemon's answer to HELLO has {key} = {value!r}")
    return value


def _text_or_none(document: dict[str, Any], key: str) -> str | None:
    value = document.get(key)
    return None if value is None else str(value)
