"""What a daemon's next process gets of this one: memory that the service manager keeps meanwhile.

    N-KIND         the memory of shard N, as ShardMemory cuts it
    ledger         what several shards share limits through
    extents-HASH   which shard has which chunk of a device, of several
    life           that there is all of it; sent when all of the above is there
    notes          text for the next process; memory that an older version has left has none

What an earlier version has left is converted (see `upgrades`). The copy of a region that is of
version V has the region's name and .V behind it, and is kept beside the original until the life's
label says the new version. That is one write: before it the copies are nothing, and the original
is what it was; after it the original is nothing. So nobody who is killed in between loses anything,
and an older daemon that is started again before that goes on as if nothing had happened.

Invariants:
- What is kept is complete before a client is served: without `life` nobody has stored anything.
- Of one life no two processes are at work: who goes on with it waits until the last has ended.
- What cannot be converted, or is not whole, is refused, and left where it is.

This module must not know what the memory holds, or who serves from it.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

import numpy as np

from vswapd.kept_text import KeptText, TooLongError
from vswapd.ledger import adopt_shared_region, shared_region
from vswapd.memory import KINDS, Shape, ShardMemory
from vswapd.upgrades import LIFE_VERSION, LIVES, Moment, converted
from vswapd_backends.label import (
    LIFE_BYTES,
    ForeignMemoryError,
    Label,
    adopt_region,
    find_label,
    make_region,
    relabel,
)
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion

_LOG: Final = logging.getLogger(__name__)
_DETAILS: Final = struct.Struct("<I")
_LIFE: Final = "life"
_LEDGER: Final = "ledger"
_EXTENTS: Final = "extents-"
_NOTES: Final = "notes"
_NOTES_VERSION: Final = 1
_NOTES_BYTES: Final = SYSTEM_PAGE + (2 << 20)
"""A page for the word that names a half, and the halves; untouched, they cost nothing."""
_LAST_BREATH_S: Final = 45.0
"""How long the last process may take to end: as long as shards have to finish what is under way."""


class KeepingError(Exception):
    """What was kept cannot be gone on with, or nothing can be kept; the text says what to do."""


class RefusedError(KeepingError):
    """What an earlier process has left cannot be gone on with. It is left where it is."""


class GivenUpError(Exception):
    """Whoever has started this process does not want to wait for it any more."""


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

    def wait_for_the_last(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until no other process is at work on it, or it is given up.

        Raises:
            KeepingError: one does not end.
            GivenUpError: `given_up` says so.
        """
        _wait_for_the_last([memory.state.fd for memory in self.memories], given_up)


def _wait_for_the_last(states: Sequence[int], given_up: Callable[[], bool]) -> None:
    """Wait until no process is at work on the memory of shards, by the descriptors of their state.

    Raises:
        KeepingError: one does not end.
        GivenUpError: it is not to be waited for any longer.
    """
    end = time.monotonic() + _LAST_BREATH_S
    for shard, fd in enumerate(states):
        while not _hold(fd):
            if time.monotonic() > end:
                raise KeepingError(f"shard {shard} of an earlier daemon is still at work: end it")
            if given_up():
                raise GivenUpError
            time.sleep(0.01)  # nothing is served yet
        fcntl.lockf(fd, fcntl.LOCK_UN)


def claim(memory: ShardMemory) -> None:
    """Say that this process is at work on a shard's memory, until it ends.

    Raises:
        KeepingError: another process is.
    """
    if not _hold(memory.state.fd):
        raise KeepingError(f"shard {memory.shape.shard} is another process's: end that one")


