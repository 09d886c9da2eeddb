"""The service: everything wired together, from the configuration to the last close.

This module knows all the others.

Invariants:
- What an earlier daemon has left is gone on with, or refused and left alone; it is never dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from vswapd import held_signals, stacks, status
from vswapd.acceptor import Acceptor
from vswapd.config import Config, ConfigError
from vswapd.config_schema import Shards
from vswapd.control import Control, KeptDevice
from vswapd.errors import OutOfServiceError
from vswapd.forking import Child, end_children, fork_shards
from vswapd.front import (
    Front,
    ServiceError,
    Sockets,
    Tally,
    lock_memory,
    open_sockets,
    raise_descriptors,
)
from vswapd.host import Host
from vswapd.keeping import GivenUpError, Keeping, KeepingError, Life, RefusedError, claim
from vswapd.notify import ServiceManager
from vswapd.own_memory import own_bytes
from vswapd.recovery import RecoveryError
from vswapd.shard import Kept, Shard
from vswapd.shard_process import Birth
from vswapd.sizes import human_size
from vswapd.steering import Opened, Reloaded, with_set
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
                _LOG.error("%s; the daemon goes on without it", error)
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
        return Tally(snapshot.slots.allocated, self._shard.server.clients, snapshot.saved_bytes)

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
        )

    def configure(self, config: Config) -> None:
        """See steering.Surroundings."""
        self._front.configure(config)


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


def _gone_on_with(config: Config, host: Host, life: Life) -> Config:
    """A configuration as it holds over memory that is there already, with what was set since."""
    shards = len(life.memories)
    wanted = config.shards(host)
    if wanted != shards:
        _LOG.warning(
            "server.shards = %d: what was kept is of %d, which go on; stop the service for good, "
            "and start it, to have another number",
            wanted,
            shards,
        )
    config = dataclasses.replace(
        config,
        table=msgspec.structs.replace(
            config.table, max_slots=sum(memory.shape.max_slots for memory in life.memories)
        ),
        server=msgspec.structs.replace(config.server, shards=Shards(shards)),
    )
    base = config
    for key, value in run_time_settings(Control(life.memories[0])).items():
        try:
            changed = with_set(config, key, value)
            changed.settings(host)
        except ConfigError as error:
            _LOG.warning("%s = %s was set at run time, and is left out: %s", key, value, error)
        else:
            config = changed
    return _with_metrics_that_can_be_served(config, base)


def _with_metrics_that_can_be_served(config: Config, base: Config) -> Config:
    """Metrics as they were set at run time, if that is possible now; else as the file has them."""
    if config.metrics == base.metrics:
        return config
    from vswapd.metrics import Exporter

    with Exporter(dict) as exporter:
        try:
            exporter.apply(config.metrics.listen, "")
        except ConfigError as error:
            _LOG.warning("metrics were set at run time, and are left out: %s", error)
            return dataclasses.replace(config, metrics=base.metrics)
    return config


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


def serve(config: Config, source: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a daemon until it is told to stop. Signals are held, see held_signals.

    Raises:
        ListenError, ServiceError, ConfigError: it could not start, or go on; the text says why.
        OSError, MemoryError, RuntimeError: the system refuses what it cannot do without.
    """
    be_undumpable()
    if (why := stacks.make_room()) is not None:
        raise ServiceError(why)
    host = Host.here()
    try:
        manager = ServiceManager()
    except ValueError as error:
        raise ServiceError(f"LISTEN_FDS: {error}") from None
    config.settings(host)  # what is wrong with it is found before anything is made
    raise_descriptors(config, host)
    sockets = open_sockets(config, host, manager)
    with contextlib.ExitStack() as undo:
        for listener in sockets.listeners:
            undo.callback(listener.close)
        if sockets.own is not None:
            undo.callback(sockets.own.close)
        undo.enter_context(contextlib.suppress(GivenUpError))
        try:
            _serve(config, host, source, overrides, manager, sockets, undo)
        except KeepingError as error:
            raise _cannot_go_on(error, manager) from None
        except (RecoveryError, OutOfServiceError) as error:
            raise ServiceError(str(error)) from None


def _serve(
    config: Config,
    host: Host,
    source: Path | None,
    overrides: tuple[str, ...],
    manager: ServiceManager,
    sockets: Sockets,
    undo: contextlib.ExitStack,
) -> None:
    """The same, once it has its socket."""
    keeping = Keeping(manager, held_signals.asked_to_end)
    life = _life(config, host, keeping, keeps=manager.keeps)
    if life is not None and life.revived:
        config = _gone_on_with(config, host, life)
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

    async def main() -> None:
        front = Front(config, sockets, manager)
        front.body = make_body(front)
        await front.run()

    with asyncio.Runner() as runner:
        runner.run(main())
