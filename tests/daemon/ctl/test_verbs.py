"""vswapctl against a daemon that answers what the test wants: arguments, output, exit codes."""

from __future__ import annotations

import io
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fake_daemon import FakeDaemon
from support.status_documents import BUSY, EMPTY, FULL, group
from vswap.protocol import Header, Op, Status
from vswapd.ctl import main

ANSWERS: dict[str, dict[str, Any]] = {
    "set": {"key": "pool.max", "old": "20%", "new": "1G"},
    "reload": {"changed": ["pool.max"], "ignored": ["server.max_batch"]},
    "swapon": {"path": "/swap", "size_bytes": 1 << 30, "priority": 3},
    "swapoff": {"path": "/swap", "moved_pages": 12345, "lost_pages": 0},
    "writeback": {"bytes": 100 << 20, "pages": 51200, "stopped": None},
    "compact": {"moved_bytes": 3 << 20, "freed_bytes": 12 << 20},
    "verify": {
        "ok": True,
        "problems": [],
        "slots": 9000,
        "entries": 8000,
        "checked_bytes": 1 << 20,
    },
    "spaces": {
        "spaces": [
            {
                "id": "1",
                "name": "cache",
                "client": "small 1\x1b[2J",
                "pid": 77,
                "uid": 0,
                "group": "0",
                "slots": 10,
                "original_bytes": 40960,
                "compressed_bytes": 4096,
                "zero": 2,
                "connected_s": 61.0,
            },
            {
                "id": "2",
                "name": None,
                "client": "large 2",
                "pid": None,
                "uid": 4294967294,
                "group": "4294967294",
                "slots": 20000,
                "original_bytes": 81920000,
                "compressed_bytes": 1 << 20,
                "zero": 0,
                "connected_s": 3600.0,
            },
        ],
        "left_out": 0,
        "silent_shards": [],
    },
}


class Daemon(FakeDaemon):
    """Keeps what it was asked, answers from `answers`, or refuses with `refuse`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, space=None, token=None)
        self.asked: list[dict[str, Any]] = []
        self.answers = dict(ANSWERS)
        self.documents = [BUSY]
        self.refuse: tuple[Status, str] | None = None

    def execute(self, header: Header, body: bytes) -> tuple[int, bytes, int, int]:
        if header.op == Op.STATUS:
            document = self.documents.pop(0) if len(self.documents) > 1 else self.documents[0]
            return 0, json.dumps(document).encode(), 0, 0
        if header.op == Op.CONTROL:
            self.asked.append(json.loads(body))
            if self.refuse:
                return self.refuse[0], self.refuse[1].encode(), 0, 0
            return 0, json.dumps(self.answers[self.asked[-1]["verb"]]).encode(), 0, 0
        return super().execute(header, body)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    path = tmp_path / "s"
    monkeypatch.setenv("VSWAP_SOCKET", str(path))
    monkeypatch.delenv("COLUMNS", raising=False)
    with Daemon(path) as daemon:
        yield daemon


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def test_status_is_the_first_screen(daemon: Daemon, run: Run) -> None:
    """Without a verb, the status is shown, at 80 columns and without colours in a pipe."""
    golden = Path(__file__).parent / "golden/busy.txt"
    for words in ((), ("status",)):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert "".join(f"{line.rstrip()}\n" for line in out.splitlines()) == golden.read_text()


def test_socket_can_be_named(daemon: Daemon, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--socket goes before the environment."""
    monkeypatch.setenv("VSWAP_SOCKET", "/nowhere")
    assert run("--socket", str(daemon.path), "status")[0] == 0
    assert run("--socket", str(daemon.path))[0] == 0


def test_status_as_json_is_the_document(daemon: Daemon, run: Run) -> None:
    """--json prints the STATUS document with nothing added or left out."""
    assert json.loads(run("status", "--json")[1]) == BUSY


