"""The service: everything wired together, from the configuration to the last close.

This module knows all the others.

Invariants:
- What an earlier daemon has left is gone on with, or refused and left alone; it is never dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

from vswapd import held_signals, journal, stacks, status
from vswapd.acceptor import Acceptor
from vswapd.config import Config, ConfigError
from vswapd.control import Control, KeptDevice
from vswapd.errors import ArgumentError, OutOfServiceError
from vswapd.forking import Child, end_children, fork_shards
from vswapd.front import (
    Front,
    ServiceError,
    Sockets,
    Tally,
    lock_memory,
    one_line,
    open_sockets,
    raise_descriptors,
    turn_away,
)
from vswapd.host import Host
from vswapd.keeping import GivenUpError, Keeping, KeepingError, Life, RefusedError, claim
from vswapd.listener import ListenError
from vswapd.notify import ServiceManager
from vswapd.own_memory import own_bytes
from vswapd.recovery import RecoveryError
from vswapd.shard import Kept, Shard
from vswapd.shard_process import Birth
from vswapd.sizes import human_size
from vswapd.starting import (
    FallBack,
    Notes,
    NothingToFallBackOnError,
    Start,
    check_metrics,
    made_with,
    over,
    over_new,
    read,
)
from vswapd.steering import Opened, Reloaded
from vswapd.supervisor import Before, Dealt, Supervisor
from vswapd.swap_devices import Locked, adopt_device, open_alone, reopen_alone
from vswapd.undumpable import be_undumpable
from vswapd.vswap import run_time_settings, shape_for
from vswapd.watchdog import Watchdog
from vswapd_backends.label import ForeignMemoryError
from vswapd_backends.shared_extents import adopt_owners_region
from vswapd_blockdev.device import OpenError

_LOG: Final = logging.getLogger(__name__)
__all__ = ["ServiceError", "serve"]
_REFUSED_S: Final = 60.0
"""Before what was refused is tried again: once a second would fill the journal. It is less than the
unit's TimeoutStartSec=."""


class OneShard:
    """A daemon's body that is one shard, in the daemon's own process."""

    def __init__(
        self,
        front: Front,
        config: Config,
        host: Host,
        source: Path | None,
        overrides: tuple[str, ...],
        life: Life | None,
    ) -> None:
        self._front = front
        self._host = host
        self._own_bytes = 0
        self._revived = life is not None and life.revived
        self._boot_id = secrets.token_bytes(16)
        self._shard = Shard(
            config=config,
            host=host,
            source=source,
            overrides=overrides,
            surroundings=self,
            open_device=lambda entry: open_alone(entry, self._boot_id),
            kept=None if life is None else _kept(life),
        )

    # What the front wants

    async def start(self, made: contextlib.AsyncExitStack) -> None:
        """See front.Body."""
        shard = self._shard
        config = shard.steering.config
        self._front.lock = lock_memory(config, shard.engine.lock_memory, revived=self._revived)
        await shard.start(made)
        self._own_bytes = own_bytes()
        self._front.fit(config, self._host, self._own_bytes, revived=self._revived)
        for entry in config.devices:
            if entry.path in shard.steering.devices:
                continue  # an earlier process has put it into use
            try:
                opened = await shard.drive(shard.steering.swapon(entry))
            except OutOfServiceError as error:
                if not self._revived:
                    raise
                # It was out of use, and holds nothing: what the others hold is needed.
                self._front.lacks(entry.path, str(error))
                continue
            size = human_size(opened["size_bytes"])
            _LOG.info("%s: %s, priority %d", opened["path"], size, opened["priority"])

    def listen(
        self, listeners: list[socket.socket], made: contextlib.AsyncExitStack
    ) -> list[Acceptor]:
        """See front.Body."""
        self._shard.serve(made)
        return [self._shard.server.listen(listener) for listener in listeners]

    def watch(self, period_s: float, tell: Callable[[], None]) -> Coroutine[Any, Any, None]:
        """See front.Body."""
        return Watchdog(self._shard.driver, self._shard.shrinker, tell).run(period_s)

    async def document(self) -> dict[str, Any]:
        """See front.Body."""
        return await self._shard.drive(self._shard.steering.status())

    async def tally(self) -> Tally:
        """See front.Body."""
        with self._shard.driver.lock:
            snapshot = self._shard.engine.snapshot()
        return Tally(
            snapshot.slots.allocated,
            self._shard.server.clients,
            snapshot.saved_bytes,
            tuple(device.path for device in snapshot.devices),
        )

    async def reload(self) -> Reloaded:
        """See front.Body."""
        return await self._shard.drive(self._shard.steering.reload())

    # What steering wants

    def facts(self, config: Config) -> status.Facts:
        """See steering.Surroundings."""
        return self._front.facts(
            config,
            clients=self._shard.server.clients,
            shrinker_errors=self._shard.shrinker.errors,
            fitting=config.fitting(self._host, self._own_bytes),
            in_use=self._shard.steering.devices,
        )

    def configure(self, config: Config) -> None:
        """See steering.Surroundings."""
        self._front.configure(config)

    def was_read(self, read: Config | str) -> None:
        """See steering.Surroundings."""
        self._front.was_read(read)


