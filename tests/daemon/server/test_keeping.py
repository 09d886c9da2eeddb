"""A daemon that is killed, or started anew, goes on where it was, if its memory is kept."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vswap
import vswap.aio
from support.daemon import running_daemon
from support.mortal import mortal
from support.service_manager import ServiceManager, service
from support.wire import HELLO, SPACE_LOST, Wire
from vswap.control import Control
from vswapd.upgrades import LIFE_VERSION
from vswapd_backends.label import find_label
from vswapd_backends.shared import SYSTEM_PAGE

EACH = pytest.mark.parametrize("shards", [1, 3])


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * 4096)


@pytest.fixture(params=[1, 3], ids=["one", "three"])
def manager(request: pytest.FixtureRequest) -> Iterator[ServiceManager]:
    with service(f"server.shards={request.param}", "pool.max=32M") as running:
        yield running


def connected(manager: ServiceManager) -> vswap.Space:
    return vswap.connect(manager.socket_path, timeout=30)


def status(manager: ServiceManager) -> dict[str, Any]:
    with Control(manager.socket_path) as control:
        return control.status()


def test_pages_outlive_a_kill(manager: ServiceManager) -> None:
    """Pages, zeros, frees; the same client goes on, and everything adds up."""
    with connected(manager) as space:
        content = noise(900) + bytes(100 * 4096)
        slots = space.store(content)
        manager.kill()
        manager.start()
        assert space.load(slots) == content
        space.store(content[::-1], slots=slots)
        space.free(slots[500:])
        manager.kill()
        manager.start()
        assert space.load(slots[:500]) == content[::-1][: 500 * 4096]
        with Control(manager.socket_path) as control:
            assert control.call("verify")["ok"]
            assert control.status()["slots"]["allocated"] == 500


def test_clients_that_have_come_back_are_counted_as_before(manager: ServiceManager) -> None:
    """One connection of each is a client, whether it is the first one that there was or not."""
    with connected(manager) as space:
        slots = space.store(noise(600))
        before = status(manager)["clients"]
        manager.kill()
        manager.start()
        space.load(slots)
        assert status(manager)["clients"] == before


def test_pages_outlive_a_restart(manager: ServiceManager) -> None:
    """A stop that is followed by a start: an upgrade, say."""
    with connected(manager) as space:
        content = noise(600)
        slots = space.store(content)
        manager.restart()
        assert space.load(slots) == content


def test_a_call_under_way_goes_on(manager: ServiceManager) -> None:
    """Calls that meet no daemon wait for it, and return as if nothing had happened."""
    with connected(manager) as space:
        content = noise(2000)
        slots: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []

        def work() -> None:
            for _ in range(20):
                slots.append(space.store(content[: 200 * 4096]))
                assert space.load(slots[-1]) == content[: 200 * 4096]

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(3):
            manager.kill()
            manager.start()
        thread.join()
        assert len(slots) == 20
        assert len(np.unique(np.concatenate(slots))) == 20 * 200
        assert space.load(np.concatenate(slots)) == 20 * content[: 200 * 4096]


def test_the_next_process_waits_for_the_last(manager: ServiceManager) -> None:
    """The daemon alone is killed: its shards end by themselves, and no two work on one memory."""
    with connected(manager) as space:
        content = noise(500)
        slots = space.store(content)
        for _ in range(3):
            os.kill(manager.pid, signal.SIGKILL)
            manager.start()
            assert space.load(slots) == content
            with Control(manager.socket_path) as control:
                assert control.call("verify")["ok"]


def test_devices_and_settings_outlive_a_kill(manager: ServiceManager, tmp_path: Path) -> None:
    """What was put into use at run time is, again; what was set at run time holds."""
    path = str(tmp_path / "swap")
    with connected(manager) as space:
        with Control(manager.socket_path) as control:
            control.call("swapon", path=path, size=32 << 20, priority=7)
            control.call("set", key="shrinker.idle_age", value="3h")
            control.call("set", key="pool.max", value="24M")
        content = noise(1500)
        slots = space.store(content)
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=32 << 20)
        manager.kill()
        manager.start()
        with Control(manager.socket_path) as control:
            document = control.status()
            (device,) = document["devices"]
            assert (device["state"], device["priority"]) == ("on", 7)
            assert document["slots"]["phys"] > 1000
            assert document["settings"]["shrinker.idle_age"] == "3h"
            assert document["pool"]["max_bytes"] == 24 << 20
            control.call("set", key="shrinker.idle_age", value="4h")
        assert space.load(slots) == content
        manager.restart()
        with Control(manager.socket_path) as control:
            assert control.status()["settings"]["shrinker.idle_age"] == "4h"
            control.call("swapoff", path=path)
        assert space.load(slots) == content
        manager.kill()
        manager.start()
        assert not status(manager)["devices"]
        assert not [name for name in manager.kept if "extents" in name]
        with Control(manager.socket_path) as control:
            control.call("swapon", path=path, size=32 << 20)
        assert space.load(slots) == content


@pytest.mark.parametrize("how", ["supervisor", "restart"])
@EACH
def test_a_swapoff_that_is_cut_off_takes_no_page_for_unreadable(
    shards: int, how: str, tmp_path: Path
) -> None:
    """Shards that end let go of a device when nobody reads it any more, and give nothing up."""

    def give_up() -> None:
        with Control(manager.socket_path) as control, contextlib.suppress(vswap.VswapError):
            control.call("swapoff", path=path, give_up=True)

    path = str(tmp_path / "swap")
    with (
        service(f"server.shards={shards}", "pool.max=64M") as manager,
        connected(manager) as space,
    ):
        content = noise(6000)
        slots = space.store(content)
        for _ in range(2):
            with Control(manager.socket_path) as control:
                if not control.status()["devices"]:
                    control.call("swapon", path=path, size=48 << 20)
                while control.status()["slots"]["phys"] < 5000:
                    control.call("writeback", bytes=8 << 20)
                swapoff = threading.Thread(target=give_up)
                swapoff.start()
                while control.status()["slots"]["phys"] > 4500:
                    pass  # each answer is waited for
            if how == "supervisor":
                os.kill(manager.pid, signal.SIGKILL)
                manager.start()
            else:
                manager.restart()
            swapoff.join()
            assert space.load(slots) == content
        for words in ("Bad file descriptor", "mistake", "Traceback"):
            assert words not in manager.log


def test_a_reload_ends_what_was_set_at_run_time(manager: ServiceManager) -> None:
    """The file holds then, also after the next kill."""
    with Control(manager.socket_path) as control:
        control.call("set", key="shrinker.idle_age", value="3h")
        before = control.call("reload")
        assert before["changed"] == ["shrinker.idle_age"]
    manager.kill()
    manager.start()
    with Control(manager.socket_path) as control:
        assert control.status()["settings"]["shrinker.idle_age"] != "3h"


def test_configured_devices_are_put_into_use_once(tmp_path: Path) -> None:
    """Also by a process that finds them in use; one put out of use comes again with a start."""
    path = str(tmp_path / "swap")
    with service("pool.max=8M", "server.shards=2", f"device={path},size=32M") as manager:
        with connected(manager) as space:
            slots = space.store(noise(4000))
            manager.kill()
            manager.start()
            assert [d["path"] for d in status(manager)["devices"]] == [path]
            assert space.load(slots) == noise(4000)
            space.free(slots)
        with Control(manager.socket_path) as control:
            control.call("swapoff", path=path)
        manager.restart()
        assert [d["path"] for d in status(manager)["devices"]] == [path]


@EACH
def test_a_configured_device_that_cannot_be_had_keeps_no_pages_away(
    shards: int, tmp_path: Path
) -> None:
    """It had turned bad, and was put out of use: the daemon comes back without it, and says so."""
    path = tmp_path / "swap"
    with service(f"server.shards={shards}", f"device={path},size=32M", "pool.max=32M") as manager:
        with connected(manager) as space:
            slots = space.store(noise(300))
            with Control(manager.socket_path) as control:
                control.call("swapoff", path=str(path))
            manager.kill()
            path.unlink()
            path.mkdir()
            manager.start()
            assert space.load(slots) == noise(300)
        assert f"{path}: is a directory" in manager.log
        assert not status(manager)["devices"]


def test_a_device_that_is_gone_loses_its_pages_alone(
    manager: ServiceManager, tmp_path: Path
) -> None:
    """The rest is there; the lost ones say so, and the device can be put out of use."""
    path = tmp_path / "swap"
    with connected(manager) as space:
        with Control(manager.socket_path) as control:
            control.call("swapon", path=str(path), size=32 << 20)
        slots = space.store(noise(800))
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=1 << 20)
            there = control.status()["slots"]
        assert there["phys"]
        assert there["zswap"]
        manager.kill()
        path.unlink()
        manager.start()
        lost = 0
        for index, slot in enumerate(slots):
            try:
                assert space.load([slot]) == noise(800)[index * 4096 : (index + 1) * 4096]
            except vswap.PageLost as error:
                lost += list(error.slots) == [slot]
        assert lost == there["phys"]
        with Control(manager.socket_path) as control:
            assert len(control.call("verify")["problems"]) >= 1
        space.free(slots)
        with Control(manager.socket_path) as control:
            control.call("swapoff", path=str(path))
            assert not control.status()["devices"]
    manager.stop()
    assert not [name for name in manager.kept if "extents" in name]


def test_a_device_that_is_there_again_has_its_pages_again(
    manager: ServiceManager, tmp_path: Path
) -> None:
    """It was not to be had at one start: not mounted yet, say. What is done meanwhile holds."""
    path, elsewhere = tmp_path / "swap", tmp_path / "elsewhere"
    with connected(manager) as space:
        with Control(manager.socket_path) as control:
            control.call("swapon", path=str(path), size=64 << 20)
        content = noise(4000)
        slots = space.store(content)
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=12 << 20)
            assert control.status()["slots"]["phys"] > 2000
        manager.restart()
        manager.kill()
        path.rename(elsewhere)
        manager.start()
        with pytest.raises(vswap.PageLost):
            space.load(slots)
        space.free(slots[:1000])
        space.store(content[: 1000 * 4096], slots=slots[1000:2000])
        manager.kill()
        elsewhere.rename(path)
        manager.start()
        assert space.load(slots[1000:2000]) == content[: 1000 * 4096]
        assert space.load(slots[2000:]) == content[2000 * 4096 :]
        with Control(manager.socket_path) as control:
            assert control.call("verify")["ok"]
            control.call("writeback", bytes=4 << 20)
            assert control.call("swapoff", path=str(path))["lost_pages"] == 0
        assert space.load(slots[2000:]) == content[2000 * 4096 :]
        manager.restart()
        assert not status(manager)["devices"]
    assert not [name for name in manager.kept if "extents" in name]


def test_spaces_that_nobody_comes_back_for_are_freed() -> None:
    """After resume_timeout; a client that died with the daemon leaves nothing behind."""
    with service("server.shards=2", "server.resume_timeout=200ms") as manager:
        with mortal(manager.socket_path, noise(5), shard=1) as token:
            manager.kill()
        manager.start()
        with connected(manager) as other:
            while other.status()["slots"]["allocated"]:
                other.ping()
        with Wire(manager.socket_path) as late:
            said = f'{{"token": "{token}", "shard": 1, "resume": true}}'.encode()
            assert late.ask(HELLO, said).status == SPACE_LOST


@contextlib.contextmanager
def of_version_99(manager: ServiceManager, name: str) -> Iterator[None]:
    """Have something that is kept be of another layout version for a while."""
    fd = manager.kept[name]
    at = os.fstat(fd).st_size - SYSTEM_PAGE
    label = os.pread(fd, SYSTEM_PAGE, at)
    os.pwrite(fd, label[:8] + (99).to_bytes(4, "little") + label[12:], at)
    yield
    os.pwrite(fd, label, at)


def test_memory_of_another_version_is_left_alone(manager: ServiceManager, tmp_path: Path) -> None:
    """It is refused with what to do; the version that made it finds it as it was."""
    with connected(manager) as space:
        with Control(manager.socket_path) as control:
            control.call("swapon", path=str(tmp_path / "swap"), size=32 << 20)
        content = noise(50)
        slots = space.store(content)
        with Control(manager.socket_path) as control:
            control.call("writeback", bytes=1 << 20)
        manager.kill()
        for name in list(manager.kept):
            with of_version_99(manager, name):
                manager.launch()
                assert "this is memory of layout version 99" in manager.await_refusal()
        assert manager.log.count("this is memory of layout version 99") == len(manager.kept)
        assert "Traceback" not in manager.log
        manager.start()
        assert space.load(slots) == content


def test_memory_that_is_not_whole_is_left_alone(manager: ServiceManager) -> None:
    """A descriptor did not come back: no daemon serves what is not there."""
    with connected(manager) as space:
        content = noise(50)
        slots = space.store(content)
        manager.kill()
        pool = manager.kept.pop("kept-0-pool")
        manager.launch()
        assert "0-pool did not come back" in manager.await_refusal()
        manager.kept["kept-0-pool"] = pool
        manager.start()
        assert space.load(slots) == content


def test_what_was_not_kept_as_a_whole_is_dropped(manager: ServiceManager) -> None:
    """Killed before it served anybody: nothing is in it, and nothing is left of it."""
    manager.kill()
    os.close(manager.kept.pop("kept-life"))
    old = {name: os.fstat(fd).st_ino for name, fd in manager.kept.items()}
    manager.start()
    assert find_label("life", LIFE_VERSION, manager.kept["kept-life"])
    assert all(os.fstat(manager.kept[name]).st_ino != inode for name, inode in old.items())


@pytest.mark.parametrize(("shards", "most"), [(1, 3), (2, 7)])
def test_a_store_that_is_too_small_is_refused(shards: int, most: int) -> None:
    """What does not fit the service manager would drop, and all would be lost with a kill."""
    with ServiceManager(f"server.shards={shards}") as manager:
        manager.most = most
        manager.launch()
        assert manager.await_exit() == 71
        assert f"room for {most} only: raise FileDescriptorStoreMax" in manager.log
        manager.most = most + 1
        manager.start()
        with connected(manager) as space:
            slots = space.store(noise(50))
            manager.kill()
            manager.start()
            assert space.load(slots) == noise(50)


def test_a_device_that_cannot_be_kept_is_not_put_into_use(tmp_path: Path) -> None:
    """Who has what of it would be forgotten with a kill; the daemon says what to raise."""
    with ServiceManager("server.shards=2") as manager:
        manager.most = 8
        manager.start()
        with Control(manager.socket_path) as control:
            with pytest.raises(vswap.OutOfService, match="raise FileDescriptorStoreMax"):
                control.call("swapon", path=str(tmp_path / "swap"), size=32 << 20)
            assert not control.status()["devices"]


def test_a_manager_that_does_not_listen_keeps_nothing_twice(tmp_path: Path) -> None:
    """A device is put out of use and into use again while nobody reads what it is told of that.

    Of two regions of owners by the same name the next process might take the one that is of no use.
    """
    path = str(tmp_path / "swap")
    with service("server.shards=2", "pool.max=32M") as manager, connected(manager) as space:
        slots = space.store(noise(900))
        with Control(manager.socket_path) as control:
            control.call("swapon", path=path, size=32 << 20)
            again = threading.Thread(
                target=control.call, args=("swapon",), kwargs={"path": path, "size": 32 << 20}
            )
            with manager.not_listening():
                control.call("swapoff", path=path)
                again.start()
            again.join()
            control.call("writeback", bytes=32 << 20)
        manager.kill()
        manager.start()
        assert space.load(slots) == noise(900)
        with Control(manager.socket_path) as control:
            assert control.call("verify")["ok"]


def test_the_number_of_shards_is_that_of_the_memory() -> None:
    """Another one takes effect when the memory is given up."""
    with (
        service("server.shards=2", "table.max_slots=100000") as manager,
        connected(manager) as space,
    ):
        content = noise(400)
        slots = space.store(content)
        manager.settings[:2] = ["server.shards=3", "table.max_slots=200000"]
        manager.restart()
        assert space.load(slots) == content
        assert status(manager)["shards"] == 2
        assert "server.shards = 3" in manager.log
        with Control(manager.socket_path) as control:
            control.call("set", key="shrinker.idle_age", value="2h")


def test_a_setting_that_no_longer_fits_is_left_out(manager: ServiceManager) -> None:
    """The file has changed meanwhile; the daemon starts, and says so."""
    with Control(manager.socket_path) as control:
        control.call("set", key="shrinker.high_watermark", value="88%")
    manager.settings += ["shrinker.low_watermark=89%"]
    manager.restart()
    assert "shrinker.high_watermark" in manager.log


def test_metrics_that_cannot_be_served_any_more_are_left_out(manager: ServiceManager) -> None:
    """Somebody has taken the port meanwhile: the daemon starts, and has all pages."""
    with socket.socket() as taken, connected(manager) as space:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        slots = space.store(noise(5))
        with Control(manager.socket_path) as control:
            control.call("set", key="metrics.listen", value=f"127.0.0.1:{port}")
        manager.kill()
        manager.start()
        assert status(manager)["settings"]["metrics.listen"] == f"127.0.0.1:{port}"
        manager.kill()
        with socket.socket() as somebody:
            somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            somebody.bind(("127.0.0.1", port))
            somebody.listen()
            manager.start()
        assert "metrics were set at run time, and are left out" in manager.log
        assert space.load(slots) == noise(5)


def test_without_a_keeper_it_says_so_once() -> None:
    """A kill of the daemon loses all pages then."""
    with running_daemon("server.shards=2") as daemon:
        assert daemon.log.count("loses all pages") == 1
    with service("server.shards=2", keeps=False) as manager:
        assert manager.log.count("loses all pages") == 1
        with connected(manager) as space:
            slots = space.store(noise(5))
            manager.kill()
            manager.start()
            with pytest.raises(vswap.SpaceLost):
                space.load(slots)


def test_descriptors_do_not_grow(manager: ServiceManager) -> None:
    """Neither the daemon's nor the manager's, whatever happens between."""
    counts = []
    for _ in range(5):
        with connected(manager) as space:
            space.store(noise(300))
        manager.kill()
        manager.start()
        counts.append(len(list(Path(f"/proc/{manager.pid}/fd").iterdir())) + len(manager.kept))
    # The socket that READY went through may not be closed yet.
    assert counts[-1] <= counts[0] + 1


@pytest.mark.parametrize("timeout", [None, 0.1])
def test_a_daemon_that_is_away_is_waited_for_as_long_as_patience_says(
    manager: ServiceManager, timeout: float | None
) -> None:
    """Also where the service manager listens for it meanwhile; it may be away for longer than a
    daemon that is there may be silent."""
    with vswap.connect(manager.socket_path, timeout=timeout) as space:
        slots = space.store(noise(3))
        manager.kill()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(space.load, slots)
            with pytest.raises(TimeoutError):
                loading.result(0.5)
            manager.start()
            assert loading.result() == noise(3)
    with vswap.connect(manager.socket_path, timeout=timeout, patience=0.3) as space:
        slots = space.store(noise(3))
        manager.kill()
        with pytest.raises(vswap.ConnectionLost, match=r"did not come back within 0\.3 s"):
            space.load(slots)
        assert space.closed


@pytest.mark.parametrize("timeout", [None, 0.1])
def test_tasks_wait_for_a_daemon_as_long_as_patience_says(
    manager: ServiceManager, timeout: float | None
) -> None:
    """As threads do."""

    async def main() -> None:
        async with vswap.aio.connect(manager.socket_path, timeout=timeout) as space:
            slots = await space.store(noise(3))
            manager.kill()
            loading = asyncio.create_task(space.load(slots))
            assert not (await asyncio.wait([loading], timeout=0.5))[0]
            await asyncio.to_thread(manager.start)
            assert await loading == noise(3)
        space = await vswap.aio.connect(manager.socket_path, timeout=timeout, patience=0.3)
        slots = await space.store(noise(3))
        manager.kill()
        with pytest.raises(vswap.ConnectionLost, match=r"did not come back within 0\.3 s"):
            await space.load(slots)
        assert space.closed

    asyncio.run(main())


def test_a_lane_is_opened_to_a_daemon_that_is_away() -> None:
    """What needs a shard that was not needed before waits for it, or is told within patience."""
    with service("server.shards=3", "pool.max=32M") as manager:
        with vswap.connect(manager.socket_path, name="many") as space:
            slots = space.store(noise(1000))
        with vswap.connect(manager.socket_path, name="many") as space:
            manager.kill()
            with ThreadPoolExecutor(1) as pool:
                loading = pool.submit(space.load, slots)
                manager.start()
                assert loading.result() == noise(1000)
        with vswap.connect(manager.socket_path, name="many", patience=0.2) as space:
            manager.kill()
            with pytest.raises(vswap.ConnectionLost):
                space.load(slots)


def test_a_restart_does_not_wait_for_clients_that_wait_for_it() -> None:
    """A call over several lanes that hears of the end on one of them still reads the others."""
    with (
        service("server.shards=3", "pool.max=64M") as manager,
        vswap.connect(manager.socket_path) as space,
        ThreadPoolExecutor(1) as pool,
    ):
        content = noise(6000)
        slots = space.store(content)
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                assert space.load(slots) == content

        working = pool.submit(work)
        try:
            for _ in range(6):
                began = time.monotonic()
                manager.restart()
                assert time.monotonic() - began < 10
        finally:
            over.set()
        working.result()


def test_a_client_that_makes_calls_keeps_what_it_has_on_all_shards() -> None:
    """Also on those that no call has needed since the daemon died, or they alone did."""
    settings = ("server.shards=3", "pool.max=32M", "server.resume_timeout=2s")
    with service(*settings) as manager, vswap.connect(manager.socket_path) as space:
        content = noise(1000)
        slots = space.store(content)
        few = space.store(noise(1, 1))
        for kill in (kill_all, kill_shards):
            kill(manager)
            end = time.monotonic() + 3.0
            while time.monotonic() < end:
                # Longer than the daemon waits for anybody.
                assert space.load(few) == noise(1, 1)
            assert space.load(slots) == content


def _idle(path: Path, pipe: Connection) -> None:
    """A client that stores, and makes no call until it is asked to."""
    with vswap.connect(path) as space:
        content = noise(100, os.getpid())
        slots = space.store(content)
        pipe.send(os.getpid())
        pipe.recv()
        pipe.send(space.load(slots) == content)
        pipe.recv()


@contextlib.contextmanager
def idle_clients(
    manager: ServiceManager, count: int
) -> Iterator[Sequence[tuple[BaseProcess, Connection]]]:
    """So many, of 100 pages each, in processes of their own."""
    fork = multiprocessing.get_context("fork")
    clients = []
    for _ in range(count):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_idle, args=(manager.socket_path, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.recv() == process.pid
        clients.append((process, ours))
    try:
        yield clients
    finally:
        for process, pipe in clients:
            process.kill()
            process.join()
            pipe.close()


def await_slots(manager: ServiceManager, count: int) -> None:
    with Control(manager.socket_path, timeout=60) as control:
        while control.status()["slots"]["allocated"] != count:
            control.call("compact")


@pytest.mark.parametrize("shards", [1, 3])
def test_who_makes_no_calls_loses_nothing_while_it_lives(shards: int) -> None:
    """It does not know that the daemon has died: it is waited for as long as it is there."""
    settings = (f"server.shards={shards}", "pool.max=32M", "server.resume_timeout=1s")
    with service(*settings) as manager, idle_clients(manager, 3) as clients:
        (dies, _), (idle, pipe), (dies_later, _) = clients
        kill_all(manager)
        dies.kill()
        dies.join()
        await_slots(manager, 200)  # so whoever does not come back has been waited for
        kill_all(manager)
        dies_later.kill()
        await_slots(manager, 100)
        pipe.send("load")
        assert pipe.recv()
        idle.kill()
        await_slots(manager, 0)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_who_closes_while_the_daemon_is_away_leaves_nothing(shards: int, *, back: bool) -> None:
    """Though its process lives on: it is as if it had come back to close its space."""
    settings = (f"server.shards={shards}", "pool.max=32M", "server.resume_timeout=1s")
    with service(*settings) as manager:
        with vswap.connect(manager.socket_path) as space:
            space.store(noise(500))
            manager.kill()
            if back:
                manager.start()
        if not back:
            manager.start()
        await_slots(manager, 0)

        async def scenario() -> None:
            async with vswap.aio.connect(manager.socket_path) as space:
                await space.store(noise(500))
                manager.kill()
                loading = asyncio.create_task(space.ping())
                # The loop has seen it when the call waits for the daemon to come back.
                while not space._connection._returning:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0)
            with pytest.raises(vswap.ConnectionLost):
                await loading

        asyncio.run(scenario())
        manager.start()
        await_slots(manager, 0)


@EACH
def test_who_closes_before_the_loop_has_seen_that_the_daemon_is_away_leaves_nothing(
    shards: int,
) -> None:
    """Whether it is there is looked at, not remembered."""
    settings = (f"server.shards={shards}", "pool.max=32M", "server.resume_timeout=1s")

    async def scenario(manager: ServiceManager) -> None:
        async with vswap.aio.connect(manager.socket_path) as space:
            await space.store(noise(500))
            manager.kill()

    with service(*settings) as manager:
        asyncio.run(scenario(manager))
        manager.start()
        await_slots(manager, 0)


@EACH
@pytest.mark.parametrize("patience", [0, 0.05])
def test_who_gives_the_daemon_up_leaves_nothing(shards: int, patience: float) -> None:
    """Its patience is over before the daemon is back: on no shard, whichever it has asked last."""
    settings = (f"server.shards={shards}", "pool.max=32M", "server.resume_timeout=1s")
    with service(*settings) as manager:
        space = vswap.connect(manager.socket_path, patience=patience)
        space.store(noise(500))
        manager.kill()
        with pytest.raises(vswap.ConnectionLost):
            space.ping()
        manager.start()
        await_slots(manager, 0)


def kill_all(manager: ServiceManager) -> None:
    manager.kill()
    manager.start()


def kill_shards(manager: ServiceManager) -> None:
    for pid in Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
