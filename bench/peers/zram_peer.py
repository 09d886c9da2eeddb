"""The kernel's zram with lz4: a block device, written and read past the page cache.

Invariants:
- The device is one that was added for this and is removed again; others are left alone.
- Buffers are aligned to pages, so that nothing is copied on the way.

This module must not know how the kernel keeps pages.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

from bench.peers.contract import (
    BATCH,
    PAGE_BYTES,
    Batch,
    Buffer,
    Held,
    MissingError,
    Peer,
    PeerFailedError,
    Plan,
)

_CONTROL = Path("/sys/class/zram-control")
_PATIENCE_S = 5.0
_POLL_S = 0.02


class ZramPeer(Peer):
    """A batch is one request of 256 KiB."""

    name = "zram"
    what = "kernel zram lz4, O_DIRECT, 256 KiB requests"
    request_pages = BATCH

    def __init__(self) -> None:
        self._number: int | None = None
        self._share = 0

    def start(self, plan: Plan) -> None:
        if os.geteuid():
            raise MissingError("only root may make zram devices")
        if not _CONTROL.exists() and (modprobe := shutil.which("modprobe")):
            subprocess.run([modprobe, "zram"], capture_output=True, check=False)
        if not _CONTROL.exists():
            raise MissingError("this kernel has no zram")
        try:
            self._number = int((_CONTROL / "hot_add").read_text())
        except OSError as error:
            raise MissingError(f"no zram device can be added: {error.strerror}") from None
        try:
            (self._sysfs / "comp_algorithm").write_text("lz4")
            (self._sysfs / "disksize").write_text(str(plan.bytes_in_all))
        except OSError as error:
            raise MissingError(f"zram cannot be set to lz4: {error.strerror}") from None
        if not os.access(self._node, os.R_OK | os.W_OK):
            raise MissingError(f"{self._node} cannot be opened")
        self._share = plan.pages * PAGE_BYTES

    @property
    def _sysfs(self) -> Path:
        return Path(f"/sys/block/zram{self._number}")

    @property
    def _node(self) -> str:
        return f"/dev/zram{self._number}"

    def address(self, client: int) -> str:
        return f"{self._node}:{client * self._share}"

    def held(self) -> Held:
        fields = (self._sysfs / "mm_stat").read_text().split()
        return Held(resident_bytes=int(fields[2]), compressed_bytes=int(fields[1]))

    def stop(self) -> None:
        if self._number is None:
            return
        give_up = time.monotonic() + _PATIENCE_S
        while (error := self._remove()) is not None and time.monotonic() < give_up:
            time.sleep(_POLL_S)  # who looks at every new block device has it open for a moment
        if error is not None:
            raise PeerFailedError(
                f"{self._node} is left behind: {error.strerror}; "
                f"`echo {self._number} > {_CONTROL}/hot_remove` removes it"
            )
        self._number = None

    def _remove(self) -> OSError | None:
        try:
            (self._sysfs / "reset").write_text("1")
            (_CONTROL / "hot_remove").write_text(str(self._number))
        except OSError as error:
            return error
        return None

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> ZramClient:
        del client, pages
        node, _, start = address.rpartition(":")
        return ZramClient(node, int(start), cls.request_pages * PAGE_BYTES)


class SmallZramPeer(ZramPeer):
    """A batch is 64 requests of 4 KiB."""

    name = "zram-4k"
    what = "kernel zram lz4, O_DIRECT, 4 KiB requests"
    request_pages = 1


class ZramClient:
    """A part of the device."""

    def __init__(self, node: str, start: int, request_bytes: int) -> None:
        self._fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._start = start
        self._room = memoryview(mmap.mmap(-1, BATCH * PAGE_BYTES))
        self._page = self._room[:PAGE_BYTES]
        self._request = request_bytes
        self._cuts = [
            (at, self._room[at : at + request_bytes])
            for at in range(0, len(self._room), request_bytes)
        ]

    def store(self, batch: Batch) -> None:
        start = self._start + batch.first * PAGE_BYTES
        if self._request == PAGE_BYTES:
            for at, page in enumerate(batch.pages):
                _all(os.pwritev(self._fd, (page,), start + at * PAGE_BYTES), PAGE_BYTES)
        else:
            _all(os.pwritev(self._fd, (batch.whole,), start), len(batch.whole))

    def load(self, batch: Batch) -> Buffer:
        start = self._start + batch.first * PAGE_BYTES
        for at, room in self._cuts:
            _all(os.preadv(self._fd, (room,), start + at), self._request)
        return self._room

    def store_one(self, number: int, page: memoryview) -> None:
        _all(os.pwritev(self._fd, (page,), self._start + number * PAGE_BYTES), PAGE_BYTES)

    def load_one(self, number: int) -> Buffer:
        at = self._start + number * PAGE_BYTES
        _all(os.preadv(self._fd, (self._page,), at), PAGE_BYTES)
        return self._page

    def close(self) -> None:
        os.close(self._fd)


def _all(done: int, wanted: int) -> None:
    if done != wanted:
        raise PeerFailedError(f"zram took or gave {done} bytes of {wanted}")
