"""What a daemon is to the outside: its socket, signals, the service manager, metrics.

What serves behind it, one shard or several, is its body.

Invariants:
- READY is told once devices are in use and the socket is served.
- The socket comes first: a second daemon gets no further, and touches no device of the first.
- Stopping finishes what is under way, and removes what the start has made, also when the start
  fails half-way.

This module must not know engines, or what answers a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from vswapd import __version__, held_signals, journal, status
from vswapd.acceptor import Acceptor
from vswapd.beside import beside
from vswapd.config import Config, ConfigError
from vswapd.config_budget import Fitting
from vswapd.errors import EngineError, OutOfServiceError
from vswapd.host import Host
from vswapd.listener import Listener, ListenError
from vswapd.notify import ServiceManager
from vswapd.sizes import human_size
from vswapd.steering import Reloaded, log_reloaded

_LOG: Final = logging.getLogger(__name__)
_STATUS_S: Final = 10.0
"""How often the line that `systemctl status` shows is made anew."""
_NO_MORE_TIME: Final = (
    "all the processor time is used that RLIMIT_CPU allows: raise it (LimitCPU= in a unit)"
)
_OTHER_DESCRIPTORS: Final = 128
"""What the daemon needs besides its connections, generously."""
_LEAST_DESCRIPTORS: Final = 32
_DESCRIPTORS_PER_SHARD: Final = 8
"""What it cannot start without."""


class ServiceError(Exception):
    """The daemon cannot start, or go on; the text says what to do. EX_OSERR."""

    exit_code: ClassVar[int] = 71


class Tally(NamedTuple):
    """What the service manager shows."""

    slots: int
    clients: int
    saved_bytes: int
    devices: tuple[str, ...] = ()
    """Paths of those in use."""


class Body(Protocol):
    """What serves behind the front."""

    async def start(self, made: contextlib.AsyncExitStack) -> None:
        """Start, and put the configured devices into use; leaves in `made` how it is ended.

        Raises:
            ServiceError, OutOfServiceError: it cannot.
        """

    def listen(
        self, listeners: list[socket.socket], made: contextlib.AsyncExitStack
    ) -> list[Acceptor]:
        """Take connections, from each socket by one acceptor."""

    def watch(self, period_s: float, tell: Callable[[], None]) -> Any:
        """A coroutine that tells of each beat, for ever, as long as there is one."""

    async def document(self) -> dict[str, Any]:
        """The status document."""

    async def tally(self) -> Tally:
        """A short version of it."""

    async def reload(self) -> Reloaded:
        """Read the configuration again.

        Raises:
            ConfigError, EngineError: nothing was changed.
        """


class Sockets(NamedTuple):
    """Where the daemon listens."""

    where: str
    listeners: list[socket.socket]
    own: Listener | None
    """What has to be removed at the end; None: they are the service manager's."""


def open_sockets(config: Config, host: Host, manager: ServiceManager) -> Sockets:
    """The sockets that were passed to the daemon, or one of its own.

    Raises:
        ListenError, ServiceError: there is none to be had.
    """
    try:
        passed = manager.take_sockets()
    except ValueError as error:
        raise ServiceError(f"LISTEN_FDS: {error}") from None
    if passed:
        # They are the service manager's: it keeps listening when we are gone.
        return Sockets(", ".join(str(sock.getsockname()) for sock in passed), passed, None)
    listener = Listener.open(
        config.socket_path(host),
        mode=int(config.server.socket_mode),
        group=config.server.socket_group,
        own_folder=not config.server.socket and host.makes_folder,
    )
    return Sockets(listener.path, [listener.socket], listener)


def turn_away(listeners: Iterable[socket.socket]) -> None:
    """Hang up on clients that wait at sockets which nobody is going to serve, and close ours.

    The service manager goes on to listen there. It would begin the daemon again at once for clients
    that still wait, and they would wait for ever.
    """
    for listener in listeners:
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        with listener, contextlib.suppress(OSError):
            while waiting.poll(0):
                listener.accept()[0].close()


