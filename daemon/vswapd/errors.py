"""What can go wrong with a request, as one small tree; each knows its wire status and exit code.

A refused page is not among them: that is a value (`Stored.reason`). Errors of devices are in
vswapd_blockdev.device, errors of the configuration in vswapd.config.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vswap.protocol import Status

U64 = npt.NDArray[np.uint64]
_NO_SLOTS: U64 = np.empty(0, np.uint64)


class EngineError(Exception):
    """A request that could not be done. Nothing was changed."""

    status: ClassVar[Status]
    exit_code: ClassVar[int] = 1

    def __init__(self, text: str, slots: U64 = _NO_SLOTS) -> None:
        super().__init__(text)
        self.slots = slots
        """The slot ids that it is about, as the client knows them; shape (k,), uint64."""


class BadSlotError(EngineError):
    """Slots that are free, stale, or another space's."""

    status = Status.BAD_SLOT


class DuplicateSlotError(EngineError):
    """One slot twice in a folio."""

    status = Status.DUPLICATE_SLOT


class UnbackedError(EngineError):
    """Slots without content: their last store was rejected."""

    status = Status.UNBACKED


class PageLostError(EngineError):
    """Slots whose bytes could not be had, or were not the right ones."""

    status = Status.PAGE_LOST


class NoSlotsError(EngineError):
    """The table has no room for that many new slots."""

    status = Status.NO_SLOTS


class BatchError(EngineError):
    """No pages, or a buffer that is not whole pages, or one slot list that does not fit it."""

    status = Status.BAD_LENGTH


class ArgumentError(EngineError):
    """A steering request that makes no sense as it stands; the text says what would."""

    status = Status.BAD_ARGUMENT
    exit_code = 2


class NotAllowedError(EngineError):
    """Steering by somebody who is neither root nor the daemon's user."""

    status = Status.NOT_ALLOWED
    exit_code = 77


class OutOfServiceError(EngineError):
    """A steering request that could not be carried out now; the state is what it was."""

    status = Status.OUT_OF_SERVICE


class StoppingError(EngineError):
    """A greeting that the daemon cannot answer, since it is ending."""

    status = Status.STOPPING


class SilentShardError(OutOfServiceError):
    """A shard is there and gives no sign of life, so that it is not known what it will do."""


class NoSuchSpaceError(ArgumentError):
    """There is no space of that name."""


class NoSuchDeviceError(OutOfServiceError):
    """No device of that path is in use."""


class SwapoffError(OutOfServiceError):
    """What lies on the device fits nowhere else; the device stays in use."""
