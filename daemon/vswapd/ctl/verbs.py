"""What each verb asks the daemon, and how its answer reads.

A verb is a function from the parsed options to an exit code.

This module must not know how failures are told: they are raised.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from stat import S_IWGRP, S_IWOTH
from types import MappingProxyType
from typing import Any, Final, NoReturn

import shtab
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from vswap.control import Control
from vswapd.ctl.parser import build_parser
from vswapd.ctl.screen import plain_table, render, safe
from vswapd.ctl.svg import picture
from vswapd.sizes import human_duration, human_size
from vswapd.whole_file import WholeFile

COLUMNS: Final = 80
"""Width of what goes to a file or a pipe."""
WIDE_COLUMNS: Final = 200
"""The same for tables with many columns: better long lines than cut words."""
NAME: Final = "vswapctl"
_sleep: Final = time.sleep

Options = argparse.Namespace


def _control(options: Options) -> Control:
    return Control(options.socket, timeout=options.timeout, name=NAME)


def _console(columns: int = COLUMNS) -> Console:
    """As wide as the terminal; `columns` and no colours where there is none."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is no reason to show nothing.
        sys.stdout.reconfigure(errors="replace")
    width = None if sys.stdout.isatty() else columns
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def _ask(options: Options, verb: str, **arguments: Any) -> dict[str, Any] | None:
    """The daemon's answer to a verb, or None if it has been printed as JSON."""
    with _control(options) as control:
        answer = control.call(verb, **arguments)
    if options.json:
        print(json.dumps(answer, indent=2))
        return None
    return answer


def status(options: Options) -> int:
    """The status, once or again and again."""
    with _control(options) as control:
        if options.watch is not None:
            _watch(control, options)
            return 0
        document = control.status()
    if options.svg is not None:
        _write(Path(options.svg), picture(_screen(document), "vswapctl status"))
    elif options.json:
        print(json.dumps(document, indent=2))
    else:
        _console().print(_screen(document))
    return 0


def _screen(document: dict[str, Any], before: dict[str, Any] | None = None) -> RenderableType:
    return render(document, before, lambda name: _user(int(name)) if name.isdecimal() else name)


def _write(path: Path, text: str) -> None:
    """Write a file as a whole, or to what is no file (/dev/stdout).

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        _write_to_device(path, text)
        return
    if path.is_symlink():
        # Whoever has put it there may want us to write what it leads to.
        _refuse_link(path)
    before = os.umask(0)
    os.umask(before)
    WholeFile.write(path, text.encode(), mode=0o666 & ~before).close()


def _write_to_device(path: Path, text: str) -> None:
    """Write to a pipe, a terminal or the like. Links to it are those of the system (/dev/stdout).

    Raises:
        OSError: it cannot be written, or is a link where others can put one: to a disk, perhaps.
    """
    folder = path.parent.stat()
    others = folder.st_uid not in {0, os.geteuid()} or folder.st_mode & (S_IWGRP | S_IWOTH)
    if others and path.is_symlink():
        _refuse_link(path)
    flags = os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC | (os.O_NOFOLLOW if others else 0)
    with open(os.open(path, flags), "w", encoding="utf-8") as file:
        file.write(text)


def _refuse_link(path: Path) -> NoReturn:
    raise OSError(errno.ELOOP, "is a link: name the file itself", str(path))


def _watch(control: Control, options: Options) -> None:
    """Show the status until interrupted; Ctrl-C is its orderly end."""
    console = _console()
    screen = console.is_terminal and not options.json
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        live: Live | None = None
        for before, document in _documents(control, options.watch):
            if options.json:
                print(json.dumps(document), flush=True)
            elif not screen:
                console.print(_screen(document, before))
            elif live is None:
                live = Live(_screen(document), console=console, screen=True, auto_refresh=False)
                stack.enter_context(live)
            else:
                live.update(_screen(document, before), refresh=True)


def _documents(
    control: Control, seconds: float
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """The status, and the one before, for ever, once every so many seconds."""
    before = None
    while True:
        document = control.status()
        yield before, document
        before = document
        _sleep(seconds)


def set_(options: Options) -> int:
    """Change settings one by one, or list them."""
    with _control(options) as control:
        if not options.settings:
            settings = control.status()["settings"]
            lines = [f"{key}={value}" for key, value in settings.items()]
            print(json.dumps(settings, indent=2) if options.json else "\n".join(lines))
            return 0
        for key, value in options.settings:
            answer = control.call("set", key=key, value=value)
            if options.json:
                print(json.dumps(answer))
            else:
                print(f"{answer['key']}: {answer['old']} -> {answer['new']}")
    return 0


def reload_(options: Options) -> int:
    """Read the configuration again."""
    answer = _ask(options, "reload")
    if answer is None:
        return 0
    changed, ignored = answer["changed"], answer["ignored"]
    after_stop = answer.get("after_stop")  # a daemon from before an upgrade has none
    print(f"changed: {', '.join(changed)}" if changed else "nothing has changed")
    if ignored:
        print(f"needs a restart: {', '.join(ignored)}")
    if after_stop:
        print(f"needs a stop and a start, as a restart keeps the memory: {', '.join(after_stop)}")
    return 0


def swapon(options: Options) -> int:
    """Put a device into use."""
    arguments: dict[str, Any] = {"path": _absolute(options.path)}
    if options.size is not None:
        arguments["size"] = options.size
    if options.priority is not None:
        arguments["priority"] = options.priority
    if options.no_encrypt:
        arguments["encrypt"] = False
    answer = _ask(options, "swapon", **arguments)
    if answer is not None:
        size = human_size(answer["size_bytes"])
        print(f"{answer['path']}: {size}, priority {answer['priority']}")
    return 0


def swapoff(options: Options) -> int:
    """Take a device out of use."""
    arguments: dict[str, Any] = {"path": _absolute(options.path)}
    if options.give_up:
        arguments["give_up"] = True
    answer = _ask(options, "swapoff", **arguments)
    if answer is not None:
        lost = answer["lost_pages"]
        print(
            f"{answer['path']}: out of use, {answer['moved_pages']:,} pages were moved"
            + (f"; {lost:,} could not be read, and are lost" if lost else "")
        )
    return 0


def _absolute(path: str) -> str:
    """The daemon's working directory is another one."""
    return str(Path.cwd() / path)


