"""`make install` into a staging directory: all in place, and no trace of where it was made."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.sources import REPOSITORY, copy_sources

PREFIX = "/opt/vswapd"
# The stage may have to fetch wheels first.
pytestmark = pytest.mark.timeout(600)

EXPECTED = (
    "bin/vswapd",
    "bin/vswapctl",
    "lib/systemd/system/vswapd.service",
    "lib/systemd/system/vswapd.socket",
    "lib/systemd/user/vswapd.service",
    "lib/systemd/user/vswapd.socket",
    "lib/sysusers.d/vswapd.conf",
    "lib/tmpfiles.d/vswapd.conf",
    "share/man/man8/vswapd.8",
    "share/man/man1/vswapctl.1",
    "share/bash-completion/completions/vswapd",
    "share/bash-completion/completions/vswapctl",
    "share/zsh/site-functions/_vswapd",
    "share/zsh/site-functions/_vswapctl",
    "share/fish/vendor_completions.d/vswapd.fish",
    "share/fish/vendor_completions.d/vswapctl.fish",
)


def _make(sources: Path, target: str, destination: Path) -> str:
    """Run make; returns what it complained of."""
    # What is installed must not lean on the clone's .venv, so its base interpreter is used.
    python = Path(sys.base_prefix) / "bin" / "python3"
    variables = [f"DESTDIR={destination}", f"PREFIX={PREFIX}", f"PYTHON={python}"]
    result = subprocess.run(
        ["make", "--no-print-directory", target, *variables],
        cwd=sources,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's files, where something can be built."""
    return copy_sources(tmp_path_factory.mktemp("clone") / "vswapd")


@pytest.fixture(scope="module")
def staged(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory into which an installation was staged."""
    destination = tmp_path_factory.mktemp("staged")
    _make(sources, "install", destination)
    return destination


def _files(directory: Path) -> Sequence[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("name", EXPECTED)
def test_everything_is_in_its_place(staged: Path, name: str) -> None:
    """Commands, units, users, pages and completions are where systems look for them."""
    path = staged / PREFIX.lstrip("/") / name
    assert path.stat().st_size > 0


def test_nothing_else_is_installed(staged: Path) -> None:
    """Beside the listed files there are only the configuration and the daemon's own directory."""
    prefix = staged / PREFIX.lstrip("/")
    own = prefix / "lib" / "vswapd"
    others = {path for path in _files(staged) if own not in path.parents}
    expected = {prefix / name for name in EXPECTED} | {staged / "etc/vswapd/vswapd.toml"}
    assert others == expected


def test_no_path_of_the_build_remains(staged: Path, sources: Path) -> None:
    """No installed file, compiled ones included, names the staging directory or the sources."""
    traces = [os.fsencode(staged), os.fsencode(sources)]
    for path in _files(staged):
        content = path.read_bytes()
        assert not any(trace in content for trace in traces), path


def test_modules_are_compiled_for_where_they_run(staged: Path) -> None:
    """Each module of ours has its compiled form, so a service that may not write has it."""
    sources = [path for path in _files(staged) if path.suffix == ".py" and "vswap" in str(path)]
    assert sources
    for source in sources:
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), source


def test_commands_run_isolated_from_the_environment(staged: Path) -> None:
    """The commands run the installed interpreter, deaf to PYTHONPATH and the current directory."""
    # No SIGHUP ends the daemon before it knows what to do with one.
    commands = (("vswapd", "vswapd", 'trap "" HUP; '), ("vswapctl", "vswapd.ctl", ""))
    for name, module, before in commands:
        text = (staged / PREFIX.lstrip("/") / "bin" / name).read_text()
        python = f"{PREFIX}/lib/vswapd/bin/python"
        assert text == f'#!/bin/sh\n{before}exec {python} -I -m {module} "$@"\n'


