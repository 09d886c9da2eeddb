"""Taking a file into use as a swap device, and every way in which that is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vswapd_blockdev
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, OpenError
from vswapd_blockdev.header import DATA_OFFSET, MIN_BYTES, DeviceHeader, parse_header
from vswapd_blockdev.swapfile import SwapFile

MIB = 1 << 20
_NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "swap"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(path: Path | str, text: str, size: int | None = 2 * MIB) -> None:
    """Opening fails with this text and leaves neither descriptor nor change of the file."""
    before = descriptors()
    target = Path(path)
    is_file = os.path.isfile(path) and not os.path.islink(path)
    was = (target.stat().st_mode, target.read_bytes()) if is_file else None
    listed = sorted(os.listdir(target.parent)) if target.parent.is_dir() else None
    with pytest.raises(OpenError, match=text) as caught:
        SwapFile.open(str(path), size=size)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert descriptors() == before
    if was is not None:
        assert (target.stat().st_mode, target.read_bytes()) == was
    if listed is not None:
        assert sorted(os.listdir(target.parent)) == listed


def test_creates(path: Path) -> None:
    """A missing file is made: private, with a header, of whole extents, all space reserved."""
    boot = os.urandom(16)
    device = SwapFile.open(str(path), size=2 * MIB + 12345, boot_id=boot, encrypted=True)
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 2 * MIB
    assert status.st_blocks * 512 >= 2 * MIB
    assert device.extents == (2 * MIB - DATA_OFFSET) // EXTENT_BYTES == 7
    assert parse_header(path.read_bytes()[:BLOCK_BYTES]) == DeviceHeader(
        extents=7, boot_id=boot, encrypted=True
    )
    device.close()
    assert path.exists()


def test_is_private_whatever_the_umask(path: Path) -> None:
    """A strange umask makes the file neither more open nor unusable."""
    for mask in (0, 0o777):
        old = os.umask(mask)
        try:
            SwapFile.open(str(path), size=2 * MIB).close()
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()


def test_descriptor_is_not_inherited(path: Path) -> None:
    """Programs that the daemon starts get neither the file nor its lock."""
    device = SwapFile.open(str(path), size=2 * MIB)
    assert not os.get_inheritable(device._fd)
    device.close()


def test_direct_or_said_otherwise(path: Path, no_direct: None) -> None:
    """Where O_DIRECT is refused the file works without it, and says so."""
    device = SwapFile.open(str(path), size=2 * MIB)
    assert not device.direct
    assert not fcntl.fcntl(device._fd, fcntl.F_GETFL) & os.O_DIRECT
    device.close()


def test_direct_flag_is_true(path: Path) -> None:
    """`direct` says what the descriptor is."""
    device = SwapFile.open(str(path), size=2 * MIB)
    assert device.direct == bool(fcntl.fcntl(device._fd, fcntl.F_GETFL) & os.O_DIRECT)
    device.close()


def test_opens_its_own_again(path: Path) -> None:
    """An earlier swap file is used again with its size, its contents, and a new header."""
    device = SwapFile.open(str(path), size=2 * MIB)
    device.write(3, 0, b"\x05" * BLOCK_BYTES)
    device.close()
    path.chmod(0o644)
    device = SwapFile.open(str(path), boot_id=b"b" * 16)
    assert device.extents == 7
    assert device.read(3, 0, BLOCK_BYTES) == b"\x05" * BLOCK_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert parse_header(path.read_bytes()[:BLOCK_BYTES]).boot_id == b"b" * 16
    device.close()


@pytest.mark.parametrize("size", [MIN_BYTES, 2 * MIB, 4 * MIB])
def test_takes_the_size_asked_for(path: Path, size: int) -> None:
    """An earlier swap file becomes shorter or longer, and its holes are filled again."""
    device = SwapFile.open(str(path), size=3 * MIB)
    device.discard(0, device.extents)
    device.close()
    assert path.stat().st_blocks * 512 < MIB
    device = SwapFile.open(str(path), size=size)
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 >= size
    assert device.extents == size // EXTENT_BYTES - 1
    device.close()


@pytest.mark.parametrize("fill", ["empty", "hole", "zeros"])
def test_uses_what_is_blank(path: Path, fill: str) -> None:
    """A file that is empty, a hole, or all zeros is nobody's data."""
    with path.open("wb") as file:
        if fill == "hole":
            file.truncate(8 * MIB)
        elif fill == "zeros":
            file.write(bytes(3 * MIB))
    device = SwapFile.open(str(path), size=2 * MIB)
    assert device.extents == 7
    device.close()


def test_existing_size(path: Path) -> None:
    """Without a size, a blank file keeps the one it has."""
    with path.open("wb") as file:
        file.truncate(3 * MIB)
    device = SwapFile.open(str(path))
    assert device.extents == 11
    device.close()


