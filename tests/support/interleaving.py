"""Operations that overlap: by hand, step by step, or by a seeded scheduler that reorders their I/O.

Invariants:
- An operation is resumed only when what it asked for is there: its own requests performed, or, for
  WAIT, a step of somebody else's taken since.
- Between two steps of operations, requests are performed one at a time, in any order. Those of a
  device that hangs wait until it does not any more, or until nothing else can be done.
- The same seed gives the same history.

This module must not know what operations do.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from vswapd.errors import EngineError
from vswapd_backends.base import PAUSE, WAIT, Compute, IoBatch, IoRequest, Need, Operation, Submit


class Running:
    """One operation under way, advanced by hand."""

    def __init__(
        self, name: str, operation: Operation[Any], done: Callable[[Running], None] | None = None
    ) -> None:
        self.name: Final = name
        self.operation: Final = operation
        self.need: Need | None = None
        self.air: list[IoRequest | Compute[Any]] = []
        """What was asked for and is not performed yet: requests, submitted ones too, and work."""
        self.steps = 0
        self.ended = False
        self.cancelled = False
        self.result: Any = None
        self.error: EngineError | None = None
        self.heard = 0
        """For WAIT: the scheduler's count of steps when it was asked for."""
        self._done = done

    def advance(self) -> Need | None:
        """Take one step; returns what it needs next, None at its end."""
        assert not self.ended
        self.steps += 1
        try:
            self.need = next(self.operation)
        except StopIteration as end:
            self.result = end.value
            self._end()
        except EngineError as error:
            self.error = error
            self._end()
        else:
            self._ask()
        return self.need

    def _ask(self) -> None:
        need = self.need
        batch = need.batch if isinstance(need, Submit) else need
        if isinstance(batch, IoBatch) and batch.ticket is None:
            batch.ticket = self
            self.air += batch.requests
        elif isinstance(need, Compute):
            self.air.append(need)

    def _end(self) -> None:
        self.need = None
        self.ended = True
        assert not self.air, f"{self.name} ended while its requests are under way"
        if self._done is not None:
            self._done(self)

    @property
    def waits_for_io(self) -> bool:
        """Whether requests of the batch that it waits for are still to be performed."""
        if isinstance(self.need, Compute):
            return bool(self.air)
        if not isinstance(self.need, IoBatch):
            return False
        awaited = {id(request) for request in self.need.requests}
        return any(id(request) in awaited for request in self.air)

    def perform(self) -> None:
        """Perform all that it asked for."""
        while self.air:
            self.air.pop(0).perform()

    def until_io(self) -> IoBatch:
        """Advance until it waits for requests, none of which is performed yet."""
        while True:
            need = self.advance()
            assert need is not None, f"{self.name} ended"
            assert need is not WAIT, f"{self.name} waits for others"
            if isinstance(need, IoBatch) and self.waits_for_io:
                return need
            if isinstance(need, Submit):
                continue

    def finish(self) -> Any:
        """Drive it to its end; raises what it raises."""
        while not self.ended:
            self.perform()
            assert self.need is not WAIT or self.steps < 10_000, f"{self.name} waits for ever"
            self.advance()
        if self.error is not None:
            raise self.error
        return self.result

    def cancel(self, *, perform: bool) -> None:
        """End it where it stands, its requests performed or never begun."""
        if perform:
            self.perform()
        self.air.clear()
        self.cancelled = True
        self.operation.close()
        self._end()


def start(operation: Operation[Any], name: str = "operation") -> Running:
    """An operation that is about to take its first step."""
    return Running(name, operation)


class StuckError(AssertionError):
    """Operations wait for each other, and nothing is under way."""


