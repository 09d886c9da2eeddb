"""What is told of what goes wrong again and again."""

from __future__ import annotations

import pytest

from vswapd.trouble import Trouble
from vswapd_backends.base import IoKind, IoRequest
from vswapd_blockdev.device import BLOCK_BYTES
from vswapd_blockdev.faulty import Faults, FaultyDevice
from vswapd_blockdev.memory import MemoryDevice


def test_first_then_ever_fewer(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind for itself."""
    trouble = Trouble()
    for _ in range(1000):
        trouble.of_pages("1/x", ValueError("lost"))
    assert len(caplog.records) == 10
    assert "lost (512 such requests so far)" in caplog.messages[-1]


def test_devices_are_told_apart_and_so_are_reads_and_writes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only what failed is told."""
    trouble = Trouble()
    for name in ("a", "b"):
        device = FaultyDevice(MemoryDevice(4, name), Faults(bad_reads={1}, bad_writes={1}))
        for extent in (0, 1, 1):
            for kind in (IoKind.WRITE, IoKind.READ):
                data = bytes(BLOCK_BYTES)
                request = IoRequest(kind, device, extent, 0, BLOCK_BYTES, data)
                request.perform()
                trouble.of_devices([request])
    assert [message.partition(", the last")[0] for message in caplog.messages] == [
        f"{name}: {verb} fail ({count} so far)"
        for name in ("a", "b")
        for count in (1, 2)
        for verb in ("writes", "reads")
    ]
    assert "injected: writing extent 1" in caplog.messages[0]
