"""Places for connections: for all, for one user, and for who steers the daemon."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

import pytest

from support.daemon import running_daemon
from support.wire import (
    HELLO,
    SPACE_BUSY,
    SPACE_LOST,
    STATUS,
    TOO_MANY_CONNECTIONS,
    Reply,
    Wire,
)
from vswapd.places import Places

ROOT, MARY, PAUL = 0, 1001, 1002
NOBODY = 65534


def test_one_user_leaves_some_to_others() -> None:
    """Whoever takes what he can get has his share, and says so."""
    places = Places(5, 3, frozenset({ROOT}))
    for _ in range(3):
        assert not places.refusal(MARY)
        places.take(MARY)
    assert places.refusal(MARY) == (
        "3 connections of this user are open: close one, or raise server.max_user_connections"
    )
    for _ in range(2):
        assert not places.refusal(PAUL)
        places.take(PAUL)
    assert places.refusal(PAUL) == (
        "5 connections are open: close one, or raise server.max_connections"
    )
    places.give(MARY)
    assert not places.refusal(PAUL)
    assert not places.refusal(MARY)


def test_operators_come_in_whatever_clients_do() -> None:
    """They have as many of their own, for all of them together, and no share."""
    places = Places(4, 2, frozenset({ROOT, PAUL}))
    for uid in (MARY, MARY, NOBODY, NOBODY):
        places.take(uid)
    assert places.refusal(1003)
    for uid in (ROOT, ROOT, ROOT, PAUL):
        assert not places.refusal(uid)
        places.take(uid)
    assert "4 connections are open" in places.refusal(ROOT)
    assert "4 connections are open" in places.refusal(PAUL)


def test_a_daemon_of_ones_own_has_as_many_as_are_said() -> None:
    """Its only user is its operator: the limit is the one that was set."""
    places = Places(2, 1, frozenset({ROOT, MARY}))
    places.take(MARY)
    assert not places.refusal(MARY)
    places.take(MARY)
    assert places.refusal(MARY)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("with_token", [False, True])
def test_a_user_who_takes_all_places_takes_his_own(shards: int, *, with_token: bool) -> None:
    """Also by saying tokens, which no supervisor counts: others come in, and root steers."""
    settings = (f"server.shards={shards}", "server.max_connections=6", "pool.max=8M")
    others = (*settings, "server.max_user_connections=4", "server.socket_mode=0666")
    with running_daemon(*others) as daemon, contextlib.ExitStack() as opened:
        daemon.directory.chmod(0o755)

        def greet(**said: object) -> Reply:
            with _somebody_else():
                wire = opened.enter_context(Wire(daemon.socket_path))
            with contextlib.suppress(BrokenPipeError):  # refused already; it says why
                wire.socket.sendall(wire.frame(HELLO, json.dumps(said).encode()))
            return wire.reply()

        replies = [greet() for _ in range(4 + 3)]
        taken = [reply.json for reply in replies if reply.status == 0]
        for reply in replies:
            if reply.status:
                assert reply.status == TOO_MANY_CONNECTIONS
                assert "server.max_user_connections" in reply.text
        assert len(taken) == 4
        if with_token:
            for first in list(taken):
                for shard in range(shards):
                    reply = greet(token=first["token"], shard=shard)
                    taken += [reply.json] if reply.status == 0 else []
                    in_use = {SPACE_BUSY, TOO_MANY_CONNECTIONS}
                    assert reply.status in (in_use if shard == first["shard"] else {0})
                assert greet(token="0" * 32).status in {SPACE_LOST, TOO_MANY_CONNECTIONS}
            assert len(taken) == 4 * shards
        for _ in range(2):
            root = opened.enter_context(Wire(daemon.socket_path))
            root.hello()
            assert root.ask(STATUS).json["clients"]


@contextlib.contextmanager
def _somebody_else() -> Iterator[None]:
    """The kernel takes down who connects at that moment."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
