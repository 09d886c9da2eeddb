"""A shard that is stopped keeps nobody waiting: the others are shown, what all do is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import vswap
from support.daemon import RunningDaemon, running_daemon
from support.wire import REASONS, Wire
from vswap.control import Control
from vswapd.ctl import main

DISABLED = REASONS["disabled"]


def noise(count: int) -> bytes:
    return np.random.default_rng(count).bytes(count * 4096)


def shards_of(daemon: RunningDaemon) -> list[int]:
    found = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    return sorted(int(pid) for pid in found)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("which", [0, 1])
def test_nobody_waits_for_a_shard_that_is_stopped(
    which: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each verb ends with a line that names it, metrics with 503; when it goes on all is well."""
    port = free_port()
    with running_daemon("server.shards=2", f"metrics.listen=127.0.0.1:{port}") as daemon:

        def ctl(*words: str, expected: int) -> str:
            assert main(["--socket", str(daemon.socket_path), *words]) == expected
            out, err = capsys.readouterr()
            told = [line for line in err.splitlines() if "has not finished" not in line]
            told = [line for line in told if "is not answering" not in line]
            return out if not expected else "\n".join(told)

        with vswap.connect(daemon.socket_path, timeout=60) as space:
            content = noise(600)
            slots = space.store(content)
            pid = shards_of(daemon)[which]
            with stopped(pid):
                shown = ctl("status", expected=0)
                assert f"no sign of life from shard {which} of 2" in shown
                document = json.loads(ctl("status", "--json", expected=0))
                assert (document["shards"], document["silent_shards"]) == (2, [which])
                assert 0 < document["slots"]["allocated"] < 600
                assert f"no sign of life from shard {which}" in ctl("spaces", expected=0)
                for words in (
                    ["set", "store.enabled=false"],
                    ["reload"],
                    ["verify"],
                    ["compact"],
                    ["writeback", "1M"],
                    ["swapon", str(tmp_path / "swap"), "--size", "8M"],
                    ["drop", "nothing"],
                ):
                    said = ctl(*words, expected=1)
                    assert said == (
                        f"vswapctl: shard {which} (pid {pid}) gives no sign of life: nothing was"
                        " done"
                    )
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
                with caught.value as page:
                    assert page.code == 503
                    assert (
                        page.read() == f"no numbers: no sign of life from shard {which}\n".encode()
                    )
                silent = f"ERROR shard {which} (pid {pid}) gives no sign of life: what it holds"
                assert daemon.log.count(silent) == 1
                # Somebody new is served by the other one.
                with vswap.connect(daemon.socket_path, timeout=60) as other:
                    assert other.peer.shard != which
            assert space.load(slots) == content
            while json.loads(ctl("status", "--json", expected=0))["silent_shards"]:
                pass
            assert ctl("verify", expected=0).startswith("all good: 600 slots")
            assert ctl("set", "store.enabled=true", expected=0)
            assert not (tmp_path / "swap").exists()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                assert b"vswap_store_pages_total 600.0" in page.read()
            assert f"INFO shard {which} gives signs of life again" in daemon.log


def test_a_reload_that_a_stopped_shard_keeps_from_ending_is_taken_back() -> None:
    """Those that have adopted it give it up; the stopped one adopts nothing when it goes on."""
    with running_daemon("server.shards=2") as daemon, Wire(daemon.socket_path) as first:
        first.hello(shard=0)
        assert first.store(noise(1)).status == 0
        (daemon.directory / "vswapd.toml").write_text("[store]\nenabled = false\n")
        with stopped(shards_of(daemon)[1]):
            daemon.process.send_signal(signal.SIGHUP)
            daemon.await_notification("RELOADING=1")
            while first.store(noise(1)).flags != DISABLED:
                pass
            daemon.await_notification("READY=1")
            assert "reload: nothing was changed: shard 1" in daemon.log
            assert first.store(noise(1)).status == 0
        with Wire(daemon.socket_path) as second:
            second.hello(shard=1)
            assert second.store(noise(1)).status == 0
        with Control(daemon.socket_path) as control:
            while control.status()["silent_shards"]:
                pass
            assert control.status()["settings"]["store.enabled"] == "true"
        daemon.reload()
        assert first.store(noise(1)).flags == DISABLED
