"""The command line of vswapctl: one parser, from which manual pages and completions are made too.

This module must not know how a verb is carried out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import TYPE_CHECKING, Final

import shtab

from vswap.waiting import LONGEST_S
from vswapd import sizes
from vswapd.config import GROUP_KEYS, RELOADABLE

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - its only name

TIMEOUT_S: Final = 10.0
"""A daemon that is there answers in milliseconds; one that has a shard that does not, in five
seconds; one that is started again by its service manager is there after one or two."""
SHORTEST_S: Final = 0.1
SHELLS: Final = ("bash", "zsh", "fish")
_LIVE_KEYS: Final = tuple(
    f"{key.replace('*', 'default')}=" for key in sorted({*RELOADABLE, *GROUP_KEYS})
)

_DESCRIPTION: Final = """\
Shows what vswapd holds and saves, and steers it. Without a verb, the status is shown. The status
is for everybody who may connect to the daemon, and so are `spaces` and `drop`, for one's own; all
other verbs need root or the user that the daemon runs as. Sizes are written as 512M or 1.5G: K, M,
G and T are powers of 1024.
"""
_EPILOG: Final = """\
Exit codes: 0, done. 1, the daemon could not do it, or `verify` found something wrong. 2, the
command line is wrong, or the daemon says so. 69, no daemon can be reached. 71, the system refuses
what it needs. 74, what it prints cannot be written. 75, a daemon is there and does not answer: try
again later. 76, daemon and vswapctl are of different versions. 77, not permitted.
"""


def version() -> str:
    """The version that is installed."""
    try:
        return importlib.metadata.version("vswapd")
    except importlib.metadata.PackageNotFoundError:
        return "0 (not installed)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of vswapctl; `verb` is None if none was given."""
    parser = argparse.ArgumentParser(
        prog="vswapctl", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    # What stands in the manual page's NAME section; read by argparse-manpage.
    parser.man_short_description = "status of vswapd, and steering it"  # type: ignore[attr-defined]
    parser.add_argument("--version", action="version", version=f"vswapctl {version()}")
    _with_file(
        parser.add_argument(
            "--socket",
            metavar="PATH",
            help="the daemon's socket; default: $VSWAP_SOCKET, else the user's own daemon "
            "($XDG_RUNTIME_DIR/vswapd.sock), else the system's (/run/vswapd.sock)",
        )
    )
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="give a daemon up that does not answer for so long (default "
        f"{TIMEOUT_S:g}; 0 or none: wait for ever); a verb that takes longer is waited for as long "
        "as the daemon is there",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    _add_status(verbs)
    _add_settings(verbs)
    _add_devices(verbs)
    _add_work(verbs)
    _add_rest(verbs)
    return parser


def _add(
    verbs: _Verbs, name: str, summary: str, text: str, *, add_help: bool = True
) -> argparse.ArgumentParser:
    """A verb's parser; its description begins with the summary and goes on with `text`."""
    description = f"{summary[0].upper()}{summary[1:]}. {text}"
    return verbs.add_parser(
        name, help=summary, description=description, add_help=add_help, allow_abbrev=False
    )


class _Once(argparse.Action):
    """An option that is an error when it is given twice: which is meant?"""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Keep the value."""
        del parser, option_string
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "is given twice")
        setattr(namespace, self.dest, values)


def _with_file(action: argparse.Action) -> None:
    """Let shells complete an argument with the names of files."""
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the daemon's answer as JSON, as it came"
    )


def _add_status(verbs: _Verbs) -> None:
    status = _add(
        verbs,
        "status",
        "show what is stored, what it saves, and what the daemon does",
        "One screen: RAM saved and how well pages shrink; the pool against its limit; where the "
        "pages are; the swap devices; what the shrinker does, or why it idles; pages that were "
        "refused, by reason; traffic; and the largest spaces.",
    )
    _add_json(status)
    status.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=1.0,
        metavar="SECONDS",
        help="show it again every so many seconds (default 1) with what happens per second, until "
        "interrupted; with --json, one document per line",
    )
    _with_file(
        status.add_argument(
            "--svg", metavar="FILE", help="write the screen to FILE as a picture instead"
        )
    )


def _add_settings(verbs: _Verbs) -> None:
    set_ = _add(
        verbs,
        "set",
        "change settings of the running daemon",
        "The keys are those of the configuration, with the table before the dot: "
        "`vswapctl set pool.max=1G shrinker.rate=50M/s`. They are changed one after the other, up "
        "to the first that is refused, and hold until the daemon reloads its configuration or ends "
        "(under systemd, a restart is no end). Without an argument, all settings in force are "
        "listed.",
    )
    _add_json(set_)
    pairs = set_.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", type=_setting, help="a key and its new value"
    )
    pairs.complete = _keys_completion()  # type: ignore[attr-defined]
    reload_ = _add(
        verbs,
        "reload",
        "have the daemon read its configuration again",
        "The same as SIGHUP. Tells what has changed, and what would need a restart, or a stop and "
        "a start. A configuration with an error changes nothing, and the status says so.",
    )
    _add_json(reload_)


def _add_devices(verbs: _Verbs) -> None:
    swapon = _add(
        verbs,
        "swapon",
        "put a swap device into use",
        "PATH is a block device, or a file, which is made if it is not there. What lies on it is "
        "overwritten. Nothing on it can be read after the daemon's end (under systemd, a restart "
        "is no end).",
    )
    _add_json(swapon)
    _with_file(swapon.add_argument("path", metavar="PATH", help="file or block device"))
    swapon.add_argument(
        "--size",
        action=_Once,
        type=_size,
        metavar="SIZE",
        help="size of the file, reserved at once; default: as it is",
    )
    swapon.add_argument(
        "--priority",
        action=_Once,
        type=_priority,
        metavar="N",
        help="0 to 32767, default 0; devices of the highest priority are filled first",
    )
    swapon.add_argument(
        "--no-encrypt",
        action="store_true",
        help="write pages as they are; default: encrypted, with a key that is never written down",
    )
    swapoff = _add(
        verbs,
        "swapoff",
        "take a swap device out of use",
        "Its pages are moved to the pool or to other devices first. If they do not fit there, the "
        "device stays in use and all pages stay where they can be loaded. So it does if pages on "
        "it cannot be read, or are damaged, unless --give-up is given.",
    )
    _add_json(swapoff)
    swapoff.add_argument(
        "--give-up",
        action="store_true",
        help="for a device that has turned bad: what nobody can read is lost, and keeps it in use "
        "no longer; loading such a page goes on to be an error until it is freed or overwritten",
    )
    _with_file(swapoff.add_argument("path", metavar="PATH", help="the device, as status names it"))


def _add_work(verbs: _Verbs) -> None:
    writeback = _add(
        verbs,
        "writeback",
        "write the coldest pages from the pool to the swap devices",
        "Ends early, and says why, when nothing more can go. Fails if nothing could go at all.",
    )
    _add_json(writeback)
    writeback.add_argument(
        "bytes", type=_size, metavar="SIZE", help="how much compressed data to write: 100M"
    )
    compact = _add(
        verbs,
        "compact",
        "give the room of freed pages back to the system",
        "Moves what is still alive out of sparsely used memory. The daemon does it by itself too, "
        "later and more sparingly.",
    )
    _add_json(compact)
    verify = _add(
        verbs,
        "verify",
        "check every stored page, and that the books agree",
        "Walks table, pools and devices, compares every checksum, and adds up what is accounted. "
        "Each problem is one line. Clients are served meanwhile, more slowly.",
    )
    _add_json(verify)


def _add_rest(verbs: _Verbs) -> None:
    spaces = _add(
        verbs,
        "spaces",
        "list spaces: who holds how much",
        "One line per space, the largest first. One without a pid has a name and, for now, no "
        "client. Who may not steer sees his own.",
    )
    _add_json(spaces)
    spaces.add_argument("--uid", type=int, help="only those of this user", metavar="UID")
    drop = _add(
        verbs,
        "drop",
        "free a named space that nobody uses",
        "A space with a name outlives its client, and keeps its pages until it is dropped. One "
        "that has a client is left alone. Who may not steer can drop his own.",
    )
    _add_json(drop)
    drop.add_argument("name", metavar="NAME", help="as `vswapctl spaces` has it")
    drop.add_argument(
        "--uid", type=int, help="whose, if several users have a space of that name", metavar="UID"
    )
    _add(
        verbs,
        "demo",
        "try it out: store the memory of live programs and load it back",
        "Starts a daemon of its own and some programs with real memory, stores that memory, "
        "shows the status, loads it back in random order, compares every byte, and cleans up. "
        "Touches no daemon that is running. Its options are its own: `vswapctl demo --help`.",
        add_help=False,
    )
    completion = _add(
        verbs,
        "completion",
        "print the completions for a shell",
        'For one session: `eval "$(vswapctl completion bash)"`. An installation has them in place.',
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def _keys_completion() -> dict[str, object]:
    """What completes KEY=: the keys that can be set at run time, without a blank after them."""
    keys = " ".join(_LIVE_KEYS)
    return {
        "bash": "_vswapctl_keys",
        "zsh": "_vswapctl_keys",
        "fish": keys,
        "preamble": {
            # Bash cuts words at "=": what stands after it is not the key's any more.
            "bash": f'_vswapctl_keys() {{ compopt -o nospace; compgen -W "{keys}" -- "$1"; }}',
            "zsh": f"_vswapctl_keys() {{ compadd -S '' -- {keys} }}",
        },
    }


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as KEY=VALUE, such as pool.max=512M")
    return key, value


def _size(text: str) -> int:
    try:
        return sizes.parse_size(text)
    except sizes.UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _priority(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 32767:  # noqa: PLR2004 - swapon(8)'s
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number, 0 to 32767")
    return int(text)


def _timeout(text: str) -> float | None:
    if text == "none":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if seconds == 0:
        return None
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write seconds, {SHORTEST_S} to {LONGEST_S:.0f}, or none"
        )
    return seconds


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:  # noqa: PLR2004 - a tenth of a second to a day
        raise argparse.ArgumentTypeError(f"{text!r}: write seconds, 0.1 to 86400")
    return seconds
