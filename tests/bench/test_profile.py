"""The profile of a shard: what it says where it cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import profile


def test_without_perf_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and no daemon is started."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile.main() == 1
    assert "apt-get install linux-perf" in capsys.readouterr().out
