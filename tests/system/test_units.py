"""The unit files, looked at by systemd's own tools without running them."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from support.sources import REPOSITORY

UNITS = REPOSITORY / "systemd"

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def _analyze(*arguments: str) -> str:
    result = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def test_exposure() -> None:
    """The sandbox leaves an exposure of at most 1.5 of 10."""
    report = _analyze("security", "--offline=true", "--no-pager", str(UNITS / "vswapd.service"))
    exposure = re.search(r"Overall exposure level for vswapd.service: ([0-9.]+)", report)
    assert exposure is not None, report
    assert float(exposure[1]) <= 1.5


def test_systemd_knows_every_setting() -> None:
    """systemd understands each line of the units: no unknown setting, no value it cannot parse."""
    report = _analyze("verify", str(UNITS / "vswapd.service"), str(UNITS / "vswapd.socket"))
    ours = [line for line in report.splitlines() if "vswapd" in line]
    # The commands and the pages are not where they will be installed.
    missing = re.compile(r"is not executable|Command 'man ")
    assert [line for line in ours if not missing.search(line)] == []
