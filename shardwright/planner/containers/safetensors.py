"""safetensors: an 8-byte length, a JSON header, then the tensors' bytes back to back.

Reading, in linear time and without touching tensor data:

1. The length is held against the format's own limit and the file's end before the header is read.
2. A header in the form that every writer built on the Rust library emits (compact JSON, no escapes) is taken apart by
   one regular expression whose matches must tile it exactly: a fifth of the time. It decides only that all is well.
3. Any other header is parsed as strict JSON (duplicate keys, constants and deep nesting are refused), entry by entry;
   this path also finds what is wrong. In both, the bytes of each entry must equal shape × bits.
4. In order of offset the entries must tile the data section exactly, up to the file's last byte.

Writing: the header that `safetensors.torch.save_file` writes, byte for byte: tensors by dtype (widest first, the order
of `dtypes._TABLE` reversed), then by name; ``__metadata__`` first; padded with spaces to 8 bytes. Two differences, both
on purpose: several metadata keys are sorted (the library's order is random), and an empty metadata without tensors is
valid JSON here (the library writes a file that it cannot read).

Pure: bytes come through the `Store`, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, TypeAlias

from ...errors import ContainerError, UnsupportedError, UsageError, short
from ..store import Store
from ..tensor.dtypes import BY_TAG, TAG_ORDER, DType, dtype
from ._untrusted import STRICT, count_elements, object_of, parse_json
from .base import ContainerIndex, FileLayout, Placement, StoredTensor, TensorSpec, UnitLayout

__all__ = ["MAX_HEADER_BYTES", "Safetensors"]

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit: its reader refuses longer headers."""

_METADATA = "__metadata__"
_AGAIN = "Download or copy the file again"
_BITS = {tag: (found.name, found.bits) for tag, found in BY_TAG.items()}
_ENTRY = '{}:{{{}"data_offsets":[{},{}]}}'
_KIND = '"dtype":"{}","shape":[{}],'
# What `_ENTRY` spells, after a comma. Names hold no escapes and numbers no leading zeros, so a match needs no decoding.
_NUMBER = "(0|[1-9][0-9]{0,17})"
_QUICK = re.compile(r',"([^"\\\x00-\x1f]*)":{"dtype":"(\w+)","shape":(\[[0-9,]*\]),"data_offsets":\[' + _NUMBER + "," + _NUMBER + r"\]}")
_QUICK_FIXED = len("," + _ENTRY.format('""', _KIND.format("", ""), "", "")) - len("[]")

_Row: TypeAlias = tuple[int, int, str, str, tuple[int, ...], int]
"""begin, end, name, dtype, shape, bytes: sorts by offset."""


