"""The verbs of CONTROL: checked arguments, engine calls, answers. Tasks, as sessions want them.

Invariants:
- A verb that fails has changed nothing, or says what it has changed.
- Opening and closing devices, reading files and looking up users are done in workers.
- Configurations change one after the other: what is set while a file is read is not lost.

This module must not know the wire, or concrete devices: it is given a way to open one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from vswapd import status
from vswapd.arguments import Arguments
from vswapd.config import OF_MEMORY, Config, ConfigError, load, reloadable
from vswapd.config_schema import Device, Size
from vswapd.control import Origin
from vswapd.driver import T, Task
from vswapd.errors import ArgumentError, NoSuchSpaceError, OutOfServiceError
from vswapd.host import Host
from vswapd.vswap import NO_ORIGIN, Engine
from vswapd_backends.base import WAIT, Compute
from vswapd_blockdev.device import BlockDevice, OpenError

_LOG: Final = logging.getLogger(__name__)
_MOST_PRIORITY: Final = 32767
"""As swapon(8) has it."""
_MOST_UID: Final = (1 << 32) - 1


class Opened(NamedTuple):
    """A device, and what nobody but its maker knows of it."""

    device: BlockDevice
    discards: bool
    """Whether discarded extents give their space back."""
    origin: Origin = NO_ORIGIN
    """What it takes to open it again."""


OpenDevice = Callable[[Device], Opened]
"""Opens what a configuration entry describes; raises OpenError."""


class Reloaded(NamedTuple):
    """What a reload changed, and what it could not; dotted keys, sorted."""

    changed: tuple[str, ...]
    ignored: tuple[str, ...]
    """What a restart changes."""
    after_stop: tuple[str, ...]
    """What no restart changes, as it keeps the memory: the service has to be stopped for it."""

    @classmethod
    def between(cls, old: Config, new: Config, read: Config) -> Reloaded:
        """What a reload of `read` has done that made `new` of `old`."""
        before, after = old.flat(), new.flat()
        changed = (k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        fixed = old.fixed_changes(read)
        after_stop = tuple(key for key in fixed if old.kept is not None and key in OF_MEMORY)
        ignored = tuple(key for key in fixed if key not in after_stop)
        return cls(tuple(sorted(changed)), ignored, after_stop)

    def answer(self) -> dict[str, Any]:
        """As the verb answers."""
        return {name: list(keys) for name, keys in self._asdict().items()}


def no_such_verb(verb: str, verbs: Iterable[str]) -> ArgumentError:
    """The error for a verb that there is not."""
    return ArgumentError(f"there is no verb {verb!r}; there are {', '.join(verbs)}")


def log_answer(verb: str, answer: dict[str, Any]) -> None:
    """What was done at somebody's request, for the journal."""
    if verb == "reload":
        log_reloaded(Reloaded(**{name: tuple(answer[name]) for name in Reloaded._fields}))
    elif verb != "spaces":
        told = {key: value for key, value in answer.items() if key != "problems"}
        # Whoever may connect may make spaces and drop them again, as often as he likes.
        level = logging.DEBUG if verb == "drop" else logging.INFO
        _LOG.log(level, "%s: %s", verb, ", ".join(f"{k} {_shown(v)}" for k, v in told.items()))


def log_reloaded(done: Reloaded) -> None:
    """What a reload has done, for the journal, whoever has asked for it."""
    _LOG.info("reload: changed %s", ", ".join(done.changed) or "nothing")
    if done.ignored:
        _LOG.warning("reload: needs a restart to take effect: %s", ", ".join(done.ignored))
    if done.after_stop:
        _LOG.warning(
            "reload: needs a stop and a start, as a restart keeps the memory: %s",
            ", ".join(done.after_stop),
        )


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case None | "":
            return "none"
        case _:
            return str(value)


def with_set(old: Config, key: str, value: str) -> Config:
    """What `vswapctl set` makes of a configuration.

    Raises:
        ConfigError: no such key or value, or one that cannot change while the daemon runs.
    """
    new = old.with_override(key, value)
    if not reloadable(key):
        text = "cannot be changed while the daemon runs: change the file, and "
        stop = old.kept is not None and key in OF_MEMORY
        text += "stop and start the service" if stop else "restart"
        raise ConfigError(text, key=key)
    return new


def device_of(arguments: Arguments) -> Device:
    """The device that a swapon names.

    Raises:
        ArgumentError: it makes no sense.
    """
    entry = Device(
        path=arguments.path("path"),
        size=Size(arguments.size("size", least=1)) if "size" in arguments else None,
        priority=arguments.number("priority", 0, most=_MOST_PRIORITY),
        encrypt=arguments.flag("encrypt", default=True),
    )
    arguments.end()
    return entry


