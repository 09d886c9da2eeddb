"""The clients: as many processes as asked for, told the same thing at the same time.

Invariants:
- A pass begins for all clients at one gate, when every one of them stands before it.
- An error of one client ends the run; leaving the block ends all of them.

This module must not know peers, but by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bench.peers.contract import PeerFailedError
from bench.peers.processes import environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What all clients did at the same time."""

    wall_s: float
    """From the first one's start to the last one's end."""
    cpu_s: float
    """Processor time of all clients together, system calls included."""
    latencies_ns: Sequence[int]
    """Of single requests, all clients' together; empty for others."""


class Crew:
    """The clients' processes. A context manager."""

    def __init__(self, pages_file: Path, clients: int) -> None:
        gate, self._open_gate = os.pipe()
        command = [sys.executable, "-m", "bench.peers.worker", str(pages_file)]
        self._workers: Final = [
            subprocess.Popen(
                [*command, str(number), str(gate)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment(),
                pass_fds=[gate],
                start_new_session=True,
                text=True,
            )
            for number in range(clients)
        ]
        os.close(gate)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        os.close(self._open_gate)
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def connect(self, peer: str, addresses: Sequence[str]) -> None:
        """Make every client a client of a peer.

        Raises:
            PeerFailedError: one cannot.
        """
        for worker, address in zip(self._workers, addresses, strict=True):
            _tell(worker, {"do": "connect", "peer": peer, "address": address})
        for worker in self._workers:
            _answer(worker, peer)

    def disconnect(self, peer: str) -> None:
        """Close every client's connection to a peer."""
        for worker in self._workers:
            _tell(worker, {"do": "disconnect", "peer": peer})
        for worker in self._workers:
            _answer(worker, peer)

    def run(self, peer: str, what: str, count: int = 0) -> Pass:
        """Let all clients do the same thing at the same time.

        Args:
            peer: by name; the clients are connected to it.
            what: a verb of the worker's.
            count: single requests of each client.

        Raises:
            PeerFailedError: one of them cannot; the text has its traceback.
        """
        for worker in self._workers:
            _tell(worker, {"do": what, "peer": peer, "count": count})
        for worker in self._workers:
            _answer(worker, peer)
        os.write(self._open_gate, bytes(len(self._workers)))
        done = [_answer(worker, peer) for worker in self._workers]
        start, end = min(one["start_s"] for one in done), max(one["end_s"] for one in done)
        return Pass(
            wall_s=end - start,
            cpu_s=sum(one["cpu_s"] for one in done),
            latencies_ns=[ns for one in done for ns in one.get("latencies_ns", ())],
        )


def _tell(worker: subprocess.Popen[str], command: dict[str, Any]) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(command) + "\n")
    worker.stdin.flush()


def _answer(worker: subprocess.Popen[str], peer: str) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise PeerFailedError(f"{peer}: a client ended with {worker.wait()}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise PeerFailedError(f"{peer}: {answer['error']}")
    return answer