def _hold(state: int) -> bool:
    """Lock a record of the state's file: the lock goes with this process, however it ends."""
    try:
        fcntl.lockf(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return False
        raise
    return True


class Keeping:
    """A daemon's memory with its service manager."""

    def __init__(self, keeper: Keeper, given_up: Callable[[], bool] = lambda: False) -> None:
        """Take what an earlier process has left.

        Args:
            keeper: has it.
            given_up: whether who waits for another process to end need not go on doing so.
        """
        self._keeper = keeper
        self._given_up = given_up
        self._found = keeper.take_kept()
        """Descriptors by region, once `found` has chosen; by name before."""
        self.holds: Final = _LIFE in self._found
        """Whether an earlier process has left a life: what clients have stored is in it."""
        self._names: dict[str, str] = {}
        """What regions are kept as whose name is another."""
        self._notes: KeptText | None = None
        self._told_of_notes = False

    def found(self) -> Life | None:
        """The life that an earlier process has left; None: there was none. To be asked once.

        Raises:
            RefusedError: it is not whole, or cannot be converted.
            KeepingError: another process is still at work on it.
            GivenUpError: the same, and nobody wants to wait for its end.
        """
        if _LIFE not in self._found:
            # Whoever began to keep this died before it served anybody.
            for name in list(self._found):
                self._drop(name)
            return None
        try:
            life = find_label("life", LIFE_VERSION, self._found[_LIFE], older=LIVES.keys())
            (shards,) = _DETAILS.unpack_from(life.details)
            self._choose(LIVES[life.version])
            self._refuse_a_part(shards)
            if life.version != LIFE_VERSION:
                self._convert(life, shards)
            return self._adopt(shards)
        except ForeignMemoryError as error:
            raise RefusedError(f"what an earlier daemon has left: {error}") from None

    def _refuse_a_part(self, shards: int) -> None:
        missing = [name for name in _names(shards) if name not in self._found]
        if missing:
            raise ForeignMemoryError(
                f"{', '.join(missing)} did not come back: raise FileDescriptorStoreMax, and stop "
                "the service for good (its pages are lost then) before it is started"
            )

    def _choose(self, versions: Mapping[str, int]) -> None:
        """Of a region and copies of it, go on with the one that a life of these versions has."""
        for name in sorted(self._found):
            region, _, version = name.partition(".")
            if not version:
                continue
            if version == str(versions.get(_kind(region))):
                if region in self._found:
                    self._drop(region)
                self._found[region] = self._found.pop(name)
                self._names[region] = name
            else:
                self._drop(name)

    def _convert(self, life: Label, shards: int) -> None:
        """Make everything of an earlier version what this one knows."""
        begin, before = time.monotonic(), LIVES[life.version]
        labels = {
            region: find_label(_kind(region), before[_kind(region)], fd)
            for region, fd in self._found.items()
            if _kind(region) in before  # whatever else there is nobody will ask for
        }
        # Else what has been copied might still be changed.
        states = [self._found[_name(shard, "state")] for shard in range(shards)]
        _wait_for_the_last(states, self._given_up)
        moment = Moment(clock=time.clock_gettime(time.CLOCK_BOOTTIME), wall=time.time())
        copies: dict[str, int] = {}
        try:
            for region, label in labels.items():
                version = LIVES[LIFE_VERSION][label.kind]
                copy = converted(self._found[region], label, version, moment)
                if copy is not None:
                    copies[region] = copy
                    self._keep(_copy(region, version), copy)
            relabel(dataclasses.replace(life, version=LIFE_VERSION), self._found[_LIFE])
        except (OSError, KeepingError, ForeignMemoryError) as error:
            for region, fd in copies.items():
                os.close(fd)
                self._keeper.let_go(_copy(region, LIVES[LIFE_VERSION][_kind(region)]))
            why = error.strerror if isinstance(error, OSError) else error
            raise RefusedError(
                f"what an earlier daemon has left is of layout {life.version}, and cannot be made "
                f"into layout {LIFE_VERSION}: {why}. It was left alone, with all pages: see to "
                "that, or install the vswapd again that made it, and restart the service"
            ) from None
        for region, fd in copies.items():
            self._drop(region)
            self._found[region] = fd
            self._names[region] = _copy(region, LIVES[LIFE_VERSION][_kind(region)])
        took = time.monotonic() - begin
        _LOG.info(
            "what was kept is of layout %d now, not %d: %.2f s", LIFE_VERSION, life.version, took
        )

    def _adopt(self, shards: int) -> Life:
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
            version=LIFE_VERSION,
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

    # Notes for the next process

    def notes(self) -> str | None:
        """What was noted last of the life that was found; None: nothing.

        To be asked before `found`.

        Raises:
            KeepingError: another version has noted it; it is left where it is.
        """
        if not self.holds or _NOTES not in self._found:
            return None
        try:
            label = find_label(_NOTES, _NOTES_VERSION, self._found[_NOTES])
        except ForeignMemoryError as error:
            raise RefusedError(f"what an earlier daemon has left: {error}") from None
        self._notes = _text_in(adopt_region(label, self._found.pop(_NOTES)))
        return self._notes.text()

    def note(self, text: str) -> None:
        """Leave the next process a text, in place of the one before.

        The daemon does without where it cannot be, and says so once.
        """
        try:
            if self._notes is None:
                life = os.urandom(LIFE_BYTES)
                region = make_region(
                    Label(kind=_NOTES, version=_NOTES_VERSION, life=life, size=_NOTES_BYTES)
                )
                self._notes = _text_in(region)
                self._keep(_NOTES, region.fd)
            self._notes.keep(text)
        except (KeepingError, TooLongError) as error:
            if not self._told_of_notes:
                _LOG.warning(
                    "the next daemon will not know what this one was configured with: %s", error
                )
            self._told_of_notes = True

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
        self._let_go(_owners(path))

    def forget_the_rest(self) -> None:
        """What an earlier process has left and nobody has asked for is of no use."""
        for name in list(self._found):
            self._drop(name)

    def _drop(self, name: str) -> None:
        os.close(self._found.pop(name))
        self._let_go(name)

    def _let_go(self, region: str) -> None:
        self._keeper.let_go(self._names.pop(region, region))


def _text_in(region: SharedRegion) -> KeptText:
    return KeptText(region.words_array()[:1].view(np.int64), region.view[SYSTEM_PAGE:])


def _names(shards: int) -> list[str]:
    """What there is of a life of so many shards, besides devices and `life`."""
    names = [_name(shard, kind) for shard in range(shards) for kind in KINDS]
    return [*names, _LEDGER] if shards > 1 else names


def _name(shard: int, kind: str) -> str:
    return f"{shard}-{kind}"


def _kind(region: str) -> str:
    """What kind of memory a region is of, by its name."""
    first, _, second = region.partition("-")
    return second if first.isdecimal() else first


def _copy(region: str, version: int) -> str:
    """The name of a region's copy that is of another version than the original."""
    return f"{region}.{version}"


def _owners(path: str) -> str:
    name = os.fsencode(path)
    return _EXTENTS + blake2b(name, digest_size=16).hexdigest()
