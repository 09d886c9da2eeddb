"""What the supervisor and its shards say to each other, besides questions about `claims`.

This module must not know how it is sent, or what is done about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vswapd.claims import Claim
from vswapd.config import Config
from vswapd.config_schema import Device
from vswapd.groups import Holder
from vswapd.snapshot import Snapshot

# To a shard


@dataclass(frozen=True, slots=True)
class Serve:
    """A connection, its descriptor with it."""

    place: int | None
    """The user whose place it takes; None: it says a token, so it asks for a space that has its
    first connection, and a place, already, or it comes back for one. How many of those there may be
    is for the shard to say."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Answer with a ShardState."""


@dataclass(frozen=True, slots=True)
class Carry:
    """Carry this CONTROL request out in this shard alone; answer as it does."""

    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Adopt:
    """Put this configuration into force."""

    config: Config
    run_time: Mapping[str, str]
    """What of it was set at run time, by key."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Put a device into use, if it is not; with it come its descriptor and its chunks' owners'."""

    entry: Device
    extents: int
    direct: bool
    block_device: bool
    boot_id: bytes
    """What stands in its header."""


@dataclass(frozen=True, slots=True)
class Inherit:
    """A space of a name has another client now: the part of it that waits here is that one's."""

    key: str
    holder: Holder


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what is under way, take nothing more, and end."""


# From a shard


@dataclass(frozen=True, slots=True)
class Operate:
    """Somebody who may steer asks for this; answer as the verb does."""

    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AskStatus:
    """Answer with the status document."""


@dataclass(frozen=True, slots=True)
class Seek:
    """A connection asks for a space's part: answer with the Verdict. News if it is a new space."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Leave:
    """What was granted by a Verdict is over."""

    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The shard has started, and serves."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The shard cannot start; to be answered, so that it is heard before the process ends."""

    why: str


@dataclass(frozen=True, slots=True)
class Beat:
    """The shard is alive: its event loop, its lock and its shrinker move."""


@dataclass(frozen=True, slots=True)
class Parted:
    """A connection has gone, or was refused."""

    place: int | None
    """As the message that it came with said, whatever it turned out to be."""


@dataclass(frozen=True, slots=True)
class Hungry:
    """The pool has no room for this shard; others may hold what can go."""


# Values


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """One shard at one moment."""

    snapshot: Snapshot
    clients: int
    shrinker_errors: int
    discards: Mapping[str, bool]
    now: float
    """The engine's clock."""
    own_bytes: int
    """What the process takes by itself; see `own_memory`."""
