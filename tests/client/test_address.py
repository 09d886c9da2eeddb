"""Where the daemon is looked for, and what is said when it is not there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import vswap
import vswap.aio
from support.daemon import daemon_environment
from support.fake_daemon import FakeDaemon
from vswap import address
from vswap.address import candidates
from vswap.control import Control
from vswapd.ctl import main


def paths(environment: dict[str, str], uid: int, path: str | None = None) -> list[str]:
    return [str(each.path) for each in candidates(path, environment, uid)]


def test_a_given_path_is_the_only_one() -> None:
    """Neither environment nor defaults are looked at when a path is given."""
    assert paths({"VSWAP_SOCKET": "/b", "XDG_RUNTIME_DIR": "/c"}, 5, "/a") == ["/a"]


def test_the_variable_comes_next_and_alone() -> None:
    """$VSWAP_SOCKET, if it is set and not empty, is the only place."""
    assert paths({"VSWAP_SOCKET": "/b", "XDG_RUNTIME_DIR": "/c"}, 5) == ["/b"]
    assert "/c/vswapd.sock" in paths({"VSWAP_SOCKET": "", "XDG_RUNTIME_DIR": "/c"}, 5)


def test_the_users_daemon_comes_before_the_systems() -> None:
    """A user's own sockets are tried first, then /run/vswapd.sock; root has only the latter."""
    assert paths({"XDG_RUNTIME_DIR": "/c"}, 5) == [
        "/c/vswapd.sock",
        "/tmp/vswapd-5/vswapd.sock",
        "/run/vswapd.sock",
    ]
    assert paths({}, 5) == ["/tmp/vswapd-5/vswapd.sock", "/run/vswapd.sock"]
    assert paths({}, 0) == ["/run/vswapd.sock"]


