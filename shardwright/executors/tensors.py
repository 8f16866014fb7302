"""A sink over tensors in memory: what a plan would write to target file n goes to tensor n.

1. A contiguous tensor on the CPU that has the plan's dtype is seen as bytes, and those are copied to it, or read into it.
2. Any other (another dtype, another device, strided) is given values: a run of elements, row-major, becomes at most one
   part of a row, whole rows, and one part of a row on each axis; torch copies, casts and transfers each.

Either way only what one strip holds is in memory beside the tensor. Tensors that this process does not hold go to those that
do, if `remote` says so.

Boundary: torch tensors and bytes; knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from .transfer import Write

if TYPE_CHECKING:
    from ..planner.plan import TargetFile
    from .arena import Buffer

__all__ = ["Remote", "Tensors"]

Remote = Callable[[int, int, memoryview], None]
"""Takes ``(number, byte offset, bytes)`` for the other processes that hold that tensor; ignores what none does."""


class Tensors:
    """The sink.

    Parameters
    ----------
    tensors
        By number of the target file; not written through autograd.
    dtypes
        By number: torch's spelling of the dtype that the plan writes.
    remote
        Takes what is written, too.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor], dtypes: Mapping[int, str], remote: Remote | None = None) -> None:
        self.files: dict[int, TargetFile] = {}
        self._remote = remote
        self._values = {number: tensor.detach() for number, tensor in tensors.items()}
        self._dtypes = {number: _dtype(dtypes[number]) for number in tensors}
        self._bytes = {number: raw for number, tensor in self._values.items() if (raw := self._raw(number, tensor)) is not None}

    def witnessed(self, number: int) -> bool:
        """Nothing here has a checksum."""
        return False

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """A function that puts bytes at an offset of that tensor, seen row-major in the plan's dtype."""
        yield partial(self._write, number)

    def memory(self, number: int) -> memoryview | None:
        """The tensor's own memory, if bytes can be put there and no one else takes them."""
        raw = self._bytes.get(number) if self._remote is None else None
        return None if raw is None else raw.data

    def place(self, number: int, offset: int, data: memoryview) -> None:
        """The same for one run of bytes; for a tensor of another process, nothing."""
        if (raw := self._bytes.get(number)) is not None:
            np.copyto(raw[offset : offset + len(data)], np.frombuffer(data, np.uint8))
        elif (tensor := self._values.get(number)) is not None:
            dtype = self._dtypes[number]
            values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)
            put(tensor, offset // dtype.itemsize, values)

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        self.place(number, offset, data)
        if self._remote is not None:
            self._remote(number, offset, data)

    def _raw(self, number: int, tensor: torch.Tensor) -> Buffer | None:
        """The tensor's own memory, if bytes can be copied to it."""
        if tensor.device.type != "cpu" or tensor.dtype != self._dtypes[number] or not tensor.is_contiguous():
            return None
        return tensor.view(-1).view(torch.uint8).numpy()


def put(tensor: torch.Tensor, begin: int, values: torch.Tensor) -> None:
    """Row-major elements ``begin …`` of a tensor of any strides, dtype and device become `values`, a flat tensor.

    >>> t = torch.zeros(3, 2).T
    >>> put(t, 1, torch.arange(4.0)); t
    tensor([[0., 0., 1.],
            [2., 3., 0.]])
    """
    if tensor.is_contiguous():
        tensor.view(-1)[begin : begin + len(values)].copy_(values)
        return
    inner = tensor[0].numel()
    while len(values):
        row, at = divmod(begin, inner)
        if at == 0 and len(values) >= inner:
            rows = len(values) // inner
            step = rows * inner
            tensor[row : row + rows].copy_(values[:step].view(rows, *tensor.shape[1:]))
        else:
            step = min(inner - at, len(values))
            put(tensor[row], at, values[:step])
        begin, values = begin + step, values[step:]


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
