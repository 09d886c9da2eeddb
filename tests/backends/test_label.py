"""Labels of memory that outlives its process: found, believed, or refused."""

from __future__ import annotations

import dataclasses
import os

import pytest

from vswapd.ledger import Ledger, adopt_shared_region, shared_region
from vswapd_backends.label import (
    LIFE_BYTES,
    ForeignMemoryError,
    Label,
    adopt_region,
    find_label,
    make_region,
)
from vswapd_backends.shared import SYSTEM_PAGE, SharedRegion
from vswapd_backends.shared_extents import SharedExtents, adopt_owners_region, owners_region

LABEL = Label(
    kind="thing", version=3, life=bytes(range(LIFE_BYTES)), size=2 * SYSTEM_PAGE, details=b"d" * 32
)


def test_a_label_is_found_as_it_was_written() -> None:
    """And is no part of the region."""
    region = make_region(LABEL)
    assert region.size == LABEL.size
    assert os.fstat(region.fd).st_size == LABEL.size + SYSTEM_PAGE
    region.bytes_array()[-1] = 9
    assert find_label("thing", 3, region.fd) == LABEL
    again = adopt_region(LABEL, os.dup(region.fd))
    assert again.bytes_array()[-1] == 9
    assert again.resident_bytes == SYSTEM_PAGE


@pytest.mark.parametrize(
    ("kind", "version", "text"),
    [
        ("thing", 2, r"^thing: this is memory of layout version 3, .* version 2 only"),
        ("other", 3, r"^other: this is memory of a vswapd, but not its other$"),
        ("other", 4, r"^other: .* layout version 3"),
    ],
)
def test_another_label_is_refused(kind: str, version: int, text: str) -> None:
    """The version is looked at first: another one may put the kind elsewhere."""
    region = make_region(LABEL)
    before = os.pread(region.fd, 3 * SYSTEM_PAGE, 0)
    with pytest.raises(ForeignMemoryError, match=text):
        find_label(kind, version, region.fd)
    assert os.pread(region.fd, 3 * SYSTEM_PAGE, 0) == before


def test_memory_without_a_label_is_refused() -> None:
    """What stands in its last page is no label."""
    region = SharedRegion("test", SYSTEM_PAGE)
    with pytest.raises(ForeignMemoryError, match="no memory of a vswapd"):
        find_label("thing", 3, region.fd)


def test_a_ledger_is_taken_over() -> None:
    """With what its shards had entered, and as many of them."""
    region = shared_region(3)
    Ledger(region, 1).enter(0, 77)
    again = adopt_shared_region(os.dup(region.fd))
    assert Ledger(again, 2).others(0) == 77
    assert Ledger(again, 0).shards == 3
    other = make_region(dataclasses.replace(LABEL, version=1))
    with pytest.raises(ForeignMemoryError, match="not its ledger"):
        adopt_shared_region(other.fd)


def test_owners_of_chunks_are_taken_over() -> None:
    """For the same device and as many shards; for others they are refused."""
    region = owners_region(64, 2)
    SharedExtents(64, region, 0, 2).take()
    again = adopt_owners_region(64, 2, os.dup(region.fd))
    assert again.bytes_array()[:2].tolist() == [1, 0]
    for extents, shards in ((65, 2), (64, 3)):
        with pytest.raises(ForeignMemoryError, match="for another device, or other shards"):
            adopt_owners_region(extents, shards, region.fd)
