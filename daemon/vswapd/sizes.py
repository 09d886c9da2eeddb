"""Sizes, shares and durations as people write them, and back.

The grammar, the same in the configuration, in `--set`, and for vswapctl:

    size      512M, 1.5G, 4096      K M G T are powers of 1024; KiB MiB GiB TiB say the same;
                                    no unit: bytes. KB and MB are refused: they mean two things
    share     20%, 12.5%            always with the sign, so that 0.9 cannot be taken for 0.9 %
    duration  30s, 5m, 1h           ms s m (or min) h d; no unit only for 0
    rate      50M, 50M/s            a size, per second

Invariants:
- `parse_x(format_x(value)) == value` for every value that can be parsed.
- What cannot be read raises UnitError, and its text names what would be right.

This module must not know which setting it reads, nor the host.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

_K: Final = 1024
_SIZE_UNITS: Final = {"": 1, "b": 1, "k": _K, "m": _K**2, "g": _K**3, "t": _K**4}
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_NUMBER_AND_UNIT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z%/]*)\s*", re.ASCII)
MAX_SIZE: Final = 1 << 62
"""Nothing larger is read: it could not be counted in 64 bits."""

SIZE_HINT: Final = "write 512M or 1.5G (units B, K, M, G, T, powers of 1024)"
SHARE_HINT: Final = "write a percentage such as 20%"
DURATION_HINT: Final = "write 30s, 5m or 1h (units ms, s, m, h, d)"


class UnitError(ValueError):
    """Text that is no size, share or duration; says how one is written."""


def _split(text: str, what: str, hint: str) -> tuple[float, str]:
    found = _NUMBER_AND_UNIT.fullmatch(text)
    if found is None:
        raise UnitError(f"{text!r} is no {what}: {hint}")
    return float(found[1]), found[2]


def parse_size(value: str | int) -> int:
    """Bytes of a size such as `512M`; a plain number is bytes.

    Raises:
        UnitError: not a size, negative, or beyond MAX_SIZE.
    """
    text = str(value)
    number, unit = _split(text, "size", SIZE_HINT)
    letter = unit.lower()
    if len(letter) == len("kib") and letter.endswith("ib"):
        letter = letter[0]
    if letter not in _SIZE_UNITS:
        hint = "KB, MB, GB can mean two things: " if re.fullmatch("[kmgt]b", letter) else ""
        raise UnitError(f"{text!r} has a unit that sizes do not have: {hint}{SIZE_HINT}")
    # Whole numbers stay whole: a float cannot hold every size in bytes.
    whole = "." not in text
    size = int(text.strip()[: -len(unit) or None]) if whole else number
    size = round(size * _SIZE_UNITS[letter])
    if size > MAX_SIZE:
        raise UnitError(f"{text!r} is more than any machine has: {SIZE_HINT}")
    return size


def format_size(size: int) -> str:
    """The shortest exact text for so many bytes: 512M, 1536M, 4097."""
    for letter in "TGMK":
        unit = _SIZE_UNITS[letter.lower()]
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def parse_share(value: str) -> float:
    """The share, 0 to 1, of a percentage such as `20%`.

    Raises:
        UnitError: not a percentage, or not between 0% and 100%.
    """
    if not isinstance(value, str) or "%" not in value:
        raise UnitError(f"{value!r} is no share: {SHARE_HINT}")
    number, unit = _split(value, "share", SHARE_HINT)
    if unit != "%":
        raise UnitError(f"{value!r} is no share: {SHARE_HINT}")
    if number > 100:  # noqa: PLR2004 - per cent
        raise UnitError(f"{value!r} is more than the whole: write 0% to 100%")
    return number / 100


def format_share(share: float) -> str:
    """The share as a percentage: 0.2 -> 20%."""
    # 12 digits: enough for any share that somebody writes, too few for the noise of / 100.
    return f"{share * 100:.12g}%"


def parse_duration(value: str | int) -> float:
    """Seconds of a duration such as `5m`.

    Raises:
        UnitError: no unit, or not one of time.
    """
    text = str(value)
    number, unit = _split(text, "duration", DURATION_HINT)
    if not unit and not number:
        return 0.0
    if unit.lower() not in _DURATION_UNITS:
        what = "has no unit" if not unit else "has a unit that durations do not have"
        raise UnitError(f"{text!r} {what}: {DURATION_HINT}")
    return number * _DURATION_UNITS[unit.lower()]


def format_duration(seconds: float) -> str:
    """The shortest text for a duration: 30s, 5m, 1h, 250ms."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _DURATION_UNITS[unit]
        if count and count == int(count):
            return f"{int(count)}{unit}"
    if seconds and seconds * 1000 == round(seconds * 1000):
        return f"{round(seconds * 1000)}ms"
    return f"{seconds:.12g}s"


def parse_rate(value: str | int) -> int:
    """Bytes per second of a rate such as `50M/s`; the `/s` may be left out.

    Raises:
        UnitError: not a rate.
    """
    text = str(value)
    size, slash, per = text.partition("/")
    if slash and per.strip() != "s":
        raise UnitError(f"{text!r} is no rate: write a size per second, such as 50M/s")
    return parse_size(size)


def human_size(size: float) -> str:
    """So many bytes for a reader, three digits: 0 B, 812 KiB, 1.24 GiB."""
    sign = "-" if size < 0 else ""
    size = abs(size)
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    # 999.5 would be written as 1000: that is the next unit's 0.98.
    while size >= 999.5 and len(units) > 1:  # noqa: PLR2004
        size /= _K
        units.pop()
    unit = units[-1]
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2  # noqa: PLR2004
    return f"{sign}{size:.{digits}f} {unit}"


def human_duration(seconds: float) -> str:
    """So long for a reader, two units at most: 42 s, 3 min 5 s, 2 h 10 min, 5 d 3 h."""
    seconds = int(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, length), (smaller, smaller_length) in itertools.pairwise(units):
        if seconds >= length:
            rest = seconds % length // smaller_length
            return f"{seconds // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"
