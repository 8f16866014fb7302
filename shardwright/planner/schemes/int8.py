"""``int8``: compressed-tensors' ``int-quantized``, symmetric, one scale per output channel, weights only.

For a weight ``W [out, in]``: ``s = max|W| / 127.5`` per row, ``q = round_half_even(clamp(W / s, -128, 127))``, all in
W's own dtype (source: compressed-tensors ``quantization/utils/helpers.calculate_qparams`` and ``lifecycle/forward``).
Stored: ``X.weight`` int8 [out, in] and ``X.weight_scale`` [out, 1] in W's dtype. Linear weights of the layers are taken;
embeddings, norms and the head are not (config: ``ignore: ["lm_head"]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import SchemeOutput

__all__ = ["Int8"]

Shape = tuple[int, ...]


class Int8:
    """See the module."""

    name = "int8"
    kernel = "shardwright.executors.kernels:quantise_int8_channel"
    dequantise = "shardwright.executors.kernels:dequantise_int8_channel"

    def takes(self, name: str, shape: Shape, dtype: str) -> bool:
        return (
            len(shape) == 2
            and name.startswith("model.layers.")
            and name.endswith("_proj.weight")
            and dtype in ("bfloat16", "float16", "float32")
        )

    def outputs(self, name: str, shape: Shape, dtype: str) -> Sequence[SchemeOutput]:
        rows, columns = shape
        return (SchemeOutput(name, "int8", shape, (1, 1)), SchemeOutput(f"{name}_scale", dtype, (rows, 1), (1, columns)))

    def block(self, shape: Shape) -> Shape:
        return (1, 0)

    def scratch(self) -> int:
        return 8

    def config(self) -> dict[str, Any]:
        weights = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
            "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "int-quantized",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
            "kv_cache_scheme": None,
        }

    def recognises(self, config: dict[str, Any]) -> bool:
        groups = config.get("config_groups")
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "int-quantized":
            return False
        if not isinstance(groups, dict) or len(groups) != 1:
            return False
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return False
        wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        return group.get("input_activations") is None and all(weights.get(k) == v for k, v in wanted.items())
