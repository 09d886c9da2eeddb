"""All peers by name, in the order of the table; a library that is missing is one peer missing.

This module must not know how peers are measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from bench.peers.contract import MissingError, Peer

_CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "codec": ("codec_peer", "CodecPeer"),
    "ping-pong": ("pingpong_peer", "PingPongPeer"),
    "vswapd": ("vswapd_peer", "VswapdPeer"),
    "vswapd-window": ("vswapd_peer", "WindowPeer"),
    "vswapd-1": ("vswapd_peer", "OneShardPeer"),
    "zram": ("zram_peer", "ZramPeer"),
    "zram-4k": ("zram_peer", "SmallZramPeer"),
    "redis": ("redis_peer", "RedisPeer"),
    "memcached": ("memcached_peer", "MemcachedPeer"),
    "lmdb": ("lmdb_peer", "LmdbPeer"),
}
NAMES: Final = tuple(_CLASSES)


def peer_class(name: str) -> type[Peer]:
    """The class of a peer.

    Raises:
        MissingError: its client library is not installed.
    """
    module, kind = _CLASSES[name]
    try:
        found: type[Peer] = getattr(importlib.import_module(f"bench.peers.{module}"), kind)
    except ModuleNotFoundError as error:
        raise MissingError(f"the library {error.name} is not installed") from None
    return found
