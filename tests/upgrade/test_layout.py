"""The layout of kept memory, held against what is recorded of it for each version.

`layouts/N.txt` says what a life of version N is made of. Who changes the layout makes the version
of the kind and that of the life rise, writes a step (see ARCHITECTURE.md, Upgrades), and records
the new layout:  RECORD=1 python -m pytest tests/upgrade/test_layout.py
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from support.sources import REPOSITORY
from support.versions import MAKERS, PREVIOUS, git
from vswapd import (
    answers,
    clusters,
    control,
    groups,
    keeping,
    kept_text,
    ledger,
    memory,
    swap_table,
)
from vswapd.memory import Head, Shape
from vswapd.upgrades import LIFE_VERSION, LIVES, STEPS
from vswapd_backends import kept, label, segment, shared_extents, swapdev, zswap
from vswapd_backends.shared import SYSTEM_PAGE

LAYOUTS = Path(__file__).with_name("layouts")
SHAPE = Shape.fitting(shard=1, max_slots=1 << 20, arena_bytes=1 << 30)
# What stands in memory that is kept; all constants of these modules are recorded.
WHOLE = (
    answers,
    control,
    keeping,
    kept,
    kept_text,
    label,
    ledger,
    memory,
    segment,
    shared_extents,
    swap_table,
)
PARTS = (
    (clusters, ("_NUMBER_BITS", "_GENERATIONS", "_KEPT_SHIFT")),
    (groups, ("MOST_GROUPS", "NAME_BYTES")),
    (swapdev, ("MAX_DEVICES", "EXTENT_BITS")),
    (zswap, ("MOST_POOLS", "SPEC_BYTES")),
)


def _constants(module: ModuleType, names: list[str]) -> Iterator[str]:
    for name in sorted(names):
        value = getattr(module, name, None)
        where = f"{module.__name__}.{name}"
        if isinstance(value, struct.Struct):
            yield f"{where} = {value.format}"
        elif isinstance(value, np.dtype):
            yield f"{where} = {value.descr}"
        elif isinstance(value, int):
            yield f"{where} = {int(value)}"
        elif isinstance(value, (bytes, str)):
            yield f"{where} = {value!r}"
        elif isinstance(value, type) and issubclass(value, enum.Enum):
            if value.__module__ == module.__name__:
                yield f"{where} = { ({m.name: m.value for m in value}) }"
        elif dataclasses.is_dataclass(value) and name.endswith("Columns"):
            yield f"{where} = {[f.name for f in dataclasses.fields(value)]}"


def _defined_in(module: ModuleType) -> list[str]:
    """Names of constants and classes of a module; none that it has from another."""
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        match node:
            case ast.AnnAssign(target=ast.Name(name)) | ast.ClassDef(name):
                found.append(name)
            case ast.Assign(targets=[ast.Name(name)]):
                found.append(name)
    return found


def _layout() -> str:
    """What kept memory is made of, in lines."""
    lines = [f"{kind}: version {version}" for kind, version in sorted(LIVES[LIFE_VERSION].items())]
    lines += [f"{kind}: {size} bytes" for kind, size in SHAPE.sizes.items()]
    lines += [f"state: {name} {size} bytes" for name, size in memory._areas(SHAPE).items()]
    lines += [f"head: {n} {i}" for n, i in vars(Head).items() if isinstance(i, int)]
    for module in WHOLE:
        lines += _constants(module, _defined_in(module))
    for module, names in PARTS:
        lines += _constants(module, list(names))
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(SYSTEM_PAGE != 4096, reason="hardware: areas are whole pages of 4096 bytes")
def test_the_layout_is_that_of_its_version() -> None:
    """A layout that changes has another version, and a way to it from the one before."""
    path = LAYOUTS / f"{LIFE_VERSION}.txt"
    if os.environ.get("RECORD"):
        path.write_text(_layout())
    assert path.read_text() == _layout(), "has the layout changed? See this test's module"


def test_what_was_passed_by_ci_stays_as_it_is() -> None:
    """No version's layout is recorded anew once there may be memory of it."""
    folder = LAYOUTS.relative_to(REPOSITORY)
    for name in git("ls-tree", "--name-only", PREVIOUS, f"{folder}/").decode().split():
        assert (REPOSITORY / name).read_bytes() == git("show", f"{PREVIOUS}:{name}"), name


def test_every_layout_that_is_converted_has_a_maker() -> None:
    """Tests of upgrades begin with memory of each."""
    assert MAKERS.keys() == LIVES.keys() - {LIFE_VERSION}


@pytest.mark.parametrize("version", sorted(LIVES))
def test_there_is_a_way_from_every_version(version: int) -> None:
    """Each kind of every life that is said to be known has all steps to the latest."""
    assert LIVES[version].keys() == LIVES[LIFE_VERSION].keys()
    for kind, first in LIVES[version].items():
        missing = [n for n in range(first, LIVES[LIFE_VERSION][kind]) if (kind, n) not in STEPS]
        assert not missing
