"""The blocking connection under a hostile daemon, full buffers, signals, threads and forks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon
from support.fake_daemon import HELLO, FakeDaemon
from vswap.connection import Connection
from vswap.errors import U64
from vswap.lane import Lane
from vswap.pages import Pages
from vswap.peer import FRAME_PAGES
from vswap.planner import Load, Store
from vswap.protocol import HEADER_BYTES, PAGE_BYTES, Header, Op, Status, pack_header

LOST = (vswap.ConnectionLost, vswap.ProtocolError)


class ScriptedDaemon(FakeDaemon):
    """Answers `op` with `script`, which gets the right reply and returns what is sent instead."""

    op: Op = Op.PING

    def script(self, header: Header, right: bytes) -> bytes:
        raise NotImplementedError

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        right = b"".join(super().answer(header, body))
        yield self.script(header, right) if header.op == self.op else right


class CuttingDaemon(ScriptedDaemon):
    """Sends its reply up to `cut` and hangs up."""

    cut = 0

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        right = b"".join(FakeDaemon.answer(self, header, body))
        if header.op == self.op:
            yield right[: self.cut]
            self.hang_up()
        else:
            yield right


@pytest.mark.parametrize("cut", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, -1])
@pytest.mark.parametrize("op", [Op.HELLO, Op.STORE, Op.LOAD, Op.STATUS])
def test_a_daemon_that_dies_at_any_byte_is_connection_lost(
    socket_path: Path, op: Op, cut: int
) -> None:
    """However much of a reply had come: the call fails at once, and later calls say why."""
    with CuttingDaemon(socket_path) as daemon:
        daemon.op, daemon.cut = op, cut
        if op is Op.HELLO:
            with pytest.raises(vswap.ConnectionLost, match="closed the connection"):
                vswap.connect(socket_path)
            return
        with vswap.connect(socket_path, timeout=30) as space:
            daemon.pages[1] = bytes(PAGE_BYTES)
            calls: dict[Op, Any] = {
                Op.STORE: lambda: space.store(bytes(PAGE_BYTES)),
                Op.LOAD: lambda: space.load([1]),
                Op.STATUS: space.status,
            }
            with pytest.raises(vswap.ConnectionLost, match="closed the connection"):
                calls[op]()
            with pytest.raises(vswap.ConnectionLost, match=r"the connection is closed: .*connect"):
                space.ping()


class DyingDaemon(FakeDaemon):
    """Reads `reads` requests of a call and then ends without a word."""

    reads = 3

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op != Op.STORE:
            yield from super().answer(header, body)
            return
        self.reads -= 1
        if not self.reads:
            self.hang_up()
            return
        yield from super().answer(header, body)


def test_a_daemon_that_dies_while_it_is_sent_to_is_connection_lost(socket_path: Path) -> None:
    """A send into a closed connection fails as a typed error."""
    with DyingDaemon(socket_path), vswap.connect(socket_path) as space:
        with pytest.raises(vswap.ConnectionLost):
            space.store(bytes(PAGE_BYTES * 4096))
        assert space.closed


class ParingDaemon(FakeDaemon):
    """Answers a STORE with a last word and hangs up, with requests unread."""

    status = Status.STOPPING

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op == Op.STORE:
            text = b"see you after the upgrade"
            yield pack_header(0, len(text), status=self.status, request_id=0) + text
            self.hang_up()
        else:
            yield from super().answer(header, body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.STOPPING, vswap.Stopping),
        (Status.INTERNAL, vswap.DaemonFailed),
        (Status.TIMED_OUT, vswap.TimedOut),
        (Status.FRAME_TOO_LARGE, vswap.ProtocolError),
    ],
)
def test_last_words_are_heard(socket_path: Path, status: Status, kind: type[Exception]) -> None:
    """What a daemon says before it closes is the error, even in the middle of sending."""
    with ParingDaemon(socket_path) as daemon, vswap.connect(socket_path) as space:
        daemon.status = status
        with pytest.raises(kind, match="after the upgrade"):
            space.store(bytes(PAGE_BYTES * 2048))
        with pytest.raises(vswap.ConnectionLost, match="after the upgrade"):
            space.ping()


def reply_with_id(right: bytes, request_id: int) -> bytes:
    return right[:16] + request_id.to_bytes(8, "little") + right[24:]


NONSENSE: dict[str, Any] = {
    "another id": lambda header, right: reply_with_id(right, header.request_id + 1),
    "an earlier id": lambda header, right: reply_with_id(right, header.request_id - 1),
    "another operation": lambda _, right: right[:5] + bytes([Op.FREE]) + right[6:],
    "another version": lambda _, right: right[:4] + b"\2" + right[5:],
    "a short frame": lambda _, right: (8).to_bytes(4, "little") + right[4:],
    "a huge frame": lambda _, right: b"\xff\xff\xff\xff" + right[4:],
    "too long a body": lambda header, right: (
        pack_header(header.op, 8, request_id=header.request_id) + b"surprise"
    ),
    "text": lambda *_: b"500 Internal Server Error\r\nServer: nonsense\r\n",
    "zeros": lambda *_: bytes(64),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_protocol_error_and_closes(socket_path: Path, name: str) -> None:
    """A reply that cannot be right is refused, the connection closed, and nothing hangs."""
    with ScriptedDaemon(socket_path) as daemon, vswap.connect(socket_path, timeout=30) as space:
        daemon.script = NONSENSE[name]  # type: ignore[method-assign]
        with pytest.raises(vswap.ProtocolError):
            space.ping()
        assert space.closed


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        ({"version": 2}, "speaks version 2"),
        ({"page_bytes": 16384}, "pages of 16384 bytes"),
        ({"max_batch": 0}, "max_batch = 0"),
        ({"max_pipeline": None}, "max_pipeline = None"),
        ({"max_frame_bytes": "many"}, "max_frame_bytes = 'many'"),
        ({"max_frame_bytes": 100}, "takes no pages"),
        ({"max_batch": True}, "max_batch = True"),
    ],
)
def test_a_daemon_it_cannot_work_with_is_refused(
    socket_path: Path, hello: dict[str, Any], says: str
) -> None:
    """Numbers of HELLO that make no sense are found when connecting, and named."""
    with (
        FakeDaemon(socket_path, **hello),
        pytest.raises(vswap.ProtocolError, match=says),
    ):
        vswap.connect(socket_path)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"", json.dumps("x").encode()])
def test_an_answer_that_is_no_json_object_is_refused(socket_path: Path, text: bytes) -> None:
    """HELLO's answer must be a JSON object."""
    with ScriptedDaemon(socket_path) as daemon:
        daemon.op = Op.HELLO
        daemon.script = lambda header, right: daemon.reply(header, 0, text)  # type: ignore[method-assign]
        with pytest.raises(vswap.ProtocolError, match="JSON"):
            vswap.connect(socket_path)


