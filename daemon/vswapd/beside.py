"""Work that goes on beside all else in an event loop, until what it belongs to ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any


def beside(made: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Have a coroutine run beside all else until `made` is unmade."""
    task = asyncio.get_running_loop().create_task(work)

    async def end() -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    made.push_async_callback(end)
