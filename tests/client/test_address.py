"""Where the daemon is looked for, and what is said when it is not there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

import vswap
from support.fake_daemon import FakeDaemon
from vswap import address
from vswap.address import candidates


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