def test_unknown_keys_of_hello_are_passed_over(socket_path: Path) -> None:
    """A newer daemon may say more."""
    with FakeDaemon(socket_path, novelty=[1]), vswap.connect(socket_path) as space:
        space.ping()


def test_a_refused_connection_is_told(socket_path: Path) -> None:
    """A daemon with too many connections says so to HELLO, with what to do."""
    with ScriptedDaemon(socket_path) as daemon:
        daemon.op = Op.HELLO
        daemon.script = lambda *_: (  # type: ignore[method-assign]
            pack_header(0, 4, status=Status.TOO_MANY_CONNECTIONS) + b"full"
        )
        with pytest.raises(vswap.ConnectionRefused, match=r"server\.max_connections"):
            vswap.connect(socket_path)


class SilentDaemon(ScriptedDaemon):
    """Begins a reply and never ends it."""

    def script(self, header: Header, right: bytes) -> bytes:
        del header
        return right[:30]


@pytest.mark.parametrize("op", [Op.HELLO, Op.LOAD])
def test_silence_is_timed_out(socket_path: Path, op: Op) -> None:
    """With a timeout, a daemon that stops in the middle is given up, and the connection closed."""
    with SilentDaemon(socket_path) as daemon:
        daemon.op = op
        daemon.pages[1] = bytes(PAGE_BYTES)
        with pytest.raises(TimeoutError, match=r"silent for 0\.05 s") as caught:
            vswap.connect(socket_path, timeout=0.05).load([1])
        assert isinstance(caught.value, vswap.TimedOut)


