"""bench.peers: what it computes from what was measured, and one short run with all peers there are.

Peers that this machine lacks are not measured; then it is held that they are named. On CI the
programs are installed, so nothing but what needs root or the kernel may be missing.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.peers import chart, figures, interrupts, measure, results
from bench.peers.__main__ import build_parser, numbers_of_clients
from bench.peers.contract import (
    BATCH,
    PAGE_BYTES,
    Batch,
    Buffer,
    MissingError,
    PeerFailedError,
    Plan,
)
from bench.peers.crew import Crew
from bench.peers.lz4_codec import grown, shrunk
from bench.peers.processes import Server, program
from bench.peers.registry import NAMES, peer_class
from bench.peers.results import Latency, Measured, Memory, Run, Speed
from bench.peers.worker import batches_of, check, wrong_pages
from support.sources import REPOSITORY

DEADLINE_S = 90
SVG = "{http://www.w3.org/2000/svg}"


# What is computed


def speed(us: float = 5.0, *, pages: int = 1000, cpu_us: float = 0.0) -> Speed:
    """Three rounds, the middle one with `us` per page."""
    walls = [pages * us * factor / 1e6 for factor in (2.0, 1.0, 0.5)]
    cpu = 3 * pages * cpu_us / 1e6
    return Speed(pages=pages, walls_s=walls, client_cpu_s=cpu, server_cpu_s=cpu)


def measured(peer: str, clients: int, store_us: float, load_us: float) -> Measured:
    return Measured(
        peer=peer,
        what=f"what {peer} is",
        counts=peer not in {"codec", "ping-pong", "vswapd-1"},
        clients=clients,
        store=speed(store_us),
        load=speed(load_us),
        store_one=Latency(p50_us=store_us + 30, p99_us=99.0),
        load_one=Latency(p50_us=load_us + 20, p99_us=77.0),
        ratio=None if peer == "ping-pong" else 2.5,
        memory=None
        if peer == "codec"
        else Memory(pages=1000, resident_bytes=1_720_320, compressed_bytes=1_638_400),
    )


def a_run(*found: Measured, missing: dict[str, str] | None = None) -> Run:
    return Run(
        machine={"processor": "some <fast> one"},
        pages=1000,
        batch=BATCH,
        rounds=3,
        cores=4,
        measured=found,
        missing=missing or {},
    )


RUN = a_run(
    measured("codec", 1, 4.0, 1.0),
    measured("ping-pong", 1, 1.0, 1.0),
    measured("vswapd", 1, 5.0, 2.0),
    measured("redis", 1, 10.0, 8.0),
    measured("vswapd", 4, 1.5, 0.5),
    measured("zram", 4, 1.2, 0.6),
    missing={"memcached": "there is no memcached here"},
)


@pytest.mark.parametrize(
    ("percent", "expected"), [(1, 1), (50, 50), (50.5, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentiles_are_by_nearest_rank(percent: float, expected: int) -> None:
    """A percentile is a value that was measured: the least that is not below so many of all."""
    values = [*range(100, 50, -1), *range(1, 51)]
    assert results.percentile(values, percent) == expected


def test_percentiles_of_few_values() -> None:
    """One value is every percentile; of none there is no percentile."""
    assert [results.percentile([7], percent) for percent in (1, 50, 99)] == [7, 7, 7]
    with pytest.raises(ValueError, match="no values"):
        results.percentile([], 50)


def test_latencies_are_in_microseconds() -> None:
    """Nanoseconds become the p50 and p99 in microseconds."""
    found = Latency.of([1000 * number for number in range(1, 101)])
    assert (found.p50_us, found.p99_us) == (50.0, 99.0)


def test_speeds_are_medians_of_the_rounds() -> None:
    """One slow and one fast round do not change pages per second; processor time is the mean's."""
    found = speed(5.0, cpu_us=3.0)
    assert found.pages_per_s == pytest.approx(200_000)
    assert found.us_per_page == pytest.approx(5.0)
    assert found.client_us == pytest.approx(3.0)
    assert found.server_us == pytest.approx(3.0)


