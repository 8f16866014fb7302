"""Made-up checkpoints: a config.json becomes a Hugging Face checkpoint of the right shapes, random or sparse.

Random values are finite and below 2 in every floating dtype (the top exponent bit is cleared), so real clients can run
them; a sparse checkpoint has headers and holes, which is all that planning needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

from .errors import TargetExistsError
from .planner.config import family_of
from .planner.containers.base import TensorSpec
from .planner.identity import read_object
from .planner.paper import SHARD_BYTES, PaperFile, dtype_of_config, lay_out
from .planner.passes.request import castable
from .planner.store import LocalStore
from .planner.tables import Family
from .planner.tensor.dtypes import dtype as dtype_of

__all__ = ["synth"]

_BLOCK = 1 << 20


def synth(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparse: bool = False,
    dtype: str | None = None,
    family: Family | None = None,
    max_shard_size: int = SHARD_BYTES,
    seed: int = 0,
) -> Path:
    """Make a checkpoint for `config`, a config.json or a folder that holds one.

    Parameters
    ----------
    dtype
        Of every tensor that the family's table gives none; by default the config's own, else bfloat16.

    Raises
    ------
    TargetExistsError
        `out` holds something already.
    ConfigError
        The config cannot be read.
    """
    given = Path(config)
    path = given / "config.json" if given.is_dir() else given
    raw = read_object(LocalStore(path), path.name)
    chosen = family or family_of(raw, str(path))
    name = castable(dtype) if dtype else dtype_of_config(raw, str(path)) or "bfloat16"
    made = {**raw, ("dtype" if "dtype" in raw else "torch_dtype"): name}
    files = list(lay_out(made, chosen, name, max_shard_size, None, str(path)))
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise TargetExistsError("the target holds something already", file=root, remedy="Name a new folder")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(files, partial, None if sparse else seed)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if root.exists():
        root.rmdir()
    partial.rename(root)
    return root


def _write(files: list[PaperFile], root: Path, seed: int | None) -> None:
    for number, paper in enumerate(files):
        _fill(root / paper.file.path, paper, None if seed is None else seed + number)


def _fill(path: Path, paper: PaperFile, seed: int | None) -> None:
    with open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), paper.file.nbytes)
        for offset, data in paper.file.static:
            os.pwrite(file.fileno(), data, offset)
        for index, (offset, spec) in enumerate(paper.tensors if seed is not None else ()):
            at = offset
            for block in _random(spec, (seed or 0, index)):
                at += os.pwrite(file.fileno(), block, at)


def _random(spec: TensorSpec, seed: tuple[int, int]) -> Iterator[bytes]:
    """Random bytes of one tensor, a block at a time."""
    import numpy as np

    source = np.random.default_rng(seed)
    itemsize = dtype_of(spec.dtype).itemsize
    left = dtype_of(spec.dtype).nbytes(prod(spec.shape))
    while left:
        size = min(_BLOCK, left)
        block = np.frombuffer(source.bytes(size), dtype=np.uint8).copy()
        block[itemsize - 1 :: itemsize] &= 0xBF  # the top exponent bit of the little-endian float
        yield block.tobytes()
        left -= size
