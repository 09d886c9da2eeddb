"""The listening socket's owner and mode; how it is taken over stands in server/test_service.py."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat
import tempfile
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


@pytest.mark.usefixtures("as_nobody")
def test_the_default_folder_is_made_for_this_user_alone() -> None:
    """Nobody has named it, so it is made, 0700; what others can write to, or a link, is refused."""
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        _check_own_folder(Path(name))


def _check_own_folder(place: Path) -> None:
    folder = place / "own"
    path = str(folder / "sock")
    with pytest.raises(ListenError, match="there is no such folder"):
        Listener.open(path, mode=0o600)
    assert not folder.exists()
    Listener.open(path, mode=0o600, own_folder=True).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with pytest.raises(ListenError, match="others can write to it"):
        Listener.open(path, mode=0o600, own_folder=True)
    folder.rename(place / "other")
    folder.symlink_to(place / "other")
    with pytest.raises(ListenError, match="cannot be used"):
        Listener.open(path, mode=0o600, own_folder=True)
    folder.unlink()


def test_a_full_listener_is_not_waited_for(tmp_path: Path) -> None:
    """Who listens and does not accept is somebody who listens."""
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as other, contextlib.ExitStack() as stack:
        other.bind(path)
        other.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(path)
        with pytest.raises(ListenError, match="another daemon is listening there"):
            Listener.open(path, mode=0o600)


def test_a_mode_is_not_given_through_a_link(tmp_path: Path) -> None:
    """Mode and group go to what was bound, whatever stands at the path: a link is refused."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o600)
    (tmp_path / "sock").symlink_to(victim)
    (tmp_path / "other.lock").symlink_to(victim)
    for name in ("sock", "other"):
        with pytest.raises(ListenError):
            Listener.open(str(tmp_path / name), mode=0o666)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert victim.read_text() == "mine"