def test_comparisons_are_round_by_round() -> None:
    """How much faster one is than another is the median of the rounds' ratios, not of the times."""
    walls = {"walls_s": [4.0, 1.0, 2.0], "client_cpu_s": 0.0, "server_cpu_s": 0.0}
    ours = Speed(pages=100, **walls)  # type: ignore[arg-type]
    theirs = replace(ours, walls_s=[4.0, 3.0, 6.0])
    assert ours.times_as_fast_as(theirs) == pytest.approx(3.0)
    assert replace(ours, pages=200).times_as_fast_as(theirs) == pytest.approx(6.0)


def test_the_table_has_a_line_per_peer_and_names_the_missing() -> None:
    """Each peer has one line per number of clients; who is missing is named with the reason."""
    text = results.table(RUN)
    cells = [line.split() for line in text.splitlines()]
    # The first eight columns have a number for every peer.
    rows = {(row[0], row[1]): row[2:] for row in cells if len(row) > 10 and row[0].isdigit()}
    assert set(rows) == {(str(one.clients), one.peer) for one in RUN.measured}
    assert rows["1", "vswapd"][:4] == ["200,000", "500,000", "5.00", "2.00"]
    assert rows["1", "vswapd"][-3:] == ["1,720", "1.050", "2.50"]
    assert rows["1", "codec"][-3:] == ["-", "-", "2.50"]
    assert rows["1", "ping-pong"][-3:] == ["1,720", "-", "-"]
    assert re.search(r"^memcached +NOT MEASURED: there is no memcached here$", text, re.MULTILINE)
    assert re.search(r"^redis +what redis is$", text, re.MULTILINE)


def test_the_table_of_nothing_still_names_the_missing() -> None:
    """When no peer is here, the table says why."""
    assert "redis  NOT MEASURED: not here" in results.table(a_run(missing={"redis": "not here"}))


def test_figures_stand_beside_their_targets() -> None:
    """Ratios are taken within the run, judged by the targets, and left out without a peer."""
    found = {figure.name: figure for figure in figures.figures(RUN)}
    store, load = (found[f"{what}, 4 clients: vswapd / zram"] for what in ("store", "load"))
    assert store.value == pytest.approx(0.8)
    assert load.value == pytest.approx(1.2)
    assert (store.target, store.ok, load.ok) == (1.0, False, True)
    assert found["store, 1 client: vswapd / redis"].value == pytest.approx(2.0)
    assert found["load, 1 client: vswapd / redis"].ok
    single = found["load one page, p50 us above ping-pong and codec"]
    assert single.value == pytest.approx(22.0 - 21.0 - 21.0)
    assert found["resident / compressed bytes"].value == pytest.approx(1.05)
    assert not any("memcached" in name or "shards" in name for name in found)


def test_the_window_stands_for_vswapd_where_it_was_measured() -> None:
    """Targets are held against vswapd as a client finds it best."""
    run = replace(RUN, measured=[*RUN.measured, measured("vswapd-window", 4, 1.0, 0.4)])
    names = [figure.name for figure in figures.figures(run)]
    assert "store, 4 clients: vswapd-window / zram" in names
    assert "store, 1 client: vswapd / redis" in names


def test_shards_are_judged_by_the_processor_time_of_the_daemon() -> None:
    """Clients share the cores with the shards, so the clock alone would judge the clients."""
    one, many = measured("vswapd-1", 4, 10.0, 4.0), measured("vswapd", 4, 5.0, 2.0)
    busy = [
        replace(peer, store=speed(us, pages=200_000, cpu_us=us), load=speed(us, pages=200_000))
        for peer, us in ((one, 8.0), (many, 10.0))
    ]
    found = [figure for figure in figures.figures(a_run(*busy)) if "shards" in figure.name]
    # The loads took no processor time that could be counted.
    assert [figure.name for figure in found] == [
        "store, shards 1 to 4, by the daemon's processor time"
    ]
    assert found[0].value == pytest.approx(4 * 8 / 10)
    assert "by the clock 0.80" in found[0].detail


