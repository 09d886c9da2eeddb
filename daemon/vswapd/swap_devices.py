"""Swap devices as the service opens them: for one shard, for several, and again after a death.

This is the one module that names concrete devices.

Invariants:
- Devices are opened, and locked, by the process that the service manager knows.
- To one that is opened again nothing is written, and it is what it was, or it is refused.

This module must not know engines, or who uses a device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from vswapd.config_schema import Device
from vswapd.control import KeptDevice, Origin
from vswapd.messages import Attach
from vswapd.steering import Opened
from vswapd_blockdev import opening
from vswapd_blockdev.device import LockedError
from vswapd_blockdev.header import DeviceHeader
from vswapd_blockdev.opening import open_swap_device, reopen_swap_device
from vswapd_blockdev.sealed import SealedDevice, new_key
from vswapd_blockdev.swapfile import SwapFile

_ATTEMPTS: Final = 200
_PAUSE_S: Final = 0.01
"""For two seconds a device that is opened again may still be locked by a process that is ending."""


def open_alone(entry: Device, boot_id: bytes) -> Opened:
    """A device for one shard, with a new key.

    Raises:
        OpenError: it cannot be used.
    """
    return _sealed(entry, SwapFile(entry.path, _open(entry, boot_id)), boot_id, None)


def reopen_alone(kept: KeptDevice) -> Opened:
    """The same, of one that an earlier process had in use.

    Raises:
        OpenError: it is missing, in use, or not what it was.
    """
    file = SwapFile(kept.path, _reopen(kept))
    return _sealed(_entry(kept), file, kept.origin.boot_id, kept.origin.key)


def adopt_device(attach: Attach, fd: int, key: bytes | None) -> Opened:
    """A shard's own device on a descriptor that it was given.

    Args:
        attach: the device.
        fd: owned from now on.
        key: what an earlier process of the shard has encrypted with; None: a new one is made.
    """
    opened = opening.Opened(
        fd=fd, extents=attach.extents, direct=attach.direct, block_device=attach.block_device
    )
    return _sealed(attach.entry, SwapFile(attach.entry.path, opened), attach.boot_id, key)


class Locked:
    """A device that the supervisor keeps open and locked, for its shards to use."""

    def __init__(self, entry: Device, boot_id: bytes, opened: opening.Opened) -> None:
        """For `open` and `reopen`."""
        self._entry = entry
        self._boot_id = boot_id
        self._opened = opened

    @classmethod
    def open(cls, entry: Device, boot_id: bytes) -> Locked:
        """Open a device. Raises: as `open_alone`."""
        return cls(entry, boot_id, _open(entry, boot_id))

    @classmethod
    def reopen(cls, kept: KeptDevice) -> Locked:
        """Open one that an earlier supervisor had. Raises: as `reopen_alone`."""
        return cls(_entry(kept), kept.origin.boot_id, _reopen(kept))

    def attach(self) -> tuple[Attach, int]:
        """See supervisor.LockedDevice."""
        opened = self._opened
        return (
            Attach(self._entry, opened.extents, opened.direct, opened.block_device, self._boot_id),
            opened.fd,
        )

    def close(self) -> None:
        """See supervisor.LockedDevice."""
        os.close(self._opened.fd)


def _open(entry: Device, boot_id: bytes) -> opening.Opened:
    return open_swap_device(
        entry.path,
        size=None if entry.size is None else int(entry.size),
        boot_id=boot_id,
        encrypted=entry.encrypt,
    )


def _reopen(kept: KeptDevice) -> opening.Opened:
    origin = kept.origin
    header = DeviceHeader(extents=kept.extents, boot_id=origin.boot_id, encrypted=bool(origin.key))
    return _patiently(lambda: reopen_swap_device(kept.path, header))


def _patiently(reopen: Callable[[], opening.Opened]) -> opening.Opened:
    for _ in range(_ATTEMPTS):
        try:
            return reopen()
        except LockedError:
            time.sleep(_PAUSE_S)  # nothing is served yet
    return reopen()


def _entry(kept: KeptDevice) -> Device:
    """A device that was in use, as the configuration would describe it."""
    return Device(path=kept.path, priority=kept.priority, encrypt=bool(kept.origin.key))


def _sealed(entry: Device, file: SwapFile, boot_id: bytes, key: bytes | None) -> Opened:
    """A device as the engine has it, with a new key if it is to be encrypted and has none."""
    if key is None:
        key = new_key() if entry.encrypt else b""
    device = SealedDevice(file, key) if entry.encrypt else file
    return Opened(device, file.discards, Origin(boot_id=boot_id, key=key))
