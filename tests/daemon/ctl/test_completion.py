"""Completions and the manual page, both made from the parser."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess

import pytest

from vswapd.config import RELOADABLE
from vswapd.ctl import main
from vswapd.ctl.parser import SHELLS, build_parser
from vswapd.ctl.verbs import VERBS

manpage = pytest.importorskip("argparse_manpage.manpage", reason="argparse-manpage is not there")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no verbs")


def test_every_verb_is_carried_out() -> None:
    """What the parser takes and what can be carried out are the same verbs."""
    assert set(verbs_of(build_parser())) == set(VERBS)


@pytest.mark.parametrize("shell", SHELLS)
def test_script_knows_verbs_and_keys(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shell's script completes all verbs, and `set` with the keys that are live."""
    text = script(shell, capsys)
    assert all(verb in text for verb in VERBS)
    assert all(f"{key.replace('*', 'default')}=" in text for key in RELOADABLE)


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell itself parses its script."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    result = subprocess.run(
        [program, "-n", "/dev/stdin"],
        input=script(shell, capsys),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vswapctl sw", {"swapon", "swapoff"}),
        ("vswapctl completion ", {"bash", "zsh", "fish"}),
        ("vswapctl --so", {"--socket"}),
        ("vswapctl set pool.t", {"pool.tiers="}),
    ],
)
def test_bash_completes(words: str, expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Bash, given the beginning of a command line, offers what can follow."""
    bash = shutil.which("bash")
    assert bash is not None
    drive = f"""
compopt() {{ :; }}
COMP_WORDS=({words}{" ''" if words.endswith(" ") else ""})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_vswapctl
echo "${{COMPREPLY[*]}}"
"""
    result = subprocess.run(
        [bash, "--norc", "-s"],
        input=script("bash", capsys) + drive,
        text=True,
        capture_output=True,
        check=True,
    )
    assert set(result.stdout.split()) == expected


def test_manual_page_has_every_verb_and_exit_code() -> None:
    """The page made from the parser names each verb, each option and each exit code."""
    page = str(manpage.Manpage(build_parser()))
    text = re.sub(r"\\f[A-Z]", "", page).replace("\\-", "-").replace("\\", "")
    for name, parser in verbs_of(build_parser()).items():
        assert re.search(rf"\b{name}\b", text)
        assert parser.description
        for action in parser._actions:
            assert all(option in text for option in action.option_strings)
    for code in ("1,", "2,", "69,", "76,", "77,"):
        assert code in text


def test_texts_read_like_a_manual() -> None:
    """Help lines have no capital and no full stop; descriptions are sentences."""
    for parser in verbs_of(build_parser()).values():
        assert parser.description is not None
        assert parser.description[0].isupper()
        assert parser.description.rstrip().endswith((".", "`."))
        for action in parser._actions:
            assert action.help
            assert not action.help.endswith(".")
