"""Messages between two processes: order, answers, errors, descriptors, the end."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from vswapd.channel import Channel, ChannelClosedError
from vswapd.errors import BadSlotError, OutOfServiceError

Handle = Callable[[Any, list[int]], Awaitable[Any]]


async def echo(message: Any, descriptors: list[int]) -> Any:
    for fd in descriptors:
        os.close(fd)
    return message


def pair(left: Handle = echo, right: Handle = echo) -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one, left), Channel(other, right)


def test_answers_find_their_requests() -> None:
    """Requests under way at the same time each get their own answer, whatever their size."""

    async def scenario() -> None:
        one, other = pair()
        messages = [b"x" * size for size in (0, 1, 70_000, 3_000_000, 5)]
        assert await asyncio.gather(*(one.ask(message) for message in messages)) == messages
        assert await other.ask({"both": "ways"}) == {"both": "ways"}
        one.close()
        other.close()

    asyncio.run(scenario())


def test_a_request_whose_descriptors_cannot_be_had_is_refused() -> None:
    """Nobody waits for ever for an answer to what the other end could not receive."""

    async def scenario() -> None:
        one, other = pair()
        fd = os.memfd_create("something")
        asked = asyncio.ensure_future(one.ask("too much", [fd]))
        await asyncio.sleep(0)  # it is sent, and not received
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            with pytest.raises(OutOfServiceError, match="raise RLIMIT_NOFILE"):
                await asyncio.wait_for(asked, 30)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert await one.ask("again", [fd]) == "again"
        os.close(fd)
        one.close()
        other.close()

    asyncio.run(scenario())


def test_a_request_whose_descriptors_cannot_be_sent_leaves_none_open() -> None:
    """Of two there is room for one: its copy would keep a device locked for good."""

    async def scenario() -> None:
        one, other = pair()
        fds = [os.memfd_create("something"), os.memfd_create("more")]
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        last = os.dup(fds[0])
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
        try:
            with pytest.raises(OutOfServiceError, match="raise RLIMIT_NOFILE"):
                await one.ask("too much", fds)
            os.close(os.dup(fds[0]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert await one.ask("again", fds) == "again"
        for fd in fds:
            os.close(fd)
        one.close()
        other.close()

    asyncio.run(scenario())


def test_late_answers_overtake_nobody() -> None:
    """A request that takes long does not hold up the answers of those after it."""
    gate = asyncio.Event()

    async def slow(message: Any, _: list[int]) -> Any:
        if message == "slow":
            await gate.wait()
        return message

    async def scenario() -> None:
        one, other = pair(right=slow)
        first = asyncio.ensure_future(one.ask("slow"))
        assert await one.ask("fast") == "fast"
        assert not first.done()
        gate.set()
        assert await first == "slow"
        one.close()
        other.close()

    asyncio.run(scenario())


def test_errors_are_raised_where_the_request_was_made() -> None:
    """What the handler raises arrives with its type, text and slots; the channel goes on."""

    async def refuse(message: Any, _: list[int]) -> Any:
        if message == "bad":
            raise BadSlotError("no such slot", np.array([7], np.uint64))
        return message

    async def scenario() -> None:
        one, other = pair(right=refuse)
        with pytest.raises(BadSlotError, match="no such slot"):
            await one.ask("bad")
        assert await one.ask("good") == "good"
        one.close()
        other.close()

    asyncio.run(scenario())


def test_what_cannot_be_sent_is_an_error_of_the_request() -> None:
    """An answer that cannot be pickled fails the request, instead of leaving it waiting."""

    async def unsendable(_: Any, __: list[int]) -> Any:
        return lambda: None

    async def scenario() -> None:
        one, other = pair(right=unsendable)
        with pytest.raises(Exception, match=r"pickle|local object"):
            await one.ask("anything")
        one.close()
        other.close()

    asyncio.run(scenario())


def test_read_only_mappings_can_be_sent() -> None:
    """Settings hold read-only mappings; they arrive as such."""

    async def scenario() -> None:
        one, other = pair()
        answer = await one.ask(MappingProxyType({"a": 1}))
        assert (type(answer), dict(answer)) == (MappingProxyType, {"a": 1})
        one.close()
        other.close()

    asyncio.run(scenario())


def test_descriptors_arrive_with_their_messages() -> None:
    """Each message brings its own descriptors, also when many arrive at once; none is left."""
    got: list[tuple[Any, bytes]] = []
    done = asyncio.Event()

    async def take(message: Any, descriptors: list[int]) -> Any:
        read = b"".join(os.read(fd, 100) for fd in descriptors)
        for fd in descriptors:
            os.close(fd)
        got.append((message, read))
        if message == "last":
            done.set()

    async def scenario() -> None:
        before = len(os.listdir("/proc/self/fd"))
        one, other = pair(right=take)
        expected = []
        for number in range(50):
            ends = []
            for part in range(number % 4):
                reader, writer = os.pipe()
                os.write(writer, b"%d.%d " % (number, part))
                os.close(writer)
                ends.append(reader)
            one.tell(number, ends)
            for fd in ends:
                os.close(fd)
            expected.append((number, b"".join(b"%d.%d " % (number, p) for p in range(number % 4))))
        one.tell("last")
        await done.wait()
        await other.drained()
        one.close()
        other.close()
        assert got == [*expected, ("last", b"")]
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())


def test_the_end_is_told() -> None:
    """When the other end goes, requests that wait and those that come later say so, once."""
    ends: list[str] = []

    async def never(_: Any, __: list[int]) -> Any:
        await asyncio.Event().wait()

    async def scenario() -> None:
        left, right = socket.socketpair()
        one = Channel(left, echo, lambda: ends.append("one"))
        other = Channel(right, never, lambda: ends.append("other"))
        waiting = asyncio.ensure_future(one.ask("anything"))
        await asyncio.sleep(0)
        other.close()
        with pytest.raises(ChannelClosedError):
            await waiting
        with pytest.raises(ChannelClosedError):
            await one.ask("more")
        one.tell("into the void")
        assert ends == ["one"]
        one.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(scenario())


def test_nothing_is_handled_any_more_once_it_has_ended() -> None:
    """What is at work is given up, and its cleanup done; what comes later is not begun."""
    done: list[str] = []
    begun = asyncio.Event()

    async def work(message: Any, __: list[int]) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            done.append(message)

    async def scenario() -> None:
        one, other = pair(right=work)
        asked = asyncio.ensure_future(one.ask("first"))
        await begun.wait()
        await other.end()
        assert done == ["first"]
        with pytest.raises(ChannelClosedError):
            await asked
        with pytest.raises(ChannelClosedError):
            await one.ask("second")
        assert done == ["first"]
        await other.end()
        one.close()

    asyncio.run(scenario())


def test_a_full_socket_delays_and_loses_nothing() -> None:
    """More than the socket holds is kept until the other end reads."""

    async def scenario() -> None:
        one, other = pair()
        total = await asyncio.gather(*(one.ask(bytes(100_000)) for _ in range(100)))
        assert [len(each) for each in total] == [100_000] * 100
        one.close()
        other.close()

    asyncio.run(scenario())
