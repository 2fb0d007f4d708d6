"""The one thing that counts in EXIF: how the picture is to be turned (EXIF 3.0, 4.6.5.1, tag 0x0112)."""

from struct import unpack_from
from typing import Final

_ORDERS: Final = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3


def orientation_of(exif: memoryview) -> int:
    """1 to 8; 1 (as it is) where there is none, or where the EXIF data is broken: the pixels may be whole all the
    same. Reads the first directory and nothing that it points to."""
    if bytes(exif[:6]) == b"Exif\0\0":
        exif = exif[6:]
    order = _ORDERS.get(bytes(exif[:4]))
    if order is None or len(exif) < 8:
        return 1
    (at,) = unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return 1
    (entries,) = unpack_from(f"{order}H", exif, at)
    for place in range(at + 2, min(at + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count, value = unpack_from(f"{order}HHIH", exif, place)
        if tag == _ORIENTATION:
            return int(value) if (kind, count) == (_SHORT, 1) and 1 <= value <= 8 else 1
    return 1
