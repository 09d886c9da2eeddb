"""HELLO as it is said to the daemon: strict JSON in, what it asks for out.

Theory: what makes no sense is refused before anything is opened, so that a mistake in a client is
seen where it was made. Keys that are not known are passed over, since a newer client may say more
than this daemon knows. A key that is null is as if it were not there.

A token names, in its first two digits, the shard that the space's first connection came to. So
whoever says a token and no shard comes to the same one each time, whoever looks at it.

Invariants:
- What `parse_hello` lets through has types and ranges as its fields say.

This module must not know sockets, sessions, or which spaces there are.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from zlib import crc32

from vswap.protocol import PAGE_BYTES
from vswapd.control import MOST_NAME
from vswapd.errors import ArgumentError

_MOST_LABEL: Final = 1024
"""Bytes of what a client calls itself."""
_SHOWN_LABEL: Final = 64
"""Characters of it that are kept."""
_MOST_DEPTH: Final = 16
"""Objects and lists within each other. No key that is known has any in it."""
_TOKEN_DIGITS: Final = 32
_SHARD_DIGITS: Final = 2
_HEX: Final = frozenset("0123456789abcdef")
_OF_A_SPACE: Final = ("token", "resume", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a HELLO asks for."""

    client: str
    """On one line, and not too long; empty: it does not say."""
    shard: int | None
    """None: any, or where `destination` leads."""
    token: str | None
    """None: a new one."""
    resume: bool
    """Only with a token."""
    name: str | None
    """None: a space without one."""
    window: int
    """Bytes, whole pages; 0: none."""


def parse_object(body: memoryview) -> dict[str, Any]:
    """A request's JSON object, of RFC 8259 and no more; an empty body is an empty one.

    Raises:
        ArgumentError: it is none, or has a key twice.
    """
    if not body:
        return {}
    try:
        text = bytes(body).decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        _refuse_depth(found, _MOST_DEPTH)
        # Half of a surrogate pair can be written in JSON, and nowhere else: no path, no reply.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArgumentError("the body is no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:_SHOWN_LABEL]!r} stands there twice")
        found[key] = value
    return found


def _refuse_depth(value: object, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not left:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        _refuse_depth(inner, left - 1)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def parse_hello(said: dict[str, Any], *, control: bool) -> Hello:
    """What a HELLO asks for.

    Args:
        said: its object.
        control: whether it is flagged CONTROL.

    Raises:
        ArgumentError: it makes no sense.
    """
    token = _token(said.get("token"))
    resume = said.get("resume")
    if resume is not None and not isinstance(resume, bool):
        raise ArgumentError("resume: write true or false")
    if resume and token is None:
        raise ArgumentError("resume: say the token of the space that is to be taken up again")
    hello = Hello(
        client=_client(said.get("client")),
        shard=_shard(said.get("shard")),
        token=token,
        resume=bool(resume),
        name=_name(said.get("name")),
        window=_window(said.get("window")),
    )
    if control:
        for key in _OF_A_SPACE:
            if said.get(key) is not None:
                raise ArgumentError(f"{key}: a connection for control has no space")
    return hello


def destination(shard: int | None, token: str | None, name: str | None, shards: int) -> int | None:
    """Where a connection that says this is served; None: anywhere.

    Args:
        shard: what it asks for; below `shards`, or what becomes of it is all the same.
        token: a right one.
        name: of a space.
        shards: how many there are.
    """
    if shard is not None:
        return shard % shards
    if name is not None:
        # Whoever asks for it comes to the same shard.
        return shard_of(name, shards)
    # The number of shards may have been another one when the token was made.
    return None if token is None else int(token[:_SHARD_DIGITS], 16) % shards


def shard_of(name: str, shards: int) -> int:
    """Where whoever asks for a space of that name comes first."""
    return crc32(name.encode(errors="replace")) % shards


def new_token(shard: int) -> str:
    """The secret of a space that has its first connection on a shard: 120 random bits."""
    return f"{shard:0{_SHARD_DIGITS}x}" + secrets.token_hex((_TOKEN_DIGITS - _SHARD_DIGITS) // 2)


def is_token(said: object) -> bool:
    """Whether it looks like one."""
    return isinstance(said, str) and len(said) == _TOKEN_DIGITS and not set(said) - _HEX


def _token(said: object) -> str | None:
    if said is None:
        return None
    if not isinstance(said, str) or not is_token(said):
        raise ArgumentError("token: write the 32 hexadecimal digits of the space's first HELLO")
    return said


def _shard(said: object) -> int | None:
    if said is None:
        return None
    if not _is_count(said):
        raise ArgumentError(f"shard: {_shown(said)}: write the number of a shard, from 0 on")
    assert isinstance(said, int)
    return said


def _window(said: object) -> int:
    if said is None:
        return 0
    if not _is_count(said):
        raise ArgumentError(f"window: {_shown(said)}: write bytes")
    assert isinstance(said, int)
    return -(-said // PAGE_BYTES) * PAGE_BYTES


def _is_count(said: object) -> bool:
    return isinstance(said, int) and not isinstance(said, bool) and said >= 0


def _shown(said: object) -> str:
    """A value as it was said, as far as it fits a line."""
    text = json.dumps(said)
    return text if len(text) <= _SHOWN_LABEL else f"{text[:_SHOWN_LABEL]}..."


def _name(said: object) -> str | None:
    if said is None:
        return None
    if (
        not isinstance(said, str)
        or not said.isprintable()
        or said != said.strip()
        or not 1 <= len(said.encode()) <= MOST_NAME
    ):
        raise ArgumentError(
            f"name: 1 to {MOST_NAME} bytes that can be printed, without blanks at the ends"
        )
    return said


def _client(said: object) -> str:
    if said is None:
        return ""
    if not isinstance(said, str) or len(said.encode()) > _MOST_LABEL:
        raise ArgumentError(f"client: write text of {_MOST_LABEL} bytes at most")
    return "".join(c if c.isprintable() else " " for c in said[:_SHOWN_LABEL]).strip()
