"""docs/protocol.md names what a daemon says: every key, every status, every reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol.example import DOCUMENT
from support.daemon import running_daemon
from support.wire import STATUS, Wire, noise
from vswap.protocol import Reason, Status


def section(title: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    rank = title.split(maxsplit=1)[0]
    _, _, after = DOCUMENT.read_text().partition(f"\n{title}\n")
    assert after, title
    return re.split(rf"\n{rank} ", after, maxsplit=1)[0]


def keys_of(said: Any) -> Iterator[str]:
    """All keys of a document, those of settings aside."""
    if isinstance(said, dict):
        for key, value in said.items():
            yield key
            if key not in {"settings", "rejects"}:
                yield from keys_of(value)
    elif isinstance(said, list):
        for value in said:
            yield from keys_of(value)


def test_what_operators_are_told_is_on_the_page(tmp_path: Path) -> None:
    """Each key of the status, and of the answer to each verb, is named where it is explained."""
    with (
        running_daemon("server.shards=2", "pool.max=32M") as daemon,
        Wire(daemon.socket_path) as wire,
    ):
        answer = wire.hello(name="x")
        assert all(f'"{key}"' in section("### HELLO (1)") for key in answer)
        path = str(tmp_path / "swap")
        said = [wire.done("swapon", path=path, size="2M")]
        assert wire.store(noise(3)).status == 0
        named = section("### STATUS (6)")
        for key in keys_of(wire.ask(STATUS).json):
            assert f"`{key}`" in named, key
        said += [
            wire.done("set", key="pool.max", value="16M"),
            wire.done("spaces"),
            wire.done("verify"),
            wire.done("writeback", bytes="4K"),
            wire.done("compact"),
            wire.done("swapoff", path=path),
            wire.done("reload"),
        ]
        wire.socket.close()
        with Wire(daemon.socket_path) as operator:
            operator.hello(1)
            while operator.done("spaces")["spaces"][0]["pid"] is not None:
                pass
            said.append(operator.done("drop", name="x"))
        named = section("### CONTROL (7)")
        for key in keys_of(said):
            assert f"`{key}`" in named, key


def test_statuses_and_reasons_are_on_the_page() -> None:
    """Each by its number and name, and whether it closes the connection."""
    rows = re.findall(r"^\| 0x(\w+) \| (\w+) \| (.*?) ?\|", DOCUMENT.read_text(), re.MULTILINE)
    told = {(int(code, 16), name, "X" in marks) for code, name, marks in rows}
    assert told == {(int(status), status.name, status.closes) for status in Status}
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", section("## Errors"), re.MULTILINE)
    assert {(int(code), word) for code, word in rows} == {(int(r), r.word) for r in Reason}