def test_status_as_picture(daemon: Daemon, run: Run, tmp_path: Path) -> None:
    """--svg writes the screen to a file and prints nothing."""
    code, out, _ = run("status", "--svg", str(tmp_path / "x.svg"))
    assert (code, out) == (0, "")
    assert "RAM" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_watch_goes_on_until_interrupted(
    daemon: Daemon,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    """--watch shows the status again after each interval; Ctrl-C ends it with 0."""
    later = BUSY | {"uptime_s": BUSY["uptime_s"] + 2}
    later["traffic"] = BUSY["traffic"] | {"load_pages": BUSY["traffic"]["load_pages"] + 200}
    daemon.documents = [BUSY, later]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("vswapd.ctl.verbs._sleep", sleep)
    code, out, _ = run("status", "--watch", "2", *words)
    assert (code, waits) == (0, [2.0, 2.0])
    if words:
        assert [json.loads(line) for line in out.splitlines()] == [BUSY, later]
    else:
        assert out.count("of RAM saved") == 2
        assert "100/s loaded" in out


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        ("set pool.max=1G", {"key": "pool.max", "value": "1G"}, "pool.max: 20% -> 1G\n"),
        ("reload", {}, "changed: pool.max\nneeds a restart: server.max_batch\n"),
        ("swapon /swap", {"path": "/swap"}, "/swap: 1.00 GiB, priority 3\n"),
        (
            "swapon /swap --size 1G --priority 3 --no-encrypt",
            {"path": "/swap", "size": 1 << 30, "priority": 3, "encrypt": False},
            "/swap: 1.00 GiB, priority 3\n",
        ),
        ("swapoff /swap", {"path": "/swap"}, "/swap: out of use, 12,345 pages were moved\n"),
        (
            "swapoff --give-up /swap",
            {"path": "/swap", "give_up": True},
            "/swap: out of use, 12,345 pages were moved\n",
        ),
        ("writeback 100M", {"bytes": 100 << 20}, "51,200 pages, 100 MiB written\n"),
        ("compact", {}, "12.0 MiB given back, 3.00 MiB moved\n"),
        ("verify", {}, "all good: 9,000 slots, 8,000 entries, 1.00 MiB checked\n"),
    ],
)
def test_verb_asks_and_tells(
    daemon: Daemon, run: Run, words: str, asked: dict[str, Any], said: str
) -> None:
    """Each verb sends exactly its arguments and tells the answer in words, or as it came."""
    verb = words.split(maxsplit=1)[0]
    assert run(*words.split()) == (0, said, "")
    assert daemon.asked == [{"verb": verb} | asked]
    assert json.loads(run(*words.split(), "--json")[1]) == ANSWERS[verb]


