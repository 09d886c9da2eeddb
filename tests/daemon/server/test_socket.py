"""The daemon's socket and lock in the file system, when others remove, replace or move them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.wire import STATUS, Wire

SERVE = [sys.executable, "-W", "error", "-m", "vswapd", "serve", "--set=pool.max=8M"]


def lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def serves(path: Path) -> bool:
    """Whether a daemon answers at a path; it does not if nothing is there, or nobody listens.

    Nor while the socket is being made: until it has its mode nobody but root may connect.
    """
    try:
        with Wire(path) as wire:
            wire.hello()
            return wire.ask(STATUS).status == 0
    except (FileNotFoundError, ConnectionRefusedError, PermissionError):
        return False


@contextmanager
def second_daemon(path: Path) -> Iterator[None]:
    """Another daemon at the same path, which holds to the end, and leaves nothing."""
    process = subprocess.Popen([*SERVE, f"--socket={path}"], env=daemon_environment())
    try:
        while not serves(path):
            assert process.poll() is None
        yield
        assert serves(path)
        assert lock_of(path).exists()
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not path.exists()
    assert not lock_of(path).exists()


def sweep(path: Path) -> None:
    path.unlink()
    lock_of(path).unlink()


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()


@pytest.mark.parametrize(("shards", "take"), [(1, sweep), (2, move_folder)])
def test_another_daemons_socket_stays(shards: int, take: Callable[[Path], None]) -> None:
    """A daemon whose socket has gone, and which is stopped, takes nothing from the one after it."""
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        path = Path(name) / "folder" / "s"
        path.parent.mkdir()
        command = [*SERVE, f"--socket={path}"]
        first = subprocess.Popen(
            [*command, f"--set=server.shards={shards}"], env=daemon_environment()
        )
        while not serves(path):
            assert first.poll() is None
        take(path)
        with second_daemon(path):
            first.terminate()
            assert first.wait(60) == 0
            assert serves(path)
            # The lock is the second one's, and still locks.
            third = subprocess.run(
                command, env=daemon_environment(), capture_output=True, check=False, timeout=60
            )
            assert (third.returncode, b"another vswapd is serving it" in third.stderr) == (69, True)
        # Nor does the first one leave anything, where its folder is by now.
        assert [path for path in Path(name).rglob("*") if not path.is_dir()] == []


def to_file(path: Path) -> None:
    path.unlink()
    path.write_text("mine")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("notify"))


def to_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))


REPLACED = [to_file, to_folder, to_link, to_socket]


@pytest.mark.parametrize("what", ["socket", "lock"])
@pytest.mark.parametrize("replace", REPLACED)
def test_what_has_taken_its_place_stays(what: str, replace: Callable[[Path], None]) -> None:
    """What stands in place of the socket, or of the lock, is not removed by who stops."""
    with running_daemon("pool.max=8M") as daemon:
        socket_path, lock = daemon.socket_path, lock_of(daemon.socket_path)
        place, other = (socket_path, lock) if what == "socket" else (lock, socket_path)
        replace(place)
        mine = place.lstat()
        daemon.process.terminate()
        daemon.await_exit(expected=0)
        assert os.path.samestat(place.lstat(), mine)
        # Where the lock is somebody else's, so may be what stands behind it.
        assert what == "lock" or not other.exists()
        for path in (place, other):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


@pytest.mark.parametrize("swept", [["socket"], ["lock"], ["socket", "lock"]])
def test_what_is_left_is_removed(swept: list[str]) -> None:
    """Where one of the two was swept away, the other goes with the daemon, and no more is made."""
    with running_daemon("pool.max=8M") as daemon:
        before = {path.name for path in daemon.directory.iterdir()}
        names = {"socket": daemon.socket_path, "lock": lock_of(daemon.socket_path)}
        for name in swept:
            names[name].unlink()
        daemon.terminate()
        left = {path.name for path in daemon.directory.iterdir()}
        assert left == before - {path.name for path in names.values()}


# After SIGHUP


@pytest.mark.parametrize("shards", [1, 2])
def test_a_removed_socket_is_made_again(shards: int) -> None:
    """A reload makes the socket again, with its mode; who is connected notices nothing."""
    with running_daemon(
        "pool.max=8M", f"server.shards={shards}", "server.socket_mode=666"
    ) as daemon:
        path = daemon.socket_path
        mode = path.stat().st_mode
        with Wire(path) as wire:
            wire.hello()
            for take in (Path.unlink, sweep):
                take(path)
                assert not serves(path)
                daemon.reload()
                assert serves(path)
                assert path.stat().st_mode == mode
                assert lock_of(path).exists()
                assert f"{path} was not there any more, and was made again" in daemon.log
                assert wire.ask(STATUS).status == 0
            counts = []
            for _ in range(4):
                path.unlink()
                daemon.reload()
                counts.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
            # The socket that READY went through may not be closed yet.
            assert max(counts) <= min(counts) + 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_socket_that_is_there_stays(shards: int) -> None:
    """A reload leaves the socket as it is, as long as it leads to the daemon."""
    with running_daemon("pool.max=8M", f"server.shards={shards}") as daemon:
        before = daemon.socket_path.stat()
        daemon.reload()
        assert os.path.samestat(daemon.socket_path.stat(), before)


def test_a_place_that_is_taken_is_told() -> None:
    """Where another daemon serves by now, or something else stands, a reload says so."""
    with running_daemon("pool.max=8M") as daemon:
        path = daemon.socket_path
        sweep(path)
        with second_daemon(path):
            daemon.reload()
            assert f"nobody can connect any more: {path}: another vswapd" in daemon.log
            assert serves(path)
        path.write_text("mine")
        daemon.reload()
        assert f"{path}: is there already, and is no socket" in daemon.log
        assert path.read_text() == "mine"
        path.unlink()
        daemon.reload()
        assert serves(path)