def alone(sock: socket.socket, timeout: float) -> Connection:
    """A connection over one socket, with room for many requests."""

    def no_lane(shard: int) -> Lane:
        raise AssertionError(shard)

    lane = Lane(sock, timeout)
    lane.conversation.window = 1000
    return Connection(lane, 1, no_lane)


def test_a_daemon_that_does_not_read_is_timed_out(socket_path: Path) -> None:
    """Sending to nobody ends after the timeout too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(socket_path))
        connection = alone(client, 0.05)
        with pytest.raises(vswap.TimedOut):
            connection.run(Store(Pages(memoryview(bytes(PAGE_BYTES * 4096))), 64))
        assert connection.closed


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_positive_number(fake: FakeDaemon, timeout: float) -> None:
    """A timeout that cannot be is refused."""
    with pytest.raises(ValueError, match="timeout"):
        vswap.connect(fake.path, timeout=timeout)


class NarrowDaemon(FakeDaemon):
    """Reads one request, answers it whole, reads the next; through the smallest buffers."""

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        super()._serve(connection)


@pytest.mark.parametrize("frame_pages", [1, FRAME_PAGES, 1000])
def test_full_buffers_on_both_sides_do_not_block(socket_path: Path, frame_pages: int) -> None:
    """While the daemon waits for its reply to be read, sending more requests reads it."""
    with NarrowDaemon(socket_path) as daemon:
        sock = socket.socket(socket.AF_UNIX)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sock.connect(str(socket_path))
        connection = alone(sock, 30)
        count = 3000
        content = np.random.default_rng(1).bytes(count * PAGE_BYTES)
        store = Store(Pages(memoryview(content)), frame_pages)
        connection.run(store)
        target = bytearray(len(content))
        load = Load(store.result(), Pages(memoryview(target)), frame_pages)
        connection.run(load)
        load.result()
        assert target == content
        connection.close()
        assert len(daemon.pages) == count


def test_signals_in_the_middle_do_no_harm(space: vswap.Space) -> None:
    """Handlers that return run during calls, and every byte still comes through."""
    count = 20 * FRAME_PAGES
    pages = np.random.default_rng(1).bytes(count * PAGE_BYTES)
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        while len(seen) < 20:
            slots = space.store(pages)
            assert space.load(slots) == pages
            space.free(slots)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class SignallingDaemon(FakeDaemon):
    """Sends this process a signal instead of an answer to PING, and nothing more."""

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op == Op.PING:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        else:
            yield from super().answer(header, body)


class InterruptedByTestError(Exception):
    pass


def test_an_interrupted_call_closes(socket_path: Path) -> None:
    """An exception out of a signal handler ends the call, and the connection says so later."""

    def interrupt(*_: object) -> None:
        raise InterruptedByTestError("by hand")

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with SignallingDaemon(socket_path), vswap.connect(socket_path) as space:
            with pytest.raises(InterruptedByTestError):
                space.ping()
            with pytest.raises(vswap.ConnectionLost, match="by hand"):
                space.ping()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_call_from_within_a_call_is_refused(socket_path: Path) -> None:
    """A signal handler that uses the connection its thread is using gets an error, no deadlock."""
    caught: list[Exception] = []
    with SignallingDaemon(socket_path) as daemon, vswap.connect(socket_path) as space:

        def reenter(*_: object) -> None:
            try:
                space.status()
            except RuntimeError as error:
                caught.append(error)
            daemon.hang_up()

        before = signal.signal(signal.SIGUSR1, reenter)
        try:
            with pytest.raises(vswap.ConnectionLost):
                space.ping()
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert "this very thread" in str(caught[0])


def test_a_forked_child_does_not_share_the_connection(space: vswap.Space, fake: FakeDaemon) -> None:
    """In a child the space is closed, with the reason; the parent's goes on."""
    slots = space.store(bytes(PAGE_BYTES))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            space.load(slots)
        except vswap.ConnectionLost as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "forked" in text
    assert space.load(slots) == bytes(PAGE_BYTES)
    assert len(fake.requests) == 3


