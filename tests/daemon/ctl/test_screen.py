"""The status screen, drawn from documents: exactly what an operator sees at 80 columns."""

from __future__ import annotations

import copy
import io
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from support.status_documents import ALL, BUSY, EMPTY, FAILING, device, group
from vswapd.ctl.bars import Bar, Part, widths
from vswapd.ctl.screen import render
from vswapd.ctl.svg import picture

GOLDEN = Path(__file__).parent / "golden"


def drawn(status: dict[str, Any], before: dict[str, Any] | None = None, width: int = 80) -> str:
    """The screen as plain text, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(status, before))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


@pytest.mark.parametrize("name", sorted(ALL))
def test_screen_is_the_golden_one(name: str) -> None:
    """Each document gives its golden screen; VSWAP_GOLDEN=write renews them after a change."""
    golden = GOLDEN / f"{name}.txt"
    text = drawn(ALL[name])
    if os.environ.get("VSWAP_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_configuration_error_stands_above_all() -> None:
    """In words, whatever the file's name has in it; without one, nothing does."""
    lines = drawn(BUSY | {"config_error": "/etc/x\x1b[2J: pool.tires: no such key"}).splitlines()
    assert lines[0] == "CONFIGURATION ERROR: /etc/x\\u{1b}[2J: pool.tires: no such key"
    assert "reload" in lines[1]
    assert "\n".join(lines[-len(drawn(BUSY).splitlines()) :]) + "\n" == drawn(BUSY)
    assert drawn(BUSY | {"config_error": None}) == drawn(BUSY)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("width", [80, 100, 200])
def test_screen_fits_its_width(name: str, width: int) -> None:
    """No line is longer than the terminal is wide, nor does one depend on being cut off."""
    assert max(map(len, drawn(ALL[name], width=width).splitlines())) <= width


def test_bars_give_way_to_numbers() -> None:
    """On a narrow terminal the bars are shorter, and what they mean is still there."""
    text = drawn(BUSY, width=45)
    for number in ("190 MiB of 256 MiB  74%  lz4", "164,240 allocated", "70.0 MiB of 4.00 GiB  2%"):
        assert number in text


def test_busy_screen_fits_a_small_terminal() -> None:
    """With one device and two clients the whole screen fits 24 lines."""
    assert len(drawn(BUSY).splitlines()) <= 24


def test_screen_needs_no_unicode() -> None:
    """Where the output takes ASCII only, the bars are ASCII and nothing fails."""
    raw = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(raw, encoding="ascii", errors="replace"), width=80, color_system=None
    )
    console.print(render(BUSY))
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert "######" in text
    assert "# 110,000 zswap" in text
    assert "451 MiB" in text


def test_rates_come_from_two_documents() -> None:
    """With an earlier document, what happened in between is shown per second."""
    after = copy.deepcopy(BUSY)
    after["uptime_s"] += 2
    after["traffic"]["store_pages"] += 5000
    after["traffic"]["swapin_pages"] += 20
    assert re.search(r"now +2,500/s stored, 10/s read in\n", drawn(after, BUSY))
    quiet = copy.deepcopy(BUSY) | {"uptime_s": BUSY["uptime_s"] + 1}
    assert re.search(r"now +quiet\n", drawn(quiet, BUSY))
    assert "now " not in drawn(BUSY, BUSY)


IN_MEMORY = {"compact_bytes", "recompress_saved_bytes"}
"""What is counted in bytes, and goes to no device."""


def test_every_cause_of_writing_is_shown() -> None:
    """Each cause for which bytes go to a device has its own number on the screen."""
    status = copy.deepcopy(BUSY)
    causes = [key for key in status["traffic"] if key.endswith("_bytes") and key not in IN_MEMORY]
    for index, key in enumerate(causes):
        status["traffic"][key] = (index + 11) << 20
    text = " ".join(drawn(status, width=200).split())
    assert len(causes) == 5
    for index in range(len(causes)):
        assert f"{index + 11}.0 MiB " in text


def test_short_memory_is_shown() -> None:
    """That the pool may take less than its maximum is told with the reason, and only then."""
    status = copy.deepcopy(BUSY)
    assert "memory is short" not in drawn(status)
    status["pool"].update(pressure="memory is short on the machine", limit_bytes=40 << 20)
    assert "memory is short on the machine: it may take 40.0 MiB for now" in drawn(status)


def test_damage_and_failed_steps_are_shown() -> None:
    """Damaged entries and failures of the shrinker are told, and only then."""
    status = copy.deepcopy(BUSY)
    status["pool"]["corrupt_entries"] = 3
    status["shrinker"]["errors"] = 1
    text = drawn(status)
    assert "3 damaged entries" in text
    assert "1 step failed" in text
    assert "damaged" not in drawn(BUSY)
    assert "failed" not in drawn(BUSY)


