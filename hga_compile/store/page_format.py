"""What a page on a file looks like: a header that says which page it is, then K and V of a run of groups.

The checksum covers header and payload, so that a flipped bit, a page in another's place and a write that the
device lost are all told from what was written.
"""

import struct
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from hga_compile.store.errors import CorruptPageError

__all__ = ["HEADER_BYTES", "PageFormat"]

HEADER_BYTES = 64
"""Bytes before the payload."""

_MAGIC = b"hgapage1"
# Magic, store, layer, row, block, generation, bytes of payload; then the checksum.
_IDENTITY = struct.Struct("<8s16sIIQQI")
_CHECKSUM = struct.Struct("<I")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PageFormat:
    """Header and checksum of the pages of one file.

    Attributes
    ----------
    store : bytes
        16 random bytes that name the store.
    layer : int
        Number of its layer.
    payload : int
        Bytes of K and V in a page.
    """

    store: bytes
    layer: int
    payload: int

    def seal(self, page: Bytes, row: int, block: int, generation: int) -> None:
        """Write header and checksum of a page whose payload is in place."""
        header = self._identity(row, block, generation)
        end = len(header) + _CHECKSUM.size
        page[: len(header)] = np.frombuffer(header, np.uint8)
        page[len(header) : end] = np.frombuffer(self._checksum(header, page), np.uint8)
        page[end:HEADER_BYTES] = 0

    def check(self, page: Bytes, row: int, block: int, generation: int) -> None:
        """Refuse a page that is not the one that was written last at this place.

        Raises
        ------
        CorruptPageError
            Another page, an older one, or other bytes.
        """
        header = self._identity(row, block, generation)
        end = len(header) + _CHECKSUM.size
        found = page[: len(header)].tobytes()
        if found != header:
            raise CorruptPageError(
                f"a page of the nvme tier is not the one that was written: got {_described(found)}, expected "
                f"{_described(header)}; check the device of offload.nvme_folder"
            )
        if page[len(header) : end].tobytes() != self._checksum(header, page):
            raise CorruptPageError(
                f"a page of the nvme tier is damaged: got another checksum than was written for "
                f"{_described(header)}; check the device of offload.nvme_folder"
            )

    def _identity(self, row: int, block: int, generation: int) -> bytes:
        return _IDENTITY.pack(_MAGIC, self.store, self.layer, row, block, generation, self.payload)

    def _checksum(self, header: bytes, page: Bytes) -> bytes:
        payload = page[HEADER_BYTES : HEADER_BYTES + self.payload]
        return _CHECKSUM.pack(google_crc32c.extend(google_crc32c.value(header), payload))


def _described(header: bytes) -> str:
    magic, store, layer, row, block, generation, payload = _IDENTITY.unpack(header)
    if magic != _MAGIC:
        return "no page of this format"
    return (
        f"store {store.hex()[:8]}, layer {layer}, row {row}, block {block}, generation {generation}, "
        f"{payload} bytes"
    )