class Front:
    """See the module. Made inside a running event loop; `body` is set before `run`."""

    def __init__(
        self,
        config: Config,
        read: Config | str,
        sockets: Sockets,
        manager: ServiceManager,
        note: Callable[[Config], None],
    ) -> None:
        """Make it.

        Args:
            config: what it starts with.
            read: what the file says, or what is wrong with it.
            sockets: where to listen.
            manager: who has started this process.
            note: told of each configuration that was read, and is good.
        """
        self._config = config
        self._read = read
        self._problem: str | None = None
        """Why what the file says does not hold; None: it does."""
        self._lacking: dict[str, str] = {}
        """Devices that it names and that could not be put into use, by path, with the reason."""
        self._note = note
        self._sockets = sockets
        self._manager = manager
        self._news = asyncio.Event()
        """There is something new for the service manager to show."""
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._serving = False
        self.failure: str | None = None
        """Why the daemon cannot go on, if it cannot."""
        self._acceptors: list[Acceptor] = []
        self._reloads: set[asyncio.Task[None]] = set()
        self._metrics: Any = None
        """The exporter, once metrics are switched on for the first time."""
        self._metrics_lock = threading.Lock()
        self._metrics_ended = False
        self.lock = Lock(False)
        """Set by the body, once it has tried."""
        self.body: Body

    # Running

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ServiceError, OutOfServiceError, ConfigError: it could not start, or go on.
        """
        held_signals.attend(
            self._loop,
            {
                signal.SIGTERM: self._stopping.set,
                signal.SIGINT: self._stopping.set,
                signal.SIGHUP: self._hang_up,
                signal.SIGXCPU: partial(self.fail, _NO_MORE_TIME),
            },
        )
        journal.begin()
        async with contextlib.AsyncExitStack() as made:
            await self._start(made)
            if self._stopping.is_set():
                return
            self._serving = True
            if not self._manager.keeps:
                _LOG.info(
                    "no service manager keeps the memory: a kill or stop of %d loses all pages",
                    os.getpid(),
                )
            self._manager.tell(READY="1", STATUS=await self._headline())
            _LOG.info("vswapd %s serves %s", __version__, self._sockets.where)
            await self._stopping.wait()
            self._serving = False
            if self.failure is None:
                _LOG.info("stopping: requests under way are finished first")
            self._manager.tell(STOPPING="1", STATUS="Stopping")
        if self.failure is not None:
            raise ServiceError(self.failure)
        _LOG.info("stopped")

    def fail(self, text: str) -> None:
        """Stop because the daemon cannot go on."""
        self.failure = self.failure or text
        self._stopping.set()

    async def _start(self, made: contextlib.AsyncExitStack) -> None:
        """Make everything, and leave in `made` how it is unmade."""
        await self.body.start(made)
        made.push_async_callback(asyncio.to_thread, self._close_metrics)
        # A file that cannot be written now may be later: that is no reason not to start.
        await asyncio.to_thread(self.configure, self._config, tried=False)
        # Only now it is good: all that it asks for is there.
        self.was_read(self._read)
        self._acceptors = self.body.listen(self._sockets.listeners, made)
        beside(made, self._tell_status())
        if self._manager.watchdog_s is not None:
            tell = self.body.watch(
                self._manager.watchdog_s, lambda: self._manager.tell(WATCHDOG="1")
            )
            beside(made, tell)

    def _close_metrics(self) -> None:
        with self._metrics_lock:
            # What is being set is taken back while the daemon ends: its threads would never end.
            self._metrics_ended = True
            if self._metrics is not None:
                self._metrics.close()

    # What the service manager shows

    async def _tell_status(self) -> None:
        told = ""
        while True:
            self._news.clear()
            line = await self._headline()
            if line != told:
                told = line
                self._manager.tell(STATUS=line)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: until Python 3.12 it loses a cancellation that comes with the news,
                # and the daemon would not end.
                async with asyncio.timeout(_STATUS_S):
                    await self._news.wait()

    async def _headline(self) -> str:
        tally = await self.body.tally()
        saved = human_size(tally.saved_bytes)
        line = f"{tally.slots:,} pages of {tally.clients} clients, {saved} saved"
        error = self._config_error(tally.devices)
        return line if error is None else f"CONFIGURATION ERROR: {error} | {line}"

    def _config_error(self, in_use: Collection[str]) -> str | None:
        """Why not all that the file says holds; None: it does."""
        found = [] if self._problem is None else [f"{self._problem}; what was loaded last holds"]
        for path, why in list(self._lacking.items()):
            if path in in_use:
                self._lacking.pop(path, None)  # somebody has put it into use since
            else:
                found.append(f"{why}; the daemon goes on without it")
        return "; ".join(found) or None

    # What steering asks

    def fit(self, config: Config, host: Host, own_bytes: int, *, revived: bool) -> None:
        """Say how far pool.max fits beside the processes.

        Args:
            config: what holds.
            host: the machine.
            own_bytes: what all processes take by themselves, the pool not counted.
            revived: whether pages are kept already.

        Raises:
            ServiceError: it does not fit at all, and no pages are kept.
        """
        fitting = config.fitting(host, own_bytes)
        if fitting.refusal and not revived:
            raise ServiceError(fitting.refusal)
        if fitting.lowered:
            _LOG.warning("%s", fitting.lowered)

    def facts(
        self,
        config: Config,
        *,
        clients: int,
        shrinker_errors: int,
        fitting: Fitting,
        in_use: Collection[str],
    ) -> status.Facts:
        """What the engine does not know, for the status document.

        Args:
            config: what is in force.
            clients: how many there are.
            shrinker_errors: how many steps of it have failed.
            fitting: how far pool.max fits.
            in_use: the paths of devices.
        """
        return status.Facts(
            locked=self.lock.locked,
            lock_trouble=self.lock.trouble,
            fits_bytes=fitting.fits_bytes,
            lowered=fitting.lowered,
            version=__version__,
            state="stopping" if self._stopping.is_set() else "running",
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started,
            clients=clients,
            shrinker_errors=shrinker_errors,
            settings=config.flat(),
            config_error=self._config_error(in_use),
        )

    def was_read(self, read: Config | str) -> None:
        """See steering.Surroundings."""
        if isinstance(read, str):
            self._problem = one_line(read)
        else:
            self._problem = None
            named = {entry.path for entry in read.devices}
            self._lacking = {path: why for path, why in self._lacking.items() if path in named}
            self._note(read)
        self._news.set()

    def lacks(self, path: str, why: str) -> None:
        """A device of the configuration cannot be put into use: the daemon goes on without it."""
        _LOG.error("%s; the daemon goes on without it", why)
        self._lacking[path] = one_line(why)

    def configure(self, config: Config, *, tried: bool = True) -> None:
        """Put metrics and logging into force. May block; not for the event loop's thread.

        Args:
            config: says what.
            tried: see Exporter.apply.

        Raises:
            ConfigError: it cannot be done; all is as it was.
        """
        with self._metrics_lock:
            if not self._metrics_ended:
                self._apply_metrics(config.metrics.listen, config.metrics.textfile, tried=tried)
        journal.set_up(config.log.level)

    def _apply_metrics(self, listen: str, textfile: str, *, tried: bool) -> None:
        if self._metrics is None and (listen or textfile):
            # Only now: it brings a library of 3 MB.
            from vswapd.metrics import Exporter

            self._metrics = Exporter(self._document)
        if self._metrics is not None:
            self._metrics.apply(listen, textfile, tried=tried)

    def _document(self) -> dict[str, Any]:
        """The status document, for threads.

        Raises:
            OutOfServiceError: it is not that of the whole daemon. Counters that are lower for a
                while would look like ones that have begun anew.
        """
        found = asyncio.run_coroutine_threadsafe(self.body.document(), self._loop).result()
        if silent := found["silent_shards"]:
            shards = ", ".join(map(str, silent))
            raise OutOfServiceError(f"no sign of life from shard {shards}")
        return found

    # SIGHUP

    def _hang_up(self) -> None:
        if not self._serving:
            _LOG.warning("SIGHUP: no reload while starting or stopping")
            return
        task = self._loop.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._manager.reloading()
        try:
            done = await self.body.reload()
        except (ConfigError, EngineError) as error:
            _LOG.error("reload: nothing was changed: %s", error)
        else:
            log_reloaded(done)
        finally:
            self._look_after_socket()
            self._manager.tell(READY="1", STATUS=await self._headline())

    def _look_after_socket(self) -> None:
        """Make our own socket again if it was removed: nobody could reach us any more."""
        own = self._sockets.own
        if own is None or own.is_there() or not self._serving:
            return
        try:
            own.make_again()
        except ListenError as error:
            _LOG.error("reload: nobody can connect any more: %s", error)
        else:
            self._acceptors[0].move(own.socket)
            _LOG.warning("reload: %s was not there any more, and was made again", own.path)


class Lock(NamedTuple):
    """Whether the memory of all shards is locked into RAM."""

    locked: bool
    trouble: str = ""
    """Why not, where it was wanted."""


def lock_memory(config: Config, lock: Callable[[], None], *, revived: bool) -> Lock:
    """Lock memory as far as pool.lock_memory wants it, or say that it cannot be.

    Args:
        config: what holds.
        lock: raises OSError if it cannot.
        revived: whether pages are kept already: they are worth more than a lock.

    Raises:
        ServiceError: it cannot be locked, and has to be.
    """
    wanted = config.pool.lock_memory
    if wanted == "no":
        return Lock(False)
    try:
        lock()
    except OSError as error:
        trouble = _cannot_lock(error)
        if wanted == "must" and not revived:
            raise ServiceError(f"{trouble}, or set it to try") from None
        _LOG.warning("%s; the daemon goes on without", trouble)
        return Lock(False, trouble)
    return Lock(True)


def one_line(text: str) -> str:
    """Text that may be shown as one line, whatever a path or a name in it has."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _cannot_lock(error: OSError) -> str:
    """What to do when memory cannot be locked."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    most = "unlimited" if soft == resource.RLIM_INFINITY else human_size(soft)
    return (
        f"pool.lock_memory: {error.strerror or error}; RLIMIT_MEMLOCK is {most}: raise it "
        "(LimitMEMLOCK=infinity in a unit, CAP_IPC_LOCK in a container)"
    )


def raise_descriptors(config: Config, host: Host) -> None:
    """Allow as many descriptors as the connections need, or say that they cannot be had.

    Here, and in processes that are forked from now on: any of them may have all connections.

    Raises:
        ServiceError: they would not do for the daemon itself.
    """
    least = _LEAST_DESCRIPTORS + _DESCRIPTORS_PER_SHARD * config.shards(host)
    connections = config.server.max_connections
    # Operators have as many again.
    wanted = 2 * connections * (2 if config.server.window else 1) + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        if soft < least:
            text = f"RLIMIT_NOFILE is {soft}: raise it (LimitNOFILE= in a unit) to {least} at least"
            raise ServiceError(text)
        if soft < wanted:
            _LOG.warning(
                "server.max_connections = %d needs more descriptors than the %d of RLIMIT_NOFILE",
                connections,
                soft,
            )
