"""Writing what a `UnitLayout` decided: files at full size, static bytes, then each tensor's bytes at its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardwright.planner.containers.base import UnitLayout


def materialise(layout: UnitLayout, root: Path, blobs: Sequence[bytes]) -> None:
    """Write the layout's files below `root`; `blobs` are the tensors' row-major bytes in the order they were laid out."""
    for file in layout.files:
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as out:
            out.truncate(file.nbytes)
            for offset, data in file.static:
                out.seek(offset)
                out.write(data)
    for place, blob in zip(layout.places, blobs, strict=True):
        with open(root / layout.files[place.file].path, "r+b") as out:
            out.seek(place.offset)
            out.write(blob)
    for file in layout.files:
        assert (root / file.path).stat().st_size == file.nbytes, "a tensor was written past the end of its file"
