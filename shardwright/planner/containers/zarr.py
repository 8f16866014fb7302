"""zarr v3: a unit is a folder, one group; each tensor is one uncompressed array node in it.

Writing:

1. ``zarr.json`` of the group holds the metadata as attributes. A dotted tensor name stays *one* node.
2. A tensor up to `SINGLE_CHUNK_MAX` is one chunk: its file is the tensor's row-major bytes and nothing else.
3. A larger one is one shard of inner chunks along axis 0. Their number divides the axis, so none is padded and the
   shard is the row-major bytes again, followed by an index that is known before any data: chunk i begins at i × size.
   Where no number divides well, the tensor stays a single chunk.

No consolidated metadata: it is not in the v3 specification, and with one bfloat16 array in it zarr-python cannot open
the group at all; without it, the arrays that zarr-python knows stay readable beside those it does not.

Reading takes the same shape of layout from any writer: one chunk file per array, raw little-endian bytes or a shard
whose index shows whole rows in order. A chunk file that is absent means "all fill value" to zarr; here it is an
error, since it may as well have been lost. Everything else (several chunk files, compression, v2) is refused by name.

Pure: bytes come through the `Store`, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ContainerError, UnsupportedError, UsageError, short
from ..store import Store
from ..tensor.dtypes import ALIASES, BY_NAME, DType, dtype
from ._untrusted import count_elements, object_of, parse_json
from .base import ContainerIndex, FileLayout, Placement, Shape, StoredTensor, TensorSpec, UnitLayout

__all__ = ["INNER_MAX", "INNER_MIN", "SINGLE_CHUNK_MAX", "Zarr"]

SINGLE_CHUNK_MAX = 256 << 20
"""Bytes up to which a tensor is one chunk."""
INNER_MIN, INNER_MAX = 16 << 20, 64 << 20
"""Bytes of an inner chunk of a larger one."""

_MAX_DOCUMENT = 256 << 20
_MAX_INDEX = 4 << 20
"""Bytes of a shard's index; more than 200,000 inner chunks, where this module's own writer needs 1,000 for 64 GiB."""
_MAX_NAME_BYTES = 255
_ABSENT = 2**64 - 1
_ENTRY_BYTES = 16
_CRC_BYTES = 4
_NODE_KEYS = {
    *("zarr_format", "node_type", "attributes", "shape", "data_type", "fill_value", "dimension_names"),
    *("chunk_grid", "chunk_key_encoding", "codecs", "storage_transformers"),
}


class Zarr:
    """One zarr v3 group per unit."""

    name: str = "zarr"
    suffix: str = ""

    def read(self, store: Store, path: str) -> ContainerIndex:
        """Parse the metadata of the group at `path`.

        Raises
        ------
        ContainerError
            Malformed metadata, a chunk file that is missing or of the wrong size, an index that contradicts its checksum.
        UnsupportedError
            Compressed, cut into several chunk files, or zarr v2.
        """
        prefix = _prefix(path)
        root = _group(store, prefix)
        seen = {root.file: root.raw}
        tensors: dict[str, StoredTensor] = {}
        for node in _nodes(store, prefix):
            seen[node.file] = node.raw
            if node.kind == "group":
                continue
            tensor, footer = _stored(store, node)
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                raise node.broken("two nodes have this name once joined with dots")
            seen[tensor.file] = seen.get(tensor.file, b"") + footer
        attributes = object_of(root.doc.get("attributes", {}), file=root.file, tensor=None, what="attributes")
        return ContainerIndex(tensors, metadata=attributes, header_digest=_digest(seen, prefix))

    def lay_out(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        objects: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UnitLayout:
        """Lay out one group.

        Raises
        ------
        UsageError
            Objects, a name that cannot be a node's, metadata that is not JSON.
        UnsupportedError
            A packed sub-byte dtype: zarr's types of that name take a byte per element.
        """
        if objects is not None:
            raise UsageError("zarr holds tensors only, no objects", file=path)
        files = [_document_file(path, {"zarr_format": 3, "node_type": "group", "attributes": dict(metadata or {})})]
        places, names = [], set()
        for spec in tensors:
            if spec.name in names:
                raise UsageError("a tensor's name is given twice", file=path, tensor=spec.name)
            names.add(spec.name)
            mine, place = _array_files(path, spec, len(files))
            files += mine
            places.append(place)
        return UnitLayout(tuple(files), tuple(places))


def _prefix(path: str) -> str:
    """What precedes the names inside a folder; nothing where the folder is the root itself."""
    return "" if path in ("", ".") else f"{path}/"


# --- writing ---------------------------------------------------------------------------------------------------------


def _array_files(path: str, spec: TensorSpec, index: int) -> tuple[list[FileLayout], Placement]:
    """The files of one array, the first of which will be file number `index`, and where its bytes go."""
    _check_name(path, spec.name)
    kind, count = dtype(spec.dtype), count_elements(list(spec.shape))
    if count < 0:
        raise UsageError("not a shape", file=path, tensor=spec.name, actual=spec.shape)
    if kind.bits % 8:
        remedy = "Keep the packed bytes as uint8, or use --container safetensors"
        raise UnsupportedError(f"zarr has no packed {kind.name}", file=path, tensor=spec.name, remedy=remedy)
    folder, nbytes = _prefix(path) + spec.name, count * kind.itemsize
    chunks = _inner_chunks(spec.shape, nbytes)
    document = _document_file(folder, _array_document(spec.shape, kind, chunks))
    if not nbytes:
        return [document], Placement(index, document.nbytes)
    file = f"{folder}/{'/'.join(['c', *('0' for _ in spec.shape)])}"
    if chunks == 1:
        return [document, FileLayout(file, nbytes)], Placement(index + 1, 0)
    footer = _shard_index(chunks, nbytes // chunks)
    return [document, FileLayout(file, nbytes + len(footer), ((nbytes, footer),))], Placement(index + 1, 0, spec.shape[0] // chunks)


def _check_name(path: str, name: str) -> None:
    """A node's name is a file name, and zarr keeps some for itself."""
    try:
        fits = 0 < len(name.encode()) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        fits = False
    # A leading dot hides the node from directory listings; ``__`` is reserved by the specification.
    if not fits or name.startswith((".", "__")) or name == "zarr.json" or "/" in name or "\0" in name:
        raise UsageError(
            "the name cannot be that of a zarr node",
            file=path,
            tensor=name,
            expected=f"1 to {_MAX_NAME_BYTES} bytes without '/', not beginning with '.' or '__'",
        )