def test_the_json_has_every_number_of_the_table() -> None:
    """The document is JSON, and holds what the table shows and the rounds behind it."""
    found = json.loads(json.dumps(results.document(RUN)))
    assert found["machine"] == {"processor": "some <fast> one"}
    assert found["missing"] == {"memcached": "there is no memcached here"}
    assert (found["pages_per_client"], found["batch"], found["rounds"]) == (1000, BATCH, 3)
    entry = found["measured"][2]
    assert (entry["peer"], entry["clients"], entry["ratio"]) == ("vswapd", 1, 2.5)
    assert entry["store"]["pages_per_s"] == pytest.approx(200_000)
    assert entry["store"]["seconds_per_round"] == pytest.approx([0.01, 0.005, 0.0025])
    assert entry["load_one"] == {"p50_us": 22.0, "p99_us": 77.0}
    assert entry["memory"]["resident_bytes_per_compressed_byte"] == pytest.approx(1.05)
    assert found["measured"][0]["memory"] is None


def bars_of(run: Run) -> list[tuple[str, float]]:
    """Kind and length of every bar of the picture."""
    root = ET.fromstring(chart.chart(run))
    found = [
        (rect.get("class", ""), float(rect.get("width", "nan"))) for rect in root.iter(SVG + "rect")
    ]
    return found[2:]  # the first two explain the colours


def test_the_picture_is_in_proportion() -> None:
    """Bars are as long as the pages per second they stand for, in both halves alike."""
    bars = bars_of(RUN)
    shown = [one for one in RUN.measured if one.peer != "ping-pong"]
    by_clients = sorted(shown, key=lambda one: (one.clients, not one.counts))
    order = ["vswapd", "redis", "codec"]
    assert sum(kind.startswith("store") for kind, _ in bars) == len(shown)
    ones = [one for name in order for one in by_clients if (one.peer, one.clients) == (name, 1)]
    rates = [rate for one in ones for rate in (one.store.pages_per_s, one.load.pages_per_s)]
    zram = next(one for one in shown if one.peer == "zram")
    scale = bars[-1][1] / zram.load.pages_per_s
    lengths = [length for _, length in bars[: len(rates)]]
    assert lengths == pytest.approx([rate * scale for rate in rates], abs=0.11)


def test_the_picture_fits_light_and_dark_ground() -> None:
    """The picture is well-formed, has colours for dark ground, and refers to nothing outside."""
    text = chart.chart(RUN)
    root = ET.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    for text_of in root.iter(SVG + "text"):
        assert 0 <= float(text_of.get("x", "nan")) < width
        assert 0 <= float(text_of.get("y", "nan")) < height
    words = root.get("aria-label") or ""
    assert "redis, clients: 1: 100 and 125" in words


def test_the_picture_of_one_number_of_clients_has_one_half() -> None:
    """Where only one number of clients was measured, the picture is not drawn twice."""
    run = replace(RUN, measured=[one for one in RUN.measured if one.clients == 1])
    assert len(bars_of(run)) == 2 * 3


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])]
)
def test_clients_go_up_to_the_cores(cores: int, expected: list[int]) -> None:
    """By default 1, 2, 4, ... clients are measured, and as many as there are cores."""
    assert numbers_of_clients(cores) == expected


