"""HELLO by the page: what makes no sense is refused and opens nothing, what is unknown is ignored.

The client is tests/support/wire.py, which knows struct and socket and nothing of vswap.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.daemon import RunningDaemon
from support.wire import (
    BAD_ARGUMENT,
    BAD_LENGTH,
    CONTROL,
    FOR_CONTROL,
    HELLO,
    PING,
    SPACE_LOST,
    STATUS,
    Wire,
)

TOKEN = "0" * 32


@pytest.mark.parametrize(
    "said",
    [
        {"client": 5},
        {"client": ["me"]},
        {"client": True},
        {"client": "x" * 1025},
        {"client": "\N{EURO SIGN}" * 342},
        {"shard": 99},
        {"shard": -1},
        {"shard": "0"},
        {"shard": 0.0},
        {"shard": True},
        {"shard": False},
        {"shard": [0]},
        {"shard": 1 << 64},
        {"token": 5},
        {"token": ""},
        {"token": "0" * 31},
        {"token": "0" * 33},
        {"token": "A" * 32},
        {"token": "g" * 32},
        {"token": "\N{ARABIC-INDIC DIGIT ONE}" * 32},
        {"token": True},
        {"resume": True},
        {"resume": True, "token": None},
        {"resume": True, "name": "x"},
        {"resume": 1, "token": TOKEN},
        {"resume": "true", "token": TOKEN},
        {"resume": 0},
        {"window": -1},
        {"window": True},
        {"window": "4096"},
        {"window": 4096.0},
        {"window": {}},
        {"name": ""},
        {"name": 5},
        {"name": "x" * 256},
        {"name": "\N{EURO SIGN}" * 86},
        {"name": False},
        {"name": "x", "shard": 99},
    ],
)
def test_what_makes_no_sense_is_refused(daemon: RunningDaemon, said: dict[str, Any]) -> None:
    """BAD_ARGUMENT, with a text that begins with the key; then another HELLO may be said."""
    with Wire(daemon.socket_path) as wire:
        reply = wire.ask(HELLO, json.dumps(said).encode())
        assert (reply.status, reply.count, reply.flags) == (BAD_ARGUMENT, 0, 0)
        assert reply.text.split(":")[0] in said
        assert wire.hello()["space"]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"{",
        b"{} {}",
        b"{'client': 'x'}",
        b'{"client": "x",}',
        b'{"client": "x", "client": "x"}',
        b'{"more": {"a": 1, "a": 2}}',
        b'{"window": NaN}',
        b'{"more": Infinity}',
        b'{"more": [-Infinity]}',
        b'{"window": 1e999}',
        b'{"window": ' + b"9" * 5000 + b"}",
        b'{"more": ' + b"[" * 17 + b"]" * 17 + b"}",
        b'{"more": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"client": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'\xef\xbb\xbf{"client": "x"}',
        '{"client": "x"}'.encode("utf-16"),
        b'{"client": "\xff"}',
        b'{"client": "\x01"}',
        b"{}\0",
    ],
)
def test_what_is_no_json_is_refused(daemon: RunningDaemon, body: bytes) -> None:
    """One object in UTF-8, each key once, numbers that are some, not nested without end."""
    with Wire(daemon.socket_path) as wire:
        assert wire.ask(HELLO, body).status == BAD_ARGUMENT
        assert wire.hello(FOR_CONTROL)["space"] is None
        assert wire.ask(CONTROL, body).status == BAD_ARGUMENT
        wire.assert_in_step()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"client": None, "shard": None, "token": None, "window": None, "resume": None},
        {"name": None, "resume": False},
        {"client": "x" * 1024},
        {"client": "", "shard": 0},
        {"window": 1 << 70},
        {"compression": "none", "more": [{"a": [1, 2.5, True, None]}], "": ""},
    ],
)
def test_what_is_not_known_is_ignored(daemon: RunningDaemon, said: dict[str, Any]) -> None:
    """Keys of newer clients, and keys that are null, are as if they were not there."""
    with Wire(daemon.socket_path) as wire:
        reply = wire.ask(HELLO, json.dumps(said).encode())
        assert reply.status == 0, reply.text
        assert reply.json["window"] % 4096 == 0
        wire.assert_in_step()


def test_a_long_label_is_shown_in_part(daemon: RunningDaemon) -> None:
    """Of what a client calls itself 64 characters are kept, on one line."""
    with Wire(daemon.socket_path) as wire:
        assert wire.ask(HELLO, json.dumps({"client": "a\nb" * 300}).encode()).status == 0
        (space,) = wire.done("spaces")["spaces"]
        assert space["client"] == ("a b" * 300)[:64]


@pytest.mark.parametrize("key", ["token", "name", "resume"])
def test_a_connection_for_control_asks_for_no_space(daemon: RunningDaemon, key: str) -> None:
    """What is of a space has no sense there, and is refused; a window is a wish that is not met."""
    said = {"token": TOKEN, "name": "x", "resume": False}
    with Wire(daemon.socket_path) as wire:
        body = json.dumps({key: said[key]}).encode()
        reply = wire.ask(HELLO, body, flags=FOR_CONTROL)
        assert (reply.status, reply.text.split(":")[0]) == (BAD_ARGUMENT, key)
        assert wire.hello(FOR_CONTROL, shard=0, window=4096)["window"] == 0
        wire.assert_in_step()


@pytest.mark.parametrize("more", [{}, {"shard": 0}, {"shard": 99}, {"resume": True}])
def test_a_token_of_nobody_is_a_space_that_is_lost(
    daemon: RunningDaemon, more: dict[str, Any]
) -> None:
    """SPACE_LOST closes the connection: also where the shard is one that there was once."""
    with Wire(daemon.socket_path) as wire:
        body = json.dumps({"token": TOKEN, **more}).encode()
        assert wire.ask(HELLO, body).status == SPACE_LOST
        wire.assert_closed()


def test_a_count_where_none_is_meant_is_refused(daemon: RunningDaemon) -> None:
    """BAD_ARGUMENT for HELLO, PING, STATUS and CONTROL; nothing was done, and the rest goes on."""
    with Wire(daemon.socket_path) as wire:
        for count in (1, 7, (1 << 32) - 1):
            assert wire.ask(HELLO, b"{}", count=count).status == BAD_ARGUMENT
        wire.hello()
        for op, body in ((PING, b""), (STATUS, b""), (CONTROL, b'{"verb": "spaces"}')):
            for count in (1, 7, (1 << 32) - 1):
                assert wire.ask(op, body, count=count).status == BAD_ARGUMENT
            assert wire.ask(op, body).status == 0


def test_the_longest_text_is_64_kib(daemon: RunningDaemon) -> None:
    """HELLO and CONTROL take so much and no more."""
    with Wire(daemon.socket_path) as wire:
        assert wire.ask(HELLO, b"{}".ljust(65537)).status == BAD_LENGTH
        assert wire.ask(HELLO, b"{}".ljust(65536)).status == 0
        assert wire.ask(CONTROL, b'{"verb": "spaces"}'.ljust(65537)).status == BAD_LENGTH
        assert wire.ask(CONTROL, b'{"verb": "spaces"}'.ljust(65536)).status == 0
