"""vswapctl: the operators' tool.

This package must not know the engine: it has the daemon's status document and its verbs.
"""

from vswapd.ctl.command import main

__all__ = ["main"]
