"""Kernels against formulas in plain torch, bit for bit, in strips of any height and with the least scratch."""

import pytest
import torch

from shardwright.errors import PlanError
from shardwright.executors.kernels import cast, kernel, quantise_int8_channel

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def formula(weight):
    """Symmetric int8 per row, every step in the weight's dtype."""
    scale = weight.abs().amax(1, keepdim=True) / torch.tensor(127.5, dtype=weight.dtype)
    scale = torch.where(scale == 0, torch.tensor(torch.finfo(weight.dtype).eps, dtype=weight.dtype), scale)
    return torch.round(torch.clamp(weight / scale, torch.tensor(-128.0), torch.tensor(127.0))).to(torch.int8), scale


def difficult(dtype, rows=300, width=257):
    """Random rows, and rows of zeros, ties, tiny, huge, infinite and undefined values."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = -0.0
    weight[3] *= torch.finfo(dtype).tiny
    weight[4] *= torch.finfo(dtype).max / 8
    weight[5, 7] = float("inf")
    weight[6, 7] = float("nan")
    weight[7] = torch.arange(width) / 2
    weight[8] = -weight[7]
    return weight


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scratch_rows", [1, 100, 300])
def test_int8_equals_the_formula(dtype, scratch_rows):
    weight = difficult(dtype)
    payload, scale = torch.empty(300, 257, dtype=torch.int8), torch.empty(300, 1, dtype=dtype)
    before = weight.clone()
    quantise_int8_channel(weight, [payload, scale], torch.empty(scratch_rows * 257 * dtype.itemsize, dtype=torch.uint8))
    wanted_payload, wanted_scale = formula(weight)
    assert torch.equal(payload, wanted_payload)
    assert same_bits(scale.nan_to_num(1234.0), wanted_scale.nan_to_num(1234.0))
    assert torch.equal(scale.isnan(), wanted_scale.isnan())
    assert same_bits(weight, before)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_a_cast_is_torchs(source, target):
    weight = difficult(source)
    found = torch.empty(weight.shape, dtype=target)
    cast(weight, [found], torch.empty(0, dtype=torch.uint8))
    assert same_bits(found, weight.to(target))


def test_kernels_are_found_by_name_and_only_in_this_package():
    assert kernel("shardwright.executors.kernels:cast") is cast
    for path in ("os:system", "shardwright_evil.kernels:cast", "shardwright.executors.kernels:nothing", "shardwright.nowhere:cast"):
        with pytest.raises(PlanError):
            kernel(path)
