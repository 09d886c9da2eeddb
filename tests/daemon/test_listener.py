"""The listening socket's owner and mode; how it is taken over stands in server/test_service.py."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswapd.listener import Listener, ListenError

_NOBODY = 65534


@pytest.fixture
def as_nobody(tmp_path: Path) -> Iterator[Path]:
    """This process as somebody who may not do everything; a folder."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    os.seteuid(_NOBODY)
    try:
        yield tmp_path
    finally:
        os.seteuid(0)


def _other_group() -> str:
    mine = {os.getegid(), *os.getgroups()}
    return next(entry.gr_name for entry in grp.getgrall() if entry.gr_gid not in mine)


def test_mode_and_group(tmp_path: Path) -> None:
    """The socket has the mode and the group that were asked for, and is gone after the close."""
    path = tmp_path / "sock"
    group = grp.getgrgid(os.getegid()).gr_name
    listener = Listener.open(str(path), mode=0o660, group=group)
    try:
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())
    finally:
        listener.close()
    assert list(tmp_path.iterdir()) == []


def test_a_group_of_others(as_nobody: Path) -> None:
    """Who is neither root nor in the group is told so, before anything is made."""
    group = _other_group()
    with pytest.raises(ListenError, match=f"only root and members of '{group}'"):
        Listener.open(str(as_nobody / "sock"), mode=0o660, group=group)


def test_no_such_group(tmp_path: Path) -> None:
    """A group that this host does not have is named, before anything is made."""
    with pytest.raises(ListenError, match="no group 'no-such-group'"):
        Listener.open(str(tmp_path / "sock"), mode=0o660, group="no-such-group")
    assert list(tmp_path.iterdir()) == []
