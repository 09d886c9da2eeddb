"""Several shards as one daemon: who keeps them alive, asks all, and adds up.

The supervisor stores no page. It owns the listening socket and the devices' locks, has each
connection handed to a shard (SCM_RIGHTS), and answers for all of them: status is added up, a verb
is carried out by every shard, a setting holds in all or in none.

Invariants:
- A shard whose process dies is started again over the memory that it has left, which the supervisor
  has, too; one that dies again and again with pauses. Only one that cannot start ends the daemon.
- A beat is told when every shard has told one since the last.
- A shard that is there and gives no sign of life keeps nobody waiting: status is that of the
  others, and says so; what all have to do is refused before any does it, or taken back.

This module must not know engines, or concrete devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from vswapd import status
from vswapd.acceptor import Acceptor
from vswapd.arbiter import Arbiter
from vswapd.arguments import Arguments
from vswapd.channel import Channel, ChannelClosedError, ChannelSilentError
from vswapd.claims import key_of
from vswapd.config import Config, ConfigError, load
from vswapd.config_schema import Device
from vswapd.errors import (
    ArgumentError,
    NoSuchDeviceError,
    NoSuchSpaceError,
    OutOfServiceError,
    SilentShardError,
)
from vswapd.forking import Child, fork_again
from vswapd.front import Front, ServiceError, Tally
from vswapd.keeping import Keeping, KeepingError
from vswapd.merge import merged
from vswapd.messages import (
    Adopt,
    AskStatus,
    Attach,
    Beat,
    Carry,
    Failed,
    Hungry,
    Inherit,
    Leave,
    Operate,
    Parted,
    Ready,
    Seek,
    ShardState,
    Stop,
    Tell,
)
from vswapd.own_memory import own_bytes
from vswapd.reception import Reception
from vswapd.shard_process import Birth, InUse
from vswapd.sizes import human_size
from vswapd.snapshot import Snapshot
from vswapd.steering import (
    Reloaded,
    device_of,
    log_answer,
    no_such_space,
    no_such_verb,
    user_of,
    whose_space,
    with_set,
)
from vswapd_backends.shared import SharedRegion
from vswapd_backends.shared_extents import owners_region
from vswapd_blockdev.device import OpenError

_LOG: Final = logging.getLogger(__name__)
_ATTEMPTS: Final = 3
"""How often a shard that dies over a message is asked again."""
_MOST_DEATHS: Final = 5
_DEATHS_S: Final = 10.0
_PAUSE_S: Final = 1.0
"""A shard that has died more often than so many times in so long is left dead for a moment: what
kills it may come again at once."""
_SILENCE_S: Final = 4.0
"""A shard whose event loop has not moved for so long is given up by whoever asks it something, and
asked nothing more until it does. It is not ended: that is for the watchdog."""
_PATIENCE_S: Final = 40.0
"""Seconds that shards are given to end: more than they give their connections."""


class LockedDevice(Protocol):
    """A device that the supervisor has opened and locked."""

    def attach(self) -> tuple[Attach, int]:
        """What a shard is told of it, and its descriptor."""

    def close(self) -> None:
        """Give it up."""


class Dealt(NamedTuple):
    """A device, and who has which part of it."""

    device: LockedDevice
    owners: SharedRegion

    def in_use(self) -> InUse:
        """As a shard's process inherits it."""
        attach, fd = self.device.attach()
        return InUse(attach, fd, self.owners.fd)


@dataclass(frozen=True, slots=True)
class Before:
    """What an earlier supervisor has left, besides the shards' memory."""

    devices: Mapping[str, Dealt] = field(default_factory=dict)
    """Those in use, by path."""
    lost: frozenset[str] = frozenset()
    """Those that cannot be opened any more."""
    run_time: Mapping[str, str] = field(default_factory=dict)
    """What operators have set, by key."""


def _silent(child: Child, outcome: str = "") -> SilentShardError:
    """The error for a shard that gives no sign of life. `outcome`: what that means."""
    said = f"shard {child.index} (pid {child.pid}) gives no sign of life"
    return SilentShardError(f"{said}: {outcome}" if outcome else said)


