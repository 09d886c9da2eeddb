"""A device whose bytes are encrypted: AES-256-XTS with a key that is never written down.

One extent is one XTS data unit (IEEE 1619), its tweak the extent's number: what lies on the device
is what any XTS with units of 256 KiB makes of it. Yet blocks can be read and written one by one.
XTS encrypts each 16 bytes on their own, with the mask E2(tweak) * x^j for the j-th in the unit; so
a run of blocks that begins at j is a unit of its own under the tweak D2(E2(tweak) * x^j), which is
worked out here. Nothing has to be remembered of how an extent was written, no write touches other
blocks than its own, and each call costs one cipher context.

That matters because contexts are dear here (medians, 256 KiB, VAES, us): in units of 4 KiB 229, of
32 KiB 39, of 256 KiB 14, beside about 115 for the write itself; the tweak of a run takes 3, a whole
read of 4 KiB 8. The cipher keeps the GIL, so this is also what others wait.

XTS hides contents, not that a block has changed back to what it was. That bytes are the right ones
is for the checks of the entries.

Invariants:
- The key comes from the system's random source, and is in no file, log or repr. Whoever gives one
  keeps it where it goes with the machine's power, and gives it to one device only.
- Equal blocks at different places, or under different keys, look unrelated.

This module must not know what is encrypted, or the device below beyond its contract.
"""

from __future__ import annotations

import os
import threading
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB, XTS

from vswapd_blockdev.buffers import Scratch
from vswapd_blockdev.device import BLOCK_BYTES, EXTENT_BYTES, BlockDevice

KEY_BYTES: Final = 64
"""Two keys of 256 bits: the first for contents, the second for tweaks."""
_CIPHER_BYTES: Final = 16
_LOW: Final = (1 << 128) - 1


def new_key() -> bytes:
    """KEY_BYTES that nobody else has."""
    return os.urandom(KEY_BYTES)


def run_mask(mask: int, block: int) -> int:
    """`mask` * x^(256 * block), modulo x^128 + x^7 + x^2 + x + 1, bit i being x^i.

    256 is the number of cipher blocks in a block. x^256 is x^14 + x^4 + x^2 + 1 there, and squaring
    doubles exponents: three shifts for each bit of `block`.
    """
    shifts = (2, 4, 14)
    while block:
        if block & 1:
            first, second, third = shifts
            mask ^= mask << first ^ mask << second ^ mask << third
            while over := mask >> 128:
                mask = mask & _LOW ^ over ^ over << 1 ^ over << 2 ^ over << 7
        block >>= 1
        shifts = (2 * shifts[0], 2 * shifts[1], 2 * shifts[2])
    return mask


class _TweakCipher(threading.local):
    """The second key's cipher on single cipher blocks; contexts are not shared by threads."""

    def __init__(self, key: bytes) -> None:
        # One block without a mode around it is what XTS itself does with its tweak.
        cipher = Cipher(AES(key), ECB())  # noqa: S305
        self.encrypt = cipher.encryptor().update
        self.decrypt = cipher.decryptor().update


class SealedDevice:
    """Encrypts what goes to another device, and decrypts what comes back."""

    def __init__(self, device: BlockDevice, key: bytes | None = None) -> None:
        """Wrap a device.

        Args:
            device: what lies below.
            key: KEY_BYTES, see `new_key`; None: new ones that nobody else will ever have.
        """
        secret = new_key() if key is None else key
        assert len(secret) == KEY_BYTES
        self._device = device
        self._key: Final = AES(secret)
        self._tweaks: Final = _TweakCipher(secret[KEY_BYTES // 2 :])
        self._scratch: Final = Scratch()
        self.path: Final = device.path
        self.extents: Final = device.extents
        self.direct: Final = device.direct
        self.encrypted: Final = True

    def read(self, extent: int, offset: int, length: int) -> memoryview:
        """See BlockDevice."""
        sealed = self._device.read(extent, offset, length)
        # update_into wants room for one cipher block more than comes out.
        plain = np.empty(length + _CIPHER_BYTES, np.uint8).data
        self._cipher(extent, offset).decryptor().update_into(sealed, plain)
        return plain[:length]

    def write(self, extent: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See BlockDevice."""
        view = memoryview(data).cast("B")
        sealed = self._scratch.buffer
        for start in range(0, len(view), EXTENT_BYTES):
            # The cipher wants room for one block more than it fills: what follows fills that.
            cipher = self._cipher(extent + start // EXTENT_BYTES, offset)
            cipher.encryptor().update_into(view[start : start + EXTENT_BYTES], sealed[start:])
        self._device.write(extent, offset, sealed[: len(view)])

    def discard(self, extent: int, count: int = 1) -> None:
        """See BlockDevice."""
        self._device.discard(extent, count)

    def close(self) -> None:
        """See BlockDevice."""
        self._device.close()

    def _cipher(self, extent: int, offset: int) -> Cipher[XTS]:
        """The cipher of a run of blocks that begins at `offset`."""
        tweak = extent.to_bytes(_CIPHER_BYTES, "little")
        if offset:
            mask = int.from_bytes(self._tweaks.encrypt(tweak), "little")
            mask = run_mask(mask, offset // BLOCK_BYTES)
            tweak = self._tweaks.decrypt(mask.to_bytes(_CIPHER_BYTES, "little"))
        return Cipher(self._key, XTS(tweak))
