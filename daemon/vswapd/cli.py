"""The command `vswapd`: serve, check-config.

Every failure to start is one line on standard error and an exit code of sysexits.h.

This module must not know what a service is made of.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from vswapd import __version__, held_signals, journal
from vswapd.config import ConfigError, load
from vswapd.errors import EngineError
from vswapd.host import Host
from vswapd.listener import ListenError

SYSTEM_CONFIG: Final = "/etc/vswapd/vswapd.toml"
_FILE: Final = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "fish": "(__fish_complete_path (commandline -ct))",
}
"""shtab.FILE, which makes the completions; the daemon does without shtab."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vswapd`; manual page and completions are made from it too."""
    parser = argparse.ArgumentParser(
        prog="vswapd",
        description=(
            "Keep other programs' memory pages, compressed: in RAM, and on a swap file. Programs "
            "hand pages over through a Unix socket and get slots back; behind a slot stands a zero "
            "marker, compressed bytes in a pool, or compressed and encrypted bytes on a device."
        ),
        epilog=(
            "Exit codes: 0, told to stop. 2, the command line is wrong. 69, the socket cannot be "
            "had. 70, a mistake of vswapd's. 71, it cannot start, or go on. 74, what it prints "
            "cannot be written. 78, the configuration is wrong."
        ),
    )
    parser.add_argument("--version", action="version", version=f"vswapd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    serve = verbs.add_parser(
        "serve",
        help="run the daemon in the foreground",
        description=(
            "Run the daemon in the foreground until SIGTERM. SIGHUP reads the configuration again. "
            "Works with and without a service manager, as root and as any user."
        ),
    )
    _add_config(serve)
    _with_file(
        serve.add_argument(
            "--socket",
            metavar="PATH",
            help="where to listen; short for --set server.socket=PATH",
        )
    )
    check = verbs.add_parser(
        "check-config",
        help="check a configuration and print what it comes to",
        description=(
            "Read a configuration as `serve` would, and print every key with its value. Exits with "
            "78 and one line on standard error if something is wrong with it."
        ),
    )
    _add_config(check)
    return parser


def _with_file(action: argparse.Action) -> None:
    """Let shells complete an argument with the names of files."""
    action.complete = _FILE  # type: ignore[attr-defined]


def _add_config(parser: argparse.ArgumentParser) -> None:
    _with_file(
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help=f"the configuration; root's default is {SYSTEM_CONFIG} if that exists, else the "
            "built-in values hold",
        )
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the configuration, e.g. pool.max=64M; may be repeated. "
        "device=PATH,size=1G adds a swap device",
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command; ends the process."""
    options = build_parser().parse_args(arguments)
    try:
        if options.verb == "serve":
            held_signals.hold()
            _serve(options)
        else:
            held_signals.release()
            _check(options)
    except (ConfigError, ListenError, EngineError) as error:
        _fail(str(error), error.exit_code)
    sys.exit(0)


def _fail(text: str, code: int) -> NoReturn:
    journal.last_words("vswapd", text)
    sys.exit(code)


def _source(options: argparse.Namespace) -> Path | None:
    found: Path | None = options.config
    if found is None and os.geteuid() == 0 and Path(SYSTEM_CONFIG).exists():
        return Path(SYSTEM_CONFIG)
    return found


def _sources(options: argparse.Namespace) -> tuple[Path | None, tuple[str, ...]]:
    overrides = tuple(options.overrides)
    if getattr(options, "socket", None):
        overrides += (f"server.socket={options.socket}",)
    return _source(options), overrides


def _serve(options: argparse.Namespace) -> None:
    # Only now: check-config and --help need no engine.
    from vswapd.service import ServiceError, serve

    if journal.is_journal(sys.stderr):
        # Until it is known how much is to be told: why it cannot be known has a level, too.
        journal.set_up("info")
    try:
        serve(*_sources(options))
    except ServiceError as error:
        _fail(str(error), error.exit_code)


def _check(options: argparse.Namespace) -> None:
    config = load(*_sources(options))
    config.settings(Host.here())
    if config.metrics.listen:
        from vswapd.metrics import check  # it brings a library

        check(config.metrics.listen, or_in_use=True)
    for key, value in config.flat().items():
        print(f"{key} = {value}")
