"""Columns and names that outlive a process: where they lie, and in which order they are written."""

from __future__ import annotations

import numpy as np
import pytest

from vswapd_backends.kept import (
    DEVICE_ROWS,
    EXTENT_ROW,
    SEGMENT_COLUMNS,
    ExtentColumns,
    Names,
    NamesFullError,
    SegmentColumns,
)


def test_names_keep_their_index() -> None:
    """Over the same memory there are the same names, whoever looks."""
    count, records = np.zeros(1, np.uint64), np.zeros((4, 8), np.uint8)
    names = Names(count, records)
    assert [names.add(text) for text in ("lz4", "größe", "zstd:22x")] == [0, 1, 2]
    assert Names(count, records).all() == ["lz4", "größe", "zstd:22x"]


@pytest.mark.parametrize("text", ["ninebytes", "ü" * 5])
def test_a_name_that_does_not_fit_is_refused(text: str) -> None:
    """Nothing is changed then."""
    names = Names.private(2, 8)
    names.add("one")
    with pytest.raises(NamesFullError, match="2 names of 8 bytes"):
        names.add(text)
    names.add("two")
    with pytest.raises(NamesFullError):
        names.add("three")
    assert names.all() == ["one", "two"]


def test_columns_of_segments_share_the_memory_they_are_given() -> None:
    """Each has its own part of it."""
    words = np.zeros(SEGMENT_COLUMNS * 5, np.int64)
    columns = SegmentColumns.over(np.zeros(2, np.int64), words)
    every = [getattr(columns, name) for name in SegmentColumns.__slots__ if name != "head"]
    for number, column in enumerate(every):
        assert column.shape == (5,)
        column[:] = number + 1
    assert words.reshape(SEGMENT_COLUMNS, 5)[0].tolist() == [1] * 5
    assert columns.stamp.tolist() == [2.0] * 5
    assert len(every) == SEGMENT_COLUMNS
    assert all((column == number + 1).all() for number, column in enumerate(every))


def test_a_fresh_device_has_rows_of_zeros() -> None:
    """Whatever the one before it under its index has left."""
    rows = np.zeros(2 * DEVICE_ROWS, EXTENT_ROW)

    def wipe(index: int) -> None:
        rows[index * DEVICE_ROWS : (index + 1) * DEVICE_ROWS] = 0

    columns = ExtentColumns(rows, wipe)
    columns.of(0, 3)["sequence"][:] = 7
    columns.of(1, 3)["sequence"][:] = 8
    assert columns.fresh(1, 4)["sequence"].tolist() == [0] * 4
    assert columns.of(0, 4)["sequence"].tolist() == [7, 7, 7, 0]
    assert ExtentColumns().fresh(9, 2)["bad"].tolist() == [0, 0]