def user_of(arguments: Arguments) -> int | None:
    """Whose spaces a request is about; None: everybody's.

    Raises:
        ArgumentError: it makes no sense.
    """
    return arguments.number("uid", 0, most=_MOST_UID) if "uid" in arguments else None


def no_such_space(name: str) -> NoSuchSpaceError:
    """The error for a space that there is not."""
    return NoSuchSpaceError(f"there is no space {name!r}")


def whose_space(name: str, users: Iterable[int]) -> int:
    """The one user whose a space of that name is, of all those who have one.

    Raises:
        NoSuchSpaceError: there are none.
        ArgumentError: there are several.
    """
    found = sorted(set(users))
    if not found:
        raise no_such_space(name)
    if len(found) > 1:
        text = f"users {', '.join(map(str, found))} have a space {name!r}: say whose (uid)"
        raise ArgumentError(text)
    return found[0]


class Surroundings(Protocol):
    """What the verbs need of the rest of the service."""

    def facts(self, config: Config) -> status.Facts:
        """What the engine does not know."""

    def configure(self, config: Config) -> None:
        """Put what is not the engine's into force: metrics, logging. May block.

        Raises:
            ConfigError: it cannot be done; all is as it was.
        """

    def was_read(self, read: Config | str) -> None:
        """The file was read: what it says, or what is wrong with it."""


