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
from .planner.config import family_of, from_huggingface
from .planner.containers import CONTAINERS
from .planner.containers.base import FileLayout, TensorSpec
from .planner.formats import FORMATS
from .planner.formats.base import Target
from .planner.identity import read_object
from .planner.layout import Layout
from .planner.passes.request import castable
from .planner.passes.rows import expand
from .planner.passes.sides import Wanted
from .planner.store import LocalStore
from .planner.tables import DIALECTS, Family, specs_of
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
    max_shard_size: int = 5_000_000_000,
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
    name = castable(dtype or raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    model = from_huggingface(raw, chosen, str(path))
    dialect = DIALECTS.get("huggingface")
    spelling = specs_of(dialect, chosen)[0]
    rows = expand(chosen, model, dialect, spelling, Layout(), None)
    own = {t.name.replace("{expert}", "0"): t.dtype for t in chosen.tensors if t.dtype}
    dtypes = [own.get(row.hub[0].replace("{expert}", "0"), name) for row in rows.classes]
    wanted = [Wanted(0, 0, 0, (0,), 0, i.name, dtypes[i.row], rows.classes[i.row].whole.shape) for i in rows.instances]
    made = {**raw, ("dtype" if "dtype" in raw else "torch_dtype"): name}
    target = Target(Layout(), dialect, spelling, "safetensors", model, chosen, name, None, max_shard_size, wanted, made, None, ())
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise TargetExistsError("the target holds something already", file=root, remedy="Name a new folder")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(target, partial, None if sparse else seed)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if root.exists():
        root.rmdir()
    partial.rename(root)
    return root


def _write(target: Target, root: Path, seed: int | None) -> None:
    filing = FORMATS.get("huggingface").file(target)
    for number, unit in enumerate(filing.units):
        laid = CONTAINERS.get("safetensors").lay_out(unit.path, unit.tensors, metadata=unit.metadata)
        spans = [(at.offset, spec) for at, spec in zip(laid.places, unit.tensors, strict=True)]
        _fill(root / unit.path, laid.files[0], spans, None if seed is None else seed + number)
    for path, data in filing.files:
        (root / path).write_bytes(data)


def _fill(path: Path, layout: FileLayout, spans: list[tuple[int, TensorSpec]], seed: int | None) -> None:
    with open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), layout.nbytes)
        for offset, data in layout.static:
            os.pwrite(file.fileno(), data, offset)
        for index, (offset, spec) in enumerate(spans if seed is not None else ()):
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
