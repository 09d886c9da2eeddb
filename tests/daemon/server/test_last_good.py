"""A configuration that cannot be used keeps no pages away; what holds instead is said."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
from support.daemon import daemon_environment, running_daemon
from support.service_manager import ServiceManager
from vswap.control import Control

EACH = pytest.mark.parametrize("shards", [1, 3])
GOOD = """
[pool]
max = "32M"
[shrinker]
idle_age = "3h"
[groups.root]
pool_max = "30M"
"""
BAD: Mapping[str, tuple[str, str]] = {
    "a misspelt key": ('[pool]\ntires = ["lz4"]\n', "did you mean pool.tiers"),
    "a misspelt table": ("[shrinkler]\n", "did you mean shrinker"),
    "no TOML": ("[pool\n", "is not valid TOML"),
    "not UTF-8": ("#\xff\n", "is not UTF-8"),
    "more than there is": ('[pool]\nmax = "1000T"\n', "more than the"),
    "a user who is not there": (
        "[groups.nobody-at-all]\nwriteback = false\n",
        "no user of that name",
    ),
    "a group that is not there": ('[server]\nsocket_group = "no-such-group"\n', "no group"),
    "a device by a name": ('[[device]]\npath = "swap"\n', "is no absolute path"),
    "a device without a path": ('[[device]]\nsize = "1G"\n', "a device needs a path"),
    "a device that is too small": ('[[device]]\npath = "/x"\nsize = "1K"\n', "is too small"),
    "what contradicts itself": ('[shrinker]\nlow_watermark = "99%"\n', "must be below"),
    "two lines": ('[groups."a\\nREADY=1"]\npool_max = "1G"\n', "READY=1: this host has no user"),
}


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


@contextlib.contextmanager
def configured(*settings: str, text: str = GOOD) -> Iterator[tuple[ServiceManager, Path]]:
    """A service manager that has started its daemon with a file."""
    with ServiceManager(*settings) as manager:
        file = manager.directory / "vswapd.toml"
        file.write_text(text)
        manager.arguments = [f"--config={file}"]
        manager.start()
        yield manager, file


def status(manager: ServiceManager) -> dict[str, Any]:
    with Control(manager.socket_path) as control:
        return control.status()


def reload(manager: ServiceManager) -> dict[str, Any]:
    with Control(manager.socket_path) as control:
        return control.call("reload")


def connected(manager: ServiceManager) -> vswap.Space:
    return vswap.connect(manager.socket_path, timeout=30)


def errors(manager: ServiceManager) -> list[str]:
    return [line for line in manager.log.splitlines() if " ERROR " in line]


@pytest.mark.parametrize(("shards", "kinds"), [(1, list(BAD)), (3, ["no TOML", "a misspelt key"])])
def test_a_file_that_cannot_be_used_keeps_no_pages_away(shards: int, kinds: list[str]) -> None:
    """The last good one holds, for as many starts as it takes; journal and status say why."""
    with configured(f"server.shards={shards}") as (manager, file), connected(manager) as space:
        content = noise(300)
        slots = space.store(content)
        before = status(manager)
        assert before["config_error"] is None
        for count, kind in enumerate(kinds, 1):
            bad, why = BAD[kind]
            file.write_bytes(bad.encode("latin-1"))
            manager.kill() if count % 2 else manager.stop()
            manager.start()
            assert space.load(slots) == content
            now = status(manager)
            assert now["settings"] == before["settings"]
            assert why in now["config_error"], kind
            assert why in manager.status
            assert "\n" not in manager.status
            assert len(errors(manager)) == count, manager.log
            assert why in errors(manager)[-1]
        manager.kill()
        file.write_text(GOOD.replace("3h", "4h"))
        manager.start()
        assert status(manager)["config_error"] is None
        assert "CONFIGURATION ERROR" not in manager.status
        assert status(manager)["settings"]["shrinker.idle_age"] == "4h"
        assert space.load(slots) == content


@EACH
def test_it_is_corrected_by_a_reload(shards: int) -> None:
    """Also what is set, and put into use, at run time goes on to hold meanwhile."""
    with configured(f"server.shards={shards}") as (manager, file), connected(manager) as space:
        slots = space.store(noise(300))
        with Control(manager.socket_path) as control:
            control.call("set", key="shrinker.rate", value="7M")
        file.unlink()
        for _ in range(2):
            manager.restart()
            assert "No such file" in status(manager)["config_error"]
            assert status(manager)["settings"]["shrinker.rate"] == "7M"
        with pytest.raises(vswap.BadArgument, match="No such file"):
            reload(manager)
        file.write_text(GOOD)
        assert reload(manager) == {"changed": ["shrinker.rate"], "ignored": [], "after_stop": []}
        assert status(manager)["config_error"] is None
        manager.await_status("saved")
        assert space.load(slots) == noise(300)


def test_where_nothing_is_kept_it_fails_at_once() -> None:
    """With the code for it and one line: the service manager shows it, and nobody's pages wait."""
    for shards, keeps in ((1, True), (3, True), (1, False)):
        with ServiceManager(f"server.shards={shards}", keeps=keeps) as manager:
            for bad, why in (BAD["a misspelt key"], BAD["a user who is not there"]):
                (manager.directory / "vswapd.toml").write_text(bad)
                manager.arguments = [f"--config={manager.directory}/vswapd.toml"]
                before = manager.log_path.exists() and len(manager.log.splitlines())
                manager.launch()
                assert manager.await_exit() == 78
                assert len(manager.log.splitlines()) == before + 1
                assert why in manager.log.splitlines()[-1]


