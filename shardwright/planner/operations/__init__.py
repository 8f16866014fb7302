"""Layout operations: how a stored tensor is made of hub tensors. One file and one registration each.

An operation is a function ``(parts, fields) -> LazyTensor``: the hub tensors of a row, in the row's order, and the
canonical config's fields with the layout's (``tp``, which is etp for experts, and ``padded_vocab_size``). It is a bijection
of elements up to fill, so reading and writing use the same pieces. Rows name operations with literal arguments:
``"transpose"``, ``"pad(0, 128)"``.
"""

from __future__ import annotations

from collections.abc import Callable

from ..registry import Registry
from ..tensor.lazy import LazyTensor
from .grouped_qkv import grouped_qkv
from .interleave import interleave
from .packed import packed
from .pad_vocab import pad_vocab
from .qkv_order import qkv_order
from .roll import roll
from .stack_experts import stack_experts
from .transpose import transpose

__all__ = ["OPERATIONS", "Operation"]

Operation = Callable[..., LazyTensor]
"""``(parts: Sequence[LazyTensor], fields: Mapping[str, Any], *literals) -> LazyTensor``"""

OPERATIONS: Registry[Operation] = Registry("operation")
OPERATIONS.add("grouped_qkv", grouped_qkv)
OPERATIONS.add("interleave", interleave)
OPERATIONS.add("packed", packed)
OPERATIONS.add("pad_vocab", pad_vocab)
OPERATIONS.add("qkv_order", qkv_order)
OPERATIONS.add("roll", roll)
OPERATIONS.add("stack_experts", stack_experts)
OPERATIONS.add("transpose", transpose)
