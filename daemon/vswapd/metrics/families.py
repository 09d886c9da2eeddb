"""Which metrics there are, and how each is read out of one STATUS document.

A scrape takes one document and makes every series from it, so that the numbers of one scrape belong
together. docs/metrics.md has the same table in prose; a test holds the two together.

Invariants:
- What only rises is a counter, and its name ends in _total; sizes are in bytes.
- Every reject reason, every cause of writing, every device, every codec and every group is one
  series, also while it is 0.

This module must not know HTTP, files, or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Document = Mapping[str, Any]
Snapshot = Callable[[], dict[str, Any]]
Labels = tuple[str, ...]
Samples = Iterator[tuple[Labels, float]]
Read = Callable[[Document], Samples]

WRITE_CAUSES: Final = {
    "writeback": "writeback_bytes",
    "reclaim": "reclaim_bytes",
    "fallback": "fallback_bytes",
    "swapoff": "swapoff_bytes",
    "merge": "device_compact_bytes",
}
"""Why bytes are written to a device, and the counter of the document that says how many."""
_DEVICE_STATES: Final = ("on", "draining", "failing")
_SLOT_STATES: Final = ("unbacked", "lost", "zero", "zswap", "phys")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, its meaning, its labels, and its samples out of a document."""

    name: str
    help: str
    read: Read
    labels: Labels = ()

    @property
    def rises(self) -> bool:
        """Whether it is a counter."""
        return self.name.endswith("_total")

    def metric(self, document: Document) -> Metric:
        """Its series at one moment."""
        kind = CounterMetricFamily if self.rises else GaugeMetricFamily
        family = kind(self.name.removesuffix("_total"), self.help, labels=self.labels)
        for labels, value in self.read(document):
            family.add_metric(labels, value)
        return family


def registry(snapshot: Snapshot) -> CollectorRegistry:
    """A registry with nothing in it but these metrics; one document per collection."""
    made = CollectorRegistry(auto_describe=False)
    made.register(_Collector(snapshot))
    return made


