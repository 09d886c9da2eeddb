"""Starts that fail: each is one line on standard error, a code of sysexits.h, and leaves nothing.

One table, a line for each. The daemon is a real one, and so is what keeps it from starting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.wire import STORE, Wire, noise

USAGE, UNAVAILABLE, OSERR, IOERR, CONFIG = 2, 69, 71, 74, 78
DEADLINE_S = 60

REFUSE_MEMORY_FILES = """
import ctypes, errno, struct
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
number = {"x86_64": 319, "aarch64": 279}[os.uname().machine]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno.EPERM),
         (0x06, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("HBBI", *step) for step in steps)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(steps), code)), 0, 0) == 0
"""
"""seccomp(2): memfd_create answers EPERM."""


def limit(name: str, value: int) -> str:
    return f"import resource; resource.setrlimit(resource.{name}, ({value}, {value}))"


LITTLE_DATA = """
import numpy, resource
[used] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:")]
few = int(used) * 1024 + (1 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (few, few))
"""
"""Too little for what is to be imported, or reserved, behind numpy."""


def passed(fds: str, *, pid: str = "str(os.getpid())") -> str:
    return f"os.environ['LISTEN_FDS'] = {fds!r}; os.environ['LISTEN_PID'] = {pid}"


def passed_socket(family: str, kind: str, then: str = "") -> str:
    return (
        f"import socket; s = socket.socket(socket.{family}, socket.{kind}); {then or None}; "
        "os.dup2(s.fileno(), 3); os.set_inheritable(3, True); " + passed("1")
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One start that fails."""

    code: int
    line: str
    """Part of the line."""
    before: str = ""
    """Python that runs in the process before it becomes the daemon."""
    arguments: Sequence[str] = ()
    """DIR stands for a folder of the test's own; a --socket among them replaces the usual one."""
    under: Sequence[str] = ()
    """What runs the command, where root is needed for it."""
    make: Callable[[Path], object] = lambda _: None
    """What stands in the folder."""
    shards: Sequence[int] = (1,)
    """Tried with these: where several fail in another way than one."""


def on_a_mount(options: str, where: str) -> tuple[str, ...]:
    """Runs a command in a mount namespace where something else stands at `where`."""
    script = f'mount -t tmpfs {options} none {where} && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