class Steering:
    """Carries verbs out."""

    def __init__(
        self,
        *,
        version: str,
        engine: Engine,
        surroundings: Surroundings,
        host: Host,
        config: Config,
        source: Path | None,
        overrides: tuple[str, ...],
        open_device: OpenDevice,
    ) -> None:
        self.version: Final = version
        self._engine = engine
        self._surroundings = surroundings
        self._host = host
        self.config = config
        self._source = source
        self._overrides = overrides
        self._open_device = open_device
        self._configuring = False
        self._settings = engine.core.settings
        self._run_time = engine.run_time_settings()
        self.devices: Final[dict[str, Opened]] = {}
        """By path: to be closed after swapoff, and at the end."""

    # What sessions ask

    def status(self) -> Task[dict[str, Any]]:
        """The status document."""
        snapshot = self._engine.snapshot()
        discards = {path: opened.discards for path, opened in self.devices.items()}
        work = Compute(
            lambda: status.document(snapshot, self._surroundings.facts(self.config), discards)
        )
        yield work
        return work.result()

    def may_steer(self, uid: int) -> bool:
        """Root, and whoever the daemon runs as."""
        return uid in {0, self._host.uid}

    def carry_out(self, request: dict[str, Any]) -> Task[dict[str, Any]]:
        """Do what a CONTROL request asks for.

        Raises:
            ArgumentError, OutOfServiceError: with what to do about it.
        """
        answer = yield from self.answer(request)
        log_answer(request["verb"], answer)
        return answer

    def answer(self, request: dict[str, Any]) -> Task[dict[str, Any]]:
        """The same, and nothing is logged."""
        arguments = Arguments(request)
        verb = arguments.text("verb")
        if verb not in self.verbs:
            raise no_such_verb(verb, self.verbs)
        return (yield from self.verbs[verb](self, arguments))

    # The configuration

    def configure(
        self,
        change: Callable[[Config], Config],
        set_since: Callable[[Mapping[str, str]], Mapping[str, str]],
    ) -> Task[tuple[Config, Config]]:
        """Put another configuration into force.

        Args:
            change: makes it of the one that holds; called in a worker.
            set_since: makes what was set at run time, by key, of what was before; it is kept for
                the process after this one.

        Returns:
            The one before, and the one that holds now.

        Raises:
            ConfigError, ArgumentError: it cannot be; all is as it was.
        """
        while self._configuring:
            yield WAIT
        self._configuring = True
        try:
            old = self.config
            new = yield from _worker(lambda: change(old))
            whole = yield from _worker(lambda: new.settings(self._host))
            settings = whole.of_one(self._engine.core.ledger.shards)
            run_time = dict(set_since(self._run_time))
            self._engine.apply(settings)
            try:
                self._engine.keep_run_time_settings(run_time)
                yield from _worker(lambda: self._surroundings.configure(new))
            except (ConfigError, ArgumentError):
                self._engine.apply(self._settings)
                self._engine.keep_run_time_settings(self._run_time)
                raise
            self.config, self._settings, self._run_time = new, settings, run_time
        finally:
            self._configuring = False
        return old, new

    def reload(self) -> Task[Reloaded]:
        """Read the configuration again.

        Raises:
            ConfigError, ArgumentError: nothing was changed.
        """
        read: list[Config] = []

        def change(old: Config) -> Config:
            read.append(load(self._source, self._overrides))
            read[0].settings(self._host)  # what a restart would refuse is refused now
            return old.reloaded(read[0])

        try:
            old, new = yield from self.configure(change, lambda _: {})
        except (ConfigError, ArgumentError) as error:
            self._surroundings.was_read(str(error))
            raise
        self._surroundings.was_read(read[0])
        return Reloaded.between(old, new, read[0])

    def _set(self, arguments: Arguments) -> Task[dict[str, Any]]:
        key, value = arguments.text("key"), arguments.text("value")
        arguments.end()

        try:
            old, new = yield from self.configure(
                lambda old: with_set(old, key, value), lambda before: {**before, key: value}
            )
        except ConfigError as error:
            raise ArgumentError(str(error)) from None
        # A group's key that nobody had set holds nothing of its own yet.
        return {"key": key, "old": old.flat().get(key, ""), "new": new.get(key)}

    def _reload(self, arguments: Arguments) -> Task[dict[str, Any]]:
        arguments.end()
        try:
            done = yield from self.reload()
        except ConfigError as error:
            raise ArgumentError(f"nothing was changed: {error}") from None
        return done.answer()

    # Devices

    def _swapon(self, arguments: Arguments) -> Task[dict[str, Any]]:
        return (yield from self.swapon(device_of(arguments)))

    def swapon(self, entry: Device) -> Task[dict[str, Any]]:
        """Open a device and put it into use.

        Raises:
            OutOfServiceError: it cannot be opened, or is in use already.
        """
        if entry.path in self.devices:
            raise OutOfServiceError(f"{entry.path}: in use already")
        try:
            opened = yield from _worker(lambda: self._open_device(entry))
        except OpenError as error:
            raise OutOfServiceError(str(error)) from None
        device = opened.device
        try:
            self._engine.swapon(device, entry.priority, None, opened.origin)
        except BaseException:
            device.close()
            raise
        self.devices[entry.path] = opened
        if not device.direct:
            _LOG.info("%s: no O_DIRECT there, pages also go through the page cache", entry.path)
        found = next(d for d in self._engine.snapshot().devices if d.path == device.path)
        return {"path": entry.path, "size_bytes": found.size_bytes, "priority": found.priority}

    def _swapoff(self, arguments: Arguments) -> Task[dict[str, Any]]:
        path = arguments.path("path")
        give_up = arguments.flag("give_up", default=False)
        arguments.end()
        moved, lost = yield from self._engine.swapoff(path, give_up=give_up)
        yield from _worker(self.devices.pop(path).device.close)
        return {"path": path, "moved_pages": moved, "lost_pages": lost}

    # Spaces

    def _drop(self, arguments: Arguments) -> Task[dict[str, Any]]:
        name = arguments.text("name")
        uid = user_of(arguments)
        arguments.end()
        named = [
            space
            for space in self._engine.core.spaces.values()
            if space.name == name and uid in {None, space.uid} and not space.closed
        ]
        whose = whose_space(name, [space.uid for space in named])
        for space in named:
            if space.attached:
                raise OutOfServiceError(
                    f"{name!r} is in use by pid {space.holder.pid}: end that first"
                )
        slots = sum(space.slots.slots for space in named)
        for space in named:
            yield from self._engine.close_space(space)
        return {"name": name, "uid": whose, "freed_slots": slots}

    # Work

    def _writeback(self, arguments: Arguments) -> Task[dict[str, Any]]:
        nbytes = arguments.size("bytes", least=1)
        arguments.end()
        written = yield from self._engine.writeback(nbytes)
        stopped = None if written.stopped is None else written.stopped.value
        return {"bytes": written.bytes, "pages": written.pages, "stopped": stopped}

    def _compact(self, arguments: Arguments) -> Task[dict[str, Any]]:
        arguments.end()
        done = yield from self._engine.compact()
        return {"moved_bytes": done.moved_bytes, "freed_bytes": done.freed_bytes}

    def _verify(self, arguments: Arguments) -> Task[dict[str, Any]]:
        arguments.end()
        report = yield from self._engine.verify()
        for problem in report.problems:
            _LOG.error("verify: %s", problem)
        return {
            "ok": report.ok,
            "problems": report.problems,
            "slots": report.slots,
            "entries": report.entries,
            "checked_bytes": report.checked_bytes,
        }

    def _spaces(self, arguments: Arguments) -> Task[dict[str, Any]]:
        uid = user_of(arguments)
        arguments.end()
        return status.spaces(self._engine.snapshot(), self._engine.core.clock(), uid)
        yield

    verbs: ClassVar[Mapping[str, Callable[[Steering, Arguments], Task[dict[str, Any]]]]] = (
        MappingProxyType(
            {
                "set": _set,
                "swapon": _swapon,
                "swapoff": _swapoff,
                "writeback": _writeback,
                "compact": _compact,
                "verify": _verify,
                "spaces": _spaces,
                "drop": _drop,
                "reload": _reload,
            }
        )
    )


def _worker(call: Callable[[], T]) -> Task[T]:
    """Do something that may block in a worker."""
    work = Compute(call, slow=True)
    yield work
    return work.result()
