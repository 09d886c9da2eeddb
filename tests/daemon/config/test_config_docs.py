"""The example file and the manual page hold every key, with the default that the code has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vswapd.config import KEYS, RELOADABLE, Config, load
from vswapd.config_schema import Device, GroupKeys, field_names

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "systemd/vswapd.toml"
MANUAL = ROOT / "docs/configuration.md"
_COMMENTED = re.compile(r"^#(?=\[|\w+ = )")


def uncommented() -> str:
    """The example with every default in force."""
    return "\n".join(_COMMENTED.sub("", line) for line in EXAMPLE.read_text().splitlines())


def test_example_as_shipped_is_the_defaults() -> None:
    """The example loads, and changes nothing until somebody edits it."""
    assert load(EXAMPLE).flat() == Config().flat()


def test_example_has_every_key_with_its_default(tmp_path: Path) -> None:
    """With every line uncommented, the example holds each key once and still is the defaults."""
    document = tomllib.loads(uncommented())
    keys = [f"{s}.{k}" for s in document if s not in {"device", "groups"} for k in document[s]]
    assert sorted(keys) == sorted(KEYS)
    assert tuple(document["device"][0]) == field_names(Device)
    assert tuple(document["groups"]["default"]) == field_names(GroupKeys)
    file = tmp_path / "vswapd.toml"
    file.write_text(uncommented())
    flat = {k: v for k, v in load(file).flat().items() if not k.startswith("device[0].")}
    assert flat == Config().flat()
    assert load(file).devices[0].priority == 0
    assert load(file).devices[0].encrypt


def test_example_marks_the_live_keys() -> None:
    """A key's comment says [live] if and only if the key can be changed at run time."""
    section = ""
    live: dict[str, bool] = {}
    comment: list[str] = []
    for line in EXAMPLE.read_text().splitlines():
        text = _COMMENTED.sub("", line)
        if text.startswith("["):
            section, comment = text.strip("[]"), []
        elif line.startswith("# "):
            comment.append(line)
        elif not line:
            comment = []
        elif " = " in text and section not in {"device", "groups.default"}:
            live[f"{section}.{text.split(' = ')[0]}"] = "[live]" in " ".join(comment)
    assert {k for k, marked in live.items() if marked} == RELOADABLE.intersection(live)
    assert set(live) == set(KEYS)


def test_manual_has_every_key_with_its_default() -> None:
    """Each key is one line of a table in docs/configuration.md, with its default beside it."""
    rows = dict(
        re.findall(r"^\| `([a-z_.]+)` \| `?([^|`]*?)`? ?\|", MANUAL.read_text(), re.MULTILINE)
    )
    defaults = {k: v or '""' for k, v in Config().flat().items()}
    devices = {f"device.{name}" for name in field_names(Device)}
    assert set(rows) == set(defaults) | devices
    assert {k: rows[k] for k in defaults} == defaults


@pytest.mark.parametrize("line", re.findall(r"^    (\S+: .*)$", MANUAL.read_text(), re.MULTILINE))
def test_errors_in_the_manual_are_real(line: str, tmp_path: Path) -> None:
    """The error lines that the manual shows are those that the code writes (as far as shown)."""
    file = tmp_path / "vswapd.toml"
    shown = line.removeprefix("/etc/vswapd/vswapd.toml: ")
    file.write_text('[pool]\nmaks = "1G"\n' if "maks" in line else '[pool]\nmax = "12Q"\n')
    overrides = ["server.max_batch=0"] if line.startswith("--set") else []
    with pytest.raises(Exception, match=re.escape(shown)) as caught:
        load(None if overrides else file, overrides)
    assert caught.value.exit_code == 78  # type: ignore[attr-defined]
