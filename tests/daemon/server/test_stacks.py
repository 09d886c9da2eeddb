"""A daemon that is started with a small stack serves as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

import vswap
from support.daemon import running_daemon
from support.privileges import limited, without
from support.wire import BAD_ARGUMENT, CONTROL, HELLO, Wire
from vswap.control import Control

KIB: Final = 1024
DEEP: Final = b'{"a":' * 10_000
"""JSON that is nested as deep as a request has room for."""


def text(count: int) -> bytes:
    """Pages that any codec makes smaller, a better one more so."""
    words = np.random.default_rng(count).integers(0, 400, count * 1024)
    return b"".join([b"%d, " % word for word in words.tolist()]).ljust(count * 4096)[: count * 4096]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tiers", ["lz4,zstd:19", "lz4hc:9"])
@pytest.mark.parametrize("hard", ["unlimited", 256 * KIB])
def test_a_small_stack(hard: int | str, tiers: str, shards: int, tmp_path: Path) -> None:
    """Codecs in the event loop and in threads have the stack that they need, and so has JSON."""
    device = f"device={tmp_path / 'swap'},size=256M"
    settings = (f"server.shards={shards}", "pool.max=4M", f"pool.tiers={tiers}", device)
    under = [*limited(stack=f"{256 * KIB}:{hard}"), *without("sys_resource")]
    with (
        running_daemon(*settings, under=under) as daemon,
        vswap.connect(daemon.socket_path) as space,
        Control(daemon.socket_path) as control,
        Wire(daemon.socket_path) as wire,
    ):
        stored = {count: space.store(text(count)) for count in (1, 64, 300)}
        pages, others = text(256), []
        while "," in tiers and not control.status()["traffic"]["recompress_pages"]:
            others.append(space.store(pages))
            if len(others) > 20:
                space.free(others.pop(0))
        for count, slots in stored.items():
            assert bytes(space.load(slots)) == text(count)
        assert wire.ask(HELLO, DEEP).status == BAD_ARGUMENT
        wire.hello()
        assert wire.ask(CONTROL, DEEP).status == BAD_ARGUMENT
        assert control.call("verify")["ok"]