def test_relative_paths_are_the_callers(
    daemon: Daemon, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's path is sent as an absolute one: the daemon's directory is another."""
    monkeypatch.chdir(tmp_path)
    run("swapon", "swap")
    run("swapoff", "swap")
    assert [asked["path"] for asked in daemon.asked] == [str(tmp_path / "swap")] * 2


def test_settings_are_set_in_order_and_listed(daemon: Daemon, run: Run) -> None:
    """Several settings are sent one by one; without any, those in force are listed."""
    run("set", "a=1", "b=2=3", "c=")
    assert [(a["key"], a["value"]) for a in daemon.asked] == [("a", "1"), ("b", "2=3"), ("c", "")]
    code, out, _ = run("set")
    assert code == 0
    assert dict(line.split("=", 1) for line in out.splitlines()) == BUSY["settings"]
    assert json.loads(run("set", "--json")[1]) == BUSY["settings"]


def test_first_refused_setting_ends_it(daemon: Daemon, run: Run) -> None:
    """After a refusal, no later setting is sent."""
    daemon.refuse = (Status.BAD_ARGUMENT, "a: there is no such key; did you mean b?")
    assert run("set", "a=1", "b=2") == (
        2,
        "",
        "vswapctl: a: there is no such key; did you mean b?\n",
    )
    assert len(daemon.asked) == 1


def test_pages_that_were_given_up_are_counted(daemon: Daemon, run: Run) -> None:
    """What is lost by a swapoff is said, besides what was moved."""
    daemon.answers["swapoff"] = {"path": "/swap", "moved_pages": 2, "lost_pages": 1234}
    said = "/swap: out of use, 2 pages were moved; 1,234 could not be read, and are lost\n"
    assert run("swapoff", "/swap", "--give-up") == (0, said, "")


def test_groups_are_shown_by_their_users_names(daemon: Daemon, run: Run) -> None:
    """The document has numbers, the screen names, as far as there are any."""
    daemon.documents = [
        FULL
        | {"groups": [group(name="0", writeback=False), group(name="4294967290", pool_max_bytes=1)]}
    ]
    lines = run("status")[1].splitlines()
    assert any(line.startswith("groups") and " user " in line for line in lines)
    root = pwd.getpwuid(0).pw_name
    assert any(line.split()[:1] == [root] for line in lines)
    assert any(line.split()[:1] == ["4294967290"] for line in lines)
    assert json.loads(run("status", "--json")[1])["groups"][0]["name"] == "0"


def test_who_has_no_client_is_not_listed_with_an_old_one(daemon: Daemon, run: Run) -> None:
    """A space that is kept says so."""
    gone = ANSWERS["spaces"]["spaces"][1] | {"client": None, "name": "kept"}
    daemon.answers["spaces"] = ANSWERS["spaces"] | {"spaces": [gone]}
    assert run("spaces")[1].splitlines()[1].split()[:4] == ["no", "client", "kept", "2"]


@pytest.mark.parametrize("option", ["--size", "--priority"])
def test_a_devices_key_that_is_given_twice_is_refused(
    daemon: Daemon, run: Run, option: str
) -> None:
    """Which is meant cannot be known; nothing is asked of the daemon."""
    code, out, err = run("swapon", "/swap", option, "1", option, "2")
    assert (code, out, daemon.asked) == (2, "", [])
    assert f"argument {option}: is given twice" in err


def test_spaces_that_were_left_out_are_counted(daemon: Daemon, run: Run) -> None:
    """There may be more than one reply has room for."""
    daemon.answers["spaces"] = ANSWERS["spaces"] | {"left_out": 1234}
    assert "and 1,234 smaller ones: --uid shows" in run("spaces")[1]


def test_reload_without_changes(daemon: Daemon, run: Run) -> None:
    """A reload that changed nothing says so."""
    daemon.answers["reload"] = {"changed": [], "ignored": []}
    assert run("reload")[1] == "nothing has changed\n"
    daemon.answers["reload"] = {"changed": [], "ignored": [], "after_stop": ["server.shards"]}
    assert run("reload")[1] == (
        "nothing has changed\n"
        "needs a stop and a start, as a restart keeps the memory: server.shards\n"
    )


def test_verify_problems_are_exit_1(daemon: Daemon, run: Run) -> None:
    """Each problem is one line, and the exit code says that there are some, in JSON too."""
    problems = ["slot 5: checksum", "pool: 3 bytes too many"]
    daemon.answers["verify"] = ANSWERS["verify"] | {"ok": False, "problems": problems}
    code, out, _ = run("verify")
    assert code == 1
    assert out.splitlines()[:2] == problems
    assert out.splitlines()[2].startswith("NOT good: ")
    assert run("verify", "--json")[0] == 1


@pytest.mark.parametrize(("written", "expected"), [(0, 1), (4096, 0)])
def test_writeback_that_could_do_nothing_is_exit_1(
    daemon: Daemon, run: Run, written: int, expected: int
) -> None:
    """Writeback that ended early says why; it failed if nothing was written."""
    daemon.answers["writeback"] = {"bytes": written, "pages": 0, "stopped": "no_device"}
    code, out, _ = run("writeback", "1M")
    assert code == expected
    assert out.endswith("; stopped: no_device\n")
    assert run("writeback", "1M", "--json")[0] == expected


def test_spaces_are_a_table(daemon: Daemon, run: Run) -> None:
    """All spaces, the largest first, with users by name and nothing that steers a terminal."""
    code, out, _ = run("spaces")
    assert code == 0
    lines = out.splitlines()
    large = "large 2 2 - 4294967294 20,000 78.1 MiB 1.00 MiB 0 1 h"
    assert " ".join(lines[1].split()) == large
    assert "root" in lines[2]
    assert "cache" in lines[2]
    assert "1 min 1 s" in lines[2]
    assert "\x1b" not in out
    daemon.answers["spaces"] = {"spaces": []}
    assert run("spaces")[1] == "none\n"


@pytest.mark.parametrize("name", ["a name " * 36, "x" * 255, "\u540d" * 85])
def test_long_names_of_spaces_hide_no_numbers(daemon: Daemon, run: Run, name: str) -> None:
    """However long a space's name is, all of it is shown, and all numbers of all spaces."""
    large, small = ANSWERS["spaces"]["spaces"][1], ANSWERS["spaces"]["spaces"][0]
    daemon.answers["spaces"] = ANSWERS["spaces"] | {"spaces": [small | {"name": name}, large]}
    out = run("spaces")[1]
    for number in ("20,000", "78.1 MiB", "1.00 MiB", "1 min 1 s", "4294967294"):
        assert number in out
    assert sum(map(out.count, set(name))) >= len(name)


def test_a_named_space_is_dropped(daemon: Daemon, run: Run) -> None:
    """By its name, and by whose it is where that is said."""
    daemon.answers["drop"] = {"name": "cache", "uid": 7, "freed_slots": 12345}
    assert run("drop", "cache")[1] == "cache: dropped, 12,345 slots were freed\n"
    assert daemon.asked[-1] == {"verb": "drop", "name": "cache"}
    assert run("drop", "cache", "--uid", "7")[0] == 0
    assert daemon.asked[-1] == {"verb": "drop", "name": "cache", "uid": 7}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.OUT_OF_SERVICE, 1),
        (Status.BAD_ARGUMENT, 2),
        (Status.NOT_ALLOWED, 77),
        (Status.STOPPING, 69),
        (Status.UNKNOWN_OP, 76),
    ],
)
def test_refusals_have_exit_codes(daemon: Daemon, run: Run, status: Status, expected: int) -> None:
    """What the daemon refuses is one line on standard error and the manual's exit code."""
    daemon.refuse = (status, "because of this")
    code, out, err = run("compact")
    assert (code, out) == (expected, "")
    assert err.startswith("vswapctl: because of this")
    assert err.count("\n") == 1


