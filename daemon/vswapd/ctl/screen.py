"""The status screen: a pure function from the STATUS document to something rich can draw.

It reads well at 80 columns, in colour or without, on a terminal or in a file.

Invariants:
- Every number on the screen is in the document, or is a plain sum or quotient of two that are.
- Trouble is said in words, never by colour alone.
- The same document always gives the same screen.

This module must not know sockets, the clock, or where the screen is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from rich.box import ROUNDED
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vswap.errors import REMEDY_OF_REASON
from vswap.protocol import PAGE_BYTES, Reason
from vswapd.ctl.bars import Bar, Part
from vswapd.sizes import human_duration, human_size

Document = Mapping[str, Any]

LABEL: Final = "bold cyan"
QUIET: Final = "dim"
GOOD: Final = "green"
WARN: Final = "yellow"
BAD: Final = "bold red"
MOST_SPACES: Final = 5
"""Spaces and groups on the first screen; `vswapctl spaces` has all."""
BAR_COLUMNS: Final = 30
_PAGE_TRAFFIC: Final = (
    ("store_pages", "stored"),
    ("load_pages", "loaded"),
    ("free_pages", "freed"),
)
_SWAP_TRAFFIC: Final = (("writeback_pages", "written back"), ("swapin_pages", "read in"))
_WRITTEN: Final = (
    ("writeback_bytes", "writeback"),
    ("reclaim_bytes", "reclaim"),
    ("fallback_bytes", "fallback"),
    ("swapoff_bytes", "swapoff"),
    ("device_compact_bytes", "merging"),
)
"""Every cause for which bytes are written to a device."""
_REMEDIES: Final = {reason.word: remedy for reason, remedy in REMEDY_OF_REASON.items()}


def render(
    status: Document, before: Document | None = None, user_of: Callable[[str], str] = str
) -> RenderableType:
    """The whole screen.

    Args:
        status: the STATUS document.
        before: an earlier one of the same daemon, to show what happens per second; or None.
        user_of: the name of the user that a group is of, by the group's name, which is a number.

    Raises:
        KeyError: the document lacks something: it is another version's.
    """
    rows: list[tuple[str, RenderableType]] = [
        ("pool", _pool(status)),
        ("slots", _slots(status)),
        ("devices", _devices(status)),
        ("shrinker", _shrinker(status)),
        ("rejects", _rejects(status)),
        ("traffic", _traffic(status, before)),
    ]
    if any(_limited(group) for group in status["groups"]):
        rows.append(("groups", _groups(status, user_of)))
    rows.append(("top spaces", _spaces(status)))
    if status["silent_shards"]:
        rows.insert(0, ("shards", _silent_shards(status)))
    grid = Table.grid(padding=(0, 2, 1, 0), expand=True)
    grid.add_column(style=LABEL, no_wrap=True, width=10)
    grid.add_column(ratio=1)
    for label, content in rows:
        grid.add_row(label, content)
    return Group(*_trouble(status), _headline(status), "", grid)


def safe(text: str) -> str:
    """Text that somebody else has chosen, without what could steer a terminal.

    Control characters, and those that turn the writing round, are written as their numbers.
    """
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)


def _count(number: int, what: str) -> str:
    """A number and a noun: `1 client`, `2 clients`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _trouble(status: Document) -> list[RenderableType]:
    """What somebody has to see to before anything else."""
    error = status.get("config_error")
    if error is None:
        return []
    remedy = "Correct it, and reload (vswapctl reload); devices want vswapctl swapon, or a restart."
    return [Text(f"CONFIGURATION ERROR: {safe(error)}", BAD), Text(remedy, WARN), Text()]


def _headline(status: Document) -> RenderableType:
    slots, pool = status["slots"], status["pool"]
    original = (slots["zero"] + slots["zswap"] + slots["phys"]) * PAGE_BYTES
    memory = pool["bytes"] + status["table"]["bytes"]
    on_devices = sum(device["live_bytes"] for device in status["devices"])
    saved = status["saved_bytes"]
    first = Text()
    if original:
        first.append(f"{human_size(saved)} ", f"bold {GOOD}" if saved > 0 else BAD)
        first.append("of RAM saved", "bold")
        if slots["zswap"]:
            first.append(f", pages shrink {status['ratio']:.2f} : 1", "bold")
    else:
        first.append("nothing stored", "bold")
    second = Text(style=QUIET)
    second.append(f"{human_size(original)} of pages in {human_size(memory)} of RAM")
    if on_devices:
        second.append(f" and {human_size(on_devices)} on swap devices")
    running = status["state"] == "running"
    title = Text(f"vswapd {status['version']}", "not dim bold")
    title.append("  " + status["state"], f"not dim {GOOD if running else WARN}")
    facts = (
        f"up {human_duration(status['uptime_s'])}, pid {status['pid']}, "
        f"{_count(status['clients'], 'client')}, {_count(status['spaces'], 'space')}"
    )
    return Panel(
        Group(first, second),
        box=ROUNDED,
        title=title,
        title_align="left",
        subtitle=Text(facts, QUIET),
        subtitle_align="right",
        border_style=QUIET if running else WARN,
        padding=(0, 1),
    )