class Supervisor:
    """A daemon's body that is several shards. Made inside a running event loop."""

    def __init__(
        self,
        front: Front,
        births: Sequence[Birth],
        children: list[Child],
        open_device: Callable[[Device], LockedDevice],
        keeping: Keeping | None,
        before: Before,
    ) -> None:
        """Make it over shards that were forked.

        Args:
            front: what the daemon is to the outside.
            births: what the shards were made with.
            children: the shards.
            open_device: how a device is opened.
            keeping: who keeps devices' parts for a supervisor after this one; None: nobody.
            before: what one before this has left.
        """
        self._front = front
        self._births = births
        self._birth = births[0]
        """For what all have in common."""
        self._config = births[0].config
        self._children = children
        self._open_device = open_device
        self._loop = asyncio.get_running_loop()
        self._keeping = keeping
        self._devices: dict[str, Dealt] = dict(before.devices)
        self._lost = set(before.lost)
        self._run_time = before.run_time
        self._changing = asyncio.Lock()
        """Configurations and devices change one after the other."""
        self._reception: Final = Reception(children, self._config.server, self._later)
        self._arbiter: Final = Arbiter(children, self._ask, self._later)
        self._tally = Tally(0, 0, 0)
        self._known_silent: set[int] = set()
        """The shards that the journal says give no sign of life."""
        self._own_bytes = 0
        """What all processes take by themselves."""
        self._stopping = False
        self._serving = False
        """Whether all shards have started once."""
        self._all_beaten = asyncio.Event()
        self._waiting: set[asyncio.Task[None]] = set()

    # Shards

    async def start(self, made: contextlib.AsyncExitStack) -> None:
        """See front.Body."""
        for child in self._children:
            self._begin(child, os.pidfd_open(child.pid))
        made.push_async_callback(self._stop)
        try:
            states: list[ShardState] = await self._ask_all(Tell())
        except OutOfServiceError:
            raise ServiceError(self._front.failure or "a shard cannot start") from None
        birth = self._birth
        self._own_bytes = own_bytes() + sum(state.own_bytes for state in states)
        self._front.fit(birth.config, birth.host, self._own_bytes, revived=birth.revived)
        self._serving = True
        for used in self._devices.values():
            # A shard may have died before it had used it.
            attach, fd = used.device.attach()
            await self._ask_all(attach, [fd, used.owners.fd])
        for entry in self._config.devices:
            if entry.path in self._devices or entry.path in self._lost:
                continue
            try:
                opened = await self._swapon(entry)
            except OutOfServiceError as error:
                if not self._birth.revived:
                    raise
                # It was out of use, and holds nothing: what the others hold is needed.
                self._front.lacks(entry.path, str(error))
                continue
            size = human_size(opened["size_bytes"])
            _LOG.info("%s: %s, priority %d", opened["path"], size, opened["priority"])

    def _begin(self, child: Child, pidfd: int) -> None:
        """A process has been made: talk to it, and be told of its end."""
        child.channel = Channel(child.sock, self._handler(child), lambda: self._hung_up(child))
        child.alive = True
        child.there.set()
        self._loop.add_reader(pidfd, self._died, child, pidfd)

    def _hung_up(self, child: Child) -> None:
        """A process has died, or is about to: its end of the channel goes before it does.

        From now on whatever is for the shard waits for the process after it.
        """
        child.there.clear()
        self._reception.clear(child)
        self._arbiter.clear(child)

    def _died(self, child: Child, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        _, status_word = os.waitpid(child.pid, 0)
        child.alive = False
        if child.there.is_set():
            child.channel.close()
            self._hung_up(child)
        if self._stopping or not self._serving:
            self._gone(child)
            if not self._stopping:
                self._front.fail(f"shard {child.index} cannot start")
            return
        code = os.waitstatus_to_exitcode(status_word)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        now = self._loop.time()
        child.deaths = [at for at in child.deaths if now - at < _DEATHS_S] + [now]
        if not child.ready and code > 0:
            self._gone(child)
            self._front.fail(f"shard {child.index} {how} and cannot be started again")
            return
        _LOG.error(
            "shard %d (pid %d) %s: it is started again, with all that it held",
            child.index,
            child.pid,
            how,
        )
        child.beaten = child.ready = False
        if len(child.deaths) > _MOST_DEATHS:
            self._later(self._revive_later(child))
        else:
            self._revive(child)

    async def _revive_later(self, child: Child) -> None:
        await asyncio.sleep(_PAUSE_S)
        if self._stopping:
            self._gone(child)
        else:
            self._revive(child)

    @staticmethod
    def _gone(child: Child) -> None:
        """There will be no other process: whoever waits for one is told."""
        child.ended.set()
        child.there.set()

    def _revive(self, child: Child) -> None:
        """Start a shard's process again, over the memory that the dead one has left."""
        birth = dataclasses.replace(
            self._births[child.index],
            config=self._config,
            revived=True,
            devices=tuple(used.in_use() for used in self._devices.values()),
        )
        try:
            child.pid, pidfd, child.sock = fork_again(birth)
        except OSError as error:
            _LOG.error("shard %d cannot be started for now: %s", child.index, error.strerror)
            self._later(self._revive_later(child))
        else:
            self._begin(child, pidfd)

    async def _stop(self) -> None:
        self._stopping = True
        for child in self._children:
            if child.alive:
                child.channel.tell(Stop())
            else:
                self._gone(child)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for child in self._children:
                    await child.ended.wait()
        except TimeoutError:
            for child in self._children:
                if not child.ended.is_set():
                    _LOG.error("shard %d does not end: it is killed", child.index)
                    os.kill(child.pid, signal.SIGKILL)
                    await child.ended.wait()
        for used in self._devices.values():
            used.device.close()

    def _handler(self, child: Child) -> Callable[[Any, list[int]], Awaitable[Any]]:
        pid = child.pid

        async def handle(message: Any, _: list[int]) -> Any:
            match message:
                case Operate(request):
                    return await self.operate(request)
                case AskStatus():
                    return await self.document()
                case Seek(claim) if child.pid == pid and child.there.is_set():
                    return await self._arbiter.claim(child, claim)
                case _ if child.pid == pid and child.there.is_set():
                    self._hear(child, message)
                # Else it was sent by one that has died: nothing of it is counted any more.
            return None

        return handle

    def _hear(self, child: Child, news: object) -> None:
        match news:
            case Ready():
                child.ready = True
            case Failed(why):
                what = "cannot be started again" if self._serving else "cannot start"
                self._front.fail(f"shard {child.index} {what}: {why}")
            case Beat():
                child.beaten = True
                if all(each.beaten for each in self._children):
                    self._all_beaten.set()
            case Parted(place):
                self._reception.unseat(child, place)
            case Leave(key, number):
                self._arbiter.leave(child, key, number)
            case Hungry():
                for other in self._children:
                    if other is not child:
                        other.channel.tell(Hungry())
            case _:
                raise TypeError(news)

    async def _ask_all(self, message: object, descriptors: Sequence[int] = ()) -> list[Any]:
        """Every shard's answer, in their order; the first error once all have answered.

        Raises:
            OutOfServiceError: a shard has gone for good, and the daemon is about to end.
        """
        answers = await self._ask_each([message] * len(self._children), descriptors)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _ask_each(
        self, messages: Sequence[object], descriptors: Sequence[int] = ()
    ) -> list[Any]:
        """Every shard's answer or error to a message of its own."""
        return await asyncio.gather(
            *(
                self._ask(child, message, descriptors)
                for child, message in zip(self._children, messages, strict=True)
            ),
            return_exceptions=True,
        )

    async def _ask(self, child: Child, message: object, descriptors: Sequence[int] = ()) -> Any:
        """One shard's answer; of one that dies meanwhile, that of the process after it.

        So no message may do harm when it comes twice.

        Raises:
            OutOfServiceError: it dies at each attempt, or has gone for good.
            SilentShardError: it gives no sign of life; what was sent to it may still be done.
        """
        for _ in range(_ATTEMPTS):
            await child.there.wait()
            # One that starts looks through its memory, and does nothing else. What it inherits is
            # to reach it whenever it moves, and nobody waits for that.
            patient = not child.ready or isinstance(message, Inherit)
            silence_s = None if patient else _SILENCE_S
            try:
                return await child.channel.ask(message, descriptors, silence_s)
            except ChannelSilentError:
                raise _silent(child) from None
            except ChannelClosedError:
                if self._stopping or child.ended.is_set():
                    break
        if self._stopping:
            raise OutOfServiceError("the daemon is ending: ask again when it is back")
        raise OutOfServiceError(f"shard {child.index} has gone: the journal says why")

    async def _check_all_answer(self) -> None:
        """To be asked before all shards are asked for something that all have to do, or none.

        Raises:
            SilentShardError: one gives no sign of life; nothing was done.
        """
        started = [child for child in self._children if child.ready and child.there.is_set()]
        there = await asyncio.gather(*(child.channel.answers(_SILENCE_S) for child in started))
        for child, answers in zip(started, there, strict=True):
            if not answers:
                raise _silent(child, "nothing was done")

    async def watch(self, period_s: float, tell: Callable[[], None]) -> None:
        """See front.Body. The period is the shards' business."""
        del period_s
        while True:
            await self._all_beaten.wait()
            self._all_beaten.clear()
            for child in self._children:
                child.beaten = False
            tell()

    # Connections

    def listen(
        self, listeners: list[socket.socket], made: contextlib.AsyncExitStack
    ) -> list[Acceptor]:
        """See front.Body."""
        acceptors = [Acceptor(listener, self._reception.greet) for listener in listeners]
        for acceptor in acceptors:
            made.callback(acceptor.close)
        made.callback(self._give_up_waiting)
        return acceptors

    def _give_up_waiting(self) -> None:
        for task in self._waiting:
            task.cancel()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    # What operators see

    async def _states(self) -> list[ShardState]:
        found: list[ShardState] = await self._ask_all(Tell())
        return found

    async def _states_of_others(self) -> tuple[list[ShardState], list[int]]:
        """The states of all shards but those that give no sign of life; and which these are.

        Raises:
            SilentShardError: none does.
        """
        states, silent = [], []
        for index, answer in enumerate(await self._ask_each([Tell()] * len(self._children))):
            if isinstance(answer, SilentShardError):
                silent.append(index)
                why = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                states.append(answer)
        self._log_silence(set(silent))
        if not states:
            raise why
        return states, silent

    def _log_silence(self, silent: set[int]) -> None:
        """Say once of each shard that it gives no sign of life, and once that it does again."""
        for index in sorted(silent - self._known_silent):
            _LOG.error("%s: what it holds cannot be had", _silent(self._children[index]))
        for index in sorted(self._known_silent - silent):
            _LOG.info("shard %d gives signs of life again", index)
        self._known_silent = silent

    async def document(self) -> dict[str, Any]:
        """See front.Body."""
        states, silent = await self._states_of_others()
        facts = self._front.facts(
            self._config,
            clients=sum(state.clients for state in states),
            shrinker_errors=sum(state.shrinker_errors for state in states),
            fitting=self._config.fitting(self._birth.host, self._own_bytes),
            in_use=[*self._devices, *self._lost],
        )
        snapshot = self._merged(states)
        document = status.document(snapshot, facts, states[0].discards)
        return document | {"shards": len(self._children), "silent_shards": silent}

    def _merged(self, states: list[ShardState]) -> Snapshot:
        settings = self._config.settings(self._birth.host)
        return merged([state.snapshot for state in states], settings)

    async def tally(self) -> Tally:
        """See front.Body."""
        # Without a shard the daemon is about to end, and says why: what was last known will do.
        with contextlib.suppress(OutOfServiceError):
            states, _ = await self._states_of_others()
            snapshot = self._merged(states)
            clients = sum(state.clients for state in states)
            self._tally = Tally(
                snapshot.slots.allocated,
                clients,
                snapshot.saved_bytes,
                tuple(device.path for device in snapshot.devices),
            )
        return self._tally

    # What operators do

    async def operate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry a verb out in all shards; see Steering.carry_out."""
        arguments = Arguments(request)
        verb = arguments.text("verb")
        if verb not in self.verbs:
            raise no_such_verb(verb, self.verbs)
        if verb != "spaces":
            await self._check_all_answer()
        answer = await self.verbs[verb](self, arguments, request)
        log_answer(verb, answer)
        return answer

    async def _adopt(self, new: Config, run_time: Mapping[str, str]) -> None:
        """Put a configuration into force everywhere, or nowhere. Under `_changing`."""
        for child in self._children:
            if child.ready and child.there.is_set() and child.channel.silent(_SILENCE_S):
                raise _silent(child, "nothing was done")
        old = self._config
        await asyncio.to_thread(self._front.configure, new)
        asked = [child.pid for child in self._children]
        try:
            await self._ask_all(Adopt(new, run_time))
        except BaseException:
            before = Adopt(old, self._run_time)
            for child in self._children:
                # One that was stopped meanwhile finds it when it goes on, and adopts nothing else.
                if child.there.is_set() and child.channel.silent(_SILENCE_S):
                    child.channel.tell(before)
            await self._ask_each([before] * len(self._children))
            await asyncio.to_thread(self._front.configure, old)
            raise
        self._config, self._run_time = new, run_time
        if asked != [child.pid for child in self._children]:
            # One that died when it had agreed has an heir that was made with the old one.
            await self._ask_all(Adopt(new, run_time))

    async def reload(self) -> Reloaded:
        """See front.Body."""
        async with self._changing:
            old = self._config
            try:
                read = await asyncio.to_thread(load, self._birth.source, self._birth.overrides)
                read.settings(self._birth.host)  # what a restart would refuse is refused now
                new = old.reloaded(read)
                new.settings(self._birth.host)
                await self._adopt(new, {})
            except (ConfigError, ArgumentError) as error:
                self._front.was_read(str(error))
                raise
            self._front.was_read(read)
            return Reloaded.between(old, new, read)

    async def _set(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        key, value = arguments.text("key"), arguments.text("value")
        arguments.end()
        async with self._changing:
            old = self._config
            try:
                new = with_set(old, key, value)
                new.settings(self._birth.host)
                await self._adopt(new, {**self._run_time, key: value})
            except ConfigError as error:
                raise ArgumentError(str(error)) from None
        return {"key": key, "old": old.flat().get(key, ""), "new": new.get(key)}

    async def _reload(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        arguments.end()
        try:
            done = await self.reload()
        except ConfigError as error:
            raise ArgumentError(f"nothing was changed: {error}") from None
        return done.answer()

    async def _swapon_verb(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        return await self._swapon(device_of(arguments))

    async def _swapon(self, entry: Device) -> dict[str, Any]:
        """Open a device and have every shard use its part of it."""
        async with self._changing:
            if entry.path in self._devices or entry.path in self._lost:
                raise OutOfServiceError(f"{entry.path}: in use already")
            try:
                device = await asyncio.to_thread(self._open_device, entry)
            except OpenError as error:
                raise OutOfServiceError(str(error)) from None
            attach, fd = device.attach()
            try:
                owners = owners_region(attach.extents, len(self._children))
            except OSError as error:
                device.close()
                raise OutOfServiceError(f"{entry.path}: {error.strerror}") from None
            # Known before any shard uses it: one that dies from now on gets it again.
            self._devices[entry.path] = Dealt(device, owners)
            try:
                if self._keeping is not None:
                    await asyncio.to_thread(self._keeping.keep_owners, entry.path, owners)
                await self._ask_all(attach, [fd, owners.fd])
            except SilentShardError as error:
                # It uses the device when it goes on.
                raise OutOfServiceError(f"{error}; {entry.path} is in use by the others") from None
            except BaseException as error:
                await self._take_off(entry.path)
                if isinstance(error, KeepingError):
                    raise OutOfServiceError(str(error)) from None
                raise
        if not attach.direct:
            _LOG.info("%s: no O_DIRECT there, pages also go through the page cache", entry.path)
        states = await self._states()
        found = next(d for d in states[0].snapshot.devices if d.path == entry.path)
        return {"path": entry.path, "size_bytes": found.size_bytes, "priority": found.priority}

    async def _swapoff(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        path = arguments.path("path")
        give_up = arguments.flag("give_up", default=False)
        arguments.end()
        async with self._changing:
            if path not in self._devices and path not in self._lost:
                known = ", ".join([*self._devices, *self._lost]) or "none"
                raise NoSuchDeviceError(f"{path} is not in use; in use: {known}")
            return {"path": path, **await self._take_off(path, give_up=give_up)}

    async def _take_off(self, path: str, *, give_up: bool = False) -> dict[str, int]:
        """Have no shard use a device any more, and close it; what has become of its pages."""
        used = self._devices.get(path)
        swapoff = Carry({"verb": "swapoff", "path": path, "give_up": give_up})
        answers = await self._ask_each([swapoff] * len(self._children))
        # A shard that does not have it may have died when it was done.
        failed = [
            answer
            for answer in answers
            if isinstance(answer, BaseException) and not isinstance(answer, NoSuchDeviceError)
        ]
        if failed:
            # What one shard cannot move keeps the device in use: for all, as before.
            if used is not None:
                attach, fd = used.device.attach()
                for child in self._children:
                    # One that was stopped meanwhile finds it when it goes on.
                    if child.there.is_set() and child.channel.silent(_SILENCE_S):
                        child.channel.tell(attach, [fd, used.owners.fd])
                await self._ask_each([attach] * len(self._children), [fd, used.owners.fd])
            lost = sum(answer["lost_pages"] for answer in answers if isinstance(answer, dict))
            if lost and isinstance(failed[0], OutOfServiceError):
                text = f"{failed[0]}; other shards have given up {lost} page(s)"
                raise OutOfServiceError(text) from None
            raise failed[0]
        self._lost.discard(path)
        if used is not None:
            del self._devices[path]
            await asyncio.to_thread(used.device.close)
        if self._keeping is not None:
            self._keeping.forget_owners(path)
        done = [answer for answer in answers if isinstance(answer, dict)]
        return {key: sum(answer[key] for answer in done) for key in ("moved_pages", "lost_pages")}

    async def _writeback(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        nbytes = arguments.size("bytes", least=1)
        arguments.end()
        states = await self._states()
        held = [state.snapshot.pool.live_bytes for state in states]
        total = max(1, sum(held))
        # Each its share of what there is; at least a byte, which is a segment.
        shares = [max(1, -(-nbytes * mine // total)) for mine in held]
        answers = await self._ask_each(
            [Carry({"verb": "writeback", "bytes": share}) for share in shares]
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        stopped = next((a["stopped"] for a in answers if a["stopped"] is not None), None)
        written = sum(a["bytes"] for a in answers)
        return {
            "bytes": written,
            "pages": sum(a["pages"] for a in answers),
            "stopped": None if written >= nbytes else stopped,
        }

    async def _summed(self, arguments: Arguments, request: dict[str, Any]) -> dict[str, Any]:
        """A verb without arguments whose answer is numbers: their sums."""
        arguments.end()
        answers = await self._ask_all(Carry(request))
        return {key: sum(answer[key] for answer in answers) for key in answers[0]}

    async def _verify(self, arguments: Arguments, request: dict[str, Any]) -> dict[str, Any]:
        arguments.end()
        answers = await self._ask_all(Carry(request))
        return {
            "ok": all(answer["ok"] for answer in answers),
            "problems": [
                f"shard {index}: {problem}"
                for index, answer in enumerate(answers)
                for problem in answer["problems"]
            ],
            **{
                key: sum(answer[key] for answer in answers)
                for key in ("slots", "entries", "checked_bytes")
            },
        }

    async def _spaces(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        uid = user_of(arguments)
        arguments.end()
        states, silent = await self._states_of_others()
        found = status.spaces(self._merged(states), states[0].now, uid)
        return found | {"silent_shards": silent}

    async def _drop(self, arguments: Arguments, _: dict[str, Any]) -> dict[str, Any]:
        name = arguments.text("name")
        uid = user_of(arguments)
        arguments.end()
        # What is judged is all that there is: a shard may know one user's part only.
        named = [
            space
            for space in self._merged(await self._states()).spaces
            if space.name == name and uid in {None, space.uid}
        ]
        whose = whose_space(name, [space.uid for space in named])
        key = key_of(whose, "", name)
        # From now on nobody gets it, on any shard: it is dropped on all, or on none.
        holder = self._arbiter.withhold(key)
        if holder is not None:
            raise OutOfServiceError(f"{name!r} is in use by pid {holder.pid}: end that first")
        try:
            drop = Carry({"verb": "drop", "name": name, "uid": whose})
            answers = await self._ask_each([drop] * len(self._children))
        finally:
            self._arbiter.restore(key)
        found = [answer for answer in answers if not isinstance(answer, NoSuchSpaceError)]
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        if not found:
            raise no_such_space(name)
        freed = sum(answer["freed_slots"] for answer in found)
        return {"name": name, "uid": whose, "freed_slots": freed}

    Verb = Callable[["Supervisor", Arguments, dict[str, Any]], Awaitable[dict[str, Any]]]
    verbs: ClassVar[Mapping[str, Verb]] = MappingProxyType(
        {
            "set": _set,
            "swapon": _swapon_verb,
            "swapoff": _swapoff,
            "writeback": _writeback,
            "compact": _summed,
            "verify": _verify,
            "spaces": _spaces,
            "drop": _drop,
            "reload": _reload,
        }
    )
