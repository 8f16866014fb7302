"""What a quantisation scheme declares: which tensors it takes, what it makes of them, and which kernel does it.

A scheme turns one stored tensor into several outputs (payload, scales). For each it declares the name, dtype, shape and
how pivot coordinates map to its own; plus the smallest box of input that is independent of all others. The arithmetic
is a kernel on the executors' side, named here as ``"module:function"``; so is the way back to values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Scheme", "SchemeOutput"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SchemeOutput:
    """One output: stored name, dtype, shape, and input elements per output element on each axis."""

    name: str
    dtype: str
    shape: Shape
    ratio: Shape


class Scheme(Protocol):
    """A quantisation scheme, registered under `name`."""

    name: str
    kernel: str
    dequantise: str
    """The kernel that makes values of what is stored; a scheme without one is only compared with itself, bit by bit."""

    def takes(self, name: str, shape: Shape, dtype: str) -> bool:
        """Whether the hub tensor of that name is quantised."""

    def outputs(self, name: str, shape: Shape, dtype: str) -> Sequence[SchemeOutput]:
        """What is stored instead of tensor `name`."""

    def block(self, shape: Shape) -> Shape:
        """Smallest independent input box per axis; 0 is the whole axis."""

    def scratch(self) -> int:
        """Bytes of scratch the kernel needs per input element."""

    def config(self) -> dict[str, Any]:
        """``quantization_config`` for config.json, by which loaders know the scheme."""

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a ``quantization_config`` found in a checkpoint is this scheme's."""