def _kept(life: Life) -> Kept:
    """The memory of a daemon that is one shard."""
    (memory,) = life.memories
    claim(memory)
    return Kept(memory, _reopen if life.revived else None, beyond_daemon=True)


def _reopen(kept: KeptDevice) -> tuple[Opened, None] | None:
    """See shard.Reopen."""
    try:
        return reopen_alone(kept), None
    except OpenError as error:
        _LOG.error("%s", error)
        return None


def _before(life: Life, keeping: Keeping) -> Before:
    """What there is of an earlier daemon of several shards, besides their memory.

    Raises:
        RefusedError: it is another version's; it is left where it is.
    """
    found: dict[str, Dealt] = {}
    lost: dict[str, str] = {}
    shards = len(life.memories)
    controls = [Control(memory) for memory in life.memories]
    for kept in [device for control in controls for device in control.devices()]:
        if kept.path in found:
            continue
        try:
            device = Locked.reopen(kept)
        except OpenError as error:
            lost[kept.path] = str(error)
            keeping.leave_owners(kept.path)
            continue
        fd = keeping.take_owners(kept.path)
        if fd is None:
            device.close()
            lost[kept.path] = f"{kept.path}: who has what of it was not kept: its pages are lost"
            continue
        try:
            owners = adopt_owners_region(kept.extents, shards, fd)
        except ForeignMemoryError as error:
            raise RefusedError(f"what an earlier daemon has left of {kept.path}: {error}") from None
        found[kept.path] = Dealt(device, owners)
    for path in lost.keys() - found.keys():
        _LOG.error("%s", lost[path])
    return Before(found, frozenset(lost.keys() - found.keys()), run_time_settings(controls[0]))


def _life(config: Config, host: Host, keeping: Keeping, *, keeps: bool) -> Life | None:
    """What this process goes on with, or begins; None: one shard that nobody keeps.

    Raises:
        KeepingError: it cannot be gone on with, or kept.
        GivenUpError: a signal has come meanwhile.
    """
    found = keeping.found()
    if found is not None:
        found.wait_for_the_last(held_signals.asked_to_end)
        return found
    shards = config.shards(host)
    if shards == 1 and not keeps:
        return None
    settings = config.settings(host).of_one(shards)
    life = Life.new([shape_for(settings, index) for index in range(shards)])
    if keeps:
        keeping.keep(life)
    return life


def _cannot_go_on(error: KeepingError, manager: ServiceManager) -> ServiceError:
    """What the daemon ends with. Where somebody has to do something first, it waits before it does.

    Whoever does it stops this process then.

    Raises:
        GivenUpError: somebody has.
    """
    if not isinstance(error, RefusedError):
        return ServiceError(str(error))
    _LOG.error("%s", error)
    manager.tell(STATUS=f"refused: {error}")
    if held_signals.asked_to_end_within(_REFUSED_S):
        raise GivenUpError
    return ServiceError("what was left is looked at again")


MakeBody = Callable[[Front], "OneShard | Supervisor"]


def _several(
    config: Config,
    host: Host,
    source: Path | None,
    overrides: tuple[str, ...],
    life: Life,
    manager: ServiceManager,
    keeping: Keeping,
    unwanted: Collection[int],
    undo: contextlib.ExitStack,
) -> MakeBody:
    """Fork the shards of a daemon; what is returned makes their supervisor."""
    assert life.ledger is not None
    before = _before(life, keeping) if life.revived else Before()
    # What one process may lock any other of them may, and each locks for itself.
    lock = lock_memory(config, life.memories[0].lock, revived=life.revived)
    life.memories[0].unlock()
    births = [
        Birth(
            index=index,
            ledger=life.ledger,
            config=config,
            host=host,
            source=source,
            overrides=overrides,
            watchdog_s=manager.watchdog_s,
            adopt_device=adopt_device,
            memory=memory,
            revived=life.revived,
            kept=manager.keeps,
            locks=lock.locked,
            devices=tuple(used.in_use() for used in before.devices.values()),
        )
        for index, memory in enumerate(life.memories)
    ]
    children: list[Child] = fork_shards(births, unwanted)
    undo.callback(end_children, children)
    boot_id = secrets.token_bytes(16)

    def make(front: Front) -> Supervisor:
        front.lock = lock
        return Supervisor(
            front,
            births,
            children,
            partial(Locked.open, boot_id=boot_id),
            keeping if manager.keeps else None,
            before,
        )

    return make


