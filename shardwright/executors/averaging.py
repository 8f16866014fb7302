"""The mean of copies that drifted apart: a strip of the first copy becomes that of all of them.

1. The sum begins with the first copy and takes the others one by one, in the order of their ranks, in float32 (float64 where
   that is what is stored).
2. Elements that differ in any bit from the first copy's are marked.
3. Where an element is marked, the sum over the number of copies is rounded once to the stored dtype, half to even. Where all
   copies are equal, nothing changes, not even the payload of a NaN.

Source of the rule: bigscience's Megatron-DeepSpeed (``tools/convert_checkpoint/ds_to_universal.py``, WEIGHTS_TO_AVERAGE_PATTERNS)
and transformers' ``convert_bloom_original_checkpoint_to_pytorch.py``, which sum in the stored dtype and so round every time.
Boundary: buffers in memory; every temporary is a small multiple of a block.
"""

from __future__ import annotations

import numpy as np

from ..planner.passes.memory import mean_dtype
from .compare import first_difference
from .elements import numpy_dtype

__all__ = ["Mean"]

_BLOCK = 64 << 10
"""Elements converted at once."""


class Mean:
    """The mean of a strip's copies.

    Parameters
    ----------
    dtype
        Of the strip.
    strip
        The first copy, whole; `finish` writes the mean into it.
    room
        `shardwright.planner.passes.memory.mean_bytes` of the strip's elements.
    """

    def __init__(self, dtype: str, strip: memoryview, room: memoryview) -> None:
        kind, wide = numpy_dtype(dtype), np.dtype(mean_dtype(dtype))
        self._strip = np.frombuffer(strip, kind)
        count = len(self._strip)
        self._sum = np.frombuffer(room, wide, count)
        self._marks = np.frombuffer(room, np.bool_, count, count * wide.itemsize)
        self._bits = np.dtype(f"u{kind.itemsize}")
        self._copies = 1
        self._differ = False

    def add(self, copy: memoryview) -> None:
        """Count another copy in."""
        self._copies += 1
        first = self._strip.view(np.uint8).data
        if not self._differ:
            if first_difference(first, copy) is None:
                return
            self._begin()
        other = np.frombuffer(copy, self._strip.dtype)
        for at in range(0, len(other), _BLOCK):
            part = slice(at, at + _BLOCK)
            self._marks[part] |= other[part].view(self._bits) != self._strip[part].view(self._bits)
            # Infinities of both signs and overflows give what their mean is: no number, or infinity.
            with np.errstate(invalid="ignore", over="ignore"):
                self._sum[part] += other[part].astype(self._sum.dtype)

    def _begin(self) -> None:
        """The sum of the copies so far, which are all equal, added one by one as the others will be."""
        self._differ = True
        self._marks[:] = False
        for at in range(0, len(self._strip), _BLOCK):
            part = slice(at, at + _BLOCK)
            first = self._strip[part].astype(self._sum.dtype)
            self._sum[part] = first
            with np.errstate(invalid="ignore", over="ignore"):
                for _ in range(self._copies - 2):
                    self._sum[part] += first

    def finish(self) -> int:
        """Put the mean in place; how many elements differed."""
        if not self._differ:
            return 0
        for at in range(0, len(self._strip), _BLOCK):
            part = slice(at, at + _BLOCK)
            with np.errstate(invalid="ignore", over="ignore"):
                mean = (self._sum[part] / self._sum.dtype.type(self._copies)).astype(self._strip.dtype)
            np.copyto(self._strip[part], mean, where=self._marks[part])
        return int(np.count_nonzero(self._marks))
