"""Sizes as people write them: ``8GiB``, ``5GB``, ``1048576``."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from .errors import UsageError

__all__ = ["parse_size"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_size(text: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"5GB"`` or a bare number.

    >>> parse_size("1.5GiB"), parse_size("5GB"), parse_size(1024)
    (1610612736, 5000000000, 1024)
    """
    plain = str(text).strip()
    digits = plain.rstrip("BKMGTIbkmgti ")
    unit = _UNITS.get(plain[len(digits) :].strip().upper())
    try:
        if unit is None or not digits.isascii() or not (value := Decimal(digits)).is_finite() or value < 0:
            raise ValueError
        nbytes = int(value * unit)
        if nbytes >= 1 << 63:
            raise ValueError
        return nbytes
    except (ValueError, InvalidOperation):
        raise UsageError(f"not a size: {text!r}", remedy="Write 512MiB, 8GiB, 5GB or a number of bytes") from None