def test_where_nothing_is_kept_clients_that_wait_are_told() -> None:
    """The service manager has their connections, and would begin the daemon for them for ever."""
    with socket.socket() as taken, ServiceManager() as manager:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for setting in ("pool.maks=1G", f"metrics.listen=127.0.0.1:{taken.getsockname()[1]}"):
            manager.settings = [setting]
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(vswap.connect, manager.socket_path)
                codes = []
                while not waiting.done():
                    if manager.somebody_waits():
                        manager.launch()
                        codes.append(manager.await_exit())
                        manager.give_up()
                with pytest.raises(vswap.ConnectionLost):
                    waiting.result()
                assert set(codes) == {78}


@EACH
def test_a_bad_setting_on_the_command_line_is_no_other_case(shards: int) -> None:
    """As a drop-in for the unit may bring it."""
    with configured(f"server.shards={shards}") as (manager, _), connected(manager) as space:
        slots = space.store(noise(300))
        manager.settings.append("pool.maks=1G")
        manager.restart()
        assert "--set pool.maks=1G" in status(manager)["config_error"]
        assert space.load(slots) == noise(300)


@EACH
def test_what_has_become_impossible_of_the_last_good_one_is_left_out(shards: int) -> None:
    """The port of the metrics is somebody else's now: all else holds, and it is said."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    listen = f'[metrics]\nlisten = "127.0.0.1:{port}"\n'
    with (
        configured(f"server.shards={shards}", text=GOOD + listen) as (manager, file),
        connected(manager) as space,
    ):
        slots = space.store(noise(300))
        manager.kill()
        with socket.socket() as somebody:
            somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            somebody.bind(("127.0.0.1", port))
            somebody.listen()
            for text in (GOOD + listen, "[pool"):
                file.write_text(text)
                manager.start()
                assert space.load(slots) == noise(300)
                settings = status(manager)["settings"]
                assert settings["metrics.listen"] == ""
                assert settings["shrinker.idle_age"] == "3h"
                assert "Address already in use" in status(manager)["config_error"]
                manager.kill()
        file.write_text(GOOD + listen)
        manager.start()
        assert status(manager)["settings"]["metrics.listen"] == f"127.0.0.1:{port}"


@EACH
def test_a_device_that_cannot_be_had_is_said_to_be_lacking(shards: int) -> None:
    """Until somebody puts it into use, or takes it out of the configuration."""
    with configured(f"server.shards={shards}") as (manager, file), connected(manager) as space:
        slots = space.store(noise(300))
        path = manager.directory / "folder" / "swap"
        file.write_text(f'{GOOD}[[device]]\npath = "{path}"\nsize = "8M"\n')
        for _ in range(2):
            manager.restart()
            assert space.load(slots) == noise(300)
            assert f"{path}" in status(manager)["config_error"]
            assert "goes on without it" in manager.status
        assert reload(manager)["ignored"] == []
        assert status(manager)["config_error"] is not None
        path.parent.mkdir()
        with Control(manager.socket_path) as control:
            control.call("swapon", path=str(path), size="8M")
            assert status(manager)["config_error"] is None
            control.call("swapoff", path=str(path))
            assert status(manager)["config_error"] is None
        path.unlink()
        path.mkdir()
        manager.restart()
        assert "is a directory" in status(manager)["config_error"]
        file.write_text(GOOD)
        reload(manager)
        assert status(manager)["config_error"] is None


@EACH
def test_a_socket_that_cannot_be_had_is_no_other_case(shards: int) -> None:
    """A daemon that makes its own goes on to listen where it did."""
    with ServiceManager(f"server.shards={shards}") as manager:
        manager.listens = False
        path = manager.directory / "own.sock"
        manager.settings.append(f"server.socket={path}")
        manager.start()
        with vswap.connect(path, timeout=30) as space:
            slots = space.store(noise(300))
            (manager.directory / "file").touch()
            manager.settings[-1] = f"server.socket={manager.directory}/file/own.sock"
            for _ in range(2):
                manager.restart()
                assert space.load(slots) == noise(300)
                with Control(path) as control:
                    assert "file" in control.status()["config_error"]


@EACH
def test_memory_of_a_version_that_notes_nothing(shards: int) -> None:
    """With a file that cannot be used it is kept until that is corrected."""
    with configured(f"server.shards={shards}") as (manager, file), connected(manager) as space:
        slots = space.store(noise(300))
        manager.kill()
        os.close(manager.kept.pop("kept-notes"))
        file.write_text("[pool")
        for _ in range(2):
            manager.launch()
            assert manager.await_exit() == 71
        assert "is kept until this is corrected" in manager.log
        file.write_text(GOOD)
        manager.start()
        assert space.load(slots) == noise(300)
        assert reload(manager) == {"changed": [], "ignored": [], "after_stop": []}
        file.write_text("[pool")
        manager.restart()
        assert space.load(slots) == noise(300)


@EACH
def test_a_reload_of_a_file_that_cannot_be_used_changes_nothing(shards: int) -> None:
    """By a signal or by the verb; status and service manager say so until there is a good one."""
    with configured(f"server.shards={shards}") as (manager, file):
        before = status(manager)["settings"]
        file.write_text(BAD["a group that is not there"][0])
        with pytest.raises(vswap.BadArgument, match="no group"):
            reload(manager)
        manager.await_status("no-such-group")
        file.write_text(BAD["a misspelt key"][0])
        os.kill(manager.pid, signal.SIGHUP)
        manager.await_status("did you mean pool.tiers")
        assert "did you mean pool.tiers" in status(manager)["config_error"]
        assert status(manager)["settings"] == before
        file.write_text(GOOD)
        assert reload(manager)["changed"] == []
        assert status(manager)["config_error"] is None


def test_a_daemon_without_a_service_manager_says_so_too() -> None:
    """SIGHUP with a bad file: it runs on, and the status says what is wrong."""
    with running_daemon(config=GOOD) as daemon:
        (daemon.directory / "vswapd.toml").write_text(BAD["a misspelt key"][0])
        daemon.reload()
        with Control(daemon.socket_path) as control:
            document = control.status()
        assert "did you mean pool.tiers" in document["config_error"]
        assert document["settings"]["shrinker.idle_age"] == "3h"
        assert "nothing was changed" in daemon.log


MEANT = {
    "defaults": (),
    "automatic": ("server.shards=auto", "pool.max=30%"),
    "in numbers": ("server.shards=3", "table.max_slots=100000", "pool.max=64M"),
    "one": ("server.shards=1", "table.max_slots=1000", "server.window=1M"),
}


@pytest.mark.parametrize("kind", MEANT)
def test_a_reload_after_a_restart_finds_nothing_changed(kind: str) -> None:
    """What was meant is compared with what is meant, not with what it came to."""
    nothing: dict[str, Any] = {"changed": [], "ignored": [], "after_stop": []}
    with ServiceManager(*MEANT[kind]) as manager:
        manager.start()
        first = status(manager)
        assert reload(manager) == nothing
        for _ in range(2):
            manager.restart()
            assert reload(manager) == nothing
            again = status(manager)
            assert again["settings"] == first["settings"]
            assert (again["shards"], again["table"]) == (first["shards"], first["table"])
        assert "WARNING" not in manager.log


@EACH
def test_what_only_a_stop_changes_is_told_apart(shards: int) -> None:
    """The number of shards is the memory's, which a restart keeps; other keys want a restart."""
    with ServiceManager(f"server.shards={shards}", "server.max_batch=100") as manager:
        manager.start()
        after = []
        for _ in range(2):
            manager.settings = ["server.shards=2", "table.max_slots=5000", "server.max_batch=100"]
            manager.restart()
            after.append(reload(manager))
            assert status(manager)["shards"] == shards
            assert "stop the service for good" in manager.log
        expected = {
            "changed": [],
            "ignored": [],
            "after_stop": ["server.shards", "table.max_slots"],
        }
        assert after == [expected, expected]
        manager.settings = [f"server.shards={shards}", "server.max_batch=100"]
        manager.restart()
        assert reload(manager)["after_stop"] == []


