"""Files that are written into folders of others: no link there is followed, whatever its name."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.wire import STATUS, Wire
from vswap.control import Control
from vswapd.whole_file import WholeFile

OPENED = """
import os, sys
from pathlib import Path
from vswapd.whole_file import WholeFile

def hook(event, arguments):
    if event == "open" and arguments[2] & os.O_CREAT:
        print(arguments[0], arguments[2] & (os.O_EXCL | os.O_NOFOLLOW))

sys.addaudithook(hook)
for _ in range(3):
    WholeFile.write(Path(sys.argv[1]), b"content", mode=0o644).close()
"""


def test_links_at_every_name_that_can_be_guessed(tmp_path: Path) -> None:
    """A link at the path, or at a temporary name, leads nobody's bytes to where it points."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o600)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "x.prom"
    pid = os.getpid()
    names = [
        "x.prom",
        "x.prom.tmp",
        ".x.prom.tmp",
        f".x.prom.{pid}.tmp",
        f"x.prom.{pid}",
        "x.prom~",
    ]
    for name in names:
        (folder / name).symlink_to(victim)
    WholeFile.write(path, b"ours", mode=0o644).close()
    assert (victim.read_text(), stat.S_IMODE(victim.stat().st_mode)) == ("mine", 0o600)
    assert not path.is_symlink()
    assert path.read_bytes() == b"ours"
    assert sorted(each.name for each in folder.iterdir()) == sorted(names)


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    """Each file that is made has a new name, of many, and nothing that has it is opened."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(tmp_path / "x.prom")],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    opened = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len({name for name, _ in opened}) == 3
    for name, flags in opened:
        assert len(name.removesuffix(".tmp").rpartition(".")[2]) == 16
        assert int(flags) == os.O_EXCL | os.O_NOFOLLOW
    assert [path.name for path in tmp_path.iterdir()] == ["x.prom"]


@pytest.mark.parametrize("what", ["folder", "pipe", "long"])
def test_what_cannot_be_replaced_is_left(tmp_path: Path, what: str) -> None:
    """A folder or a pipe at the path, or a name that is too long, is an error with the path."""
    path = tmp_path / ("x" * 300 if what == "long" else "x")
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    before = list(tmp_path.iterdir())
    with pytest.raises(OSError, match=f"{path}'$"):
        WholeFile.write(path, b"ours", mode=0o644)
    assert list(tmp_path.iterdir()) == before


def test_it_is_removed_only_if_it_is_the_same(tmp_path: Path) -> None:
    """What has taken its place in the meantime stays, also with the same bytes."""
    path = tmp_path / "x"
    first = WholeFile.write(path, b"ours", mode=0o644)
    second = WholeFile.write(path, b"ours", mode=0o644)
    first.remove()
    assert path.exists()
    second.remove()
    assert not path.exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_the_daemons_text_file(tmp_path: Path, shards: int) -> None:
    """A daemon asked to write where it cannot says so and changes nothing; a link is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "x.prom"
    path.symlink_to(victim)
    with running_daemon("pool.max=8M", f"server.shards={shards}") as daemon:
        with Control(daemon.socket_path) as control:
            before = control.status()["settings"]
            with pytest.raises(Exception, match="cannot be written: No such file"):
                control.call("set", key="metrics.textfile", value="/nonexistent/x.prom")
            assert control.status()["settings"] == before
            control.call("set", key="metrics.textfile", value=str(path))
            assert path.read_text().startswith("# HELP")
        assert victim.read_text() == "mine"
        with Wire(daemon.socket_path) as wire:
            wire.hello()
            assert wire.ask(STATUS).status == 0
    assert not path.exists()
    assert victim.read_text() == "mine"


def test_a_text_file_that_cannot_be_written_at_the_start(tmp_path: Path) -> None:
    """The daemon starts, says so, and writes it once it can: other settings can be changed."""
    path = tmp_path / "sub" / "x.prom"
    with running_daemon("pool.max=8M", f"metrics.textfile={path}") as daemon:
        with Control(daemon.socket_path) as control:
            control.call("set", key="pool.max", value="6M")
        daemon.reload()
        assert f"metrics.textfile: {path} cannot be written" in daemon.log
