"""The floor: frames of vswapd's sizes over a bare Unix socket, pages kept as they are.

    python -m bench.peers.pingpong_peer SOCKET PAGES      (what the peer starts, once per client)

A request and its reply are as long as those of vswapd's protocol; the other end does nothing but
copy. No daemon with blocking sockets of Python's can answer sooner.

This module must not know vswapd.
"""

from __future__ import annotations

import mmap
import socket
import struct
import sys
from typing import Final

from bench.peers.contract import BATCH, PAGE_BYTES, Batch, Buffer, Held, Peer, Plan
from bench.peers.processes import Server, open_socket

_HEADER: Final = struct.Struct("<IIQQ")
"""Operation, pages, number of the first page; the rest fills up to what vswapd sends."""
_SLOT_BYTES: Final = 8
_STORE, _LOAD = 1, 2
_WAIT_ALL: Final = socket.MSG_WAITALL
_SOCKET_BUFFER: Final = 1 << 20


class PingPongPeer(Peer):
    """One process per client, so that clients do not wait for each other."""

    name = "ping-pong"
    what = "bare Unix socket, nothing compressed (the floor)"
    compresses = False
    counts = False

    def __init__(self) -> None:
        self._servers: list[Server] = []

    def start(self, plan: Plan) -> None:
        for client in range(plan.clients):
            path = plan.directory / f"pingpong-{client}.sock"
            module = [sys.executable, "-m", "bench.peers.pingpong_peer"]
            self._servers.append(Server([*module, str(path), str(plan.pages)], path))

    def address(self, client: int) -> str:
        return str(self._servers[client].socket_path)

    def held(self) -> Held:
        resident = sum(server.resident_bytes() for server in self._servers)
        return Held(resident_bytes=resident)

    def cpu_s(self) -> float:
        return sum(server.cpu_s() for server in self._servers)

    def stop(self) -> None:
        while self._servers:
            self._servers.pop().stop()

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> PingPongClient:
        del client, pages
        return PingPongClient(address)


class PingPongClient:
    """The asking end."""

    def __init__(self, path: str) -> None:
        self._sock = _wide(open_socket(path))
        self._slots = memoryview(bytes(BATCH * _SLOT_BYTES))
        self._reply = memoryview(bytearray(_HEADER.size + BATCH * _SLOT_BYTES))
        self._room = memoryview(mmap.mmap(-1, BATCH * PAGE_BYTES))

    def store(self, batch: Batch) -> None:
        self._store(batch.first, len(batch.pages), batch.whole)

    def load(self, batch: Batch) -> Buffer:
        return self._load(batch.first, len(batch.pages))

    def store_one(self, number: int, page: memoryview) -> None:
        self._store(number, 1, page)

    def load_one(self, number: int) -> Buffer:
        return self._load(number, 1)

    def close(self) -> None:
        self._sock.close()

    def _store(self, first: int, count: int, pages: memoryview) -> None:
        send_all(self._sock, _HEADER.pack(_STORE, count, first, 0), pages)
        receive(self._sock, self._reply[: _HEADER.size + count * _SLOT_BYTES])

    def _load(self, first: int, count: int) -> memoryview:
        slots = self._slots[: count * _SLOT_BYTES]
        send_all(self._sock, _HEADER.pack(_LOAD, count, first, 0), slots)
        receive(self._sock, self._reply[: _HEADER.size])
        room = self._room[: count * PAGE_BYTES]
        receive(self._sock, room)
        return room


def send_all(sock: socket.socket, header: bytes, body: memoryview) -> None:
    """Send both in one piece, or go on where the socket had no more room."""
    sent = sock.sendmsg([header, body]) - len(header)
    assert sent >= 0
    if sent < len(body):
        sock.sendall(body[sent:])


def receive(sock: socket.socket, room: memoryview) -> None:
    """Fill `room`.

    Raises:
        EOFError: the other end has gone.
    """
    got = sock.recv_into(room, len(room), _WAIT_ALL)
    while got < len(room):
        more = sock.recv_into(room[got:], len(room) - got, _WAIT_ALL)
        if not more:
            raise EOFError("the other end has gone")
        got += more


def serve(path: str, pages: int) -> None:
    """Answer one connection after the other, for ever."""
    kept = memoryview(mmap.mmap(-1, pages * PAGE_BYTES))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            sock = _wide(listening.accept()[0])
            try:
                _answer(sock, kept)
            except EOFError:
                continue
            finally:
                sock.close()


def _answer(sock: socket.socket, kept: memoryview) -> None:
    header = memoryview(bytearray(_HEADER.size))
    slots = memoryview(bytearray(BATCH * _SLOT_BYTES))
    while True:
        receive(sock, header)
        operation, count, first, _ = _HEADER.unpack(header)
        body = kept[first * PAGE_BYTES : (first + count) * PAGE_BYTES]
        if operation == _STORE:
            receive(sock, body)
            send_all(sock, bytes(header), slots[: count * _SLOT_BYTES])
        else:
            receive(sock, slots[: count * _SLOT_BYTES])
            send_all(sock, bytes(header), body)


def _wide(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
    return sock


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
