"""What a daemon's next process gets of this one: memory that the service manager keeps meanwhile.

    N-KIND         the memory of shard N, as ShardMemory cuts it
    ledger         what several shards share limits through
    extents-HASH   which shard has which chunk of a device, of several
    life           that there is all of it; sent last

Invariants:
- What is kept is complete before a client is served: without `life` nobody has stored anything.
- Of one life no two processes are at work: who goes on with it waits until the last has ended.
- What another version has left, or what is not whole, is refused, and left where it is.

This module must not know what the memory holds, or who serves from it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from vswapd.ledger import adopt_shared_region, shared_region
from vswapd.memory import KINDS, Shape, ShardMemory
from vswapd_backends.label import LIFE_BYTES, ForeignMemoryError, Label, find_label, make_region
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion

_LOG: Final = logging.getLogger(__name__)
LAYOUT_VERSION: Final = 1
_DETAILS: Final = struct.Struct("<I")
_LIFE: Final = "life"
_LEDGER: Final = "ledger"
_EXTENTS: Final = "extents-"
_LAST_BREATH_S: Final = 45.0
"""How long the last process may take to end: as long as shards have to finish what is under way."""


class KeepingError(Exception):
    """What was kept cannot be gone on with, or nothing can be kept; the text says what to do."""


class Keeper(Protocol):
    """Whoever outlives this process."""

    def take_kept(self) -> dict[str, int]:
        """Descriptors by their names, that an earlier process has left; owned from now on."""

    def keep(self, name: str, fd: int) -> None:
        """Keep a copy of a descriptor. Raises OSError."""

    def let_go(self, name: str) -> None:
        """Keep what has this name no more."""


@dataclass(frozen=True, slots=True)
class Life:
    """What all processes of one daemon have in common, one after the other."""

    memories: Sequence[ShardMemory]
    """By shard."""
    ledger: SharedRegion | None
    """Of several shards."""
    revived: bool
    """Whether an earlier process has left something in it."""

    @classmethod
    def new(cls, shapes: Sequence[Shape]) -> Life:
        """Memory in which nothing is kept yet, for as many shards as there are shapes."""
        ledger = shared_region(len(shapes)) if len(shapes) > 1 else None
        return cls([ShardMemory.create(shape) for shape in shapes], ledger, revived=False)

    def wait_for_the_last(self) -> None:
        """Wait until no other process is at work on it.

        Raises:
            KeepingError: one does not end.
        """
        end = time.monotonic() + _LAST_BREATH_S
        for memory in self.memories:
            while not _hold(memory):
                if time.monotonic() > end:
                    raise KeepingError(
                        f"shard {memory.shape.shard} of an earlier daemon is still at work: end it"
                    )
                time.sleep(0.01)  # nothing is served yet
            fcntl.lockf(memory.state.fd, fcntl.LOCK_UN)


def claim(memory: ShardMemory) -> None:
    """Say that this process is at work on a shard's memory, until it ends.

    Raises:
        KeepingError: another process is.
    """
    if not _hold(memory):
        raise KeepingError(f"shard {memory.shape.shard} is another process's: end that one")


def _hold(memory: ShardMemory) -> bool:
    """Lock a record of the memory's file: the lock goes with this process, however it ends."""
    try:
        fcntl.lockf(memory.state.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return False
        raise
    return True


class Keeping:
    """A daemon's memory with its service manager."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._found = keeper.take_kept()

    def found(self) -> Life | None:
        """The life that an earlier process has left; None: there was none. To be asked once.

        Raises:
            KeepingError: it is another version's, or not whole; it is left where it is.
        """
        if _LIFE not in self._found:
            # Whoever began to keep this died before it served anybody.
            for name in list(self._found):
                self._drop(name)
            return None
        try:
            return self._adopt()
        except ForeignMemoryError as error:
            raise KeepingError(f"what an earlier daemon has left: {error}") from None

    def _adopt(self) -> Life:
        life = find_label("life", LAYOUT_VERSION, self._found[_LIFE])
        (shards,) = _DETAILS.unpack_from(life.details)
        missing = [name for name in _names(shards) if name not in self._found]
        if missing:
            raise ForeignMemoryError(
                f"{', '.join(missing)} did not come back: raise FileDescriptorStoreMax, and stop "
                "the service for good (its pages are lost then) before it is started"
            )
        memories = []
        for shard in range(shards):
            names = {kind: _name(shard, kind) for kind in KINDS}
            memory = ShardMemory.adopt({kind: self._found[name] for kind, name in names.items()})
            for name in names.values():
                del self._found[name]
            memories.append(memory)
        ledger = None
        if shards > 1:
            ledger = adopt_shared_region(self._found[_LEDGER])
            del self._found[_LEDGER]
        os.close(self._found.pop(_LIFE))
        return Life(memories, ledger, revived=True)

    def keep(self, life: Life) -> None:
        """Have a new life kept.

        Raises:
            KeepingError: it cannot be.
        """
        shards = len(life.memories)
        label = Label(
            kind="life",
            version=LAYOUT_VERSION,
            life=os.urandom(LIFE_BYTES),
            size=SYSTEM_PAGE,
            details=_DETAILS.pack(shards),
        )
        regions: dict[str, int] = {
            _name(shard, kind): fd
            for shard, memory in enumerate(life.memories)
            for kind, fd in memory.fds.items()
        }
        if life.ledger is not None:
            regions[_LEDGER] = life.ledger.fd
        mark = make_region(label)
        regions[_LIFE] = mark.fd
        for name, fd in regions.items():
            self._keep(name, fd)

    def _keep(self, name: str, fd: int) -> None:
        try:
            self._keeper.keep(name, fd)
        except OSError as error:
            raise KeepingError(
                f"the service manager takes no descriptors: {error.strerror or error}"
            ) from None

    # Who has which chunk of a device

    def keep_owners(self, path: str, owners: SharedRegion) -> None:
        """Have it kept which shard has which chunk of a device. Raises: as `keep`."""
        self._keep(_owners(path), owners.fd)

    def take_owners(self, path: str) -> int | None:
        """The descriptor of a device's owners that an earlier process has left; None: no such."""
        return self._found.pop(_owners(path), None)

    def leave_owners(self, path: str) -> None:
        """The device cannot be had for now: what is kept of it is for a process that has it."""
        fd = self.take_owners(path)
        if fd is not None:
            os.close(fd)

    def forget_owners(self, path: str) -> None:
        """The device is in use no more."""
        self._keeper.let_go(_owners(path))

    def forget_the_rest(self) -> None:
        """What an earlier process has left and nobody has asked for is of no use."""
        for name in list(self._found):
            self._drop(name)

    def _drop(self, name: str) -> None:
        os.close(self._found.pop(name))
        self._keeper.let_go(name)


def _names(shards: int) -> list[str]:
    """What there is of a life of so many shards, besides devices and `life`."""
    names = [_name(shard, kind) for shard in range(shards) for kind in KINDS]
    return [*names, _LEDGER] if shards > 1 else names


def _name(shard: int, kind: str) -> str:
    return f"{shard}-{kind}"


def _owners(path: str) -> str:
    name = os.fsencode(path)
    return _EXTENTS + blake2b(name, digest_size=16).hexdigest()