@pytest.mark.parametrize(
    ("place", "mark"),
    [
        (0, b"letter to my aunt"),
        (1080, b"\x53\xef"),  # ext4
        (4086, b"SWAPSPACE2"),
        (4096, b"\xfc\x4e\x2b\xa9"),  # md 1.2
        (32769, b"CD001"),
        (65600, b"_BHRfS_M"),
        (1 << 20, b"x"),
        (2 * MIB - 1, b"x"),
    ],
)
def test_never_overwrites_data(path: Path, place: int, mark: bytes) -> None:
    """A file with a single byte of somebody's data, wherever it is, is refused and not changed."""
    with path.open("wb") as file:
        file.truncate(2 * MIB)
        file.seek(place)
        file.write(mark)
    refused(path, "holds data that is not ours .* remove it first")
    refused(path, "holds data", size=None)


@pytest.mark.parametrize("place", [100, 4096, 65600, DATA_OFFSET - 1])
def test_own_header_is_not_enough(path: Path, place: int) -> None:
    """Other data behind an old header of ours, where we never write, shows another user."""
    SwapFile.open(str(path), size=2 * MIB).close()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    refused(path, "holds data that is not ours")


def test_other_version(path: Path) -> None:
    """A swap file of another version is refused by that name."""
    SwapFile.open(str(path), size=2 * MIB).close()
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\x09")
    refused(path, "version 9")


@pytest.mark.parametrize("size", [0, 1, -5, MIN_BYTES - 1])
def test_too_small(path: Path, size: int) -> None:
    """Less than four extents and the header are refused, with the least that would do."""
    refused(path, f"too small: at least {MIN_BYTES} are needed", size=size)
    SwapFile.open(str(path), size=MIN_BYTES).close()
    refused(path, "too small", size=size)


def test_existing_file_too_small(path: Path) -> None:
    """An empty file without a size, and a short one, are refused for what they are."""
    path.touch()
    refused(path, "is empty: give a size", size=None)
    path.write_bytes(bytes(5000))
    refused(path, "5000 bytes are too small", size=None)


def test_too_large(path: Path) -> None:
    """A size that no disk has is refused before anything is taken, and no file stays."""
    refused(path, "no room for", size=1 << 60)


def test_wrong_names(tmp_path: Path) -> None:
    """What is missing, a directory, a link, below a file, or no file at all is said to be so."""
    plain = tmp_path / "file"
    plain.touch()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(plain)
    dangling.symlink_to(tmp_path / "nowhere")
    fifo, sock = tmp_path / "fifo", tmp_path / "sock"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
    refused(tmp_path / "missing", "does not exist: give a size", size=None)
    refused(tmp_path / "no" / "such" / "swap", "its directory does not exist")
    refused(tmp_path, "is a directory: name a file in it")
    refused(plain / "swap", "is not below a directory")
    refused(link, "is a symbolic link: name the file itself")
    refused(dangling, "is a symbolic link: name the file itself")
    for path in (fifo, sock, Path("/dev/null")):
        refused(path, "is neither a file nor a block device")
    refused("", "directory does not exist")
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OpenError, match="is no file name"):
            SwapFile.open(name, size=2 * MIB)
    refused(tmp_path / ("x" * 300), "cannot be opened: File name too long")


def test_more_than_one_name(path: Path) -> None:
    """A file with a second name somewhere else is refused: that name would be the pages' too."""
    SwapFile.open(str(path), size=2 * MIB).close()
    os.link(path, path.with_name("other"))
    refused(path, "has more than one name")


def test_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's file is refused: they could open it again at any time."""
    SwapFile.open(str(path), size=2 * MIB).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused(path, f"belongs to uid {os.getuid()}")


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """This process, root or not, as somebody who may not do everything; a folder of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() != 0:
            yield Path(folder)
            return
        os.chown(folder, _NOBODY, -1)
        os.seteuid(_NOBODY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


def test_not_permitted(as_nobody: Path) -> None:
    """What this user may not open, and where they may not make files, is refused."""
    path = as_nobody / "swap"
    path.touch()
    path.chmod(0)
    with pytest.raises(OpenError, match="cannot be opened: Permission denied"):
        SwapFile.open(str(path), size=2 * MIB)
    as_nobody.chmod(0o500)
    refused(path.with_name("other"), "cannot be opened: Permission denied")
    as_nobody.chmod(0o700)


def test_locked_against_itself(path: Path) -> None:
    """A second open of the same file is refused while the first lasts, by any of its names."""
    device = SwapFile.open(str(path), size=2 * MIB)
    refused_text = "is in use: another vswapd has locked it"
    refused(path, refused_text)
    refused(path.parent / "." / ".." / path.parent.name / "swap", refused_text)
    device.close()
    SwapFile.open(str(path)).close()


_HOLDER = """
import sys
from vswapd_blockdev.swapfile import SwapFile
device = SwapFile.open(sys.argv[1], size=2 << 20)
print("held", flush=True)
sys.stdin.read()
"""


def test_locked_against_another_process(path: Path) -> None:
    """A file in use by another process is refused, and free once that has ended, however."""
    root = str(Path(vswapd_blockdev.__path__[0]).parent)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused(path, "is in use: another vswapd has locked it")
        holder.kill()
    SwapFile.open(str(path)).close()


def test_full_disk_says_so_and_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the space cannot be had after all, a new file goes and an old one keeps its size."""

    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, length // 2)  # as far as it went
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    SwapFile.open(str(path.with_name("old")), size=2 * MIB).close()
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(path, "no room for 2097152 bytes: No space left")
    refused(path.with_name("old"), "no room for 8388608 bytes", size=8 * MIB)