def writeback(options: Options) -> int:
    """Write cold pages to the devices; 1 if none could be written."""
    with _control(options) as control:
        answer = control.call("writeback", bytes=options.bytes)
    stopped = answer["stopped"]
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        print(
            f"{answer['pages']:,} pages, {human_size(answer['bytes'])} written"
            + (f"; stopped: {stopped}" if stopped else "")
        )
    return 1 if stopped and not answer["bytes"] else 0


def compact(options: Options) -> int:
    """Give room back."""
    answer = _ask(options, "compact")
    if answer is not None:
        freed, moved = human_size(answer["freed_bytes"]), human_size(answer["moved_bytes"])
        print(f"{freed} given back, {moved} moved")
    return 0


def verify(options: Options) -> int:
    """Check everything; 1 if something is wrong."""
    with _control(options) as control:
        answer = control.call("verify")
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        for problem in answer["problems"]:
            print(safe(problem))
        print(
            f"{'all good' if answer['ok'] else 'NOT good'}: {answer['slots']:,} slots, "
            f"{answer['entries']:,} entries, {human_size(answer['checked_bytes'])} checked"
        )
    return 0 if answer["ok"] else 1


def spaces(options: Options) -> int:
    """All spaces, or one user's, the largest first."""
    answer = _ask(options, "spaces", **_whose(options))
    if answer is None:
        return 0
    table = plain_table(
        "client",
        "name",
        "space",
        "pid",
        "user",
        "slots",
        "original",
        "compressed",
        "zero",
        "connected",
    )
    # Texts give way, in as many lines as they take: all numbers are shown, however long one user's
    # names are, and whoever is to drop a space can read its whole name.
    for column in table.columns[:2]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for space in sorted(answer["spaces"], key=lambda space: -space["original_bytes"]):
        table.add_row(
            Text("no client" if space["client"] is None else safe(space["client"]) or "unnamed"),
            Text(safe(space["name"] or "")),
            space["id"],
            "-" if space["pid"] is None else str(space["pid"]),
            _user(space["uid"]),
            f"{space['slots']:,}",
            human_size(space["original_bytes"]),
            human_size(space["compressed_bytes"]),
            f"{space['zero']:,}",
            human_duration(space["connected_s"]),
        )
    console = _console(WIDE_COLUMNS)
    console.print(table if table.rows else "none")
    if answer["left_out"]:
        console.print(f"and {answer['left_out']:,} smaller ones: --uid shows those of one user")
    if answer["silent_shards"]:
        which = ", ".join(map(str, answer["silent_shards"]))
        console.print(f"no sign of life from shard {which}: what it holds is not shown")
    return 0


def _whose(options: Options) -> dict[str, int]:
    return {} if options.uid is None else {"uid": options.uid}


def drop(options: Options) -> int:
    """Free a named space that nobody uses."""
    answer = _ask(options, "drop", name=options.name, **_whose(options))
    if answer is not None:
        print(f"{answer['name']}: dropped, {answer['freed_slots']:,} slots were freed")
    return 0


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def demo(options: Options) -> int:
    """Hand over to the demo, which brings a daemon of its own."""
    from vswapd import demo as show  # it needs much that no other verb needs

    code: int = show.main(options.rest)
    return code


def completion(options: Options) -> int:
    """The completion script of a shell."""
    print(shtab.complete(build_parser(), options.shell))
    return 0


VERBS: Final[Mapping[str, Callable[[Options], int]]] = MappingProxyType(
    {
        "status": status,
        "set": set_,
        "reload": reload_,
        "swapon": swapon,
        "swapoff": swapoff,
        "writeback": writeback,
        "compact": compact,
        "verify": verify,
        "spaces": spaces,
        "drop": drop,
        "demo": demo,
        "completion": completion,
    }
)
