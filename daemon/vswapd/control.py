"""The control state: what is known of spaces and devices, and settings made at run time.

Records lie in memory that outlives the process, at places of their own. A record is filled first,
and then published by one word; it is taken back by that word as well. So whoever finds it finds all
of it, or none. Texts are never changed in place.

    record:  state u64 | ...     state: 0 nothing is here, 1 it is in use, 2 it is being closed

Invariants:
- Of a device that is let go of nothing is left, its key least of all.
- Keys of devices are in no repr.

This module must not know what spaces and devices are used for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vswapd.answers import Answers
from vswapd.errors import ArgumentError, OutOfServiceError
from vswapd.groups import Holder, Space
from vswapd.kept_text import KeptText, TooLongError
from vswapd.memory import (
    DEVICE_BYTES,
    MOST_SPACES,
    SPACE_BYTES,
    Head,
    ShardMemory,
)
from vswapd_backends.base import I64

_NOTHING: Final = 0
_IN_USE: Final = 1
_CLOSING: Final = 2
_SPACE: Final = struct.Struct("<QQIIIxxxxdQQI")
_HOLDER: Final = struct.Struct("<QQI")
_HOLDER_AT: Final = struct.calcsize("<QQIIIxxxxd")
_DEVICE: Final = struct.Struct("<QqQQI16s")
_LENGTH: Final = struct.Struct("<H")
MOST_NAME: Final = 255
"""Bytes of a space's name, in UTF-8."""
_MOST_TEXT: Final = 256
MOST_KEY: Final = 64
MOST_PATH: Final = 4096
MOST_DESCRIPTION: Final = 3072


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSpace:
    """What is kept of a space."""

    id: int
    group: int
    uid: int
    holder: Holder
    joined: bool
    opened_at: float
    key: str
    client: str
    name: str
    record: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What it takes to open a device again, besides its path."""

    boot_id: bytes = bytes(16)
    """What stands in its header: whether it still is the same device."""
    key: bytes = field(default=b"", repr=False)
    """What its contents are encrypted with, at most MOST_KEY bytes; empty: they are not."""
    description: str = ""
    """Whatever else whoever opens it wants to know, at most MOST_DESCRIPTION bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptDevice:
    """What is kept of a device in use."""

    index: int
    path: str
    priority: int
    added: int
    """How many were put into use before it."""
    extents: int
    origin: Origin