def test_no_daemon_is_exit_69(run: Run, tmp_path: Path) -> None:
    """Without a daemon the error names the place and what to do, in one line."""
    code, out, err = run("--socket", str(tmp_path / "none"), "status")
    assert (code, out) == (69, "")
    assert str(tmp_path / "none") in err
    assert "vswapd serve" in err
    assert "--socket" in err
    assert err.count("\n") == 1


def test_answer_of_another_version_is_exit_76(daemon: Daemon, run: Run) -> None:
    """A document that lacks something is told as a difference of versions, not a traceback."""
    daemon.documents = [{key: value for key, value in EMPTY.items() if key != "pool"}]
    code, _, err = run("status")
    assert code == 76
    assert err == (
        "vswapctl: the daemon's answer lacks 'pool': install daemon and vswapctl of one version\n"
    )


def test_picture_that_cannot_be_written_is_exit_1(daemon: Daemon, run: Run, tmp_path: Path) -> None:
    """A file that cannot be made is an error with its path."""
    code, _, err = run("status", "--svg", str(tmp_path / "no/x.svg"))
    assert code == 1
    assert str(tmp_path / "no/x.svg") in err


def test_picture_is_not_written_through_a_link(daemon: Daemon, run: Run, tmp_path: Path) -> None:
    """A link at the path is refused, and what it leads to is what it was; a pipe is written to."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x.svg").symlink_to(tmp_path / "victim")
    code, _, err = run("status", "--svg", str(tmp_path / "x.svg"))
    assert (code, err) == (1, f"vswapctl: {tmp_path}/x.svg: is a link: name the file itself\n")
    assert (tmp_path / "victim").read_text() == "mine"
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        assert run("status", "--svg", f"/dev/fd/{writer}")[0] == 0
        os.close(writer)
        assert b"<svg" in pipe.read()


def test_picture_is_not_written_to_what_others_link_to(
    daemon: Daemon, run: Run, tmp_path: Path
) -> None:
    """In a folder of everybody's a link to a device is refused, and nothing is written to that."""
    folder = tmp_path / "everybodys"
    folder.mkdir()
    folder.chmod(0o777)
    reader, writer = os.openpty()  # a device as a disk is one, and it shows what it was given
    (folder / "x.svg").symlink_to(os.ttyname(writer))
    code, _, err = run("status", "--svg", str(folder / "x.svg"))
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    assert (code, err) == (1, f"vswapctl: {folder}/x.svg: is a link: name the file itself\n")


def test_reader_that_has_seen_enough_is_no_error(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe behind standard output ends vswapctl quietly."""

    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            return spare.fileno()

    with Path("/dev/null").open("w") as spare:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["status", "--json"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        "nonsense",
        "set pool.max",
        "set =1",
        "writeback",
        "writeback 5Q",
        "swapon",
        "swapon /a --size many",
        "swapon /a --priority 40000",
        "status --watch 0",
        "status --watch soon",
        "completion tcsh",
        "compact now",
        "status --jso",
    ],
)
def test_wrong_command_line_is_exit_2(daemon: Daemon, run: Run, words: str) -> None:
    """A command line that makes no sense is refused before the daemon is asked anything."""
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert "usage: " in err
    assert daemon.asked == []


def test_wrong_size_names_the_units(run: Run) -> None:
    """A wrong unit on the command line is told with the right ones."""
    assert "units B, K, M, G, T" in run("writeback", "5Q")[2]


def test_help_and_version(run: Run) -> None:
    """--version names the program, --help lists every verb; both end with 0."""
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("vswapctl ")
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"    {verb} " in out for verb in (*ANSWERS, "status", "demo", "completion"))