def _inner_chunks(shape: Shape, nbytes: int) -> int:
    """Into how many inner chunks to cut along axis 0: the fewest that divide it; 1 for a plain chunk."""
    if nbytes <= SINGLE_CHUNK_MAX:
        return 1
    fewest, most = -(-nbytes // INNER_MAX), min(nbytes // INNER_MIN, shape[0] if shape else 1)
    return next((chunks for chunks in range(fewest, most + 1) if shape[0] % chunks == 0), 1)


def _array_document(shape: Shape, kind: DType, chunks: int) -> dict[str, object]:
    chunk = [max(1, extent) for extent in shape]
    codecs = [_bytes_codec(kind)]
    if chunks > 1:
        inner = {"chunk_shape": [chunk[0] // chunks, *chunk[1:]], "codecs": codecs, "index_codecs": _INDEX_CODECS, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _FILL[kind.kind],
        "codecs": codecs,
        "attributes": {"torch_dtype": kind.name},
    }


_FILL: dict[str, object] = {"bool": False, "int": 0, "uint": 0, "float": 0.0, "complex": [0.0, 0.0]}
_LITTLE: dict[str, object] = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS: list[dict[str, object]] = [_LITTLE, {"name": "crc32c"}]


def _bytes_codec(kind: DType) -> dict[str, object]:
    # Readers refuse a byte order where there is none to have.
    return _LITTLE if kind.itemsize > 1 else {"name": "bytes"}


def _document_file(folder: str, document: Mapping[str, object]) -> FileLayout:
    file = f"{_prefix(folder)}zarr.json"
    try:
        data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"metadata that JSON cannot hold ({error})", file=file) from None
    return FileLayout(file, len(data), ((0, data),))


def _shard_index(chunks: int, nbytes: int) -> bytes:
    """The index of a shard whose chunks of `nbytes` lie in order without gaps, and its checksum."""
    entries = _in_order(chunks, nbytes, 0).tobytes()
    return entries + _crc32c(entries).to_bytes(_CRC_BYTES, "little")


def _in_order(chunks: int, nbytes: int, base: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    entries = np.empty((chunks, 2), "<u8")
    entries[:, 0] = base + np.arange(chunks, dtype=np.uint64) * np.uint64(nbytes)
    entries[:, 1] = nbytes
    return entries


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli); an index is a few kilobytes, so a table of bytes is fast enough.

    >>> hex(_crc32c(b"123456789"))
    '0xe3069283'
    """
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC32C_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """One ``zarr.json``: its path, the tensor name that it gives, its bytes and what they say."""

    file: str
    name: str
    raw: bytes
    doc: Mapping[str, Any]

    @property
    def kind(self) -> object:
        return self.doc.get("node_type")

    @property
    def folder(self) -> str:
        return self.file.removesuffix("zarr.json")

    def broken(self, message: str, *, expected: object = None, actual: object = None, remedy: str | None = None) -> ContainerError:
        return ContainerError(message, file=self.file, tensor=self.name or None, expected=expected, actual=_short(actual), remedy=remedy)

    def refused(self, message: str, *, expected: object = None, actual: object = None) -> UnsupportedError:
        remedy = "Write it again with one uncompressed chunk per array, or convert it with the tool that wrote it"
        return UnsupportedError(message, file=self.file, tensor=self.name or None, expected=expected, actual=_short(actual), remedy=remedy)

    def extents(self, value: object, what: str, rank: int | None = None) -> Shape:
        """A shape out of the document; chunk shapes have the array's rank and no zeros."""
        if count_elements(value) < 0 or not isinstance(value, list):
            raise self.broken(f"a malformed {what}", actual=value)
        if rank is not None and (len(value) != rank or 0 in value):
            raise self.broken(f"a malformed {what}", expected=f"{rank} positive numbers", actual=value)
        return tuple(value)

    def named(self, value: object, what: str) -> tuple[str, dict[str, Any]]:
        """Name and configuration of an extension point: ``"bytes"`` or ``{"name": "bytes", "configuration": {…}}``."""
        if isinstance(value, str):
            return value, {}
        found = object_of(value, file=self.file, tensor=self.name, what=f"the {what}")
        configuration = object_of(found.get("configuration", {}), file=self.file, tensor=self.name, what=f"the {what}'s configuration")
        if not isinstance(found.get("name"), str):
            raise self.broken(f"the {what} has no name")
        return found["name"], configuration

    def codecs(self, value: object, what: str) -> list[tuple[str, dict[str, Any]]]:
        if not isinstance(value, list):
            raise self.broken(f"the {what} are not a list", actual=value)
        return [self.named(item, "codec") for item in value]


def _short(value: object) -> object:
    """A value out of the file, for a message: it may be of any length."""
    text = str(value)
    return value if value is None or len(text) <= 80 else f"{text[:77]}..."


def _load(store: Store, file: str, name: str) -> _Node:
    if store.stat(file).nbytes > _MAX_DOCUMENT:
        raise ContainerError("a metadata document of this size is not genuine", file=file, expected=f"at most {_MAX_DOCUMENT} bytes")
    raw = store.read(file)
    node = _Node(file, name, raw, parse_json(raw, file=file, what="metadata document", remedy="Download or copy the file again"))
    if node.doc.get("zarr_format") != 3 or node.kind not in ("array", "group"):
        raise node.broken("neither an array nor a group of zarr v3", actual=f"{node.doc.get('zarr_format')!r}, {node.kind!r}")
    return node


def _group(store: Store, prefix: str) -> _Node:
    if not store.exists(f"{prefix}zarr.json"):
        if any(store.exists(prefix + old) for old in (".zgroup", ".zattrs", ".zarray", ".zmetadata")):
            raise UnsupportedError("zarr v2", file=prefix or store.root, remedy="Convert it to v3 with `zarr migrate v3`")
        raise ContainerError("no zarr v3 group: zarr.json is missing", file=prefix or store.root)
    node = _load(store, f"{prefix}zarr.json", "")
    if node.kind != "group":
        raise node.broken("not a group", expected="node_type group", actual=node.kind)
    return node


def _nodes(store: Store, prefix: str) -> Iterator[_Node]:
    """Every node below the group, in the order of their paths."""
    names = store.list()
    # The listing is sorted: a group's files are one run of it, found without passing over every other rank's.
    for i in range(bisect_left(names, prefix), len(names)):
        file = names[i]
        if not file.startswith(prefix):
            break
        inner = file[len(prefix) :]
        if inner.endswith("/zarr.json"):
            yield _load(store, file, inner.removesuffix("/zarr.json").replace("/", "."))


def _stored(store: Store, node: _Node) -> tuple[StoredTensor, bytes]:
    """Where an array's bytes lie, and the shard index that says so."""
    _check_known(node)
    shape = node.extents(node.doc.get("shape"), "shape")
    kind, codecs = _dtype(node), node.codecs(node.doc.get("codecs"), "codecs")
    chunk = _chunk_shape(node, shape)
    sharding = codecs[0][1] if len(codecs) == 1 and codecs[0][0] == "sharding_indexed" else None
    if sharding is None:
        _check_raw(node, codecs, kind)
    if 0 in shape:
        return StoredTensor(node.name, kind.name, shape, node.file, len(node.raw)), b""
    file, size = _chunk_file(store, node, len(shape))
    offset, footer = 0, b""
    if sharding is not None:
        offset, footer = _read_shard(store, node, sharding, kind, shape, chunk, file, size)
    elif size != math.prod(chunk) * kind.itemsize:
        raise _wrong_size(node, file, math.prod(chunk) * kind.itemsize, size)
    return StoredTensor(node.name, kind.name, shape, file, offset, _strides(shape, chunk)), footer


def _check_known(node: _Node) -> None:
    for key, value in node.doc.items():
        optional = isinstance(value, dict) and value.get("must_understand") is False
        if key not in _NODE_KEYS and not optional:
            raise node.refused(f"an extension of zarr v3 that must be understood, {short(key)}")
    if node.doc.get("storage_transformers"):
        raise node.refused("storage transformers", actual=node.doc["storage_transformers"])


def _dtype(node: _Node) -> DType:
    """The array's dtype; an unsigned integer of the same width may stand in for the one that ``torch_dtype`` names."""
    name, configuration = node.named(node.doc.get("data_type"), "data type")
    kind = BY_NAME.get(name)
    if kind is None or kind.bits % 8 or configuration:
        raise node.refused("a data type that checkpoints do not hold", actual=name)
    attributes = object_of(node.doc.get("attributes", {}), file=node.file, tensor=node.name, what="attributes")
    given = attributes.get("torch_dtype", name)
    plain = given.removeprefix("torch.") if isinstance(given, str) else ""
    meant = BY_NAME.get(ALIASES.get(plain, plain))
    if meant is None or (meant is not kind and (meant.bits != kind.bits or kind.kind != "uint")):
        raise node.broken("the attribute torch_dtype contradicts the data type", expected=name, actual=given)
    return meant


def _chunk_shape(node: _Node, shape: Shape) -> Shape:
    name, configuration = node.named(node.doc.get("chunk_grid"), "chunk grid")
    if name != "regular":
        raise node.refused("a chunk grid other than regular", actual=name)
    chunk = node.extents(configuration.get("chunk_shape"), "chunk shape", len(shape))
    if any(extent > step for extent, step in zip(shape, chunk, strict=True)):
        raise node.refused("the array is cut into several chunk files", expected=f"one chunk of {shape}", actual=chunk)
    return chunk


def _check_raw(node: _Node, codecs: list[tuple[str, dict[str, Any]]], kind: DType) -> None:
    """Refuse everything but plain little-endian bytes."""
    names = [name for name, _ in codecs]
    if names != ["bytes"]:
        raise node.refused("codecs that change the bytes (compression, order, checksums)", expected="bytes", actual=", ".join(names))
    endian = codecs[0][1].get("endian")
    if kind.itemsize > 1 and endian != "little":
        raise node.refused("a byte order other than little-endian", actual=endian)


def _chunk_file(store: Store, node: _Node, rank: int) -> tuple[str, int]:
    name, configuration = node.named(node.doc.get("chunk_key_encoding"), "chunk key encoding")
    separator = configuration.get("separator", {"default": "/", "v2": "."}.get(name))
    if name not in ("default", "v2") or separator not in ("/", "."):
        raise node.refused("an unknown chunk key encoding", actual=node.doc.get("chunk_key_encoding"))
    # An array without axes is chunk "c", and in the older encoding "0".
    parts = ["c", *["0"] * rank] if name == "default" else ["0"] * max(rank, 1)
    file = node.folder + separator.join(parts)
    if not store.exists(file):
        raise node.broken(
            f"the chunk file {file} is missing: zarr takes that for all fill value, but it may have been lost",
            remedy="Copy the folder again, or write it with empty chunks kept (zarr-python: write_empty_chunks=True)",
        )
    return file, store.stat(file).nbytes


def _read_shard(
    store: Store, node: _Node, sharding: Mapping[str, Any], kind: DType, shape: Shape, chunk: Shape, file: str, size: int
) -> tuple[int, bytes]:
    """Where a shard's rows begin and its index, once that index is shown to keep them whole and in order."""
    inner = node.extents(sharding.get("chunk_shape"), "inner chunk shape", len(shape))
    _check_raw(node, node.codecs(sharding.get("codecs"), "inner codecs"), kind)
    if not shape or inner[1:] != chunk[1:] or chunk[0] % inner[0]:
        raise node.refused("inner chunks that are not whole rows", expected=f"(rows, {', '.join(map(str, chunk[1:]))})", actual=inner)
    checked = _index_checksum(node, sharding)
    chunks, nbytes = chunk[0] // inner[0], math.prod(inner) * kind.itemsize
    length = chunks * _ENTRY_BYTES + checked * _CRC_BYTES
    at_start = sharding.get("index_location", "end") == "start"
    if size < length + nbytes:  # bounds what the index and its numbers below may claim
        raise _wrong_size(node, file, length + chunks * nbytes, size)
    if length > _MAX_INDEX:
        raise node.refused("a shard of very many inner chunks", expected=f"an index of at most {_MAX_INDEX} bytes", actual=length)
    index = store.read(file, 0 if at_start else size - length, length)
    if checked and _crc32c(index[:-_CRC_BYTES]) != int.from_bytes(index[-_CRC_BYTES:], "little"):
        raise node.broken(f"the shard index of {file} contradicts its checksum", remedy="Copy the file again")
    base = length if at_start else 0
    present = _check_order(node, index, _in_order(chunks, nbytes, base), -(-shape[0] // inner[0]))
    if size != length + present * nbytes:
        raise _wrong_size(node, file, length + present * nbytes, size)
    return base, index


def _index_checksum(node: _Node, sharding: Mapping[str, Any]) -> bool:
    """Whether the shard's index ends in a CRC-32C."""
    codecs = node.codecs(sharding.get("index_codecs"), "index codecs")
    names = [name for name, _ in codecs]
    if names not in (["bytes"], ["bytes", "crc32c"]) or codecs[0][1].get("endian") != "little":
        raise node.refused("index codecs other than bytes (little-endian) and crc32c", actual=", ".join(names))
    if sharding.get("index_location", "end") not in ("start", "end"):
        raise node.broken("a malformed index_location", expected="start or end", actual=sharding["index_location"])
    return len(names) == 2


def _check_order(node: _Node, index: bytes, want: np.ndarray[tuple[int, int], np.dtype[np.uint64]], needed: int) -> int:
    """Chunks that the shard holds, once the `needed` first ones lie in order; those past the array may be absent."""
    found = np.frombuffer(index, "<u8", want.size).reshape(want.shape)
    absent = (found == _ABSENT).all(axis=1)
    if absent[:needed].any():
        raise node.broken(
            f"inner chunk {int(absent.argmax())} is missing: zarr takes that for all fill value, but it may have been lost",
            remedy="Write the array with empty chunks kept (zarr-python: write_empty_chunks=True)",
        )
    if not ((found == want).all(axis=1) | absent).all():
        raise node.refused("inner chunks that do not lie in row order without gaps")
    return len(absent) - int(absent.sum())


def _wrong_size(node: _Node, file: str, expected: int, actual: int) -> ContainerError:
    return node.broken(
        f"the chunk file {file} has the wrong size",
        expected=f"{expected} bytes",
        actual=f"{actual} bytes",
        remedy="Download or copy the file again" if actual < expected else None,
    )


def _strides(shape: Shape, chunk: Shape) -> Shape | None:
    """None where the rows are contiguous; a chunk wider than the array pads each row."""
    if shape[1:] == chunk[1:]:
        return None
    strides = [1]
    for extent in reversed(chunk[1:]):
        strides.append(strides[-1] * extent)
    return tuple(reversed(strides))


def _digest(seen: Mapping[str, bytes], prefix: str) -> str:
    """SHA-256 over every document and index, in order of path relative to the group; lengths keep them apart."""
    digest = hashlib.sha256()
    for file in sorted(seen):
        digest.update(f"{file.removeprefix(prefix)}\0{len(seen[file])}\0".encode())
        digest.update(seen[file])
    return digest.hexdigest()
