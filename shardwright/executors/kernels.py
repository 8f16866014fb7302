"""Kernels: the only compute on values.

A value op names its kernel as ``"module:function"``; `kernel` imports it, and torch with it, when a plan needs one. The
contract::

    kernel(source, outputs, scratch) -> None

`source` is a strip of the pivot in the shape of its box, each of `outputs` the strip of one output in the shape of its
own box, all row-major; `scratch` is a flat uint8 tensor of ``op.scratch`` bytes per pivot element. A kernel fills its
outputs, works in place or with ``out=``, and allocates nothing that grows with the strip. It runs on one thread: lanes
run side by side.

The way back, for comparisons, is numpy alone (`values_kernel`), for it is exact in float64 and needs no torch::

    kernel(stored, values) -> None

`stored` holds the scheme's outputs for a box of the tensor, each in the shape of its own box; `values`, float64 in the
shape of the box, is filled with what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..planner.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

__all__ = [
    "Kernel",
    "ValuesKernel",
    "add_one",
    "cast",
    "dequantise_int8_channel",
    "kernel",
    "quantise_int8_channel",
    "subtract_one",
    "values_kernel",
]

Kernel = Callable[["torch.Tensor", "list[torch.Tensor]", "torch.Tensor"], None]
ValuesKernel = Callable[[Sequence[npt.NDArray[Any]], npt.NDArray[np.float64]], None]


@cache
def kernel(path: str) -> Kernel:
    """Import a kernel.

    Raises
    ------
    PlanError
        Nothing of that name, or a module outside this package that no registered scheme names: a plan may come from a
        file and must not choose code.
    """
    if path.partition(":")[0].partition(".")[0] != __name__.partition(".")[0] and path not in {scheme.kernel for scheme in SCHEMES}:
        raise PlanError(
            "a kernel belongs to no registered scheme", actual=path, remedy="Register the scheme in this process (shardwright.register)"
        )
    found: Kernel = _function(path)
    import torch

    torch.set_num_threads(1)
    return found


@cache
def values_kernel(path: str) -> ValuesKernel:
    """Import a scheme's kernel back to values; its name comes from a registered scheme, never from a file.

    Raises
    ------
    PlanError
        Nothing of that name.
    """
    found: ValuesKernel = _function(path)
    return found


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise PlanError("no such kernel", actual=path) from None


def cast(source: torch.Tensor, outputs: list[torch.Tensor], scratch: torch.Tensor) -> None:
    """Each element in the output's dtype, as torch rounds it."""
    outputs[0].copy_(source)


def add_one(source: torch.Tensor, outputs: list[torch.Tensor], scratch: torch.Tensor) -> None:
    """Each element plus 1, added in float64 and rounded once."""
    _affine(source, outputs[0], scratch, 1.0)


def subtract_one(source: torch.Tensor, outputs: list[torch.Tensor], scratch: torch.Tensor) -> None:
    """Each element less 1, in float64, rounded once."""
    _affine(source, outputs[0], scratch, -1.0)


def _affine(source: torch.Tensor, output: torch.Tensor, scratch: torch.Tensor, shift: float) -> None:
    import torch

    work = scratch[: 8 * source.numel()].view(torch.float64).view(source.shape)
    work.copy_(source)
    work.add_(shift)
    output.copy_(work)


_ROWS = 128
"""Rows of one pass: large enough to amortise the calls, small enough to stay in the second-level cache."""


def quantise_int8_channel(source: torch.Tensor, outputs: list[torch.Tensor], scratch: torch.Tensor) -> None:
    """Symmetric int8 with one scale per row, as compressed-tensors' ``int-quantized`` stores it.

    All arithmetic is in the weight's dtype: ``s = amax|W| / 127.5`` per row (the dtype's epsilon where that is zero)
    and ``q = round_half_even(clamp(W / s, -128, 127))``.

    Parameters
    ----------
    source
        ``[rows, in]``, bfloat16, float16 or float32.
    outputs
        ``[rows, in]`` int8 and ``[rows, 1]`` in the weight's dtype.
    scratch
        At least one row of the weight's dtype.
    """
    import torch

    payload, scale = outputs
    rows, width = source.shape
    if not source.numel():
        return
    bits, mask = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}[source.element_size()]
    step = min(rows, _ROWS, scratch.numel() // (width * source.element_size()))
    work = scratch[: step * width * source.element_size()]
    quotient, magnitude = work.view(source.dtype).view(step, width), work.view(bits).view(step, width)
    for at in range(0, rows, step):
        n = min(step, rows - at)
        w, s = source[at : at + n], scale[at : at + n]
        # Without the sign bit floats order as integers do, NaN above all: several times faster than amax on 16-bit floats.
        torch.bitwise_and(w.view(bits), mask, out=magnitude[:n])
        torch.amax(magnitude[:n], 1, keepdim=True, out=s.view(bits))
        s.div_(127.5)
        s.masked_fill_(s == 0, torch.finfo(s.dtype).eps)
        torch.div(w, s, out=quotient[:n]).clamp_(-128, 127).round_()
        payload[at : at + n].copy_(quotient[:n])


def dequantise_int8_channel(stored: Sequence[npt.NDArray[Any]], values: npt.NDArray[np.float64]) -> None:
    """``q · s``, unrounded: int8 times one scale per row is exact in float64 for every scale of up to 32 bits.

    Parameters
    ----------
    stored
        ``[rows, columns]`` int8 and ``[rows, 1]`` scales.
    values
        ``[rows, columns]``.
    """
    payload, scale = stored
    np.multiply(payload, scale.astype(np.float64), out=values)