def serve(source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop. Signals are held, see held_signals.

    Args:
        source: the configuration's file; None: the defaults.
        overrides: what holds on top of it.

    Raises:
        ConfigError: it could not start with this configuration; nothing is kept.
        ListenError, ServiceError: it could not start, or go on; the text says why.
        OSError, MemoryError, RuntimeError: the system refuses what it cannot do without.
    """
    be_undumpable()
    stacks.call_with_room(lambda: _serve(source, overrides))


def _serve(source: Path | None, overrides: tuple[str, ...]) -> None:
    host = Host.here()
    try:
        manager = ServiceManager()
    except ValueError as error:
        raise ServiceError(f"LISTEN_FDS: {error}") from None
    keeping = Keeping(manager, held_signals.asked_to_end)
    with contextlib.suppress(GivenUpError):
        try:
            _go_on(source, overrides, host, manager, keeping)
        except KeepingError as error:
            failed: Exception = _cannot_go_on(error, manager)
        except (RecoveryError, OutOfServiceError, NothingToFallBackOnError) as error:
            failed = ServiceError(str(error))
        except (ConfigError, ArgumentError) as error:
            # A unit may end for good with a ConfigError's code, and what is kept would be given up.
            failed = ServiceError(str(error)) if keeping.holds else error
            if not keeping.holds:
                with contextlib.suppress(ValueError):  # what was passed is no socket
                    turn_away(manager.take_sockets())
        except (ListenError, ServiceError) as error:
            failed = error
        else:
            return
        manager.tell(STATUS=f"FAILED: {one_line(str(failed))}")
        raise failed


def _go_on(
    source: Path | None,
    overrides: tuple[str, ...],
    host: Host,
    manager: ServiceManager,
    keeping: Keeping,
) -> None:
    notes = keeping.notes()
    start, sockets = _begin(source, overrides, host, manager, keeping, notes)
    with contextlib.ExitStack() as undo:
        for listener in sockets.listeners:
            undo.callback(listener.close)
        if sockets.own is not None:
            undo.callback(sockets.own.close)
        life = _life(start.config, host, keeping, keeps=manager.keeps)
        if life is not None and life.revived:
            start = over(start, life.memories, host, notes)
        elif life is not None and manager.keeps:
            start = over_new(start, life.memories)
        config = start.config
        if start.problem:
            _LOG.error("configuration not loaded, the last one goes on to hold: %s", start.problem)
        make_body: MakeBody = partial(
            OneShard, config=config, host=host, source=source, overrides=overrides, life=life
        )
        if life is not None and len(life.memories) > 1:
            own = () if sockets.own is None else sockets.own.descriptors
            unwanted = {*own, *(sock.fileno() for sock in sockets.listeners)}
            make_body = _several(
                config, host, source, overrides, life, manager, keeping, unwanted, undo
            )
        keeping.forget_the_rest()
        try:
            with asyncio.Runner() as runner:
                runner.run(_run(start, sockets, manager, keeping, make_body))
        except ConfigError:
            if sockets.own is None and not keeping.holds:
                turn_away(sockets.listeners)
            raise


async def _run(
    start: Start,
    sockets: Sockets,
    manager: ServiceManager,
    keeping: Keeping,
    make_body: MakeBody,
) -> None:
    kept_with = made_with(start.config)

    def note(read: Config) -> None:
        if manager.keeps:
            keeping.note(str(Notes(made_with=kept_with, read=read.flat())))

    front = Front(start.config, start.read or start.problem, sockets, manager, note)
    front.body = make_body(front)
    await front.run()


def _begin(
    source: Path | None,
    overrides: tuple[str, ...],
    host: Host,
    manager: ServiceManager,
    keeping: Keeping,
    notes: str | None,
) -> tuple[Start, Sockets]:
    """The configuration to start with, and the sockets that it asks for.

    Raises:
        ConfigError, ListenError, ServiceError, NothingToFallBackOnError: there are none.
    """

    def usable(config: Config) -> None:
        config.settings(host)
        if keeping.holds:
            # Whoever starts with nothing finds it out when he tries, and fails.
            check_metrics(config)

    fall_back = FallBack(notes, usable) if keeping.holds else None
    start = read(source, overrides, usable, fall_back)
    journal.set_up(start.config.log.level)
    raise_descriptors(start.config, host)
    try:
        return start, open_sockets(start.config, host, manager)
    except ListenError as error:
        if fall_back is None or start.read is None:
            raise
        last = fall_back.start(str(error))
        if last.config.server == start.config.server:
            raise
        raise_descriptors(last.config, host)
        return last, open_sockets(last.config, host, manager)