def test_the_first_that_answers_is_taken(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Places without a daemon are passed over."""
    monkeypatch.delenv("VSWAP_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(address, "SYSTEM_SOCKET", fake.path)
    with vswap.connect() as space:
        space.ping()


def test_the_variable_is_followed(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """$VSWAP_SOCKET leads to the daemon."""
    monkeypatch.setenv("VSWAP_SOCKET", str(fake.path))
    with vswap.connect() as space:
        space.ping()


def test_no_daemon_names_all_places_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, socket_path: Path
) -> None:
    """The error lists every path with why it failed, and how to start or name a daemon."""
    dead = socket_path.with_name("dead.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    monkeypatch.delenv("VSWAP_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_path.parent))
    monkeypatch.setattr(address, "SYSTEM_SOCKET", dead)
    with pytest.raises(vswap.NoDaemon) as caught:
        vswap.connect()
    text = str(caught.value)
    assert f"{socket_path} (the user's daemon, $XDG_RUNTIME_DIR): there is no such socket" in text
    assert f"{dead} (the system's daemon): nobody listens" in text
    assert "vswapd serve" in text
    assert "VSWAP_SOCKET" in text


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    """A path that no socket can have is NoDaemon with the reason, not a bare OSError."""
    with pytest.raises(vswap.NoDaemon, match="too long"):
        vswap.connect(tmp_path / ("x" * 120))


def _directory(place: Path) -> None:
    place.mkdir()


def _file(place: Path) -> None:
    place.write_text("x")


def _pipe(place: Path) -> None:
    os.mkfifo(place)


def _dangling_link(place: Path) -> None:
    place.symlink_to("elsewhere")


def _link_to_a_file(place: Path) -> None:
    place.with_name("file").write_text("x")
    place.symlink_to("file")


def _link_to_itself(place: Path) -> None:
    place.symlink_to(place.name)


def _dead_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place))


def _link_to_a_dead_socket(place: Path) -> None:
    _dead_socket(place.with_name("dead"))
    place.symlink_to("dead")


def _other_socket(place: Path) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(place))
    _kept.append(sock)


def _nothing(place: Path) -> None:
    del place


_kept: list[socket.socket] = []
WRONG_PLACES: dict[Callable[[Path], None], str] = {
    _nothing: "there is no such socket",
    _directory: "it is a directory, not a socket",
    _file: "it is a file, not a socket",
    _pipe: "it is not a socket",
    _dangling_link: "it is a link to elsewhere, which is not there",
    _link_to_a_file: "it is a file, not a socket",
    _link_to_itself: "Too many levels of symbolic links",
    _dead_socket: "nobody listens (left by a daemon that died)",
    _link_to_a_dead_socket: "nobody listens (left by a daemon that died)",
    _other_socket: "it is a socket of another kind, not vswapd's",
}


def everybody_says(place: Path, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each way to a daemon ends in NoDaemon with this reason."""

    async def task() -> None:
        await vswap.aio.connect(place)

    for connect in (vswap.connect, Control, lambda _: asyncio.run(task())):
        with pytest.raises(vswap.NoDaemon) as caught:
            connect(place)
        assert f"  {place} (as given): {why}\n" in str(caught.value)
    with contextlib.suppress(SystemExit):
        assert main(["--socket", str(place), "status"]) in {69, 77}
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"vswapctl: no vswapd answers: {place} (as given): {why}; ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("make", WRONG_PLACES)
def test_what_is_there_instead_of_a_daemon_is_told(
    socket_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no socket, or nobody's, is called what it is."""
    make(socket_path)
    try:
        everybody_says(socket_path, WRONG_PLACES[make], capsys)
    finally:
        while _kept:
            _kept.pop().close()


def test_what_is_wrong_with_the_way_is_told(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory that is not there, or is a file; a path that is no socket's."""
    missing = socket_path.parent / "missing"
    everybody_says(missing / "sock", f"there is no directory {missing}", capsys)
    socket_path.write_text("x")
    everybody_says(socket_path / "sock", "Not a directory", capsys)
    long = socket_path.with_name("x" * 120)
    everybody_says(long, "AF_UNIX path too long", capsys)
    for name in ("\0abstract", "/tmp/a\0b"):
        everybody_says(Path(name), "no path has a NUL in it", capsys)


def test_a_link_to_a_daemon_leads_there(fake: FakeDaemon) -> None:
    """The other way round: nothing is refused that would answer."""
    link = fake.path.with_name("link")
    link.symlink_to(fake.path.name)
    with vswap.connect(link) as space:
        space.ping()


_AS_NOBODY = """
import os, sys
import vswap
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for place in sys.argv[1:]:
    try:
        vswap.connect(place)
    except vswap.NoDaemon as error:
        print(str(error).splitlines()[1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can be somebody else")
def test_who_may_not_connect_is_told_whose_it_is(fake: FakeDaemon) -> None:
    """A socket of somebody else's, and one in a directory that is closed."""
    fake.path.parent.chmod(0o755)
    fake.path.chmod(0o640)
    closed = fake.path.parent / "closed"
    closed.mkdir(mode=0o700)
    said = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(fake.path), str(closed / "sock")],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    assert said == [
        f"  {fake.path} (as given): no permission (it is user 0's, mode 640)",
        f"  {closed / 'sock'} (as given): no permission to look into {closed}",
    ]


def test_a_directory_of_anybody_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket in /tmp is passed over if its directory could be somebody else's."""
    monkeypatch.delenv("VSWAP_SOCKET", raising=False)
    with tempfile.TemporaryDirectory(prefix="vswap-test-") as name:
        directory = Path(name)
        place = address.Candidate(
            path=directory / "vswapd.sock", origin="the user's daemon", private=True
        )
        monkeypatch.setattr(address, "candidates", lambda *_: [place])
        with FakeDaemon(place.path):
            directory.chmod(0o777)
            with pytest.raises(vswap.NoDaemon, match="not a directory of this user alone"):
                vswap.connect()
            directory.chmod(0o700)
            with vswap.connect() as space:
                space.ping()


def test_a_directory_that_is_a_link_is_not_trusted(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A symbolic link in place of the user's directory is passed over."""
    link = tmp_path / "link"
    link.symlink_to(fake.path.parent)
    place = address.Candidate(path=link / fake.path.name, origin="linked", private=True)
    monkeypatch.setattr(address, "candidates", lambda *_: [place])
    with pytest.raises(vswap.NoDaemon, match="this user alone"):
        vswap.connect()


@pytest.mark.parametrize(
    ("name", "shown"), [("prog", "prog"), (None, "pytest"), ("no\udcfftext", "no?text")]
)
def test_clients_say_who_they_are(name: str | None, shown: str) -> None:
    """HELLO names the program, or what was asked for, and the process."""
    said = address.client_name(name)
    assert said.split()[-1] == str(os.getpid())
    if name:
        assert said.startswith(shown)
