"""Debian trees: what debootstrap installs for a release, made once and kept for later runs.

A tree is what a test runs in when it needs another Debian, another Python or another systemd than
this machine has. Making one takes a minute and 150 to 300 MB, so it is kept outside of the clone,
in /var/cache/vswapd-tests or where VSWAPD_TEST_CACHE says.

Invariants:
- A tree that is kept is never run in and never changed: a test works on a `copy`.
- What is kept is whole: it is made under another name and renamed. Of two runs that make the same
  tree at the same time, one waits for the other.
- Only root can look into the cache: a tree has set-uid programs.

This module must not know what is done in a tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

_COMMAND: Final = "debootstrap"
_DEFAULT_CACHE: Final = "/var/cache/vswapd-tests"


def missing() -> str | None:
    """Why no tree can be made here, or None if one can."""
    if os.geteuid() != 0:
        return "making a Debian tree needs root"
    return None if shutil.which(_COMMAND) else f"not installed: {_COMMAND}"


def this_release() -> str:
    """The Debian (or derived) release of this machine, for which debootstrap has a mirror."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    return "stable"


def tree(release: str, packages: Sequence[str]) -> Path:
    """The kept tree of a release with these packages (and what they depend on), made if need be.

    Raises:
        AssertionError: debootstrap failed; the text ends with what it wrote.
    """
    cache = _cache()
    wanted = hashlib.blake2b(" ".join(sorted(packages)).encode(), digest_size=6).hexdigest()
    kept = cache / f"{release}-{wanted}"
    with (cache / f"{kept.name}.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if not kept.exists():
            _make(release, packages, kept)
    return kept


@contextlib.contextmanager
def copy(kept: Path) -> Iterator[Path]:
    """A copy of a kept tree that may be changed, until the block ends."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="vswapd-tree-") as name:
        root = Path(name) / "root"
        _checked(["cp", "-a", "--reflink=auto", str(kept), str(root)])
        yield root


def _cache() -> Path:
    cache = Path(os.environ.get("VSWAPD_TEST_CACHE", _DEFAULT_CACHE))
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    return cache


def _make(release: str, packages: Sequence[str], kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="making-") as name:
        new = Path(name) / "tree"
        included = f"--include={','.join(packages)}"
        _checked([_COMMAND, "--variant=minbase", included, release, str(new)])
        new.rename(kept)


def _checked(command: Sequence[str]) -> None:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (
        f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}{result.stderr}"
    )
