"""The daemon as a process: how it starts, what it refuses to start on, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.wire import STATUS, STOPPING, STORE, Wire, noise

SERVE = [sys.executable, "-W", "error", "-m", "vswapd", "serve", "--set=pool.max=8M"]


def start_fails(path: Path | str, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line that a daemon says that cannot start."""
    done = subprocess.run(
        [*SERVE, f"--socket={path}", *arguments],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0]


def test_a_live_daemons_socket_is_not_taken() -> None:
    """A second daemon on the same socket is refused, and the first does not notice."""
    with running_daemon("pool.max=8M") as daemon, Wire(daemon.socket_path) as wire:
        wire.hello()
        slots = wire.store(noise(1)).slots
        code, line = start_fails(daemon.socket_path)
        assert (code, "another vswapd is serving it" in line) == (69, True)
        assert wire.load(slots).status == 0
        with Wire(daemon.socket_path) as other:
            other.hello()


def test_a_dead_daemons_socket_is_replaced() -> None:
    """What a killed daemon has left behind keeps no new one from starting."""
    with running_daemon("pool.max=8M") as daemon:
        daemon.kill()
        assert daemon.socket_path.exists()
        process = subprocess.Popen(
            [*SERVE, f"--socket={daemon.socket_path}"], env=daemon_environment()
        )
        try:
            while True:
                try:
                    with Wire(daemon.socket_path) as wire:
                        assert wire.hello()["version"] == 1
                    break
                except (ConnectionRefusedError, FileNotFoundError):
                    assert process.poll() is None
        finally:
            process.terminate()
            assert process.wait(60) == 0
        assert not daemon.socket_path.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A file, a folder, somebody's listening socket, a missing folder: refused, and untouched."""
    file = tmp_path / "file"
    file.write_text("mine")
    code, line = start_fails(file)
    assert (code, "is there already, and is no socket" in line) == (69, True)
    assert file.read_text() == "mine"
    assert start_fails(tmp_path)[0] == 69
    assert start_fails(tmp_path / "no" / "such" / "socket")[0] == 69
    assert start_fails("/" + "x" * 120)[0] == 78
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        code, line = start_fails(tmp_path / "other")
        assert (code, "another daemon is listening there" in line) == (69, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--set=pool.maxx=1G", "did you mean pool.max"),
        ("--set=pool.max=1X", "unit"),
        ("--set=pool.max=500%", "pool.max"),
        ("--set=server.max_batch=0", "1 to 4096"),
        ("--set=pool.tiers=gzip", "is no codec"),
        ("--set=server.shards=0", "1 to 64"),
        ("--config=/nonexistent/vswapd.toml", "cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, argument: str, text: str) -> None:
    """What is wrong with the configuration is told in one line, exit code 78; nothing is made."""
    code, line = start_fails(tmp_path / "sock", argument)
    assert code == 78
    assert text in line
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    """A device of the configuration that cannot be used keeps the daemon from starting."""
    (tmp_path / "folder").mkdir()
    for device in (tmp_path / "folder", tmp_path / "missing"):
        code, line = start_fails(tmp_path / "sock", f"--set=device={device}")
        assert code == 71
        assert str(device) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize("shards", [1, 2])
def test_sigterm_finishes_what_is_under_way(shards: int) -> None:
    """A request that has begun is answered; who is idle is told that the daemon stops; exit 0."""
    with (
        running_daemon("pool.max=64M", f"server.shards={shards}", "pool.tiers=zstd:19") as daemon,
        Wire(daemon.socket_path) as busy,
        Wire(daemon.socket_path) as idle,
    ):
        busy.hello()
        idle.hello()
        frame = busy.frame(STORE, noise(2048), count=2048)
        busy.socket.sendall(frame)
        # It is under way: the status of others is answered while a worker compresses it.
        while idle.ask(STATUS).json["clients"] != 2:
            pass
        daemon.process.send_signal(signal.SIGTERM)
        assert idle.reply().status == STOPPING
        idle.assert_closed()
        reply = busy.reply()
        assert reply.status in {0, STOPPING}
        if reply.status == 0:
            assert reply.count == 2048
            assert busy.reply().status == STOPPING
        daemon.await_exit(expected=0)
        assert not daemon.socket_path.exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_sighup_while_stopping(shards: int) -> None:
    """SIGHUP that comes too late for a reload does not end the daemon any sooner."""
    with (
        running_daemon("pool.max=64M", f"server.shards={shards}", "pool.tiers=zstd:19") as daemon,
        Wire(daemon.socket_path) as busy,
        Wire(daemon.socket_path) as idle,
    ):
        busy.hello()
        idle.hello()
        busy.socket.sendall(busy.frame(STORE, noise(2048), count=2048))
        # It is under way, and takes a while: that is how long the daemon is stopping.
        while idle.ask(STATUS).json["clients"] != 2:
            pass
        daemon.process.send_signal(signal.SIGTERM)
        daemon.await_notification("STOPPING=1")
        daemon.process.send_signal(signal.SIGHUP)
        assert busy.reply().status in {0, STOPPING}
        daemon.await_exit(expected=0)
        assert not daemon.socket_path.exists()
        assert "RELOADING=1" not in daemon.notified


def test_sockets_that_are_passed_are_served(tmp_path: Path) -> None:
    """LISTEN_FDS: the daemon serves the socket that it was given, and leaves it where it is."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        script = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
            f"os.dup2({fd}, 3); os.set_inheritable(3, True); "
            "os.execv(sys.executable, sys.argv[1:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, *SERVE],
            env=daemon_environment({"LISTEN_FDS": "1"}),
            pass_fds=[fd],
            stderr=subprocess.PIPE,
        )
        try:
            with Wire(path) as wire:
                wire.hello()
                assert wire.store(noise(1)).status == 0
        finally:
            process.terminate()
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert path.exists()
        # It still listens: whoever comes next waits for the next daemon.
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(path))


def test_what_is_passed_must_be_a_listening_socket() -> None:
    """LISTEN_FDS with something else is one line and no daemon."""
    reader, writer = os.pipe()
    script = (
        "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
        f"os.dup2({reader}, 3); os.set_inheritable(3, True); os.execv(sys.executable, sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *SERVE],
        env=daemon_environment({"LISTEN_FDS": "1"}),
        pass_fds=[reader],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(reader)
    os.close(writer)
    assert done.returncode == 71
    assert "LISTEN_FDS: descriptor 3 is no listening Unix stream socket" in done.stderr


def test_a_reload_says_what_it_cannot_do() -> None:
    """SIGHUP: what can change does, what cannot is named, and a broken file changes nothing."""
    with running_daemon(config='[pool]\nmax = "8M"\n') as daemon:
        file = daemon.directory / "vswapd.toml"
        file.write_text('[pool]\nmax = "6M"\n[server]\nmax_batch = 7\n')
        daemon.reload()
        with Wire(daemon.socket_path) as wire:
            assert wire.hello()["max_batch"] == 4096
            assert wire.ask(STATUS).json["pool"]["max_bytes"] == 6 << 20
            assert "reload: changed pool.max" in daemon.log
            assert "needs a restart to take effect: server.max_batch" in daemon.log
            file.write_text('[pool]\nmaxx = "1M"\n')
            daemon.reload()
            assert wire.ask(STATUS).json["pool"]["max_bytes"] == 6 << 20
            assert "reload: nothing was changed" in daemon.log