def _silent_shards(status: Document) -> RenderableType:
    silent = status["silent_shards"]
    which = ", ".join(map(str, silent))
    return Text(
        f"no sign of life from shard {which} of {status['shards']}: what it holds is not shown", BAD
    )


def _pool(status: Document) -> RenderableType:
    pool = status["pool"]
    used, limit, live = pool["bytes"], pool["max_bytes"], pool["live_bytes"]
    share = used / limit if limit else 0.0
    colour = BAD if pool["full"] else WARN if used > pool["accept_bytes"] else GOOD
    sizes = f"{human_size(used)} of {human_size(limit)}"
    lines = [_bar_row([Part(share, colour)], sizes, f"{share:.0%}", pool["codec"])]
    if not pool["enabled"]:
        lines.append(Text("switched off (pool.enabled): new pages go to the devices", WARN))
    elif pool["full"]:
        until = human_size(pool["accept_bytes"])
        lines.append(Text(f"FULL: refuses pages until it is down to {until}", BAD))
    if pool["lowered"]:
        lines.append(Text(pool["lowered"], WARN))
    if pool["lock_trouble"]:
        lines.append(Text(f"not locked into RAM: {pool['lock_trouble']}", WARN))
    if pool["pressure"]:
        least = human_size(pool["limit_bytes"])
        lines.append(Text(f"{pool['pressure']}: it may take {least} for now", WARN))
    facts = f"{human_size(live)} compressed, {human_size(used - live)} overhead and room"
    lines.append(Text(f"{facts}; table {human_size(status['table']['bytes'])}", QUIET))
    if corrupt := pool["corrupt_entries"]:
        entries = "damaged entry" if corrupt == 1 else "damaged entries"
        lines.append(Text(f"{corrupt:,} {entries}: the journal has the slots", BAD))
    tiers = [tier for tier in pool["tiers"] if tier["pages"]]
    if len(tiers) > 1:
        lines += [Text(_tier(tier), QUIET) for tier in tiers]
    return Group(*lines)


_TIERS: Final = {"new": "new pages", "dense": "old pages", "former": "until they are gone"}


def _tier(tier: Document) -> str:
    size = human_size(tier["live_bytes"])
    return (
        f"{tier['codec']}: {_count(tier['pages'], 'page')} in {size}, {tier['ratio']:.1f} to 1 "
        f"({_TIERS[tier['tier']]})"
    )


def _bar_row(parts: Iterable[Part], *facts: str) -> RenderableType:
    """A bar and what it means, on one line."""
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(max_width=BAR_COLUMNS)
    for _ in facts:
        row.add_column(no_wrap=True)  # on a narrow terminal the bar gives way, not the numbers
    row.add_row(Bar(tuple(parts)), *(Text(fact) for fact in facts))
    return row


def _slots(status: Document) -> RenderableType:
    slots = status["slots"]
    total = slots["allocated"]
    if not total:
        return Text("none allocated", QUIET)
    kinds = (
        ("zswap", GOOD, "█"),
        ("phys", "blue", "▓"),
        ("zero", "magenta", "▒"),
        ("unbacked", WARN, "·"),
        ("lost", BAD, "!"),
    )
    shown = [kind for kind in kinds if slots[kind[0]]]
    parts = [Part(slots[name] / total, colour, glyph) for name, colour, glyph in shown]
    legend = Columns(padding=(0, 3, 0, 0))
    for name, colour, glyph in shown:
        kind = Table.grid(padding=(0, 1, 0, 0))
        kind.add_column(width=1)
        kind.add_row(Bar((Part(1.0, colour, glyph),)), Text(f"{slots[name]:,} {name}"))
        legend.add_renderable(kind)
    return Group(_bar_row(parts, f"{total:,} allocated"), legend)


def _devices(status: Document) -> RenderableType:
    devices = status["devices"]
    if not devices:
        return Text("none (vswapctl swapon PATH attaches one)", QUIET)
    return Group(*(_device(device) for device in devices))


def _device(device: Document) -> RenderableType:
    size, used = device["size_bytes"], device["used_bytes"]
    share = used / size if size else 0.0
    failing = device["state"] == "failing"
    colour = BAD if failing else WARN if share > 0.95 else "blue"  # noqa: PLR2004 - nearly full
    state = Text(device["state"], BAD if failing else GOOD if device["state"] == "on" else WARN)
    facts = [
        f"{human_size(device['live_bytes'])} live",
        f"priority {device['priority']}",
        "encrypted" if device["encrypted"] else "NOT encrypted",
    ]
    if not device["direct"]:
        facts.append("no O_DIRECT")
    lines: list[RenderableType] = [
        Text.assemble(safe(device["path"]), "  ", state, overflow="fold"),
        _bar_row(
            [Part(share, colour)], f"{human_size(used)} of {human_size(size)}", f"{share:.0%}"
        ),
        Text(", ".join(facts), QUIET),
    ]
    troubles = [
        _count(device[key], what)
        for key, what in (
            ("write_errors", "write error"),
            ("read_errors", "read error"),
            ("bad_extents", "bad extent"),
        )
        if device[key]
    ]
    if troubles:
        lines.append(Text(", ".join(troubles), BAD))
    return Group(*lines)


