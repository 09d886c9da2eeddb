"""Sizes, shares and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd import sizes
from vswapd.sizes import UnitError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("512MiB", 512 << 20),
        ("1.5G", 3 << 29),
        (" 2 T ", 2 << 40),
        ("1.5K", 1536),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_size_is_read(text: str, expected: float) -> None:
    """A size is a number and a power of 1024, exact even where a float would not be."""
    assert sizes.parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "is no size"),
        ("M", "is no size"),
        ("-1M", "is no size"),
        ("1e9", "units B, K, M, G, T"),
        ("12Q", "units B, K, M, G, T"),
        ("12MB", "two things"),
        ("20%", "units B, K, M, G, T"),
        ("10s", "units B, K, M, G, T"),
        ("5000000T", "more than any machine"),
        ("٣M", "is no size"),
    ],
)
def test_wrong_size_names_the_right_units(text: str, hint: str) -> None:
    """A size that cannot be read is refused, and the error says how one is written."""
    with pytest.raises(UnitError, match=hint):
        sizes.parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("20%", 0.2), ("0%", 0), ("100 %", 1), ("12.5%", 0.125)]
)
def test_share_is_read(text: str, expected: float) -> None:
    """A share is a percentage."""
    assert sizes.parse_share(text) == expected


@pytest.mark.parametrize("text", ["0.2", "20", "101%", "-1%", "%", "20%%", "20M"])
def test_wrong_share_is_refused(text: str) -> None:
    """A share without its sign, or of more than the whole, is refused with what to write."""
    with pytest.raises(UnitError, match=r"write (a percentage such as 20%|0% to 100%)"):
        sizes.parse_share(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("250ms", 0.25),
        ("30s", 30),
        ("5m", 300),
        ("5min", 300),
        ("1.5h", 5400),
        ("2d", 172800),
    ],
)
def test_duration_is_read(text: str, expected: float) -> None:
    """A duration is a number and a unit of time."""
    assert sizes.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["30", "5M/s", "1 week", "-1s", "s", ""])
def test_wrong_duration_names_the_right_units(text: str) -> None:
    """A duration without a unit of time is refused, and the error names the units."""
    with pytest.raises(UnitError, match="write 30s, 5m or 1h"):
        sizes.parse_duration(text)


def test_rate_is_a_size_per_second() -> None:
    """A rate takes `/s` or leaves it out, and no other period."""
    assert sizes.parse_rate("50M/s") == sizes.parse_rate("50M") == 50 << 20
    with pytest.raises(UnitError, match="size per second"):
        sizes.parse_rate("50M/h")


@given(st.integers(0, sizes.MAX_SIZE))
def test_size_survives_being_written(size: int) -> None:
    """What format_size writes, parse_size reads back as the same number."""
    assert sizes.parse_size(sizes.format_size(size)) == size


@given(st.integers(0, 10_000))
def test_share_survives_being_written(hundredths: int) -> None:
    """Any percentage with two decimals is read back as the same share."""
    share = sizes.parse_share(f"{hundredths / 100}%")
    assert sizes.parse_share(sizes.format_share(share)) == share


@given(st.integers(0, 10**9))
def test_duration_survives_being_written(milliseconds: int) -> None:
    """Any duration in milliseconds is read back as the same."""
    seconds = sizes.parse_duration(f"{milliseconds}ms")
    assert sizes.parse_duration(sizes.format_duration(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1023, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024, "10.0 KiB"),
        (812 << 10, "812 KiB"),
        (1 << 20, "1.00 MiB"),
        (-(5 << 20), "-5.00 MiB"),
        (3 << 40, "3.00 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_human_size_has_three_digits(size: int, text: str) -> None:
    """A size for a reader has three digits and the unit that makes that possible."""
    assert sizes.human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_human_duration_has_two_units(seconds: float, text: str) -> None:
    """A duration for a reader has at most two units."""
    assert sizes.human_duration(seconds) == text