def test_groups_are_shown_when_they_have_limits() -> None:
    """A group without limits is not worth a line; one with any limit is."""
    limits: list[dict[str, Any]] = [
        {"pool_max_bytes": 0},
        {"device_max_bytes": 1 << 30},
        {"writeback": False},
    ]
    for keys in limits:
        assert "groups" in drawn(BUSY | {"groups": [group(**keys)]})
    assert "groups" not in drawn(BUSY)


def test_at_most_five_spaces_and_groups() -> None:
    """However many spaces there are, the first screen shows the first five."""
    spaces = [BUSY["top_spaces"][0] | {"id": f"{7000 + n}"} for n in range(9)]
    groups = [group(name=f"{8000 + n}", writeback=False) for n in range(9)]
    text = drawn(BUSY | {"top_spaces": spaces, "groups": groups})
    assert len(re.findall(r"\b70\d\d\b", text)) == 5
    assert len(re.findall(r"\b80\d\d\b", text)) == 5


def test_document_of_another_version_is_a_key_error() -> None:
    """A document that lacks what the screen needs raises KeyError, for the caller to explain."""
    with pytest.raises(KeyError):
        render({key: value for key, value in EMPTY.items() if key != "pool"})


@settings(max_examples=30)
@given(
    st.integers(0, 2**62),
    st.integers(0, 2**62),
    st.integers(0, 2**40),
    st.text(min_size=1, max_size=200),
)
def test_any_numbers_and_names_can_be_drawn(used: int, limit: int, slots: int, name: str) -> None:
    """No size, count or client's name breaks the screen or its width."""
    status = copy.deepcopy(BUSY)
    status["pool"].update(bytes=used, max_bytes=limit)
    status["slots"].update(zero=slots, allocated=slots + 143760)
    status["top_spaces"][0]["client"] = name
    status["devices"] = [device(used_bytes=used, size_bytes=limit)]
    text = drawn(status)
    assert max(map(len, text.splitlines())) <= 80


def test_a_space_without_a_client_names_none() -> None:
    """Not the one that it had, whose number another process may have by now."""
    status = copy.deepcopy(BUSY)
    status["top_spaces"][0] |= {"client": None, "name": "cache"}
    status["top_spaces"][1] |= {"client": None, "name": None}
    text = drawn(status)
    assert "no client (cache)" in text
    assert text.count("no client") == 2
    assert "4301" not in text


def test_shards_that_give_no_sign_of_life_are_named() -> None:
    """What is shown then is not all that there is."""
    status = copy.deepcopy(BUSY) | {"shards": 4, "silent_shards": [1, 3]}
    assert "no sign of life from shard 1, 3 of 4: what it holds is not shown" in drawn(status)


def test_what_a_client_calls_itself_is_only_text() -> None:
    """Neither markup nor escape sequences in a client's name or a path reach the terminal."""
    evil = "[red]x[/red]\x1b[2J\x07\n\u202e"
    status = copy.deepcopy(FAILING)
    status["top_spaces"][0]["client"] = evil
    status["devices"][0]["path"] = evil
    text = drawn(status)
    assert "[red]x[/red]" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_picture_is_complete_in_itself() -> None:
    """The SVG is well-formed, holds the screen's text, and refers to nothing elsewhere."""
    text = picture(render(BUSY), "vswapctl status")
    root = ET.fromstring(text)
    words = " ".join("".join(root.itertext()).replace("\xa0", " ").split())
    assert "of RAM saved" in words
    assert "vswapctl status" in words
    assert not re.findall(r"(?:href|src)=|url\((?!#)|@import|@font-face", text)
    assert picture(render(BUSY), "vswapctl status") == text


def test_picture_keeps_columns_where_they_are() -> None:
    """Blanks at the beginning of a text become a position, since renderers may drop them."""
    text = picture(render(BUSY), "x")
    assert not re.findall(r"<text[^>]*>&#160;+[^<&]", text)


@given(st.lists(st.floats(0, 1), max_size=6), st.integers(8, 200))
def test_bar_never_lies_about_ends(shares: list[float], columns: int) -> None:
    """Whatever is not nothing has a cell, and a bar is full only if the shares are the whole."""
    total = sum(shares)
    if total > 1:
        shares = [share / total for share in shares]
    cells = widths(shares, columns)
    assert sum(cells) <= columns
    assert all((count > 0) == (share > 0) for count, share in zip(cells, shares, strict=True))
    if sum(shares) < 1 - 1e-9:
        assert sum(cells) < columns
    assert widths([1.0], columns) == widths([1e18], columns) == [columns]


def test_bar_draws_parts_in_order() -> None:
    """Parts stand side by side, each in its glyph, and the rest is empty."""
    console = Console(file=io.StringIO(), width=10, color_system=None)
    with console.capture() as capture:
        console.print(Bar((Part(0.5, "red"), Part(0.2, "blue", "▓"))))
    assert capture.get().strip() == "█████▓▓░░░"
