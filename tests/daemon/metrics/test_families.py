"""Metrics out of documents: every number once, under the name that the manual gives it."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from support.status_documents import ALL, BUSY, EMPTY, FAILING, FULL, group
from vswap.protocol import Reason
from vswapd.metrics.families import FAMILIES, registry

MANUAL = Path(__file__).parents[3] / "docs/metrics.md"

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def series(document: dict[str, Any]) -> Series:
    """All samples of a document, as Prometheus's own parser reads them."""
    text = generate_latest(registry(lambda: document)).decode()
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def one(document: dict[str, Any], name: str, **labels: str) -> float:
    return series(document)[name, frozenset(labels.items())]


def test_numbers_are_the_documents() -> None:
    """Each metric is the number of the document that its meaning says."""
    pool, device = BUSY["pool"], BUSY["devices"][0]
    assert one(BUSY, "vswap_info", version="0.1.0", codec="lz4") == 1
    assert one(BUSY, "vswap_saved_bytes") == BUSY["saved_bytes"]
    assert one(BUSY, "vswap_pool_bytes") == pool["bytes"]
    assert one(BUSY, "vswap_pool_live_bytes", codec="lz4") == pool["live_bytes"]
    assert one(BUSY, "vswap_slots", state="phys") == BUSY["slots"]["phys"]
    assert one(BUSY, "vswap_device_used_bytes", device=device["path"]) == device["used_bytes"]
    assert one(BUSY, "vswap_store_pages_total") == BUSY["traffic"]["store_pages"]
    assert one(BUSY, "vswap_shrinker_working") == 1
    assert one(FULL, "vswap_shrinker_working") == 0
    assert one(FULL, "vswap_pool_full") == 1
    assert one(FULL, "vswap_reject_pages_total", reason="pool_full") == 1203


NOT_MEASURED = {"allocated", "priority", "spaces", "original_bytes"}
"""What follows from other numbers, or is none to be watched."""


def test_every_number_of_the_document_is_measured() -> None:
    """No counter of the document is without its metric, and each has a metric of its own."""
    document = copy.deepcopy(BUSY)
    marks = iter(range(1_000_003, 2_000_000, 7))
    leaves: list[int] = []
    rows = [*document["devices"], *document["pool"]["tiers"], *document["groups"]]
    for row in [document["slots"], document["traffic"], document["rejects"], *rows]:
        for key, value in row.items():
            if type(value) is int and key not in NOT_MEASURED:
                row[key] = next(marks)
                leaves.append(row[key])
    assert len(leaves) > 30
    values = list(series(document).values())
    assert [leaf for leaf in leaves if values.count(leaf) != 1] == []


def test_series_are_there_while_they_are_zero() -> None:
    """A daemon that did nothing yet has one series per reason and per cause of writing."""
    names = [name for name, _ in series(EMPTY)]
    assert names.count("vswap_reject_pages_total") == len(Reason)
    assert names.count("vswap_written_bytes_total") == 5
    assert names.count("vswap_slots") == 5
    assert one(EMPTY, "vswap_reject_pages_total", reason="write_budget") == 0


def test_one_series_per_device_codec_and_group() -> None:
    """Devices, codecs and groups are told apart by labels; a device is in one state."""
    found = series(FAILING)
    paths = {device["path"] for device in FAILING["devices"]}
    labels = [dict(labels) for name, labels in found if name == "vswap_device_size_bytes"]
    assert {label["device"] for label in labels} == paths
    for path in paths:
        states = [
            v
            for (name, key), v in found.items()
            if name == "vswap_device_state" and ("device", path) in key
        ]
        assert sorted(states) == [0, 0, 1]
    assert one(FULL, "vswap_pool_pages", codec="lz4") == 90000
    assert one(FULL, "vswap_pool_pages", codec="zstd:3") == 20000
    assert one(FULL, "vswap_group_pool_max_bytes", group="1000") == 200 << 20


def test_no_limit_is_no_series() -> None:
    """Where there is no limit there is no number, rather than one that looks like a limit."""
    document = EMPTY | {"groups": [group()]}
    names = {name for name, _ in series(document)}
    assert "vswap_group_pool_bytes" in names
    assert not names & {"vswap_group_pool_max_bytes", "vswap_write_budget_left_bytes"}


@pytest.mark.parametrize("name", sorted(ALL))
def test_names_and_units_follow_the_rules(name: str) -> None:
    """Counters end in _total, sizes in _bytes; nothing is infinite or not a number."""
    text = generate_latest(registry(lambda: ALL[name])).decode()
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in {"counter", "gauge"}
        for sample in family.samples:
            assert sample.name.startswith("vswap_")
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert math.isfinite(sample.value)
            assert "_kb" not in sample.name


def test_hostile_names_stay_labels() -> None:
    """A path with quotes, backslashes and newlines is one label value, not a new line."""
    path = 'a"b\\c\nvswap_fake 1'
    document = copy.deepcopy(BUSY)
    document["devices"][0]["path"] = path
    assert one(document, "vswap_device_size_bytes", device=path) == 4096 << 20
    assert ("vswap_fake", frozenset()) not in series(document)


def test_one_scrape_takes_one_document() -> None:
    """All series of a scrape come from one document, and making a registry takes none."""
    taken: list[int] = []

    def snapshot() -> dict[str, Any]:
        taken.append(1)
        return BUSY

    made = registry(snapshot)
    assert taken == []
    generate_latest(made)
    assert taken == [1]


def test_manual_has_every_metric_with_its_meaning() -> None:
    """docs/metrics.md lists exactly these metrics, with these labels and words, in this order."""
    rows = re.findall(
        r"^\| `(vswap_\w+)` \| ?([^|]*?) ?\| ([^|]*) \|$", MANUAL.read_text(), re.MULTILINE
    )
    assert rows == [
        (family.name, ", ".join(f"`{label}`" for label in family.labels), family.help)
        for family in FAMILIES
    ]


def test_manual_has_every_label_value() -> None:
    """Each reason and each cause is explained in docs/metrics.md."""
    text = MANUAL.read_text()
    for _, labels in series(FAILING):
        for label, value in labels:
            if label in {"state", "reason", "cause"}:
                assert f"`{value}`" in text
