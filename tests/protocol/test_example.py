"""The example of docs/protocol.md is what a real daemon says."""

from __future__ import annotations

from protocol.example import on_the_page, session


def test_the_example_is_a_real_conversation() -> None:
    """Each length, each byte, the first slot and all texts are the daemon's; only the token varies.

    If it has to change: `PYTHONPATH=tests python -m protocol.example` prints it.
    """
    assert on_the_page() == session()