def write(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


CONFIG_FILE = ["--config=DIR/it"]
CASES: dict[str, Case] = {
    # Limits of the process
    "address space": Case(
        shards=(1, 2),
        code=OSERR,
        line="RLIMIT_AS is 2147483648",
        before=limit("RLIMIT_AS", 2 << 30),
    ),
    "hardly any address space": Case(
        code=OSERR, line="RLIMIT_AS is 209715200", before=limit("RLIMIT_AS", 200 << 20)
    ),
    "data": Case(shards=(1, 2), code=OSERR, line="RLIMIT_DATA is ", before=LITTLE_DATA),
    "file size": Case(
        shards=(1, 2),
        code=OSERR,
        line="RLIMIT_FSIZE is 1048576",
        before=limit("RLIMIT_FSIZE", 1 << 20),
    ),
    "descriptors": Case(
        shards=(1, 2), code=OSERR, line="RLIMIT_NOFILE is 12", before=limit("RLIMIT_NOFILE", 12)
    ),
    "no descriptors": Case(code=OSERR, line="RLIMIT_NOFILE is 5", before=limit("RLIMIT_NOFILE", 5)),
    "memory files": Case(
        shards=(1, 2),
        code=OSERR,
        line="memfd_create): Operation not permitted",
        before=REFUSE_MEMORY_FILES,
    ),
    "processes": Case(
        shards=(1, 2),
        code=OSERR,
        line="RLIMIT_NPROC is 1",
        under=(
            *("setpriv", "--ruid=61234", "--bounding-set=-sys_resource,-sys_admin"),
            *("prlimit", "--nproc=1"),
        ),
    ),
    # Names
    "a name that is no text": Case(
        code=CONFIG, line="is no UTF-8 text", arguments=["--socket=DIR/\udcff"]
    ),
    "a device that is no text": Case(
        code=CONFIG, line="is no UTF-8 text", arguments=["--set=device=DIR/\udcff,size=8M"]
    ),
    "a text file that is no text": Case(
        code=CONFIG, line="is no UTF-8 text", arguments=["--set=metrics.textfile=DIR/\udcff.prom"]
    ),
    "a zero byte": Case(
        code=CONFIG,
        line="has a zero byte",
        arguments=CONFIG_FILE,
        make=write("it", b'[server]\nsocket = "/tmp/a\\u0000b"\n'),
    ),
    "a group with a zero byte": Case(
        code=CONFIG,
        line="no user of that name",
        arguments=CONFIG_FILE,
        make=write("it", b'[groups."a\\u0000b"]\npool_max = "1M"\n'),
    ),
    "a folder that is not there": Case(
        code=UNAVAILABLE, line="there is no such folder", arguments=["--socket=DIR/no/socket"]
    ),
    "a folder that is a file": Case(
        code=UNAVAILABLE,
        line="Not a directory",
        arguments=["--socket=DIR/it/socket"],
        make=write("it", b""),
    ),
    "a folder where nothing can be made": Case(
        code=UNAVAILABLE, line="cannot be made", arguments=["--socket=/proc/self/vswapd.sock"]
    ),
    "a lock that is a folder": Case(
        code=UNAVAILABLE, line="lock: cannot be made", make=lambda d: (d / "s.lock").mkdir()
    ),
    "a lock that is a pipe": Case(
        code=UNAVAILABLE, line="is no lock of this user's", make=lambda d: os.mkfifo(d / "s.lock")
    ),
    "a lock that is a link": Case(
        code=UNAVAILABLE,
        line="lock: cannot be made",
        make=lambda d: (d / "s.lock").symlink_to(d / "it"),
    ),
    "a socket that is a link": Case(
        code=UNAVAILABLE, line="is no socket", make=lambda d: (d / "s").symlink_to("/nowhere")
    ),
    # Descriptors from a service manager
    "a closed descriptor": Case(
        code=OSERR, line="LISTEN_FDS: descriptor 3 was not passed", before=passed("1")
    ),
    "more than there are": Case(
        code=OSERR, line="descriptor 3 was not passed", before=passed("999999999")
    ),
    "no number of descriptors": Case(
        code=OSERR, line="LISTEN_FDS: many is no number", before=passed("many")
    ),
    "a number that is too long": Case(
        code=OSERR, line="is no number of descriptors", before=passed("1" * 5000)
    ),
    "no listener": Case(
        code=OSERR, line="no listening Unix stream", before=passed_socket("AF_UNIX", "SOCK_STREAM")
    ),
    "a datagram socket": Case(
        code=OSERR, line="no listening Unix stream", before=passed_socket("AF_UNIX", "SOCK_DGRAM")
    ),
    "a TCP socket": Case(
        code=OSERR,
        line="no listening Unix stream",
        before=passed_socket("AF_INET", "SOCK_STREAM", "s.bind(('127.0.0.1', 0)); s.listen()"),
    ),
    # The machine
    "no /proc": Case(code=OSERR, line="mount /proc", under=on_a_mount("", "/proc")),
    "a file system that is read only": Case(
        code=UNAVAILABLE,
        line="Read-only file system",
        arguments=["--socket=/mnt/socket"],
        under=on_a_mount("-o ro", "/mnt"),
    ),
    "a disk that is full": Case(
        code=OSERR,
        line="no room for 67108864 bytes",
        arguments=["--set=device=/mnt/swap,size=64M"],
        under=on_a_mount("-o size=2M", "/mnt"),
    ),
    "a swap file on what is read only": Case(
        code=OSERR,
        line="Read-only file system",
        arguments=["--set=device=/mnt/swap,size=64M"],
        under=on_a_mount("-o ro", "/mnt"),
    ),
    # The configuration
    "a pipe": Case(
        code=CONFIG,
        line="is no regular file",
        arguments=CONFIG_FILE,
        make=lambda d: os.mkfifo(d / "it"),
    ),
    "a folder": Case(code=CONFIG, line="Is a directory", arguments=["--config=DIR"]),
    "no file": Case(code=CONFIG, line="cannot be read: No such", arguments=CONFIG_FILE),
    "a device": Case(code=CONFIG, line="no regular file", arguments=["--config=/dev/zero"]),
    "binary": Case(
        code=CONFIG, line="not UTF-8", arguments=CONFIG_FILE, make=write("it", b"\x7fELF\xff\x00")
    ),
    "zero bytes": Case(
        code=CONFIG, line="not valid TOML", arguments=CONFIG_FILE, make=write("it", bytes(100))
    ),
    "huge": Case(
        code=CONFIG,
        line="is longer than 1.00 MiB",
        arguments=CONFIG_FILE,
        make=write("it", b"#" * (2 << 20)),
    ),
    "deep": Case(
        code=CONFIG, line="too deep", arguments=CONFIG_FILE, make=write("it", b"a=" + b"[" * 99999)
    ),
    "many digits": Case(
        code=CONFIG, line="digits", arguments=CONFIG_FILE, make=write("it", b"a=" + b"1" * 9999)
    ),
    "a port that is no port of ours": Case(
        code=CONFIG, line="cannot listen at", arguments=["--set=metrics.listen=192.0.2.1:9177"]
    ),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="vswapd-test-") as name:
        yield Path(name)


def command(case: Case, folder: Path, module: Sequence[str], arguments: Sequence[str]) -> list[str]:
    script = f"import os, sys\n{case.before}\nos.execv(sys.executable, sys.argv[1:])"
    words = [word.replace("DIR", str(folder)) for word in arguments]
    become = [sys.executable, "-c", textwrap.dedent(script)]
    return [*case.under, *become, sys.executable, "-W", "error", "-m", *module, *words]


def _session(marked: str) -> list[str]:
    """Processes that were started with this in their environment, and have not ended."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if marked.encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("name", "shards"), [(name, shards) for name, case in CASES.items() for shards in case.shards]
)
def test_each_is_one_line(name: str, shards: int, folder: Path) -> None:
    """A start that fails is one line, a code of sysexits.h, and leaves no file and no process."""
    case = CASES[name]
    if case.under and os.geteuid() != 0:
        pytest.skip("hardware: only root can mount, or become somebody else")
    case.make(folder)
    before = sorted(folder.rglob("*"))
    mark = f"FAILING_START={folder.name}"
    arguments = ["serve", "--set=pool.max=8M", f"--set=server.shards={shards}", *case.arguments]
    if not any(word.startswith("--socket") for word in arguments):
        arguments.append("--socket=DIR/s")
    done = subprocess.run(
        command(case, folder, ["vswapd"], arguments),
        env=daemon_environment(dict([mark.split("=")])),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    said = done.stderr.decode()
    assert len(said.splitlines()) == 1, said
    assert case.line in said
    assert "Traceback" not in said
    assert done.returncode == case.code
    assert done.stdout == b""
    assert sorted(folder.rglob("*")) == before
    assert not _session(mark)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("vswapd", ["check-config"]),
        ("vswapd", ["--help"]),
        ("vswapd.ctl", ["--help"]),
        ("vswapd.ctl", ["completion", "bash"]),
    ],
)
@pytest.mark.parametrize("output", [">&-", ">/dev/full"])
def test_output_that_nobody_takes(module: str, words: list[str], output: str) -> None:
    """What cannot be printed is one line and EX_IOERR, not success."""
    script = f'exec "$@" {output}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-W", "error", "-m", module, *words],
        env=daemon_environment(),
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == IOERR
    (line,) = done.stderr.decode().splitlines()
    assert "standard output: " in line


@pytest.mark.parametrize("module", ["vswapd", "vswapd.ctl"])
def test_a_reader_that_has_seen_enough(module: str) -> None:
    """Output whose reader has gone is no error."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, "--help"],
        env=daemon_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["descriptors", "hardly any address space"])
