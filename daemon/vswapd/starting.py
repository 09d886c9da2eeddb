"""With which configuration a daemon starts.

With the one that it reads. Where that cannot be used, and memory that an earlier process has left
waits for somebody who serves it, with the last one that could: a mistake in a file is no reason to
keep everybody's pages away. What has become impossible of that one too (a user who is no more, a
port that somebody has taken) is left out, key by key.

Notes that go from process to process, as JSON: what the memory was made with (the keys of
OF_MEMORY), and the configuration that was read last without an error.

Invariants:
- Where nothing is kept a configuration that cannot be used is an error.
- What is left out, or was not read, is said: in the journal, and by the status for as long as it
  holds.

This module must not know sockets, or what is made of a configuration.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vswapd.config import OF_MEMORY, Config, ConfigError, KeptMemory, load
from vswapd.control import Control
from vswapd.host import Host
from vswapd.memory import ShardMemory
from vswapd.sizes import human_size
from vswapd.steering import with_set
from vswapd.vswap import run_time_settings, shape_for
from vswapd_backends.base import SEGMENT_BYTES

_LOG: Final = logging.getLogger(__name__)

Check = Callable[[Config], object]
"""Raises ConfigError if a configuration cannot be used here and now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a daemon starts with."""

    config: Config
    read: Config | None
    """What was read; None: that cannot be used."""
    problem: str = ""
    """Why `config` is not what was read; empty: it is, but for what was set at run time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What one process tells the next."""

    made_with: Mapping[str, str]
    """The keys of OF_MEMORY."""
    read: Mapping[str, str]
    """The configuration that was read last; see Config.flat."""

    @classmethod
    def parse(cls, text: str) -> Notes:
        """What `str` has made."""
        found = json.loads(text)
        return cls(made_with=found["made_with"], read=found["read"])

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def read(
    source: Path | None, overrides: Sequence[str], usable: Check, fall_back: FallBack | None
) -> Start:
    """The configuration to start with.

    Args:
        source: the file; None: the defaults.
        overrides: what holds on top of it.
        usable: what has to be possible.
        fall_back: what there is instead; None: nothing, as no memory is kept.

    Raises:
        ConfigError: it cannot be used, and there is nothing to fall back on.
        NothingToFallBackOnError: see FallBack.
    """
    try:
        config = load(source, overrides)
        usable(config)
    except ConfigError as error:
        if fall_back is None:
            raise
        return fall_back.start(str(error))
    return Start(config=config, read=config)


class NothingToFallBackOnError(Exception):
    """The configuration cannot be used, memory is kept, and no other configuration is known."""


class FallBack:
    """The last configuration that was good, for a daemon whose memory is kept."""

    def __init__(self, notes: str | None, usable: Check) -> None:
        """Make it.

        Args:
            notes: what the last process has noted; None: an older version has, which notes nothing.
            usable: what has to be possible.
        """
        self._notes = notes
        self._usable = usable

    def start(self, problem: str) -> Start:
        """What to start with.

        Args:
            problem: why the configuration that was read cannot be used.

        Raises:
            NothingToFallBackOnError: it is not known.
            ConfigError: not even the defaults are possible.
        """
        if self._notes is None:
            raise NothingToFallBackOnError(
                f"{problem}; what an earlier daemon has left is kept until this is corrected"
            )
        last, left_out = Config.from_flat(Notes.parse(self._notes).read)
        config, impossible = _possible(last, self._usable)
        return Start(config=config, read=None, problem=_told(problem, [*left_out, *impossible]))


def _told(problem: str, left_out: Sequence[ConfigError]) -> str:
    """A problem, and what is left out beyond it."""
    texts = [text for text in map(str, left_out) if text != problem]
    return "; left out: ".join(filter(None, [problem, "; ".join(texts)]))


def _possible(config: Config, usable: Check) -> tuple[Config, list[ConfigError]]:
    """What of a configuration can be used, and why the rest cannot.

    Raises:
        ConfigError: not even the defaults can.
    """
    errors: list[ConfigError] = []
    tried: set[str] = set()
    while True:
        try:
            usable(config)
        except ConfigError as error:
            if "" in tried:
                raise
            # If a key is at its default already, something else is wrong: nothing is left then.
            key = "" if error.key in tried else error.key
            tried.add(key)
            errors.append(error)
            config = config.without(key)
        else:
            return config, errors


def over(start: Start, memories: Sequence[ShardMemory], host: Host, notes: str | None) -> Start:
    """What a daemon starts with over memory that an earlier one has left, with what was set since.

    Args:
        start: what it would start with.
        memories: by shard.
        host: this machine.
        notes: what the last process has noted.
    """
    made_with = _made_with(start.config, memories, host, notes)
    wanted = start.config.flat()
    for key in OF_MEMORY:
        if wanted[key] != made_with[key]:
            _LOG.warning(
                "%s = %s: the memory that was kept was made with %s, and goes on; stop the service "
                "for good, and start it, to have another",
                key,
                wanted[key],
                made_with[key],
            )
    arena = min(memory.shape.segments for memory in memories) * SEGMENT_BYTES

    def usable(config: Config) -> None:
        pool_max = config.settings(host).pool_max
        if pool_max > arena:
            raise ConfigError(
                f"{config.pool.max} is beyond the {human_size(arena)} that were reserved when the "
                "memory was made: stop the service for good, and start it, to have more",
                key="pool.max",
            )

    config, impossible = _possible(start.config.over(_kept(memories), made_with), usable)
    config = _with_what_was_set(config, run_time_settings(Control(memories[0])), usable)
    read = None if impossible else start.read
    return Start(config=config, read=read, problem=_told(start.problem, impossible))


def over_new(start: Start, memories: Sequence[ShardMemory]) -> Start:
    """The same over memory that has just been made for it, and will be there for the next."""
    config = start.config.over(_kept(memories), made_with(start.config))
    return dataclasses.replace(start, config=config)


def made_with(config: Config) -> dict[str, str]:
    """The keys of OF_MEMORY."""
    return {key: config.get(key) for key in OF_MEMORY}


def _kept(memories: Sequence[ShardMemory]) -> KeptMemory:
    slots = sum(memory.shape.max_slots for memory in memories)
    return KeptMemory(shards=len(memories), max_slots=slots)


def _made_with(
    config: Config, memories: Sequence[ShardMemory], host: Host, notes: str | None
) -> Mapping[str, str]:
    """The keys of OF_MEMORY as they were when memory was made."""
    if notes is not None:
        return Notes.parse(notes).made_with
    # An older version has made it, and noted nothing: what would make the same is what was meant.
    found = _kept(memories)
    meant = made_with(config)
    settings = config.settings(host).of_one(found.shards)
    if config.shards(host) != found.shards:
        meant["server.shards"] = str(found.shards)
    if shape_for(settings).max_slots != memories[0].shape.max_slots:
        meant["table.max_slots"] = str(found.max_slots)
    return meant


def _with_what_was_set(config: Config, run_time: Mapping[str, str], usable: Check) -> Config:
    """A configuration with what operators have set since, as far as that is possible."""
    base = config
    for key, value in run_time.items():
        try:
            changed = with_set(config, key, value)
            usable(changed)
        except ConfigError as error:
            _LOG.warning("%s = %s was set at run time, and is left out: %s", key, value, error)
        else:
            config = changed
    if config.metrics == base.metrics:
        return config
    try:
        check_metrics(config)
    except ConfigError as error:
        _LOG.warning("metrics were set at run time, and are left out: %s", error)
        return dataclasses.replace(config, metrics=base.metrics)
    return config


def check_metrics(config: Config) -> None:
    """Whether metrics can be served as they are configured.

    Raises:
        ConfigError: not now.
    """
    if config.metrics.listen:
        from vswapd.metrics import check  # only now: it brings a library of 3 MB

        check(config.metrics.listen)
