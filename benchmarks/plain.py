"""The script that anyone would write first: `get_slice` and `save_file`, one rank after the other.

``python plain.py split SOURCE OUT TP`` cuts a Hugging Face Llama into one safetensors file per tensor-parallel rank;
``python plain.py merge SOURCE OUT`` joins them again. Nothing is checked, and a whole output file is in memory at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARD_BYTES = 5_000_000_000


def axis_of(name: str) -> int | None:
    """The axis along which a Llama's tensor is cut."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def split(source: Path, out: Path, tp: int) -> None:
    """One file per rank."""
    out.mkdir()
    for rank in range(tp):
        tensors = {}
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part, axis = file.get_slice(name), axis_of(name)
                    if axis is None:
                        tensors[name] = part[:]
                        continue
                    step = part.get_shape()[axis] // tp
                    rows = slice(rank * step, (rank + 1) * step)
                    tensors[name] = part[rows] if axis == 0 else part[:, rows]
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"rank_{rank:05d}.safetensors", {"format": "pt"})


def merge(source: Path, out: Path) -> None:
    """All ranks into files of at most `SHARD_BYTES`."""
    out.mkdir()
    ranks = [safe_open(path, "pt") for path in sorted(source.glob("rank_*.safetensors"))]
    tensors: dict[str, torch.Tensor] = {}
    filled, files = 0, 0
    for name in ranks[0].keys():  # noqa: SIM118 - not a mapping
        axis = axis_of(name)
        whole = ranks[0].get_tensor(name) if axis is None else torch.cat([rank.get_tensor(name) for rank in ranks], axis)
        if tensors and filled + whole.nbytes > SHARD_BYTES:
            save_file(tensors, out / f"model-{files:05d}.safetensors", {"format": "pt"})
            tensors, filled, files = {}, 0, files + 1
        tensors[name] = whole
        filled += whole.nbytes
    save_file(tensors, out / f"model-{files:05d}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    if sys.argv[1] == "split":
        split(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        merge(Path(sys.argv[2]), Path(sys.argv[3]))
