"""What the repository promises about itself: files that are there, reasons, examples that run.

This module must not know how anything works; it reads files and runs the README's examples.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import daemon_environment, running_daemon
from support.sources import REPOSITORY

PROMISED = (
    ".ci/run",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "bench/corpora.py",
    "client/vswap/py.typed",
    "docs/configuration.md",
    "docs/installing.md",
    "docs/protocol.md",
    "systemd/vswapd.service",
    "systemd/vswapd.socket",
    "systemd/vswapd.sysusers.conf",
    "systemd/vswapd.tmpfiles.conf",
    "systemd/vswapd.toml",
)
SOURCE_ROOTS = ("client", "daemon", "backends", "blockdev")
BUILT = {".venv", "build", "dist"}
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in REPOSITORY.rglob("*.md")
    if not BUILT & set(path.relative_to(REPOSITORY).parts)
)


def _python_files(*folders: str) -> list[str]:
    return sorted(
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
    )


def _read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def _functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(_read(name))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", PROMISED)
def test_promised_files_exist(name: str) -> None:
    """Each file that users and the documentation rely on is there, and is not empty."""
    path = REPOSITORY / name
    assert path.is_file()
    assert path.stat().st_size or path.suffix == ".typed"


def test_ci_can_be_run() -> None:
    """The script that CI runs is executable."""
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


def test_every_dependency_and_every_ignored_rule_has_its_reason() -> None:
    """In pyproject.toml a comment stands beside each dependency and each lint rule left out."""
    text = _read("pyproject.toml")
    project = tomllib.loads(text)
    obvious = {"pytest", "ruff", "mypy"}
    named = list(project["project"]["dependencies"])
    for group in project["dependency-groups"].values():
        named += [entry for entry in group if isinstance(entry, str)]
    for entry in named:
        if re.split(r"[<>=~!]", entry)[0] not in obvious:
            assert re.search(rf'"{re.escape(entry)}",? +# \S', text), entry
    lint = text[text.index("[tool.ruff.lint]") :]
    for line in lint.splitlines():
        if re.match(r' +"[A-Z]+\d*",', line):
            assert re.search(r", +# \S", line), line


def test_every_supported_python_is_tested() -> None:
    """From the oldest on that can be installed for: named, one after the other, and run by CI."""
    project = tomllib.loads(_read("pyproject.toml"))
    oldest = re.fullmatch(r">=3\.(\d+)", project["project"]["requires-python"])
    assert oldest is not None
    named = re.findall(r"Python :: 3\.(\d+)", _read("pyproject.toml"))
    assert named == [str(minor) for minor in range(int(oldest[1]), 15)]
    assert project["tool"]["mypy"]["python_version"] == f"3.{named[0]}"
    assert "make test-pythons" in _read(".ci/run")


@pytest.mark.parametrize("name", _python_files(*SOURCE_ROOTS))
def test_modules_say_what_they_are(name: str) -> None:
    """Every module with code in it opens with a docstring."""
    tree = ast.parse(_read(name))
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("name", _python_files("tests"))
def test_tests_say_what_they_hold(name: str) -> None:
    """Every test states in its docstring the behaviour that it holds."""
    for function in _functions(name):
        if function.name.startswith("test_"):
            assert ast.get_docstring(function), f"{name}:{function.lineno} {function.name}"


@pytest.mark.parametrize("name", _python_files("tests"))
def test_tests_do_not_sleep(name: str) -> None:
    """No test waits for time to pass where it could wait for an event."""
    for node in ast.walk(ast.parse(_read(name))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"time.sleep", "sleep"}, f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", _python_files(*SOURCE_ROOTS))
def test_functions_fit_a_screen(name: str) -> None:
    """No function of the sources is longer than 80 lines, its docstring included."""
    for function in _functions(name):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 80, f"{name}:{function.lineno} {function.name} has {lines} lines"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(name: str) -> None:
    """Each relative link in a document names a file of the repository."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", _read(name)):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert ((REPOSITORY / name).parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_of_the_documents_exist(name: str) -> None:
    """Each `make TARGET` that a document names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", _read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`(?:sudo )?make ([a-z]+)", _read(name))) <= targets


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    """The changelog's first version is the one that pyproject.toml names."""
    version = tomllib.loads(_read("pyproject.toml"))["project"]["version"]
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", _read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    """The README's Python, taken as one script, runs against a real daemon without a warning."""
    blocks = re.findall(r"^```python\n(.*?)^```", _read("README.md"), re.MULTILINE | re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    with running_daemon() as daemon:
        result = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env=daemon_environment({"VSWAP_SOCKET": str(daemon.socket_path)}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr


def test_tests_of_the_threat_model_exist() -> None:
    """Each line of a table names tests, and each of them is there."""
    rows = [line for line in _read("docs/threat-model.md").splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.endswith("| held by |")]
    assert len(claims) > 20
    for row in claims:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in _read(f"tests/{file}"), f"{file}::{test}"