def test_a_changed_file_is_told_apart() -> None:
    """A reload says what needs a restart, and what a stop; without a keeper a restart will do."""
    changed = "[server]\nshards = 2\nmax_batch = 100\n"
    with configured(text="") as (manager, file):
        file.write_text(changed)
        for _ in range(2):
            assert reload(manager) == {
                "changed": [],
                "ignored": ["server.max_batch"],
                "after_stop": ["server.shards"],
            }
        with (
            Control(manager.socket_path) as control,
            pytest.raises(vswap.BadArgument, match="stop"),
        ):
            control.call("set", key="server.shards", value="3")
        manager.restart()
        assert reload(manager)["after_stop"] == ["server.shards"]
        assert reload(manager)["ignored"] == []
    with running_daemon(config="") as daemon:
        (daemon.directory / "vswapd.toml").write_text(changed)
        with Control(daemon.socket_path) as control:
            assert control.call("reload")["ignored"] == ["server.max_batch", "server.shards"]


def check_config(file: Path, *settings: str) -> tuple[int, str]:
    """What the command says of a file: its code, and its lines on standard error."""
    command = [sys.executable, "-m", "vswapd", "check-config", f"--config={file}"]
    command += [f"--set={setting}" for setting in settings]
    done = subprocess.run(
        command, env=daemon_environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_what_a_reload_refuses_a_check_of_the_file_refuses(tmp_path: Path) -> None:
    """Whatever it is, with the same line; what a running daemon has is nobody else's port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    good = f'{GOOD}[metrics]\nlisten = "127.0.0.1:{port}"\n'
    bad = {kind: text for kind, (text, _) in BAD.items()}
    bad["an address of another host"] = '[metrics]\nlisten = "192.0.2.1:9177"\n'
    with configured(text=good) as (manager, file):
        assert check_config(file) == (0, "")
        for kind, text in bad.items():
            file.write_bytes(text.encode("latin-1"))
            with pytest.raises(vswap.BadArgument) as refused:
                reload(manager)
            why = str(refused.value).removeprefix("nothing was changed: ")
            code, said = check_config(file)
            assert code == 78, kind
            # The one names the file by its path, as the other does.
            assert said.splitlines() == [f"vswapd: {why}"] or kind == "two lines", kind
    assert check_config(tmp_path / "gone")[0] == 78
    assert check_config(Path("/dev/null"), "pool.maks=1G")[0] == 78
