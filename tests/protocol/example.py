"""The example of docs/protocol.md: a conversation with a real daemon, byte by byte.

`PYTHONPATH=tests python -m protocol.example` prints it as it stands on the page. All of it is what
a daemon of one shard says when it was just started, but for the token, which is random.

This module must not import vswap: the conversation is spoken by hand.
"""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support.daemon import running_daemon
from support.wire import BAD_SLOT, FREE, HELLO, LOAD, STORE, Wire

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs/protocol.md"
_HEADING: Final = "## Example\n"
_TOKEN: Final = "00" + "c0ffee" * 5
"""In place of the random one, as long; of shard 0."""
_ROW: Final = 8
"""Bytes of a body in one line, and of a long body in all."""
_WIDTH: Final = 88
_PAGE: Final = b"page" * 1024


def on_the_page() -> str:
    """The example as docs/protocol.md has it."""
    _, _, after = DOCUMENT.read_text().partition(_HEADING)
    lines = [line for line in after.splitlines(keepends=True) if line.startswith("    ")]
    return "".join(lines)


def session() -> str:
    """The example as a daemon speaks it."""
    settings = ("server.shards=1", "server.window=4M", "server.max_batch=4096")
    with (
        running_daemon(*settings, "server.max_pipeline=16") as daemon,
        Wire(daemon.socket_path) as wire,
    ):
        lines = _converse(wire)
    return textwrap.indent("\n".join(lines), "    ") + "\n"


def _converse(wire: Wire) -> list[str]:
    lines: list[str] = []

    def ask(
        op: int, body: bytes, asked: str, answered: Callable[[bytes], str], count: int = 0
    ) -> bytes:
        """One request; both sides are written down. Returns the reply's body."""
        request = wire.frame(op, body, count=count)
        wire.socket.sendall(request)
        head = wire.read(24)
        answer = wire.read(struct.unpack_from("<I", head)[0] - len(head))
        if op == HELLO:
            answer = answer.replace(json.loads(answer)["token"].encode(), _TOKEN.encode())
        lines.extend(_written(">", request, asked))
        lines.extend(_written("<", head + answer, answered(answer)))
        return answer

    ask(
        HELLO,
        b"{}",
        "HELLO, request 1, body `{}`",
        lambda body: f"its answer, {len(body)} bytes of JSON: `{body.decode()}`",
    )
    stored = ask(
        STORE,
        _PAGE,
        "STORE, request 2, one page: 1024 times `page`",
        lambda body: f"stored in slot {int.from_bytes(body, 'little'):#x}",
        count=1,
    )
    ask(LOAD, stored, "LOAD, request 3, that slot", lambda _: "the page", count=1)
    ask(FREE, stored, "FREE, request 4", lambda _: "done", count=1)
    ask(
        LOAD,
        stored,
        "LOAD, request 5, the slot that was freed",
        lambda body: (
            f"BAD_SLOT ({BAD_SLOT:#x}), the slot, and {len(body) - 8} bytes of text: "
            f"`{body[8:].decode()}`"
        ),
        count=1,
    )
    return lines


def _written(who: str, frame: bytes, remark: str) -> list[str]:
    """One frame: its header's fields, its body or the beginning of it, and what it is."""
    fields = frame[:4], frame[4:5], frame[5:6], frame[6:8], frame[8:12], frame[12:16], frame[16:24]
    lines = [f"{who} {'  '.join(field.hex(' ') for field in fields)}"]
    body = frame[24:]
    if body:
        rest = " .." if len(body) > _ROW else ""
        lines.append(f"  {body[:_ROW].hex(' ')}{rest}")
    return lines + textwrap.wrap(
        remark,
        _WIDTH,
        initial_indent="  # ",
        subsequent_indent="  # ",
        break_on_hyphens=False,
        break_long_words=False,
    )


if __name__ == "__main__":
    print(session(), end="")