class Scheduler:
    """Interleaves operations and their requests, at the whim of a seed."""

    def __init__(
        self,
        seed: int,
        check: Callable[[], None],
        *,
        hanging: Collection[object] = (),
        slow: float = 0.0,
    ) -> None:
        """Nothing runs yet.

        Args:
            seed: what decides.
            check: called after each step.
            hanging: devices that hang at any time; the caller's to change.
            slow: how often a request is put off for a step that can be taken instead.
        """
        self.chooser: Final = random.Random(seed)
        self.running: Final[list[Running]] = []
        self.history: Final[list[str]] = []
        """What was done, for whoever has to understand a failure."""
        self.overtaken = 0
        """Requests that another one of their operation, asked for later, was performed before."""
        self._check = check
        self._hanging = hanging
        self._slow = slow
        self._news = 0

    def start(
        self, name: str, operation: Operation[Any], done: Callable[[Running], None] | None = None
    ) -> Running:
        """Add an operation; it takes its first step when it is chosen."""
        task = Running(name, operation, done)
        self.running.append(task)
        return task

    def _choices(self, hanging: Collection[object]) -> Iterator[tuple[str, Running]]:
        for task in self.running:
            if task.air and (not hanging or _ready(task, hanging)):
                yield "perform", task
            if not task.waits_for_io and (task.need is not WAIT or self._news > task.heard):
                yield "advance", task

    def step(self) -> bool:
        """Perform one request or advance one operation; False if there is nothing to do."""
        hanging = self._hanging
        choices = list(self._choices(hanging))
        if not choices and hanging:
            hanging = ()
            choices = list(self._choices(hanging))
        if not choices:
            if self.running:
                raise StuckError([(task.name, task.need) for task in self.running])
            return False
        if self._slow and self.chooser.random() < self._slow:
            choices = [choice for choice in choices if choice[0] == "advance"] or choices
        what, task = self.chooser.choice(choices)
        if what == "perform":
            ready = _ready(task, hanging)
            index = ready[self.chooser.randrange(len(ready))]
            self.overtaken += index > 0
            request = task.air.pop(index)
            request.perform()
            done = "work"
            if isinstance(request, IoRequest):
                done = f"{request.kind.value} {request.extent}"
            self.history.append(f"{task.name}: {done} done")
        else:
            self._advance(task)
        self._check()
        return True

    def _advance(self, task: Running) -> None:
        need = task.advance()
        self._news += 1
        task.heard = self._news
        if task.ended:
            self.running.remove(task)
        outcome = task.error or task.result if task.ended else need
        self.history.append(f"{task.name}: {_brief(outcome)}")

    def cancel(self, task: Running) -> None:
        """End an operation in the middle."""
        self.history.append(f"{task.name}: cancelled")
        self.running.remove(task)
        task.cancel(perform=self.chooser.random() < 0.5)
        self._news += 1
        self._check()

    def abandon(self) -> None:
        """After a failure: end everything, whatever state it is in."""
        for task in self.running:
            with contextlib.suppress(Exception):
                task.operation.close()

    def drain(self, most: int = 100_000) -> None:
        """Until everything has ended."""
        for _ in range(most):
            if not self.step():
                return
        raise StuckError([(task.name, task.need) for task in self.running])


def _ready(task: Running, hanging: Collection[object]) -> list[int]:
    """Which of the requests that an operation has in the air can be performed: by index."""
    return [
        index
        for index, request in enumerate(task.air)
        if not (hanging and isinstance(request, IoRequest) and request.device in hanging)
    ]


def _brief(what: object) -> str:
    if isinstance(what, IoBatch):
        return f"waits for {len(what.requests)} requests"
    if isinstance(what, Submit):
        return f"submits {len(what.batch.requests)} requests"
    if isinstance(what, Compute):
        return "waits for work"
    if what is WAIT or what is PAUSE:
        return str(what)
    if isinstance(what, EngineError):
        return f"ended: {what!r:.80}"
    # Not what it holds: writing arrays down would be a fifth of a simulation's time.
    return f"ended: {type(what).__name__} {getattr(what, 'reason', None) or ''}"