def test_the_service_starts_the_installed_command(staged: Path) -> None:
    """The units name the commands below PREFIX."""
    for kind in ("system", "user"):
        unit = (staged / PREFIX.lstrip("/") / f"lib/systemd/{kind}/vswapd.service").read_text()
        assert f"\nExecStart={PREFIX}/bin/vswapd serve" in unit
        assert f"\nExecReload={PREFIX}/bin/vswapctl " in unit
        assert "/usr/local" not in unit


def test_no_installer_is_installed(staged: Path) -> None:
    """The installed interpreter has what the daemon imports: no pip, no scripts, no test tools."""
    own = staged / PREFIX.lstrip("/") / "lib" / "vswapd"
    assert {path.name for path in (own / "bin").iterdir() if not path.is_symlink()} == set()
    [site] = own.glob("lib/python3.*/site-packages")
    assert not {"pip", "pytest", "setuptools", "bin"} & {path.name for path in site.iterdir()}
    assert {"vswap", "vswapd", "vswapd_backends", "vswapd_blockdev"} <= {
        path.name for path in site.iterdir()
    }


def test_the_staged_daemon_starts(staged: Path) -> None:
    """What was staged runs: the interpreter finds the daemon and everything it imports."""
    python = staged / PREFIX.lstrip("/") / "lib/vswapd/bin/python"
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    result = subprocess.run(
        [python, "-I", "-m", "vswapd", "--version"], capture_output=True, text=True, check=True
    )
    assert version in result.stdout


def test_the_pages_describe_each_command(staged: Path) -> None:
    """The man pages are generated from the parsers and name sections and verbs."""
    share = staged / PREFIX.lstrip("/") / "share/man"
    daemon = (share / "man8/vswapd.8").read_text()
    tool = (share / "man1/vswapctl.1").read_text()
    for verb in ("serve", "check-config"):
        assert verb in daemon.replace("\\-", "-")
    for verb in ("status", "set", "swapon", "swapoff", "writeback", "compact", "verify", "spaces"):
        assert verb in tool
    assert "SIGHUP" in daemon
    assert all(f"{code}," in daemon for code in (0, 2, 69, 71, 78))
    assert "VSWAP_SOCKET" in tool


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vswapd ser", "serve"),
        ("vswapd serve --con", "--config"),
        ("vswapd serve --config /dev/nul", "/dev/null"),
        ("vswapctl writeb", "writeback"),
        ("vswapctl swapon /dev/nul", "/dev/null"),
    ],
)
def test_bash_completes_installed_commands(staged: Path, words: str, expected: str) -> None:
    """Bash, with the installed completions, completes verbs, options and names of files."""
    command, *_ = words.split()
    completions = staged / PREFIX.lstrip("/") / "share/bash-completion/completions" / command
    drive = f"""
source {completions}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
compopt() {{ :; }}
_shtab_{command}
echo "${{COMPREPLY[*]}}"
"""
    result = subprocess.run(
        ["bash", "--norc", "-s"], input=drive, text=True, capture_output=True, check=True
    )
    assert result.stdout == f"{expected}\n"


def test_an_interpreter_that_the_service_cannot_run(sources: Path, tmp_path: Path) -> None:
    """Installing with a Python from a home directory says so, as the unit hides those."""
    python = (sources / "build/stage/venv/bin/python").resolve()
    hidden = str(python).startswith(("/home/", "/root/"))
    assert ("PYTHON=/usr/bin/python3" in _make(sources, "install", tmp_path)) == hidden


def test_an_existing_configuration_is_kept(sources: Path, tmp_path: Path) -> None:
    """Installing over a configuration leaves it; uninstalling leaves it too, and nothing else."""
    configuration = tmp_path / "etc/vswapd/vswapd.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text("# mine\n")
    _make(sources, "install", tmp_path)
    assert configuration.read_text() == "# mine\n"
    _make(sources, "uninstall", tmp_path)
    assert _files(tmp_path) == [configuration]
