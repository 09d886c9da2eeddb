"""What the processes may take beside the pool, on hosts of every size."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from vswapd.config_budget import Budget, Fitting
from vswapd.config_schema import Server

MIB = 1 << 20
GIB = 1 << 30


def test_a_large_host_is_as_configured() -> None:
    """With memory enough buffers, requests, replies and windows are what the configuration says."""
    budget = Budget.of(Server(), 64 * GIB, 4)
    assert (budget.buffers, budget.max_batch) == (256 * MIB, 4096)
    assert (budget.replies, budget.windows) == (512 << 10, 128 * MIB)
    assert budget.growth < 64 * GIB // 20


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("mib", [96, 128, 256, 512, 1024, 4096])
def test_a_small_host_gets_less(mib: int, shards: int) -> None:
    """The less memory there is, the less is promised to clients, and never nothing."""
    small, larger = (Budget.of(Server(), size * MIB, shards) for size in (mib, 2 * mib))
    assert 0 < small.buffers <= larger.buffers <= 256 * MIB
    assert 1024 <= small.max_batch <= larger.max_batch <= 4096
    assert 0 < small.replies <= larger.replies
    assert small.growth <= larger.growth


def test_many_connections_do_not_take_all() -> None:
    """However many may connect, what is kept free for replies that nobody reads is bounded."""
    many = msgspec.structs.replace(Server(), max_connections=65536)
    assert Budget.of(many, 8 * GIB, 1).growth < 2 * GIB


def test_what_fits() -> None:
    """A pool that does not fit is lowered, one without any room refused, unless asked for."""
    fitting = Fitting(
        pool_max=64 * MIB, ram_bytes=200 * MIB, own_bytes=50 * MIB, reserve=80 * MIB, automatic=True
    )
    assert (fitting.fits_bytes, fitting.lowered, fitting.refusal) == (64 * MIB, "", "")
    less = replace(fitting, ram_bytes=160 * MIB)
    assert less.fits_bytes == 30 * MIB
    assert "pool.max of 64.0 MiB does not fit, the pool can count on 30.0 MiB" in less.lowered
    assert less.refusal == ""
    nothing = replace(fitting, ram_bytes=132 * MIB)
    assert "nothing is left for the pool: allow it 134 MiB or more" in nothing.refusal
    assert replace(nothing, automatic=False).refusal == ""
    assert replace(nothing, pool_max=0).refusal == ""
    assert replace(nothing, reserve=0).fits_bytes == 64 * MIB
