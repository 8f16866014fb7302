"""Our int8 kernel against compressed-tensors' own arithmetic, bit for bit."""

from __future__ import annotations

import pytest
import torch

from shardwright.executors.kernels import quantise_int8_channel
from tests.unit.test_kernels import DTYPES, difficult, same_bits

pytestmark = pytest.mark.clients("compressed_tensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_and_payload_are_the_clients(dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    weight = difficult(dtype)
    scale, zero_point = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    payload = quantize(weight, scale, zero_point, args, dtype=torch.int8)

    ours = [torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1, dtype=dtype)]
    quantise_int8_channel(weight, ours, torch.empty(weight.nbytes, dtype=torch.uint8))
    assert torch.equal(ours[0], payload)
    assert same_bits(ours[1].nan_to_num(1234.0), scale.nan_to_num(1234.0))
    assert torch.equal(ours[1].isnan(), scale.isnan())
