"""From the arguments to an exit code: which verb runs, and how its failure is told.

Invariants:
- Whatever goes wrong between here and the daemon is one line on standard error that says what to
  do, and the exit code that the manual names for it; never a traceback.
- Standard output holds the answer and nothing else.
- Nothing is waited for without a word: what the client library warns of is told on standard error.

This module must not know what the verbs print.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import vswap
from vswapd.causes import explained
from vswapd.ctl import verbs
from vswapd.ctl.parser import build_parser
from vswapd.entry import OutputError

EXIT_USAGE: Final = 2
EXIT_VERSIONS: Final = 76
EXIT_NOT_PERMITTED: Final = 77
EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run vswapctl; returns its exit code.

    Raises:
        SystemExit: the command line is wrong (2), or asks for help or the version (0).
    """
    parser = build_parser()
    # An empty command line is `status`; what demo does not know here is its own.
    words = list(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(words)
    if options.verb is None:
        options, rest = parser.parse_known_args([*words, "status"])
    if rest and options.verb != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        with _warnings_told():
            code = verbs.VERBS[options.verb](options)
        sys.stdout.flush()
    except vswap.VswapError as error:
        return _fail(_told(error), _exit_code(error))
    except KeyError as error:
        text = f"the daemon's answer lacks {error}: install daemon and vswapctl of one version"
        return _fail(text, EXIT_VERSIONS)
    except BrokenPipeError:
        # The reader of our output has seen enough (`vswapctl status | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OutputError:
        raise
    except OSError as error:
        return _fail(explained(error), 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


class _Tell(logging.Handler):
    """What the client library says, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        with contextlib.suppress(OSError):
            print(f"vswapctl: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    library, tell = logging.getLogger("vswap"), _Tell(logging.WARNING)
    library.addHandler(tell)
    try:
        yield
    finally:
        library.removeHandler(tell)


def _fail(text: str, code: int) -> int:
    print(f"vswapctl: {text}", file=sys.stderr)
    return code


def _exit_code(error: vswap.VswapError) -> int:
    """The error's own, but for a socket that is there and may not be used."""
    if isinstance(error, vswap.NoDaemon) and ": no permission" in str(error):
        return EXIT_NOT_PERMITTED
    return error.exit_code


def _told(error: vswap.VswapError) -> str:
    """An error as one line. Where no daemon answers: the places that were tried, and what to do."""
    lines = str(error).splitlines()
    if not isinstance(error, vswap.NoDaemon):
        return " ".join(line.strip() for line in lines)
    places = "; ".join(line.strip() for line in lines if line.startswith("  ")) or str(error)
    return (
        f"no vswapd answers: {places}; start one (systemctl start vswapd.socket, or vswapd serve), "
        "or name its socket with --socket"
    )
