"""A checkpoint on paper: the files that a config.json implies, headers and all, none of them written.

1. The config gives family, canonical fields and dtype; the family's table gives every tensor under the name that its own
   Hugging Face files have, in the spelling that is written by default.
2. They are filed and laid out as for any Hugging Face target, 5 GB to a file (what the Hub's checkpoints have).
3. A `PaperStore` answers as a folder with those files would: names, sizes and headers. So a format opens it as it opens any
   checkpoint, and a plan made from it costs what the plan of the downloaded checkpoint costs, to the byte.

Boundary: no file but config.json is read, and none is written. There are no values: reading any is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, ContainerError, UnsupportedError, UsageError
from .config import carried_method, family_of, from_huggingface
from .containers import CONTAINERS
from .containers.base import TensorSpec
from .formats import FORMATS
from .formats.base import Hints, Source, Target
from .identity import read_object
from .layout import Layout
from .passes.request import castable
from .passes.rows import expand
from .passes.sides import Wanted
from .plan import TargetFile
from .store import Stat, Store
from .tables import DIALECTS, Family, specs_of

__all__ = ["SHARD_BYTES", "PaperFile", "PaperStore", "dtype_of_config", "lay_out", "open_config"]

SHARD_BYTES = 5_000_000_000
_WHEN = 10**18
"""A modification time with as many digits as any of these decades: ``shardwright.json`` holds it, and its size counts."""


@dataclass(frozen=True, slots=True)
class PaperFile:
    """A file, and where its tensors lie: byte offset and what is stored there."""

    file: TargetFile
    tensors: tuple[tuple[int, TensorSpec], ...] = ()


def dtype_of_config(raw: Mapping[str, Any], path: str) -> str | None:
    """The dtype that a config.json gives its weights (``dtype``, older: ``torch_dtype``); None where it says nothing.

    Raises
    ------
    ConfigError
        It is none that weights have.
    """
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    named = raw.get(key)
    if named is None:
        return None
    try:
        return castable(str(named))
    except UsageError:
        raise ConfigError(f"{key} is none that weights have", file=path, actual=repr(named), remedy="Correct it") from None


def lay_out(
    raw: Mapping[str, Any], family: Family, dtype: str, max_shard_size: int, config: bytes | None, path: str
) -> Iterator[PaperFile]:
    """The files of a Hugging Face checkpoint, with all bytes that are no tensor data.

    Parameters
    ----------
    raw
        The content of config.json, and in `path` its name for messages.
    dtype
        Of every tensor that the family's table gives none.
    config
        The bytes of config.json; None: `raw`, as transformers would write it.

    Raises
    ------
    ConfigError
        The config cannot be read under the family.
    """
    model = from_huggingface(raw, family, path)
    dialect = DIALECTS.get("huggingface")
    spelling = specs_of(dialect, family)[0]
    rows = expand(family, model, dialect, spelling, Layout(), None)
    own = {t.name.replace("{expert}", "0"): t.dtype for t in family.tensors if t.dtype}
    dtypes = [own.get(row.hub[0].replace("{expert}", "0"), dtype) for row in rows.classes]
    wanted = [Wanted(0, 0, 0, (0,), 0, i.name, dtypes[i.row], rows.classes[i.row].whole.shape) for i in rows.instances]
    target = Target(Layout(), dialect, spelling, "safetensors", model, family, dtype, None, max_shard_size, wanted, raw, config, ())
    filing = FORMATS.get("huggingface").file(target)
    for unit in filing.units:
        laid = CONTAINERS.get("safetensors").lay_out(unit.path, unit.tensors, metadata=unit.metadata)
        (file,) = laid.files
        places = tuple([(at.offset, spec) for at, spec in zip(laid.places, unit.tensors, strict=True)])
        yield PaperFile(TargetFile(file.path, file.nbytes, file.static), places)
    for name, data in filing.files:
        yield PaperFile(TargetFile(name, len(data), ((0, data),)))


class PaperStore:
    """Files of which only their sizes and the bytes around the tensors exist.

    Parameters
    ----------
    root
        What messages and plans call it.
    """

    def __init__(self, root: str, files: Mapping[str, TargetFile]) -> None:
        self._root, self._files = root, dict(files)

    @property
    def root(self) -> str:
        return self._root

    def list(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    def exists(self, path: str) -> bool:
        return path in self._files

    def stat(self, path: str) -> Stat:
        return Stat(self._files[path].nbytes, _WHEN)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        file = self._files[path]
        end = file.nbytes if nbytes is None else offset + nbytes
        for at, data in file.static:
            if at <= offset and end <= at + len(data):
                return data[offset - at : end - at]
        raise ContainerError("a config alone has no values to read", file=path, expected=f"bytes {offset} … {end}", actual="none")


def open_config(store: Store, path: str, family: Family | None) -> Source:
    """The checkpoint that the config.json at `path` implies.

    Raises
    ------
    UnknownFamilyError, ConfigError
        No table describes the model, or the config does not fit it.
    UnsupportedError
        The config describes quantised weights that the family's table does not list.
    """
    raw = read_object(store, path)
    chosen = family or family_of(raw, path)
    if (quantised := raw.get("quantization_config")) is not None and carried_method(raw, chosen) is None:
        raise UnsupportedError(
            "a config alone does not say how its weights are quantised, tensor by tensor", file=path,
            actual=quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised,
            remedy="Give the checkpoint, or a copy of the config without quantization_config for the plain weights",
        )  # fmt: skip
    told = dtype_of_config(raw, path)
    files = {paper.file.path: paper.file for paper in lay_out(raw, chosen, told or "bfloat16", SHARD_BYTES, store.read(path), path)}
    source = FORMATS.get("huggingface").open(PaperStore(f"{store.root}/{path}", files), Hints(family))
    notes = ["from the config alone: tokenizer and other small files are not counted"]
    if told is None:
        notes.append("the config does not say its dtype: bfloat16 was taken")
    return replace(source, warnings=(*source.warnings, *notes), on_paper=True)
