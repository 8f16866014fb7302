"""The dtype table: every dtype that a checkpoint stores, under torch's spelling.

A dtype here is a name, a width in bits and a kind; the tensor's bytes are never interpreted by the planner. ``tag`` is
the spelling in a safetensors header (source: the ``Dtype`` enum of safetensors 0.8); six-bit and four-bit types have a
tag but no torch name of their own, so they keep a lower-case form of the tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError

__all__ = ["ALIASES", "BY_NAME", "BY_TAG", "DType", "dtype"]

Kind = Literal["float", "int", "uint", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype.

    Attributes
    ----------
    name
        torch's spelling, e.g. ``"bfloat16"``.
    bits
        Width of one element in bits; below 8 the elements are packed.
    kind
        Arithmetic kind.
    tag
        Spelling in a safetensors header.
    """

    name: str
    bits: int
    kind: Kind
    tag: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for packed sub-byte types, whose layout the planner does not cut."""
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements; sub-byte types must fill whole bytes.

        >>> dtype("bfloat16").nbytes(3), BY_TAG["F4"].nbytes(16)
        (6, 8)
        """
        total = count * self.bits
        if total % 8:
            raise UsageError(f"{count} elements of {self.name} do not fill whole bytes")
        return total // 8


# In safetensors' own order: `save_file` sorts tensors by this order descending, then by name.
_TABLE = (
    DType("bool", 8, "bool", "BOOL"),
    DType("float4_e2m1fn", 4, "float", "F4"),
    DType("float6_e2m3", 6, "float", "F6_E2M3"),
    DType("float6_e3m2", 6, "float", "F6_E3M2"),
    DType("uint8", 8, "uint", "U8"),
    DType("int8", 8, "int", "I8"),
    DType("float8_e5m2", 8, "float", "F8_E5M2"),
    DType("float8_e4m3fn", 8, "float", "F8_E4M3"),
    DType("float8_e8m0fnu", 8, "float", "F8_E8M0"),
    DType("float8_e4m3fnuz", 8, "float", "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 8, "float", "F8_E5M2FNUZ"),
    DType("int16", 16, "int", "I16"),
    DType("uint16", 16, "uint", "U16"),
    DType("float16", 16, "float", "F16"),
    DType("bfloat16", 16, "float", "BF16"),
    DType("int32", 32, "int", "I32"),
    DType("uint32", 32, "uint", "U32"),
    DType("float32", 32, "float", "F32"),
    DType("complex64", 64, "complex", "C64"),
    DType("float64", 64, "float", "F64"),
    DType("int64", 64, "int", "I64"),
    DType("uint64", 64, "uint", "U64"),
)

BY_NAME = {d.name: d for d in _TABLE}
BY_TAG = {d.tag: d for d in _TABLE}
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32", "fp64": "float64"}
TAG_ORDER = {d.tag: i for i, d in enumerate(_TABLE)}


def dtype(name: str) -> DType:
    """The dtype of that name, with or without ``torch.``, or one of the short aliases.

    Raises
    ------
    UsageError
        No such dtype.

    >>> dtype("bf16").tag, dtype("torch.float8_e4m3fn").bits
    ('BF16', 8)
    """
    plain = name.removeprefix("torch.")
    try:
        return BY_NAME[ALIASES.get(plain, plain)]
    except KeyError:
        raise UsageError(f"no dtype is named {name!r}", remedy=f"Known: {', '.join(BY_NAME)}") from None
