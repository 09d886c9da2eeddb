"""What must hold between the values of a configuration, beyond what each of them must be.

Each check is a function from the configuration to problems; `problems` runs all of them.

This module must not know where values come from, or how an error is shown.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from vswap.protocol import HEADER_BYTES, PAGE_BYTES, SLOT_BYTES
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from vswapd.config import Config

MIN_POOL_BYTES: Final = 1 << 20
"""Four segments: below that, second chances and writeback have nothing to choose from."""
MIN_DEVICE_BYTES: Final = 1280 << 10
"""What the smallest swap device takes: five times 256 KiB, one of them its header's."""
MIN_TIMEOUT_S: Final = 0.1
MAX_PORT: Final = 0xFFFF
_IPV6: Final = 6
SUN_PATH_BYTES: Final = 107
"""The longest path of a Unix socket: sun_path of unix(7), less its closing zero."""


class Problem(NamedTuple):
    """One thing that is wrong: the keys it is about, the first to be shown, and what to do."""

    keys: tuple[str, ...]
    text: str


def problems(config: Config) -> Iterator[Problem]:
    """Everything that does not fit; nothing if the configuration is good."""
    for check in _CHECKS:
        yield from check(config)


def _pool(config: Config) -> Iterator[Problem]:
    size = config.pool.max.size
    if size is not None and 0 < size < MIN_POOL_BYTES:
        least = format_size(MIN_POOL_BYTES)
        yield Problem(("pool.max",), f"{size} bytes is too little: write 0 or at least {least}")
    if not config.pool.accept_threshold:
        yield Problem(
            ("pool.accept_threshold",), "0% would refuse every page once full: write 1% to 100%"
        )


def _watermarks(config: Config) -> Iterator[Problem]:
    low, high = config.shrinker.low_watermark, config.shrinker.high_watermark
    keys = ("shrinker.low_watermark", "shrinker.high_watermark")
    if low >= high:
        yield Problem(keys, f"{low} must be below shrinker.high_watermark, which is {high}")
    accept = config.pool.accept_threshold
    if low > accept:
        # Otherwise the shrinker would stop while the pool still refuses, and nothing would move.
        yield Problem(
            ("shrinker.low_watermark", "pool.accept_threshold"),
            f"{low} must not be above pool.accept_threshold, which is {accept}: "
            "lower the one or raise the other",
        )


def _buffers(config: Config) -> Iterator[Problem]:
    server = config.server
    frame = HEADER_BYTES + server.max_batch * (SLOT_BYTES + PAGE_BYTES)
    if server.buffer_memory < 2 * frame:
        yield Problem(
            ("server.buffer_memory", "server.max_batch"),
            f"{server.buffer_memory} does not hold one request and one reply of "
            f"server.max_batch = {server.max_batch} pages: write at least "
            f"{format_size(-(-2 * frame >> 20) << 20)}, or lower server.max_batch",
        )
    if server.request_timeout < MIN_TIMEOUT_S:
        yield Problem(
            ("server.request_timeout",),
            f"{server.request_timeout} is too short for any request: write 100ms or more",
        )


def _socket(config: Config) -> Iterator[Problem]:
    path = config.server.socket
    if path and not path.startswith("/"):
        yield Problem(("server.socket",), f"{path!r} is no absolute path: begin it with /")
    if len(path.encode()) > SUN_PATH_BYTES:
        yield Problem(
            ("server.socket",),
            f"{len(path.encode())} bytes is longer than a socket's path may be: "
            f"keep it to {SUN_PATH_BYTES}",
        )


def _devices(config: Config) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, device in enumerate(config.devices):
        where = f"device[{index}]"
        keys = (f"{where}.path", "device")
        if not device.path.startswith("/"):
            yield Problem(keys, f"{device.path!r} is no absolute path: begin it with /")
        if device.path in seen:
            yield Problem(keys, f"{device.path} is there twice: keep one of them")
        seen.add(device.path)
        if device.size is not None and device.size < MIN_DEVICE_BYTES:
            least = format_size(MIN_DEVICE_BYTES)
            yield Problem(
                (f"{where}.size", "device"), f"{device.size} is too small: write at least {least}"
            )


def _metrics(config: Config) -> Iterator[Problem]:
    if config.metrics.listen and parse_listen(config.metrics.listen) is None:
        yield Problem(
            ("metrics.listen",),
            f"{config.metrics.listen!r} is no address and port of this host: write "
            '127.0.0.1:9177 or [::1]:9177, or "" for none',
        )
    file = config.metrics.textfile
    if file and not (file.startswith("/") and file.endswith(".prom")):
        yield Problem(
            ("metrics.textfile",),
            f"{file!r} would not be collected: write an absolute path that ends in .prom",
        )


def parse_listen(text: str) -> tuple[str, int] | None:
    """The address and port of `ADDRESS:PORT` or `[ADDRESS]:PORT`; None if it is not one."""
    host, colon, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host
    inside = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        version = ipaddress.ip_address(inside).version
    except ValueError:
        return None
    if not colon or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= MAX_PORT:
        return None
    return (inside, int(port)) if (inside != host) == (version == _IPV6) else None


_CHECKS: Final[tuple[Callable[[Config], Iterator[Problem]], ...]] = (
    _pool,
    _watermarks,
    _buffers,
    _socket,
    _devices,
    _metrics,
)