def _shrinker(status: Document) -> RenderableType:
    shrinker = status["shrinker"]
    doing = shrinker["doing"]
    first = Text()
    first.append(doing, "" if doing in {"waits", "idle"} else GOOD)
    first.append(f": {shrinker['why']}")
    lines = [first]
    settings = status["settings"]
    if shrinker["enabled"]:
        begin, end = settings["shrinker.high_watermark"], settings["shrinker.low_watermark"]
        lines.append(Text(f"begins at {begin} of the pool, ends at {end}", QUIET))
    if shrinker["budget_bytes"]:
        left = shrinker["budget_left_bytes"] or 0
        text = f"{human_size(left)} of today's {human_size(shrinker['budget_bytes'])} left to write"
        lines.append(Text(text, QUIET if left else WARN))
    if shrinker["errors"]:
        lines.append(Text(f"{_count(shrinker['errors'], 'step')} failed: see the journal", BAD))
    if errors := status["traffic"]["housekeeping_errors"]:
        text = f"{_count(errors, 'error')} besides requests: see the journal"
        lines.append(Text(text, WARN))
    return Group(*lines)


def _rejects(status: Document) -> RenderableType:
    rejects = {reason: pages for reason, pages in status["rejects"].items() if pages}
    if not rejects:
        return Text("none", QUIET)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=BAD, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style=QUIET)
    for reason, pages in sorted(rejects.items(), key=lambda item: -item[1]):
        table.add_row(reason, _count(pages, "page"), _REMEDIES.get(reason, ""))
    return table


def _traffic(status: Document, before: Document | None) -> RenderableType:
    traffic = status["traffic"]
    lines = [
        ("pages", [f"{traffic[name]:,} {word}" for name, word in _PAGE_TRAFFIC]),
        ("swap", [f"{traffic[name]:,} {word}" for name, word in _SWAP_TRAFFIC]),
        ("disk", [f"{human_size(traffic[n])} {word}" for n, word in _WRITTEN if traffic[n]]),
    ]
    elapsed = status["uptime_s"] - before["uptime_s"] if before else 0.0
    if before is not None and elapsed > 0:
        past = before["traffic"]
        rates = [
            f"{(traffic[name] - past[name]) / elapsed:,.0f}/s {word}"
            for name, word in (*_PAGE_TRAFFIC, *_SWAP_TRAFFIC)
            if traffic[name] != past[name]
        ]
        lines.append(("now", rates or ["quiet"]))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=QUIET)
    for label, facts in lines:
        if facts:
            table.add_row(label, ", ".join(facts))
    if traffic["lost_pages"]:
        lost = f"{_count(traffic['lost_pages'], 'page')}: the journal has the causes"
        table.add_row(Text("lost", BAD), Text(lost, BAD))
    return table


def _limited(group: Document) -> bool:
    return (
        group["pool_max_bytes"] is not None
        or group["device_max_bytes"] is not None
        or not group["writeback"]
    )


def _groups(status: Document, user_of: Callable[[str], str]) -> RenderableType:
    table = plain_table("user", "pool", "limit", "device", "limit", "writeback")
    limited = sorted(filter(_limited, status["groups"]), key=lambda group: -group["pool_bytes"])
    for group in limited[:MOST_SPACES]:
        table.add_row(
            Text(safe(user_of(group["name"]))),
            human_size(group["pool_bytes"]),
            _limit(group["pool_max_bytes"]),
            human_size(group["device_bytes"]),
            _limit(group["device_max_bytes"]),
            "on" if group["writeback"] else "off",
        )
    return table


def _limit(size: int | None) -> str:
    return "none" if size is None else human_size(size)


def _spaces(status: Document) -> RenderableType:
    spaces = status["top_spaces"]
    if not spaces:
        return Text("none", QUIET)
    table = plain_table("client", "space", "slots", "original", "compressed", "ratio")
    for space in spaces[:MOST_SPACES]:
        original, compressed = space["original_bytes"], space["compressed_bytes"]
        table.add_row(
            Text(client(space)),
            space["id"],
            f"{space['slots']:,}",
            human_size(original),
            human_size(compressed),
            f"{original / compressed:.2f}" if compressed else "",
        )
    return table


def client(space: Document) -> str:
    """Who has a space now. One that is kept for a client to come, or to come back, has none."""
    if space["client"] is not None:
        return safe(space["client"]) or "unnamed"
    return f"no client ({safe(space['name'])})" if space["name"] else "no client"


def plain_table(first: str, *numbers: str) -> Table:
    """A table without lines: the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=QUIET)
    table.add_column(first, max_width=22, no_wrap=True, overflow="ellipsis")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


assert set(_REMEDIES) == {reason.word for reason in Reason}, "a reason without a remedy"