def test_a_forgotten_space_is_closed(fake: FakeDaemon) -> None:
    """The socket of a space that nobody holds is closed with the warning Python gives for it."""
    space = vswap.connect(fake.path)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del space


def test_hello_says_who_calls(socket_path: Path) -> None:
    """The daemon learns the client's name and process."""
    said: list[bytes] = []

    class Listening(FakeDaemon):
        def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
            said.append(body)
            yield from super().answer(header, body)

    with Listening(socket_path), vswap.connect(socket_path, label="probe"):
        assert json.loads(said[0])["client"] == f"probe {os.getpid()}"
    assert HELLO["version"] == 1


def struck_at(moment: int, handler: Callable[[], object], call: Callable[[], object]) -> bool:
    """Call; the handler runs where signals are looked at for the nth time. Whether it came to that.

    That is where functions begin, and behind calls of what is written in C.
    """
    seen = 0

    def strike(frame: FrameType, event: str, _: object) -> None:
        nonlocal seen
        ours = "/vswap/" in frame.f_code.co_filename
        seen += ours and event in {"call", "c_return"}
        if ours and seen == moment:
            seen += 1
            handler()

    sys.setprofile(strike)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen > moment


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_at(moment: int, call: Callable[[], object]) -> bool:
    """Call; KeyboardInterrupt at that moment. Whether it came to that."""
    try:
        struck_at(moment, interrupt, call)
    except KeyboardInterrupt:
        return True
    return False


def is_free_for_others(space: vswap.Space) -> bool:
    """Whether another thread's calls come to an end, be it an error."""

    def call() -> None:
        space.buffer(1)
        with contextlib.suppress(vswap.ConnectionLost):
            space.ping()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


INTERRUPTED: dict[str, Callable[[vswap.Space, memoryview, U64], object]] = {
    "load": lambda space, _, slots: space.load(slots),
    "store of shared memory": lambda space, shared, _: space.store(shared),
    "lending of shared memory": lambda space, *_: space.buffer(2),
    "close": lambda space, *_: space.close(),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_no_interrupt_leaves_the_connection_locked(daemon: RunningDaemon, name: str) -> None:
    """Wherever in a call it strikes: the next one succeeds, or says why it cannot."""
    for moment in itertools.count(1):
        space = vswap.connect(daemon.socket_path, timeout=30)
        shared = space.buffer(1)
        slots = space.store(shared)
        hit = interrupted_at(moment, partial(INTERRUPTED[name], space, shared, slots))
        assert is_free_for_others(space), f"locked by moment {moment}"
        with contextlib.suppress(vswap.ConnectionLost):
            space.ping()
        space.close()
        if not hit:
            break
    assert moment > 5


@pytest.mark.parametrize("name", ["load", "store of shared memory", "lending of shared memory"])
def test_no_handler_waits_for_its_own_thread(daemon: RunningDaemon, name: str) -> None:
    """Wherever in a call a handler makes another one: it is carried out, or refused at once."""
    refused = 0

    def handler(space: vswap.Space) -> None:
        nonlocal refused
        try:
            space.buffer(1)
            space.ping()
        except RuntimeError as error:
            assert "running in this very thread" in str(error)  # noqa: PT017 - or it is carried out
            refused += 1

    def call(moment: int, over: list[bool]) -> None:
        with vswap.connect(daemon.socket_path, timeout=30) as space:
            shared = space.buffer(1)
            slots = space.store(shared)
            work = partial(INTERRUPTED[name], space, shared, slots)
            over.append(not struck_at(moment, partial(handler, space), work))

    for moment in itertools.count(1):
        over: list[bool] = []
        thread = threading.Thread(target=call, args=(moment, over), daemon=True)
        thread.start()
        thread.join(20)
        assert over, f"it waits for itself, or fails, at moment {moment}"
        if over[0]:
            break
    assert 0 < refused < moment
