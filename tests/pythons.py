"""Tests on the other versions of Python that are supported: `make test-pythons`.

Which versions there are is what pyproject.toml says; this interpreter's own is left to `make test`.
An interpreter of this machine is taken if there is one (in PATH, or of pyenv), else that of a
Debian release, in a copy of its tree. Each version has an environment without pip in build/pythons,
filled from here, so that a tree needs no network. All run at the same time: they mostly wait.

With CI=true every version has to be tested. Else those that are not to be had are named.

This module must not know what is tested.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from support import trees
from support.container import PACKAGES, PATH
from support.sources import REPOSITORY

TESTS: Final = (
    *("tests/client", "tests/backends", "tests/daemon/ctl", "tests/daemon/test_demo.py"),
    "--ignore=tests/daemon/ctl/test_completion.py",  # of shells, which are not in the trees
)
"""Whatever runs in a user's own programs and at his terminal, and what is closest to numpy."""
RELEASES: Final = {"3.11": "bookworm", "3.13": "trixie", "3.14": "sid"}
"""Debian's, by their version of Python. None has 3.12."""
ENVIRONMENTS: Final = REPOSITORY / "build" / "pythons"

IN_TREE: Final = """
root=$1 clone=$2; shift 2
mkdir -p "$root$clone"
mount --bind "$clone" "$root$clone"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$clone" "$@"
"""
"""Run as root in namespaces of its own, with which all mounts and processes end."""


class Unavailable(Exception):  # noqa: N818 - it is not always an error
    """A version of Python that cannot be had here; the text says why, and what to do."""


def versions() -> list[str]:
    """What pyproject.toml says is supported, oldest first."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    found = [name.removeprefix(prefix) for name in project["classifiers"]]
    return [version for version in found if re.fullmatch(r"3\.\d+", version)]


def on_this_machine(version: str) -> str | None:
    """An interpreter of that version. One of pyenv's shims may be of no version at all: try it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}")]
    places += sorted(str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python"))
    for place in places:
        if place is not None and version_of([place]) == version:
            return place
    return None


def version_of(python: Sequence[str]) -> str:
    said = subprocess.run(
        [*python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()


@contextlib.contextmanager
def interpreter(version: str) -> Iterator[list[str]]:
    """The beginning of commands that are run by that version, with the clone where it is.

    Raises:
        Unavailable: there is none, and none can be made.
    """
    python = on_this_machine(version)
    if python is not None:
        yield [python]
        return
    if version not in RELEASES:
        raise Unavailable(f"no Debian release has it: install python{version}, with pyenv say")
    why = trees.missing()
    if why is not None:
        raise Unavailable(f"no python{version} here, and no tree with one: {why}")
    with trees.copy(trees.tree(RELEASES[version], PACKAGES)) as root:
        unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        enter = [*unshare, "sh", "-euc", IN_TREE, "sh", str(root), str(REPOSITORY)]
        kept = [f"{name}={os.environ[name]}" for name in ("CI", "LC_ALL") if name in os.environ]
        nothing_else = ["env", "-i", f"PATH={PATH}", "HOME=/root", "PYTHONDONTWRITEBYTECODE=1"]
        python_in_tree = [*enter, *nothing_else, *kept, "/usr/bin/python3"]
        found = version_of(python_in_tree)
        if found != version:
            raise Unavailable(f"Debian's {RELEASES[version]} has Python {found!r} by now")
        yield python_in_tree


def environment(version: str, python: list[str]) -> Path:
    """The interpreter of an environment that has all that the tests need; made if need be."""
    made = ENVIRONMENTS / version
    of = (REPOSITORY / "pyproject.toml").read_text() + repr(python[-1])
    stamp = made / "stamp"
    if not stamp.exists() or stamp.read_text() != of:
        shutil.rmtree(made, ignore_errors=True)
        checked([*python, "-m", "venv", "--without-pip", str(made)])
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
        site = made / "lib" / f"python{version}" / "site-packages"
        checked(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"),
                *("--target", str(site), "--python-version", version, "--only-binary=:all:"),
                *(*project["project"]["dependencies"], *project["dependency-groups"]["test"]),
            ]
        )
        stamp.write_text(of)
    return made / "bin" / "python"


def checked(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")


def run(version: str) -> bool:
    """Test one version, and say at once what came of it."""
    begin = time.monotonic()
    with interpreter(version) as python:
        command = [*python[:-1], str(environment(version, python)), "-m", "pytest"]
        result = subprocess.run(
            [*command, "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    took_s = time.monotonic() - begin
    if result.returncode:
        print(f"{result.stdout}{result.stderr}")
    last = (result.stdout.strip().splitlines() or ["nothing was said"])[-1]
    print(f"Python {version}, {took_s:.0f} s with its environment: {last}", flush=True)
    return not result.returncode


def main() -> int:
    this = ".".join(map(str, sys.version_info[:2]))
    others = [version for version in versions() if version != this]
    failed = False
    with ThreadPoolExecutor(len(others)) as pool:
        for version, outcome in [(version, pool.submit(run, version)) for version in others]:
            try:
                failed |= not outcome.result()
            except Unavailable as reason:
                print(f"Python {version} is not tested: {reason}", flush=True)
                failed |= os.environ.get("CI") == "true"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
