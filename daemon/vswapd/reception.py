"""Where a daemon of several shards receives connections: who gets which, and who gets none.

Invariants:
- A connection goes to the shard that its HELLO asks for, else to the one with the fewest. HELLO is
  looked at for that, and left where it is: what is wrong with it is for the shard to say.
- Each that takes a place (see `places`) is counted once, and counted off once: when its shard says
  that it has gone, or with its shard.
- Who says nothing waits here for a moment, as one of few.

This module must not know what is said after HELLO, or how shards come to be there.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from vswap.protocol import HEADER, HEADER_BYTES, MAX_ASKED_BYTES, VERSION, Op
from vswapd.config_schema import Server
from vswapd.forking import Child
from vswapd.hello import destination, is_token
from vswapd.messages import Serve
from vswapd.peer import Peer
from vswapd.places import Places
from vswapd.server import Refusals

_HELLO_S: Final = 1.0
"""How long the first request of a connection is waited for before it is handed over without."""
_MORE_S: Final = 0.01
"""Between two looks at a HELLO that has come in part."""
_SIGN_S: Final = 0.5
"""A shard that has given no sign of life for so long gets no connections that others could have."""
_MOST_HELLO: Final = HEADER_BYTES + MAX_ASKED_BYTES


class Reception:
    """Finds each connection its shard. Made inside a running event loop."""

    def __init__(
        self,
        children: Sequence[Child],
        keys: Server,
        later: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """Make it for these shards.

        Args:
            children: the shards, by their numbers.
            keys: how many connections there may be.
            later: has something done besides; given up when the daemon stops.
        """
        self._children: Final = children
        self._later: Final = later
        self._loop: Final = asyncio.get_running_loop()
        self._places: Final = Places(keys.max_connections, keys.max_user_connections)
        self._silent: Final = Places(keys.max_connections, keys.max_user_connections)
        """For connections that have not said HELLO yet."""
        self._greeted: Final = Places(keys.max_connections, keys.max_user_connections)
        """For those that have, and are to go to a shard that moves: who is silent takes none."""
        self._refusals: Final = Refusals()
        self._turns = 0

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return self._places.taken

    def greet(self, sock: socket.socket) -> None:
        """Take a connection that was just accepted, and find it a shard."""
        hello = _peek(sock)
        if hello is not None and _whole(hello):
            self._receive(sock, hello)
        elif why := self._silent.refusal(uid := Peer.of(sock).uid):
            self._refusals.refuse(sock, why, self._loop.time())
        else:
            self._silent.take(uid)
            self._later(self._wait_for_hello(sock, uid))

    async def _wait_for_hello(self, sock: socket.socket, uid: int) -> None:
        arrived = asyncio.Event()
        self._loop.add_reader(sock, arrived.set)
        try:
            async with asyncio.timeout(_HELLO_S):
                await arrived.wait()
                self._loop.remove_reader(sock)
                # What has come can be read all the time: there is no event for the rest.
                while not _whole(_peek(sock) or b""):  # noqa: ASYNC110
                    await asyncio.sleep(_MORE_S)
        except TimeoutError:
            pass  # the shard has patience of its own
        except asyncio.CancelledError:
            self._loop.remove_reader(sock)
            sock.close()
            raise
        finally:
            self._silent.give(uid)
        self._loop.remove_reader(sock)
        self._receive(sock, _peek(sock) or b"")

    def _receive(self, sock: socket.socket, hello: bytes) -> None:
        """Hand a connection over to the shard that it asks for, or to one that moves."""
        wish, joins = parse_wish(hello, len(self._children))
        uid = Peer.of(sock).uid
        if wish is not None:
            self._hand_over(sock, uid, self._children[wish], joins=joins)
        elif why := self._greeted.refusal(uid):
            self._refusals.refuse(sock, why, self._loop.time())
        else:
            self._greeted.take(uid)
            self._later(self._find_one_that_moves(sock, uid, joins=joins))

    async def _find_one_that_moves(self, sock: socket.socket, uid: int, *, joins: bool) -> None:
        """A shard that is stopped is there, and would never greet anybody."""
        try:
            child = self._fewest()
            while child.there.is_set() and not child.channel.silent(_SIGN_S):
                moves = await child.channel.answers(_SIGN_S)
                # Others may have been handed over meanwhile.
                before, child = child, self._fewest()
                if moves and child is before:
                    break
        except asyncio.CancelledError:
            sock.close()
            raise
        finally:
            self._greeted.give(uid)
        self._hand_over(sock, uid, self._fewest(), joins=joins)

    def _fewest(self) -> Child:
        """Of the shards with the fewest connections that whose last one has been there longest.

        It may be idle. Those that are away, or give no sign of life, come after all others.
        """
        there = [each for each in self._children if each.there.is_set()]
        moving = [each for each in there if not each.channel.silent(_SIGN_S)]
        return min(
            moving or there or self._children, key=lambda each: (each.connections, each.turn)
        )

    def _hand_over(self, sock: socket.socket, uid: int, child: Child, *, joins: bool) -> None:
        if not joins and (why := self._places.refusal(uid)):
            self._refusals.refuse(sock, why, self._loop.time())
            return
        self._turns += 1
        child.turn = self._turns
        serve = Serve(None if joins else uid)
        self.seat(child, serve.place)
        if child.there.is_set():
            self._send(sock, child, serve)
        else:
            self._later(self._hand_over_later(sock, child, serve))

    def seat(self, child: Child, place: int | None) -> None:
        """Count a connection that a shard gets; see Serve."""
        child.connections += 1
        if place is not None:
            child.places[place] += 1
            self._places.take(place)

    def unseat(self, child: Child, place: int | None) -> None:
        """Count one off that has gone; see Parted."""
        child.connections -= 1
        if place is not None:
            child.places[place] -= 1
            self._places.give(place)

    def clear(self, child: Child) -> None:
        """Count the connections of a shard off that has died."""
        for uid in child.places.elements():
            self._places.give(uid)
        child.places.clear()
        child.connections = 0

    async def _hand_over_later(self, sock: socket.socket, child: Child, serve: Serve) -> None:
        """To a shard that is being started again."""
        with sock:
            await child.there.wait()
            self._send(sock, child, serve)

    def _send(self, sock: socket.socket, child: Child, serve: Serve) -> None:
        with sock:
            try:
                child.channel.tell(serve, [sock.fileno()])
            except OSError as error:
                # It takes one more descriptor while it is on its way.
                self.unseat(child, serve.place)
                why = f"it cannot be handed to a shard: {error.strerror}: raise RLIMIT_NOFILE"
                self._refusals.refuse(sock, why, self._loop.time())


def _peek(sock: socket.socket) -> bytes | None:
    """What has arrived on a connection, left there; None: nothing yet."""
    try:
        return sock.recv(_MOST_HELLO, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""  # gone already: a shard will find out


def _whole(hello: bytes) -> bool:
    """Whether all has come that there is to be looked at; also of what is no HELLO, and of nothing.

    An end of the stream is for a shard to find out.
    """
    if not hello:
        return True
    if len(hello) < HEADER_BYTES:
        return False
    length, version, op, *_ = HEADER.unpack_from(hello)
    return bool(version != VERSION or op != Op.HELLO or len(hello) >= min(length, _MOST_HELLO))


def parse_wish(hello: bytes, shards: int) -> tuple[int | None, bool]:
    """The shard, of so many, that a HELLO leads to, if any; and whether it joins a space.

    What is no HELLO leads nowhere: what is wrong with it is for the shard to say.
    """
    if len(hello) < HEADER_BYTES:
        return None, False
    length, version, op, *_ = HEADER.unpack_from(hello)
    if version != VERSION or op != Op.HELLO:
        return None, False
    try:
        said = json.loads(hello[HEADER_BYTES:length])
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(said, dict):
        return None, False
    shard, token, name = said.get("shard"), said.get("token"), said.get("name")
    where = destination(
        shard if isinstance(shard, int) and not isinstance(shard, bool) else None,
        token if is_token(token) else None,
        name if isinstance(name, str) else None,
        shards,
    )
    return where, token is not None