class Safetensors:
    """One ``.safetensors`` file."""

    name: str = "safetensors"
    suffix: str = ".safetensors"

    def lays_out_alike(self, one: str, other: str) -> bool:
        """Whether two paths give equal files for equal tensors: always, a file does not know its name."""
        return True

    def read(self, store: Store, path: str) -> ContainerIndex:
        """Parse one file's header.

        Raises
        ------
        ContainerError
            Truncated, overlapping or malformed: names the file and the tensor.
        """
        size = store.stat(path).nbytes
        header = _header(store, path, size)
        rows, metadata = _quick(header) or _general(header, path)
        tensors = _tile(rows, path, len(header), size)
        return ContainerIndex(tensors, metadata=metadata, header_digest=hashlib.sha256(header).hexdigest())

    def lay_out(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        objects: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UnitLayout:
        """Lay out one file, as `save_file` would write it.

        Raises
        ------
        UsageError
            Objects, a name given twice, metadata that is not text, elements that do not fill whole bytes.
        UnsupportedError
            The header would be longer than safetensors reads.
        """
        if objects is not None:
            raise UsageError("safetensors holds tensors only, no objects", file=path)
        kinds, sizes = _measure(path, tensors)
        keys = [(-TAG_ORDER[kind.tag], name) for kind, (name, _, _) in zip(kinds, tensors, strict=True)]
        order = sorted(range(len(tensors)), key=keys.__getitem__)
        offsets, end = _offsets(order, sizes)
        header = _header_bytes(path, [(tensors[i], kinds[i], offsets[i], offsets[i] + sizes[i]) for i in order], metadata)
        file = FileLayout(path, len(header) + end, ((0, header),))
        return UnitLayout((file,), tuple(Placement(0, len(header) + offset) for offset in offsets))


def _header(store: Store, path: str, size: int) -> bytes:
    """The length word and the JSON after it; both lengths are checked before anything is read."""
    if size < 8:
        what = "too short to be safetensors" if size else "the file is empty"
        raise ContainerError(what, file=path, expected="at least 8 bytes", actual=f"{size} bytes", remedy=_AGAIN)
    word = store.read(path, 0, 8)
    if word == b"version ":
        raise ContainerError("a Git LFS pointer lies where the file should be", file=path, remedy="Run git lfs pull")
    nbytes = int.from_bytes(word, "little")
    if nbytes > MAX_HEADER_BYTES:
        raise ContainerError(
            "the header is longer than safetensors allows, or this is no safetensors file",
            file=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            actual=f"{nbytes} bytes",
        )
    if 8 + nbytes > size:
        raise ContainerError(
            "the file ends inside its header", file=path, expected=f"{8 + nbytes} bytes at least", actual=f"{size} bytes", remedy=_AGAIN
        )
    return word + store.read(path, 8, nbytes)


def _quick(header: bytes) -> tuple[list[_Row], dict[str, str]] | None:
    """The rows of a header in the usual form, or None where anything at all is unusual."""
    try:
        text = header[8:].decode().rstrip(" ")
        if "\\u" in text:
            return None
        metadata, text = _split_metadata(text)
        found = _QUICK.findall(text)
        kinds = {key: _kind(*key) for key in {match[1:3] for match in found}}
    except (ValueError, KeyError, RecursionError):
        return None
    rows = [(int(begin), int(end), name, *kinds[tag, shape]) for name, tag, shape, begin, end in found]
    # Matches never overlap: where their lengths add up to the text's, nothing lies between them.
    whole = sum(map(len, map("".join, found))) + _QUICK_FIXED * len(found) == len(text)
    distinct = len({_METADATA, *(row[2] for row in rows)}) == len(rows) + 1
    if not whole or not distinct or any(row[1] - row[0] != row[5] for row in rows):
        return None
    rows.sort()
    return rows, metadata


def _kind(tag: str, shape: str) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and bytes of a header's spellings; checkpoints repeat a few dozen of them."""
    name, bits = _BITS[tag]
    extents = json.loads(shape)
    nbytes, rest = divmod(count_elements(extents) * bits, 8)
    if rest or nbytes < 0:
        raise ValueError
    return name, tuple(extents), nbytes


def _split_metadata(text: str) -> tuple[dict[str, str], str]:
    """The metadata, and the entries after it, each behind a comma."""
    if not text.startswith("{") or not text.endswith("}"):
        raise ValueError
    start = f'{{"{_METADATA}":'
    if not text.startswith(start):
        return {}, "," + text[1:-1]
    found, end = STRICT.raw_decode(text, len(start))
    if type(found) is not dict or not all(type(value) is str for value in found.values()):
        raise ValueError
    return found, text[end:-1]


def _general(header: bytes, path: str) -> tuple[list[_Row], dict[str, str]]:
    body = header[8:]
    if not body.startswith(b"{"):
        raise ContainerError("the header does not begin with '{'", file=path, actual=repr(body[:1]), remedy=_AGAIN)
    entries = parse_json(body, file=path, what="header", remedy=_AGAIN)
    metadata = _read_metadata(entries.pop(_METADATA, None), path)
    return _rows(entries, path), metadata


def _read_metadata(found: object, path: str) -> dict[str, str]:
    if found is None:  # absent, or null: the library takes both for none
        return {}
    metadata = object_of(found, file=path, tensor=None, what=_METADATA)
    for key, value in metadata.items():
        if type(value) is not str:
            raise ContainerError(f"{_METADATA} maps {short(key)} to something that is not text", file=path, actual=type(value).__name__)
    return metadata


def _rows(entries: Mapping[str, Any], path: str) -> list[_Row]:
    """Every entry checked on its own, in order of offset."""
    rows: list[_Row] = []
    for name, entry in entries.items():
        try:
            shape = entry["shape"]
            begin, end = entry["data_offsets"]
            kind, bits = _BITS[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise _fault(name, entry, path) from None
        # A malformed shape counts -1 elements, which no extent equals: one comparison decides the common case.
        if type(begin) is not int or type(end) is not int or begin < 0 or count_elements(shape) * bits != 8 * (end - begin):
            raise _fault(name, entry, path)
        if end < begin:
            raise _fault(name, entry, path)
        rows.append((begin, end, name, kind, tuple(shape), end - begin))
    rows.sort()
    return rows


def _tile(rows: list[_Row], path: str, base: int, size: int) -> dict[str, StoredTensor]:
    """Stored tensors by name, once the rows are shown to leave no byte out and to share none."""
    tensors = {}
    position = 0
    for begin, end, name, kind, shape, _ in rows:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            facts = {"expected": f"begin {position}", "actual": f"begin {begin}"}
            raise ContainerError(f"the data {what}", file=path, tensor=name, **facts, remedy=_AGAIN)
        position = end
        tensors[name] = StoredTensor(name, kind, shape, path, base + begin)
    if base + position != size:
        what, remedy = ("is truncated", _AGAIN) if base + position > size else ("goes on after the last tensor", None)
        raise ContainerError(f"the file {what}", file=path, expected=f"{base + position} bytes", actual=f"{size} bytes", remedy=remedy)
    return tensors


def _fault(name: str, entry: object, path: str) -> ContainerError:
    """What is wrong with an entry that failed the quick check."""

    def error(message: str, expected: object = None, actual: object = None) -> ContainerError:
        return ContainerError(message, file=path, tensor=name, expected=expected, actual=actual)

    if type(entry) is not dict:
        return error("the header entry is not a JSON object", actual=type(entry).__name__)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        return error(f"the header entry lacks {', '.join(missing)}")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in BY_TAG:
        return error("an unknown dtype", f"one of {', '.join(BY_TAG)}", _short(tag))
    if count_elements(shape) < 0:
        return error("a malformed shape", "at most 64 whole numbers whose product is below 2**63", _short(shape))
    if type(offsets) is not list or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        return error("malformed data_offsets", "two whole numbers", _short(offsets))
    return _size_fault(error(""), BY_TAG[tag], shape, offsets)


def _size_fault(error: ContainerError, kind: DType, shape: list[int], offsets: list[int]) -> ContainerError:
    begin, end = offsets
    total = count_elements(shape) * kind.bits
    facts: tuple[str, object, object] = ("dtype and shape contradict data_offsets", f"{total // 8} bytes", f"{_short(end - begin)} bytes")
    if end < begin:
        facts = ("data_offsets run backwards", "begin <= end", _short(offsets))
    elif total % 8:
        facts = (f"{kind.tag} elements do not fill whole bytes", "a multiple of 8 bits", f"{total} bits")
    return ContainerError(facts[0], file=error.file, tensor=error.tensor, expected=facts[1], actual=facts[2])


def _short(value: object) -> str:
    """A value out of the file, for a message: it may be of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _measure(path: str, tensors: Sequence[TensorSpec]) -> tuple[list[DType], list[int]]:
    """Dtype and bytes of each tensor; refuses names given twice."""
    found: list[tuple[DType, int]] = []
    known: dict[tuple[str, tuple[int, ...]], tuple[DType, int]] = {}
    names = {_METADATA}
    for name, kind, shape in tensors:
        if name in names:
            what = "reserved" if name == _METADATA else "given twice"
            raise UsageError(f"a tensor's name is {what}", file=path, tensor=name)
        names.add(name)
        if (kind, shape) not in known:
            known[kind, shape] = _kind_of(path, name, kind, shape)
        found.append(known[kind, shape])
    return [kind for kind, _ in found], [size for _, size in found]


def _kind_of(path: str, name: str, dtype_name: str, shape: tuple[int, ...]) -> tuple[DType, int]:
    count = count_elements(list(shape))
    kind = dtype(dtype_name)
    if count < 0:
        raise UsageError("not a shape", file=path, tensor=name, actual=shape)
    if count * kind.bits % 8:
        raise UsageError(f"{count} elements of {kind.name} do not fill whole bytes", file=path, tensor=name)
    return kind, kind.nbytes(count)


def _offsets(order: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each tensor begins in the data section, in the order given, and where the last one ends."""
    offsets, position = [0] * len(sizes), 0
    for i in order:
        offsets[i] = position
        position += sizes[i]
    return offsets, position


def _header_bytes(path: str, rows: Sequence[tuple[TensorSpec, DType, int, int]], metadata: Mapping[str, Any] | None) -> bytes:
    parts = []
    if metadata is not None:
        texts = {key: metadata[key] for key in sorted(_texts(metadata, path))}
        parts.append(f'"{_METADATA}":{json.dumps(texts, ensure_ascii=False, separators=(",", ":"))}')
    known: dict[tuple[str, tuple[int, ...]], str] = {}
    for (name, _, shape), kind, begin, end in rows:
        key = kind.tag, shape
        if key not in known:
            known[key] = _KIND.format(kind.tag, ",".join(map(str, shape)))
        # serde_json escapes what `encode_basestring` escapes: quotes, backslashes and control characters.
        parts.append(_ENTRY.format(encode_basestring(name), known[key], begin, end))
    try:
        body = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"a name or metadata text cannot be encoded as UTF-8 ({error.reason})", file=path) from None
    body += b" " * (-len(body) % 8)
    if len(body) > MAX_HEADER_BYTES:
        raise UnsupportedError(
            "the header would be longer than safetensors reads",
            file=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            actual=f"{len(body)} bytes",
            remedy="Spread the tensors over more files (a smaller --max-shard-size)",
        )
    return len(body).to_bytes(8, "little") + body


def _texts(metadata: Mapping[Any, Any], path: str) -> Mapping[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError("safetensors metadata maps text to text", file=path, actual=f"{key!r}: {type(value).__name__}")
    return metadata