class Control:
    """See the module."""

    def __init__(self, memory: ShardMemory) -> None:
        self.head: Final[I64] = memory.head
        self._spaces = memory.spaces
        self._space_words = np.frombuffer(memory.spaces, np.int64)
        self._devices = memory.devices
        self._device_words = np.frombuffer(memory.devices, np.int64)
        self._settings = KeptText(self.head[Head.SETTINGS : Head.SETTINGS + 1], memory.settings)
        self.answers: Final = Answers(memory)
        self._limit = self.head.item(Head.SPACES)
        self._free: list[int] = []

    # Spaces

    def next_space(self, step: int, first: int) -> int:
        """A number that no space had before.

        Args:
            step: how far apart the numbers of one shard are.
            first: the first of all.
        """
        number = self.head.item(Head.NEXT_SPACE) or first
        self.head[Head.NEXT_SPACE] = number + step
        return number

    def add_space(self, space: Space) -> None:
        """Keep a space.

        Raises:
            OutOfServiceError: there are too many.
            ArgumentError: its name or its key is too long.
        """
        name, key = space.name.encode(), space.key.encode()
        if len(name) > MOST_NAME or len(key) > MOST_KEY:
            raise ArgumentError(f"a space's name is {MOST_NAME} bytes at most, its key {MOST_KEY}")
        if self._free:
            record = self._free.pop()
        elif self._limit < MOST_SPACES:
            record = self._limit
            self._limit += 1
            self.head[Head.SPACES] = self._limit
        else:
            raise OutOfServiceError(f"there are {MOST_SPACES} spaces: close some first")
        client = space.client.encode()[:_MOST_TEXT]
        fixed = _SPACE.pack(
            _NOTHING,
            space.id,
            space.group.index,
            space.uid,
            space.joined,
            space.opened_at,
            *_fields(space.holder),
        )
        _write(self._spaces, record * SPACE_BYTES, fixed, key, client, name)
        self._mark_space(record, _IN_USE)
        space.record = record

    def attach_space(self, space: Space) -> None:
        """Keep that a space has another holder now."""
        at = space.record * SPACE_BYTES + _HOLDER_AT
        _HOLDER.pack_into(self._spaces, at, *_fields(space.holder))

    def closing_space(self, space: Space) -> None:
        """From now on the space is not found again; what it holds is still being freed."""
        self._mark_space(space.record, _CLOSING)

    def forget_space(self, record: int) -> None:
        """A space that is closed, with nothing left of it."""
        self.answers.forget(record)
        self._mark_space(record, _NOTHING)
        self._free.append(record)

    def spaces(self) -> list[KeptSpace]:
        """Those that another process has left, ascending by id. To be asked once, at first.

        What was being closed is not among them.
        """
        step = SPACE_BYTES // 8
        states = self._space_words[: self._limit * step : step]
        found = sorted(map(self._space, np.flatnonzero(states == _IN_USE).tolist()), key=_id)
        for record in np.flatnonzero(states != _IN_USE)[::-1].tolist():
            self.forget_space(record)
        return found

    def _space(self, record: int) -> KeptSpace:
        at = record * SPACE_BYTES
        _, number, group, uid, joined, opened_at, *held = _SPACE.unpack_from(self._spaces, at)
        token, started, pid = held
        key, client, name = _texts(self._spaces, at + _SPACE.size, 3)
        return KeptSpace(
            id=number,
            group=group,
            uid=uid,
            holder=Holder(pid=pid, started=started, token=token),
            joined=bool(joined),
            opened_at=opened_at,
            key=key.decode(),
            client=client.decode(errors="ignore"),
            name=name.decode(),
            record=record,
        )

    def _mark_space(self, record: int, state: int) -> None:
        self._space_words[record * (SPACE_BYTES // 8)] = state

    # Devices

    def add_device(self, device: KeptDevice) -> None:
        """Keep a device, under its index, which no device in use has.

        Raises:
            ArgumentError: its path, key or description is too long.
        """
        origin, path = device.origin, device.path.encode(errors="surrogateescape")
        description = origin.description.encode()
        if (
            len(path) > MOST_PATH
            or len(origin.key) > MOST_KEY
            or len(description) > MOST_DESCRIPTION
        ):
            raise ArgumentError(
                f"{device.path}: a device's path is {MOST_PATH} bytes at most, its key {MOST_KEY}, "
                f"its description {MOST_DESCRIPTION}"
            )
        fixed = _DEVICE.pack(
            _NOTHING, device.priority, device.added, device.extents, 0, origin.boot_id
        )
        at = device.index * DEVICE_BYTES
        self.head[Head.DEVICES] = max(self.head.item(Head.DEVICES), device.index + 1)
        _write(self._devices, at, fixed, path, origin.key, description)
        self._device_words[at // 8] = _IN_USE

    def forget_device(self, index: int) -> None:
        """A device that is in use no more."""
        at = index * DEVICE_BYTES
        self._device_words[at // 8] = _NOTHING
        self._devices[at : at + DEVICE_BYTES] = bytes(DEVICE_BYTES)

    def devices(self) -> list[KeptDevice]:
        """Those in use, ascending by index. What is left of any other is wiped out."""
        found = []
        for index in range(self.head.item(Head.DEVICES)):
            at = index * DEVICE_BYTES
            if self._device_words[at // 8] != _IN_USE:
                self.forget_device(index)
                continue
            _, priority, added, extents, _, boot_id = _DEVICE.unpack_from(self._devices, at)
            path, key, description = _texts(self._devices, at + _DEVICE.size, 3)
            found.append(
                KeptDevice(
                    index=index,
                    path=path.decode(errors="surrogateescape"),
                    priority=priority,
                    added=added,
                    extents=extents,
                    origin=Origin(boot_id=boot_id, key=key, description=description.decode()),
                )
            )
        return found

    # Settings

    def keep_settings(self, text: str) -> None:
        """Keep what was set at run time, in whatever form.

        Raises:
            ArgumentError: it is too long; what was kept before still is.
        """
        try:
            self._settings.keep(text)
        except TooLongError:
            raise ArgumentError(
                "too much was set at run time: write it to the file, and restart"
            ) from None

    def settings(self) -> str | None:
        """What was kept last; None: nothing."""
        return self._settings.text()


def _fields(holder: Holder) -> tuple[int, int, int]:
    return holder.token, holder.started, holder.pid


def _id(space: KeptSpace) -> int:
    return space.id


def _write(area: memoryview, at: int, fixed: bytes, *texts: bytes) -> None:
    """Fill a record: what has its place, then each text with its length."""
    whole = fixed + b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    area[at : at + len(whole)] = whole


def _texts(area: memoryview, at: int, count: int) -> list[bytes]:
    """Texts as `_write` leaves them."""
    found = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(area, at)
        at += _LENGTH.size
        found.append(bytes(area[at : at + length]))
        at += length
    return found
