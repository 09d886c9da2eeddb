"""The limit: a loop over the codec, and the compressed pages in a list.

This module must not know processes: there is no server.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.contract import Batch, Buffer, Peer, Plan
from bench.peers.lz4_codec import all_grown, all_shrunk, grown, shrunk


class CodecPeer(Peer):
    """Nothing but the codec."""

    name = "codec"
    what = "loop of lz4.block in Python (the limit)"
    counts = False

    def start(self, plan: Plan) -> None:
        """Nothing to start."""

    def address(self, client: int) -> str:
        return f"list {client}"

    def stop(self) -> None:
        """Nothing to stop."""

    @classmethod
    def connect(cls, address: str, client: int, pages: int) -> CodecClient:
        del address, client
        return CodecClient(pages)


class CodecClient:
    """A list of blobs."""

    def __init__(self, pages: int) -> None:
        self._blobs: list[bytes] = [b""] * pages

    def store(self, batch: Batch) -> None:
        self._blobs[batch.first : batch.first + len(batch.pages)] = all_shrunk(batch.pages)

    def load(self, batch: Batch) -> Sequence[Buffer]:
        return all_grown(self._blobs[batch.first : batch.first + len(batch.pages)])

    def store_one(self, number: int, page: memoryview) -> None:
        self._blobs[number] = shrunk(page)

    def load_one(self, number: int) -> Buffer:
        return grown(self._blobs[number])

    def close(self) -> None:
        self._blobs.clear()
