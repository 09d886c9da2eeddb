"""vswapctl: the operators' tool.

This package must not know the engine: it has the daemon's status document and its verbs.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    # Only now: whoever starts it wants to say so where it cannot be loaded.
    from vswapd.ctl import command

    return command.main(argv)
