"""What holds for the whole session: nothing is skipped where everything could run, nothing is left.

Invariants:
- With CI=true a skip fails the session, unless its reason begins with `hardware:`.
- When the last test is over, no process that a test started is alive, no socket still listens, and
  no file has appeared where daemons put theirs by default.

This module must not know any part under test.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

_MARK = "VSWAPD_TEST_SESSION"
_ALLOWED = "hardware:"

_problems = pytest.StashKey[list[str]]()
_before = pytest.StashKey[set[Path]]()


# No test is about time, and machines that run them are shared.
hypothesis.settings.register_profile("vswapd", deadline=None)
hypothesis.settings.load_profile("vswapd")


def pytest_configure(config: pytest.Config) -> None:
    # Children inherit the environment, wherever they are reparented to: so strays can be found.
    os.environ[_MARK] = uuid.uuid4().hex
    config.stash[_problems] = []
    config.stash[_before] = set(_default_sockets())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _note_skip(item.config, report.nodeid, report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _note_skip(collector.config, report.nodeid, report.longrepr)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    problems = session.config.stash[_problems]
    problems += [f"left behind: {what}" for what in _leftovers(session.config)]
    if problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    problems = terminalreporter.config.stash[_problems]
    if problems:
        terminalreporter.section("the session as a whole failed", red=True)
        for problem in problems:
            terminalreporter.line(problem)


def _note_skip(config: pytest.Config, where: str, longrepr: object) -> None:
    reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    reason = reason.removeprefix("Skipped: ")
    if os.environ.get("CI") == "true" and not reason.startswith(_ALLOWED):
        config.stash[_problems].append(f"skipped where nothing may be: {where}: {reason}")


def _leftovers(config: pytest.Config) -> Iterator[str]:
    for pid, command in _strays():
        yield f"process {pid}: {command}"
    for path in _own_listening_sockets():
        yield f"listening socket {path}"
    before = config.stash[_before]
    yield from (f"file {path}" for path in _default_sockets() if path not in before)


def _strays() -> Iterator[tuple[int, str]]:
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        if pid == os.getpid():
            continue
        try:
            marked = mark in (directory / "environ").read_bytes().split(b"\0")
            words = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # another user's, or gone by now
        if marked:
            yield pid, words.decode(errors="replace").strip()


def _own_listening_sockets() -> Iterator[str]:
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue  # the descriptor that lists the directory
        if target.startswith("socket:["):
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        accepts_connections = int(fields[3], 16) & 0x10000  # __SO_ACCEPTCON
        if accepts_connections and fields[6] in inodes:
            yield fields[7] if len(fields) > 7 else f"inode {fields[6]}"


def _default_sockets() -> Iterator[Path]:
    places = [Path("/run/vswapd.sock"), Path(f"/tmp/vswapd-{os.getuid()}")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(runtime) / "vswapd.sock")
    return (place for place in places if place.exists())