class _Collector(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        document = self._snapshot()
        return (family.metric(document) for family in FAMILIES)


def _one(section: str, key: str) -> Read:
    """One number of a section; no sample while it is null."""

    def read(document: Document) -> Samples:
        if (value := document[section][key]) is not None:
            yield (), float(value)

    return read


def _top(key: str) -> Read:
    """One number of the document itself."""

    def read(document: Document) -> Samples:
        yield (), float(document[key])

    return read


def _rows(section: str, label: str, key: str) -> Read:
    """One number of each row of a list, told apart by one of its texts; none where it is null."""

    def read(document: Document) -> Samples:
        for row in document[section]:
            if row[key] is not None:
                yield (str(row[label]),), float(row[key])

    return read


def _traffic(name: str, help_: str, key: str) -> Family:
    return Family(name, help_, _one("traffic", key))


def _device(name: str, help_: str, key: str) -> Family:
    return Family(name, help_, _rows("devices", "path", key), ("device",))


def _group(name: str, help_: str, key: str) -> Family:
    return Family(name, help_, _rows("groups", "name", key), ("group",))


def _codec(name: str, help_: str, key: str) -> Family:
    def read(document: Document) -> Samples:
        return _rows("tiers", "codec", key)(document["pool"])

    return Family(name, help_, read, ("codec",))


def _info(document: Document) -> Samples:
    yield (document["version"], document["pool"]["codec"]), 1.0


def _slots(document: Document) -> Samples:
    for state in _SLOT_STATES:
        yield (state,), float(document["slots"][state])


def _rejects(document: Document) -> Samples:
    for reason, pages in document["rejects"].items():
        yield (reason,), float(pages)


def _written(document: Document) -> Samples:
    for cause, key in WRITE_CAUSES.items():
        yield (cause,), float(document["traffic"][key])


def _device_states(document: Document) -> Samples:
    for device in document["devices"]:
        for state in _DEVICE_STATES:
            yield (device["path"], state), float(device["state"] == state)


def _working(document: Document) -> Samples:
    yield (), float(document["shrinker"]["doing"] not in {"waits", "idle"})


FAMILIES: Final = (
    Family("vswap_info", "Version and current codec; always 1.", _info, ("version", "codec")),
    Family("vswap_uptime_seconds", "Seconds since the daemon was started.", _top("uptime_s")),
    Family("vswap_clients", "Connections that are open.", _top("clients")),
    Family("vswap_spaces", "Spaces that are open.", _top("spaces")),
    Family(
        "vswap_saved_bytes",
        "Uncompressed bytes of all stored pages, less the memory of pool and table.",
        _top("saved_bytes"),
    ),
    Family("vswap_slots", "Allocated slots by what stands behind them.", _slots, ("state",)),
    Family("vswap_table_bytes", "Memory of the swap table.", _one("table", "bytes")),
    Family("vswap_pool_bytes", "Memory that the pool really takes.", _one("pool", "bytes")),
    Family(
        "vswap_pool_max_bytes",
        "Memory that the pool may take (pool.max).",
        _one("pool", "max_bytes"),
    ),
    Family(
        "vswap_pool_limit_bytes",
        "Memory that the pool may take as things stand: less than its maximum where memory is "
        "short.",
        _one("pool", "limit_bytes"),
    ),
    Family(
        "vswap_pool_original_bytes",
        "Uncompressed bytes of the pages in the pool.",
        _one("pool", "original_bytes"),
    ),
    Family(
        "vswap_pool_full",
        "1 while the pool refuses pages until it has shrunk, else 0.",
        _one("pool", "full"),
    ),
    Family(
        "vswap_pool_locked",
        "1 if table and pool are locked into RAM, else 0.",
        _one("pool", "locked"),
    ),
    Family(
        "vswap_pool_corrupt_total",
        "Entries of the pool that turned out to be damaged.",
        _one("pool", "corrupt_entries"),
    ),
    _codec("vswap_pool_pages", "Pages in the pool by codec.", "pages"),
    _codec("vswap_pool_live_bytes", "Compressed bytes in the pool by codec.", "live_bytes"),
    _codec("vswap_pool_codec_bytes", "Memory that the pool takes by codec.", "bytes"),
    _device("vswap_device_size_bytes", "Size of a swap device.", "size_bytes"),
    _device("vswap_device_used_bytes", "What of a swap device is in use.", "used_bytes"),
    _device("vswap_device_live_bytes", "Compressed bytes on a swap device.", "live_bytes"),
    Family(
        "vswap_device_state",
        "1 for the state that a swap device is in, 0 for the others.",
        _device_states,
        ("device", "state"),
    ),
    _device("vswap_device_bad_extents", "Extents that were taken out of use.", "bad_extents"),
    _device("vswap_device_read_errors_total", "Reads that failed.", "read_errors"),
    _device("vswap_device_write_errors_total", "Writes that failed.", "write_errors"),
    Family(
        "vswap_shrinker_working", "1 while the shrinker works, 0 while it idles or waits.", _working
    ),
    Family(
        "vswap_shrinker_errors_total",
        "Steps of the shrinker that failed; the journal has the causes.",
        _one("shrinker", "errors"),
    ),
    _traffic(
        "vswap_housekeeping_errors_total",
        "What went wrong besides requests, such as a look at memory; the journal has the causes.",
        "housekeeping_errors",
    ),
    Family(
        "vswap_write_budget_bytes",
        "Bytes that may be written back per day; 0: no bound.",
        _one("shrinker", "budget_bytes"),
    ),
    Family(
        "vswap_write_budget_left_bytes",
        "What is left of it today; absent without a bound.",
        _one("shrinker", "budget_left_bytes"),
    ),
    _traffic("vswap_store_pages_total", "Pages that were stored.", "store_pages"),
    _traffic("vswap_load_pages_total", "Pages that were loaded.", "load_pages"),
    _traffic("vswap_free_pages_total", "Pages that were freed.", "free_pages"),
    _traffic(
        "vswap_writeback_pages_total",
        "Pages that moved from the pool to a swap device.",
        "writeback_pages",
    ),
    _traffic(
        "vswap_recompress_pages_total",
        "Old pages that were compressed again, and went into the dense pool.",
        "recompress_pages",
    ),
    _traffic(
        "vswap_recompress_saved_bytes_total",
        "Compressed bytes that such pages became smaller by.",
        "recompress_saved_bytes",
    ),
    _traffic(
        "vswap_recompress_seconds_total",
        "Processor time that compressing old pages again took.",
        "recompress_seconds",
    ),
    _traffic("vswap_swapin_pages_total", "Pages loaded from a swap device.", "swapin_pages"),
    _traffic(
        "vswap_fallback_pages_total",
        "Pages that went straight to a swap device.",
        "fallback_pages",
    ),
    _traffic("vswap_lost_pages_total", "Loads of pages that were lost.", "lost_pages"),
    _traffic(
        "vswap_compact_bytes_total",
        "Compressed bytes that were moved inside the pool.",
        "compact_bytes",
    ),
    Family(
        "vswap_written_bytes_total",
        "Bytes that were written to swap devices by cause.",
        _written,
        ("cause",),
    ),
    Family("vswap_reject_pages_total", "Pages that were refused by reason.", _rejects, ("reason",)),
    _group("vswap_group_pool_bytes", "Compressed bytes of a group in the pool.", "pool_bytes"),
    _group(
        "vswap_group_pool_max_bytes",
        "What a group may have there; absent without a limit.",
        "pool_max_bytes",
    ),
    _group("vswap_group_device_bytes", "Compressed bytes of a group on devices.", "device_bytes"),
    _group(
        "vswap_group_device_max_bytes",
        "What a group may have there; absent without a limit.",
        "device_max_bytes",
    ),
)
"""Every metric, in the order in which it is shown and documented."""
