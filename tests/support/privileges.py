"""Commands that run with less than the tests may: without capabilities, within limits.

This module must not know what is run.
"""

from __future__ import annotations

import os


def without(*capabilities: str) -> list[str]:
    """What to put before a command so that it runs without these, such as `ipc_lock`, also as root.

    Nobody but root has any.
    """
    if os.geteuid() != 0:
        return []
    names = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set={names}", f"--inh-caps={names}"]


def limited(**limits: str) -> list[str]:
    """What to put before a command so that limits hold for it: `limited(stack="262144:262144")`."""
    return ["prlimit", *(f"--{name}={value}" for name, value in limits.items())]