def test_removes_only_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody put in place of ours meanwhile is not removed with it."""

    def full(fd: int, offset: int, length: int) -> None:
        path.unlink()
        path.write_text("somebody's")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OpenError, match="no room"):
        SwapFile.open(str(path), size=2 * MIB)
    assert path.read_text() == "somebody's"


def test_made_by_somebody_else_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that appears between the look and the open is treated as theirs, not as made here."""
    real = os.open

    def race(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            path.write_text("somebody's")
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", race)
    with pytest.raises(OpenError, match="holds data that is not ours"):
        SwapFile.open(str(path), size=2 * MIB)
    assert path.read_text() == "somebody's"


def test_removed_by_somebody_else_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that loses its name before it is locked is not used: nobody would find its lock."""
    SwapFile.open(str(path), size=2 * MIB).close()
    real = fcntl.flock

    def race(fd: int, operation: int) -> None:
        path.unlink()
        path.touch()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", race)
    with pytest.raises(OpenError, match="was removed while it was opened"):
        SwapFile.open(str(path), size=2 * MIB)


@pytest.mark.parametrize("call", ["fstat", "pwrite", "fsync", "fchmod", "fstatvfs", "pread"])
def test_any_other_error_is_an_open_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whatever system call fails, swapon fails with an OpenError that says why, and no file."""

    def fail(*_: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = descriptors()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OpenError, match="Input/output error"):
        SwapFile.open(str(path), size=2 * MIB)
    assert not path.exists()
    assert descriptors() == before


# Again, after a process that is no more

BOOT = bytes(range(16))


def _left(path: Path, *, encrypted: bool = True) -> SwapFile:
    """A device that was in use: closed, with something on it."""
    device = SwapFile.open(str(path), size=2 * MIB, boot_id=BOOT, encrypted=encrypted)
    device.write(3, BLOCK_BYTES, b"x" * BLOCK_BYTES)
    device.close()
    return device


def test_reopens_what_was_left(path: Path) -> None:
    """Nothing is written; what stood there is there, and the lock is held again."""
    left = _left(path)
    before = path.read_bytes()
    device = SwapFile.reopen(str(path), extents=left.extents, boot_id=BOOT, encrypted=True)
    assert path.read_bytes() == before
    assert (device.extents, device.direct) == (left.extents, left.direct)
    assert bytes(device.read(3, BLOCK_BYTES, BLOCK_BYTES)) == b"x" * BLOCK_BYTES
    refused(path, "in use")
    device.write(0, 0, b"y" * BLOCK_BYTES)
    device.close()


def test_does_not_reopen_what_is_in_use(path: Path) -> None:
    """The process that had it must be gone."""
    device = SwapFile.open(str(path), size=2 * MIB, boot_id=BOOT)
    with pytest.raises(OpenError, match="is in use"):
        SwapFile.reopen(str(path), extents=device.extents, boot_id=BOOT, encrypted=False)
    device.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: os.truncate(path, MIB), "has become shorter"),
        (lambda path: os.truncate(path, 0), "not what it was .no vswapd"),
        (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "not what it was"),
        (lambda path: SwapFile.open(str(path), size=2 * MIB).close(), "by another run since"),
        (
            lambda path: SwapFile.open(str(path), size=3 * MIB, boot_id=BOOT).close(),
            "by another run since",
        ),
        (lambda path: os.link(path, path.with_name("other")), "more than one name"),
    ],
)
def test_does_not_reopen_what_has_changed(
    path: Path, change: Callable[[Path], object], text: str
) -> None:
    """It says that its pages are lost, or what is in the way; and holds nothing."""
    extents = _left(path).extents
    change(path)
    before = descriptors()
    was = path.read_bytes() if path.exists() else None
    with pytest.raises(OpenError, match=text):
        SwapFile.reopen(str(path), extents=extents, boot_id=BOOT, encrypted=True)
    assert descriptors() == before
    assert (path.read_bytes() if path.exists() else None) == was
