"""Steering: the Control connection that vswapctl is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vswap
from support.fake_daemon import FakeDaemon
from vswap.control import Control
from vswap.protocol import Flag, Header, Op, Status


def test_a_control_connection_opens_no_space(fake: FakeDaemon) -> None:
    """HELLO is flagged CONTROL."""
    with Control(fake.path, timeout=30):
        assert (fake.requests[0].op, fake.requests[0].flags) == (Op.HELLO, Flag.CONTROL)


def test_verbs_carry_their_arguments(fake: FakeDaemon) -> None:
    """A call is a JSON object of the verb and its arguments, and so is the answer."""
    with Control(fake.path) as control:
        answer = control.call("set", key="pool.max", value="8M")
        assert answer == {"asked": {"verb": "set", "key": "pool.max", "value": "8M"}}
        assert control.status() == {"state": "running"}


class RefusingDaemon(FakeDaemon):
    """Refuses steering with `status`."""

    status = Status.NOT_ALLOWED

    def answer(self, header: Header, body: bytes) -> Iterator[bytes]:
        if header.op == Op.CONTROL:
            yield self.refusal(header, self.status, "because of this")
        else:
            yield from super().answer(header, body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.NOT_ALLOWED, vswap.NotAllowed),
        (Status.BAD_ARGUMENT, vswap.BadArgument),
        (Status.OUT_OF_SERVICE, vswap.OutOfService),
    ],
)
def test_refusals_are_typed_and_harmless(
    socket_path: Path, status: Status, kind: type[Exception]
) -> None:
    """A refused verb says why, and the connection goes on."""
    with RefusingDaemon(socket_path) as daemon, Control(socket_path) as control:
        daemon.status = status
        with pytest.raises(kind, match="because of this"):
            control.call("swapoff", path="/swap")
        assert control.status() == {"state": "running"}


def test_a_closed_control_says_so(fake: FakeDaemon) -> None:
    """After close every call is ConnectionLost."""
    control = Control(fake.path)
    control.close()
    with pytest.raises(vswap.ConnectionLost):
        control.call("verify")