@pytest.mark.parametrize("wrong", [["--clients", "0"], ["--clients", "x"], ["--only", "memcachd"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of clients that are none, and peers that there are not, are errors of the caller."""
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(wrong)
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err


# The comparison of bytes


def some_pages(count: int = BATCH, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pages that shrink, all different."""
    pages = np.zeros((count, PAGE_BYTES), np.uint8)
    pages[:, ::8] = np.random.default_rng(seed).integers(1, 255, (count, PAGE_BYTES // 8))
    return pages


class Kept:
    """A client that keeps pages in a dict, and can be made to do one thing wrong."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.pages: dict[int, bytes] = {}

    def store(self, batch: Batch) -> None:
        for at, page in enumerate(batch.pages):
            self._keep(batch.first + at, page)

    def store_one(self, number: int, page: memoryview) -> None:
        if self.fault != "forgets single pages":
            self._keep(number, page)

    def _keep(self, number: int, page: memoryview) -> None:
        if self.fault != "keeps the first" or number not in self.pages:
            self.pages[number] = bytes(page)

    def load(self, batch: Batch) -> Sequence[Buffer]:
        found = [self.pages[batch.first + at] for at in range(len(batch.pages))]
        if self.fault == "swaps two":
            found[3], found[4] = found[4], found[3]
        if self.fault == "loses one":
            found.pop()
        return found

    def load_one(self, number: int) -> Buffer:
        page = bytearray(self.pages[number])
        if self.fault == "flips a bit":
            page[-1] ^= 1
        return page

    def close(self) -> None:
        self.pages.clear()


def two_sets() -> tuple[list[Batch], list[Batch]]:
    """The same numbers with two kinds of pages, in aligned memory as a worker has them."""
    first, second = (memoryview(mmap.mmap(-1, 2 * BATCH * PAGE_BYTES)) for _ in range(2))
    first[:] = some_pages(2 * BATCH, 1).tobytes()
    second[:] = some_pages(2 * BATCH, 2).tobytes()
    return batches_of(first), batches_of(second)


def test_a_client_that_keeps_pages_passes() -> None:
    """Everything is compared after it was overwritten, and holds the first pages in the end."""
    batches, others = two_sets()
    client = Kept()
    check(client, batches, others)
    assert wrong_pages(b"".join(client.pages[at] for at in range(BATCH)), batches[0]) == 0
    assert wrong_pages(client.load(batches[1]), batches[1]) == 0


@pytest.mark.parametrize(
    "fault",
    ["forgets single pages", "keeps the first", "swaps two", "loses one", "flips a bit"],
)
def test_wrong_bytes_end_the_run(fault: str) -> None:
    """Old pages, exchanged pages, missing pages and changed bytes are all found."""
    batches, others = two_sets()
    with pytest.raises(PeerFailedError, match="pages came back with other bytes"):
        check(Kept(fault), batches, others)


def test_pages_that_do_not_shrink_are_kept_as_they_are() -> None:
    """The codec of clients gives every page back, whether it shrinks or not."""
    noise = np.random.default_rng(0).bytes(PAGE_BYTES)
    text = some_pages(1)[0].tobytes()
    assert len(shrunk(noise)) == PAGE_BYTES
    assert len(shrunk(text)) < PAGE_BYTES
    assert [grown(shrunk(page)) for page in (noise, text)] == [noise, text]


# Peers that are missing, or fail


def test_every_peer_has_a_class_of_its_name() -> None:
    """The names of the command line are those of the peers."""
    for name in NAMES:
        assert peer_class(name).name == name


def test_a_missing_library_is_one_peer_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its client library a peer is missing, and the library is named."""
    monkeypatch.delitem(sys.modules, "bench.peers.lmdb_peer", raising=False)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingError, match="the library lmdb is not installed"):
        peer_class("lmdb")


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run goes on without the peers whose programs are not installed, and says what to install.

    Those that need no program are measured.
    """
    monkeypatch.setenv("PATH", str(tmp_path))
    missing: dict[str, str] = {}
    amount = measure.Amount(pages=BATCH, rounds=1, singles=3)
    names = ["codec", "redis", "memcached"]
    found = measure.measure(names, some_pages(), amount, 1, 1, missing)
    assert [one.peer for one in found] == ["codec"]
    assert "apt-get install redis-server" in missing["redis"]
    assert "apt-get install memcached" in missing["memcached"]
    with pytest.raises(MissingError, match="there is no memcached here"):
        program("memcached", "memcached")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """A server that ends at once is an error with its own words in it."""
    command = ["/bin/sh", "-c", "echo out of luck; exit 3"]
    with pytest.raises(PeerFailedError, match="out of luck"):
        Server(command, tmp_path / "some.sock")


def test_a_zram_device_goes_with_its_peer(tmp_path: Path) -> None:
    """The device that was added for a run is removed again; who may add none says so."""
    kind = peer_class("zram")
    peer = kind()
    plan = Plan(clients=1, pages=2 * BATCH, directory=tmp_path, memory=tmp_path, cores=1)
    address = ""
    with contextlib.ExitStack() as stack:
        stack.callback(peer.stop)
        try:
            peer.start(plan)
        except MissingError as error:
            reason = str(error)
        else:
            reason = ""
            address = peer.address(0)
            client = kind.connect(address, 0, 2 * BATCH)
            stack.callback(client.close)
            check(client, *two_sets())
    assert bool(address) != ("zram" in reason)
    assert not address or not Path(address.rpartition(":")[0]).exists()
    peer.stop()


def test_an_error_of_a_client_ends_the_run(tmp_path: Path) -> None:
    """A client that cannot do what it is told is an error with its traceback; the crew ends."""
    (tmp_path / "pages").write_bytes(some_pages().tobytes())
    with Crew(tmp_path / "pages", 2) as crew:
        with pytest.raises(PeerFailedError, match="FileNotFoundError"):
            crew.connect("ping-pong", [str(tmp_path / "nobody")] * 2)
        workers = crew._workers
    assert all(worker.returncode is not None for worker in workers)


# The command


def run_peers(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "bench.peers", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_by(process: subprocess.Popen[str]) -> list[Path]:
    places = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    return [path for place in places for path in place.glob(f"vswapd-peers-{process.pid}-*")]


def test_an_interrupt_waits_for_what_is_being_made() -> None:
    """Inside of a held block nothing is interrupted, and behind it that is made up for, once."""
    reached = []

    def make_something() -> None:
        with interrupts.held():
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("inner")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("outer")

    with interrupts.interruptible():
        with pytest.raises(KeyboardInterrupt):
            make_something()
        with interrupts.held():
            reached.append("later")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert reached == ["inner", "outer", "later"]


def test_the_short_form(tmp_path: Path) -> None:
    """Every peer is measured, or named; nothing is left behind.

    Where CI runs, all programs are installed: the comparison cannot rot unseen.
    """
    with run_peers(
        "--short", "--clients=2", f"--json={tmp_path}/json", f"--svg={tmp_path}/svg"
    ) as process:
        text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, text
    assert not left_by(process)
    found = json.loads((tmp_path / "json").read_text())
    entries = {(one["peer"], one["clients"]): one for one in found["measured"]}
    assert set(entries) == {(name, 2) for name in NAMES if name not in found["missing"]}
    for reason in found["missing"].values():
        assert f"NOT MEASURED: {reason}" in text
    for name, command in (("redis", "redis-server"), ("memcached", "memcached")):
        installed = shutil.which(command) is not None
        assert (name in found["missing"]) != installed
        assert installed or os.environ.get("CI") != "true"
    for one in entries.values():
        assert one["store"]["pages"] == one["clients"] * found["pages_per_client"]
        assert one["store"]["pages_per_s"] > 0
        assert one["load_one"]["p99_us"] >= one["load_one"]["p50_us"] > 0
        assert one["ratio"] is None or one["ratio"] > 1
    assert {"codec", "ping-pong", "vswapd", "lmdb"} <= {name for name, _ in entries}
    assert "resident / compressed bytes" in {line["name"] for line in found["figures"]}
    assert ET.fromstring((tmp_path / "svg").read_text()).tag == SVG + "svg"


def test_an_interrupted_run_leaves_nothing() -> None:
    """SIGTERM in the middle stops every server and client, and removes what they had."""
    only = ["--only=codec", "--only=vswapd", "--only=zram", "--only=redis", "--only=lmdb"]
    with run_peers("--short", "--clients=1,2", *only) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("clients: 1"):
                break
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, "".join([*lines, rest])
    assert "interrupted; everything was stopped" in rest
    assert not left_by(process)
