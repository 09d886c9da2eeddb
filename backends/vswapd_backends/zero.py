"""The zero backend: pages of nothing but zeros are found, and then cost one tag.

This module must not know where the other pages go.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vswapd_backends.base import PAGE_BYTES, U64

ZERO_PAGE: Final = bytes(PAGE_BYTES)
"""What every load of a ZERO slot returns: one object for all of them."""

_PAGE_WORDS: Final = PAGE_BYTES // 8
_SAMPLE: Final = 64
"""Every 64th word is looked at first. On heap pages this rules out all but the zero pages and a few
percent more; 0.07 us per page against 0.16 (or-reduce) and 0.23 (any) for looking at every word."""


def zero_pages(words: U64) -> npt.NDArray[np.bool_] | None:
    """Which pages are all zero; `words` has shape (n, 512), the result (n,). None: none is."""
    assert words.shape[1] == _PAGE_WORDS
    zero: npt.NDArray[np.bool_] = np.bitwise_or.reduce(words[:, ::_SAMPLE], axis=1) == 0
    candidates = zero.nonzero()[0]
    if not len(candidates):
        return None
    zero[candidates] = np.logical_not(words[candidates].any(axis=1))
    return zero if zero.any() else None