@pytest.mark.parametrize("words", [["status"], ["set", "pool.max=1M"], ["verify"]])
def test_the_operators_tool_is_one_line(name: str, words: list[str], folder: Path) -> None:
    """vswapctl under a limit that it cannot live with is one line and a code of sysexits.h."""
    arguments = ["--socket=DIR/s", *words]
    done = subprocess.run(
        command(CASES[name], folder, ["vswapd.ctl"], arguments),
        env=daemon_environment(),
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr.decode()
    assert done.returncode in {UNAVAILABLE, OSERR}


ODD_STARTS = {
    "no standard input": ('exec "$@" <&-', {}),
    "no standard output": ('exec "$@" >&-', {}),
    "no standard error": ('exec "$@" 2>&-', {}),
    "none of the three": ('exec "$@" <&- >&- 2>&-', {}),
    "a folder that was removed": ('mkdir gone && cd gone && rmdir ../gone && exec "$@"', {}),
    "no home": ('unset HOME TMPDIR; exec "$@"', {}),
    "no folder for temporary files": ('exec "$@"', {"TMPDIR": "/nonexistent"}),
    "a startup file": ('exec "$@"', {"PYTHONSTARTUP": "/nonexistent", "PYTHONINSPECT": ""}),
    "descriptors of another": ('exec "$@"', {"LISTEN_FDS": "1", "LISTEN_PID": "1"}),
    "no number of seconds": ('exec "$@"', {"WATCHDOG_USEC": "9" * 5000, "FDSTORE": "9" * 5000}),
}


@pytest.mark.parametrize(("name", "shards"), list(zip(ODD_STARTS, cycle([1, 2]), strict=False)))
def test_what_is_odd_but_no_reason_not_to_start(name: str, shards: int) -> None:
    """The daemon starts without what it does not need, serves, and ends with 0."""
    script, environment = ODD_STARTS[name]
    with (
        running_daemon(
            *("pool.max=8M", f"server.shards={shards}"),
            environment=environment,
            under=("sh", "-c", script, "sh"),
        ) as daemon,
        Wire(daemon.socket_path) as wire,
    ):
        wire.hello()
        assert wire.ask(STORE, noise(3), count=3).status == 0
        inherited = {fd: os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in range(3)}
        assert all(target.startswith("/") for target in inherited.values()), inherited


def test_no_sys_is_no_reason_not_to_start() -> None:
    """Without /sys there are no control groups to be seen, and the daemon starts."""
    if os.geteuid() != 0:
        pytest.skip("hardware: only root can mount")
    with (
        running_daemon("pool.max=8M", under=on_a_mount("", "/sys")) as daemon,
        Wire(daemon.socket_path) as wire,
    ):
        wire.hello()


def test_a_full_log_does_not_keep_a_failing_start(folder: Path) -> None:
    """Where nobody reads standard error, a start that fails ends all the same."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    try:
        for extra in ("--set=pool.maxx=1", f"--socket={folder}/no/such"):
            done = subprocess.run(
                [sys.executable, "-m", "vswapd", "serve", extra],
                env=daemon_environment(),
                stderr=writer,
                timeout=DEADLINE_S,
                check=False,
            )
            assert done.returncode in {UNAVAILABLE, CONFIG}
    finally:
        os.close(reader)
        os.close(writer)
