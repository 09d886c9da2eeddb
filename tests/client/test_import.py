"""What importing the client costs: no daemon, no event loop, and it is typed."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

import vswap
from support.daemon import SOURCE_ROOTS, daemon_environment

OTHERS = ("vswapd", "vswapd_backends", "vswapd_blockdev", "lz4", "zstandard", "cryptography")


def loaded_by(statement: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statement}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=daemon_environment(),
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["vswap", "vswap.control", "vswap.aio"])
def test_importing_leaves_the_daemon_out(module: str) -> None:
    """No module of the daemon, and none of what only it needs, is loaded."""
    assert len(SOURCE_ROOTS) == 4  # so the daemon could be imported
    assert not loaded_by(f"import {module}").intersection(OTHERS)


@pytest.mark.parametrize("module", ["vswap", "vswap.control"])
def test_the_blocking_client_needs_no_asyncio(module: str) -> None:
    """asyncio comes with vswap.aio only."""
    numpys_own = loaded_by("import numpy")
    assert "asyncio" not in loaded_by(f"import {module}") - numpys_own
    assert "asyncio" in loaded_by("import vswap.aio")


def test_no_call_with_plain_arrays_imports_anything() -> None:
    """What numpy has for arrays with masks is not loaded for arrays without."""
    take = "slots_of(np.zeros(1, np.uint64)); take_apart(np.zeros(4)); pages_of(np.zeros(512))"
    imports = "import numpy as np; from vswap.buffers import *; from vswap.handle import take_apart"
    assert loaded_by(f"{imports}; {take}; byte_view(bytearray(9))") == loaded_by(imports)


def test_the_package_is_typed() -> None:
    """py.typed is there for type checkers."""
    assert resources.files(vswap).joinpath("py.typed").is_file()


def test_everything_public_is_documented() -> None:
    """Each public name has a docstring."""
    assert not [name for name in vswap.__all__ if not getattr(vswap, name).__doc__]
