"""The tree of errors, and that no status of the wire is without one."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import vswap
from vswap import errors
from vswap.protocol import LISTS_SLOTS, Reason, Status


def test_every_failing_status_has_its_error() -> None:
    """The table covers the wire: all statuses but OK and REJECTED, which carries a reason."""
    assert set(errors.ERROR_OF_STATUS) == set(Status) - {Status.OK, Status.REJECTED}
    assert set(errors.REMEDY_OF_REASON) == set(Reason)


@pytest.mark.parametrize("status", sorted(errors.ERROR_OF_STATUS))
def test_errors_that_close_are_told_apart(status: Status) -> None:
    """Exactly the closing statuses become ConnectionLost or ProtocolError."""
    error = errors.error_for(status, "text of the daemon")
    closing = isinstance(error, vswap.ConnectionLost | vswap.ProtocolError)
    assert closing == status.closes
    assert error.status is status
    assert "text of the daemon" in str(error)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_told_with_what_to_do(reason: Reason) -> None:
    """A rejection names its reason's word and a remedy, and keeps its slots."""
    error = errors.error_for(Status.REJECTED, "", np.array([3], np.uint64), flags=reason)
    assert isinstance(error, vswap.Rejected)
    assert error.reason == reason.word
    assert reason.word in str(error)
    assert errors.REMEDY_OF_REASON[reason] in str(error)
    assert error.slots.tolist() == [3]


def test_an_error_without_text_still_says_something() -> None:
    """A silent daemon's status is spelt out."""
    assert "table.max_slots" in str(errors.error_for(Status.NO_SLOTS, ""))
    assert "out of service" in str(errors.error_for(Status.OUT_OF_SERVICE, ""))


@pytest.mark.parametrize("status", sorted(LISTS_SLOTS))
def test_errors_about_slots_carry_them(status: Status) -> None:
    """The listed slots are on the error."""
    error = errors.error_for(status, "x", np.array([1, 2], np.uint64))
    assert error.slots.tolist() == [1, 2]


def test_the_tree_fits_pythons_own() -> None:
    """Errors can be caught as what Python calls them, and all of them as VswapError."""
    assert issubclass(vswap.BadBuffer, ValueError)
    assert issubclass(vswap.HandleFreed, ValueError)
    assert issubclass(vswap.ConnectionLost, ConnectionError)
    assert issubclass(vswap.TimedOut, TimeoutError)
    assert issubclass(vswap.NoDaemon, vswap.ConnectionLost)
    public = [value for value in vars(vswap).values() if inspect.isclass(value)]
    raised = [value for value in public if issubclass(value, Exception)]
    assert len(raised) > 15
    assert all(issubclass(value, vswap.VswapError) for value in raised)


def test_all_errors_are_exported() -> None:
    """Whatever the package can raise can be named as vswap.Name."""
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, vswap.VswapError):
            assert getattr(vswap, name) is value
            assert name in vswap.__all__


def test_merging_prefers_what_ended_the_connection() -> None:
    """A lost connection outweighs the typed error before it."""
    lost = vswap.ConnectionLost("gone")
    assert errors.merge(vswap.BadSlot("bad"), lost) is lost
    assert errors.merge(lost, vswap.BadSlot("bad")) is lost


def test_merged_rejections_name_every_slot_that_lost_its_content() -> None:
    """Also where the shards had different reasons: who is not told would take them for full."""
    first = vswap.Rejected("a", "pool_full", np.array([1], np.uint64))
    merged = errors.merge(first, vswap.Rejected("b", "device_full", np.array([2], np.uint64)))
    merged = errors.merge(merged, vswap.Rejected("b", "device_full", np.array([3], np.uint64)))
    merged = errors.merge(merged, vswap.Rejected("a", "pool_full", np.array([4], np.uint64)))
    assert isinstance(merged, vswap.Rejected)
    assert merged.reason == "pool_full"
    assert merged.slots.tolist() == [1, 2, 3, 4]
    assert merged.__notes__ == ["other pages of the call: b"]


def test_a_rejection_outweighs_what_has_changed_nothing() -> None:
    """The slots that it has emptied are named, whichever failure was told first."""
    for turned in (False, True):
        bad = vswap.BadSlot("bad", np.array([1], np.uint64))
        rejected = vswap.Rejected("full", "pool_full", np.array([2], np.uint64))
        pair = (rejected, bad) if turned else (bad, rejected)
        merged = errors.merge(*pair)
        assert merged is rejected
        assert merged.slots.tolist() == [2]
        assert merged.__notes__ == ["other pages of the call: bad"]


def test_errors_know_an_exit_code() -> None:
    """Command line tools can exit with what the error says."""
    codes = {vswap.VswapError: 1, vswap.NotAllowed: 77, vswap.NoDaemon: 69, vswap.BadArgument: 2}
    assert {kind: kind.exit_code for kind in codes} == codes
