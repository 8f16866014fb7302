"""Fuzz targets: safetensors files, torch's zip archives, the pickles in them, zarr groups.

What a parser accepts is also checked: every tensor lies inside its file, whatever the input said.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import json
import pickle
import random
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardwright.planner.containers._pickle_writer import dump
from shardwright.planner.containers._torch_tree import grow
from shardwright.planner.containers._unpickle import unpickle
from shardwright.planner.containers._untrusted import count_elements
from shardwright.planner.containers.base import ContainerIndex, TensorSpec, UnitLayout
from shardwright.planner.containers.safetensors import Safetensors
from shardwright.planner.containers.torch_zip import Inert, Namespace, TensorRef, TorchDtype, TorchSize, TorchZip
from shardwright.planner.containers.zarr import Zarr, _crc32c
from shardwright.planner.store import Store
from shardwright.planner.tensor.dtypes import BY_NAME, BY_TAG

from . import mutators_zip
from .harness import Target, register
from .mutators import edge, mutate_bytes, mutate_json, text
from .mutators_pickle import call, compose, constant, global_op, mutate_pickle, text_op
from .stores import MemoryStore, pack, store_of, unpack

__all__ = ["SAFETENSORS", "TORCH_ZIP", "UNPICKLE", "ZARR"]

_PLANNER = "shardwright.planner.containers."


def assert_sound(index: ContainerIndex, store: Store) -> None:
    """Every tensor that was accepted lies inside its file, and its name and extents can be written down."""
    for name, tensor in index.tensors.items():
        count, bits = prod(tensor.shape), BY_NAME[tensor.dtype].bits
        last = count - 1
        if tensor.strides is not None:
            assert len(tensor.strides) == len(tensor.shape)
            last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.strides, strict=True))
        end = tensor.offset + (((last + 1) * bits + 7) // 8 if count else 0)
        assert 0 <= tensor.offset <= end <= store.stat(tensor.file).nbytes, (name, tensor)
        assert all(type(extent) is int and extent >= 0 for extent in tensor.shape)
        assert tensor.name == name and name.encode() is not None


def _written(unit: UnitLayout) -> dict[str, bytes]:
    """A unit's files as `lay_out` decided them, data zero."""
    files = {}
    for file in unit.files:
        data = bytearray(file.nbytes)
        for offset, part in file.static:
            data[offset : offset + len(part)] = part
        files[file.path] = bytes(data)
    return files


_SPECS = [
    TensorSpec("model.a.weight", "bfloat16", (4, 3)),
    TensorSpec("b", "float32", ()),
    TensorSpec("c", "uint8", (0, 2)),
    TensorSpec("é", "int64", (2,)),
]


# --- safetensors -----------------------------------------------------------------------------------------------------


def _parse_safetensors(data: bytes) -> None:
    store = MemoryStore({"m.safetensors": data})
    assert_sound(Safetensors().read(store, "m.safetensors"), store)


@functools.cache
def _safetensors_seeds() -> list[bytes]:
    from safetensors.torch import save

    tensors = {
        "model.layers.0.w": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "i": torch.zeros(1, 1, 2, dtype=torch.int8),
    }
    every = {
        f"t{i}": torch.zeros(2, dtype=getattr(torch, name)) for i, name in enumerate(("bool", "uint8", "float8_e4m3fn", "int16", "float64"))
    }
    ours = Safetensors().lay_out("m", [*_SPECS, TensorSpec("f4", "float4_e2m1fn", (2, 4))], metadata={"format": "pt", "k": "é\n"})
    return [
        *(save(tensors), save(every, {"format": "pt"}), save({"s": torch.zeros(())}), _written(ours)["m"]),
        *(_framed(b'{"a\\u00e9\\ud83d\\ude00": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)), _framed(b"{}", b"")),
        _framed(b'{"__metadata__":null,"a":{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}}\n', bytes(2)),
    ]


def _framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


_SAFETENSORS_WORDS = (*("dtype", "shape", "data_offsets", "__metadata__", "a", "b"), *BY_TAG, [0, 0], [0, 4], [2], [], [0])


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header as JSON, the length word, or any byte; most often with lengths and offsets made true again."""
    nbytes = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + nbytes], data[8 + nbytes :]
    draw = rng.random()
    if draw < 0.05:
        return edge(rng, (nbytes, len(data))).to_bytes(9, "little")[:8] + data[8:]
    if draw < 0.1:
        return mutate_bytes(data, rng)
    if draw < 0.2:
        return _framed(mutate_bytes(header, rng), body)
    header = mutate_json(header, rng, _SAFETENSORS_WORDS)
    if draw < 0.75:
        header, body = _refitted(header, body, rng)
    return _framed(header, body)


def _refitted(header: bytes, body: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """Offsets that follow from dtypes and shapes, and as many bytes of data, where the header can be understood."""
    try:
        entries = json.loads(header)
        at = 0
        for entry in [entry for name, entry in entries.items() if name != "__metadata__"]:
            size = count_elements(entry["shape"]) * BY_TAG[entry["dtype"]].bits // 8
            if not 0 <= size < 1 << 16:
                return header, body
            entry["data_offsets"] = [at, at + size]
            at += size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return header, body
    spaced = rng.random() < 0.3
    made = json.dumps(entries, ensure_ascii=rng.random() < 0.3, separators=None if spaced else (",", ":")).encode("utf-8", "surrogatepass")
    return made + b" " * rng.choice((0, 0, -len(made) % 8)), bytes(at)


SAFETENSORS = register(
    Target(
        "safetensors",
        (_PLANNER + "safetensors", _PLANNER + "_untrusted"),
        _parse_safetensors,
        _safetensors_seeds,
        _mutate_safetensors,
        elsewhere=tuple(
            f"{_PLANNER}safetensors:{name}"
            for name in ("Safetensors.lay_out", "_measure", "_kind_of", "_offsets", "_header_bytes", "_texts")
        ),
    )
)


# --- pickles ---------------------------------------------------------------------------------------------------------


def _parse_pickle(data: bytes) -> None:
    grow(unpickle(data, "m.pt"), lambda raw, name: None, file="m.pt", nbytes=len(data))


class _Anything:
    """Pickled by handing the pickler what it is reduced to."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def _genuine_values() -> list[Any]:
    linear = torch.nn.Linear(2, 3)
    return [
        linear.state_dict(),
        {"model": linear.state_dict(), "args": argparse.Namespace(a=1, b=[1.5, None, "x"], d=torch.float32), "n": {1: (True, b"b")}},
        {
            "p": torch.nn.Parameter(torch.zeros(2, 2)),
            "t": torch.zeros(4, 4).t()[1:],
            "s": torch.Size([2, 3]),
            "h": torch.zeros(2, dtype=torch.half),
        },
        {
            "f8": torch.zeros(2, dtype=torch.float8_e5m2),
            "u": torch.zeros(2, dtype=torch.uint16),
            "c": torch.zeros(1, dtype=torch.complex64),
        },
        [
            collections.defaultdict(int, {"a": 1}),
            collections.Counter("ab"),
            {1, 2},
            frozenset({"x"}),
            3 + 4j,
            bytearray(b"x"),
            1 << 70,
            -5,
            2.5,
        ],
        (torch.device("cpu"), torch.strided, Path("a/b"), io.BytesIO(b"abc")),
        torch.zeros(3),
    ]


@functools.cache
def _archives() -> list[bytes]:
    """Files of `torch.save`, and one of ours."""
    found = []
    for value in _genuine_values():
        for protocol in (2, 4):
            buffer = io.BytesIO()
            torch.save(value, buffer, pickle_protocol=protocol)
            found.append(buffer.getvalue())
    specs = [*_SPECS, TensorSpec("f4", "float4_e2m1fn", (2, 4))]
    tree = {
        "args": Namespace({"x": 1, "d": TorchDtype("float32"), "s": TorchSize((2,))}),
        "model": {spec.name: TensorRef(spec.name) for spec in specs},
        "rng": Inert("io", "BytesIO", (b"abc",)),
    }
    return [*found, *_written(TorchZip().lay_out("m.pt", specs, objects=tree)).values()]


_STORAGE = b"(" + text_op("storage") + b"ctorch\nFloatStorage\n" + text_op("0") + text_op("cpu") + b"K\x04tQ"
_TENSOR = _STORAGE + b"K\x00K\x02\x85K\x01\x85\x89}"
"""What `_rebuild_tensor_v2` is called with."""


@functools.cache
def _pickle_seeds() -> list[bytes]:
    import numpy as np

    members = [member for data in _archives() for member in _members(data) if member.name.endswith(b"data.pkl")]
    plain = {"numbers": [0, 300, 70_000, -1, 1.5], "text": "x" * 300, "nested": {"a": ({"b": [None, True]},)}, "same": ["x", "x"]}
    numpy = {"scalar": np.float32(1.5), "int": np.int64(-2), "array": np.zeros((2, 2)), "bool": np.bool_(True), "type": np.dtype("f4")}
    odd = [
        call_of("megatron.core.enums", "ModelType", text_op("a")),
        call_of("types", "SimpleNamespace") + b"}" + text_op("k") + b"Nsb",
        call_of("builtins", "getattr", global_op("megatron.x", "E", random.Random(0)), text_op("y")),
        call_of("copyreg", "_reconstructor", b"cmegatron.x\nC\n", b"c__builtin__\nobject\n", b"N") + b"}b",
        call_of("collections", "OrderedDict", b"](]" + text_op("a") + b"aNa" + b"e"),
        call_of("collections", "OrderedDict") + b"}" + text_op("_metadata") + b"}sb",
        call_of("megatron.x", "ListLike") + b"(NNe" + b"(NK\x01u" + b"NK\x02s" + b"Na",
        b"(N\x94h\x000" + b"\x88\x89" + b"K\x01M\x01\x00t",
        call_of(
            "torch._tensor",
            "_rebuild_from_type_v2",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nTensor\n",
            b"(" + _TENSOR + b"t",
            b"N",
        ),
        call_of("torch._utils", "_rebuild_parameter", call_of("torch._utils", "_rebuild_tensor_v2", _TENSOR), b"\x89", b"}"),
    ]
    pickles = [pickle.dumps(value, protocol) for value in (plain, numpy) for protocol in (2, 3, 4, 5)]
    return [
        *(member.payload for member in members),
        *pickles,
        *(b"\x80\x02" + one + b"." for one in odd),
        dump({"a": [1, 2.0, b"x"]}, _no_tensor, file="m"),
    ]


def _no_tensor(name: str) -> Any:
    raise AssertionError(name)


def call_of(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def _mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.03:
        return compose([b"(", *(rng.choice((constant, call))(rng) for _ in range(rng.randrange(6))), rng.choice((b"t", b"t", b"1]"))])
    if rng.random() < 0.03:
        return compose([b"}(", *(text_op(text(rng)) + rng.choice((constant, call))(rng) for _ in range(rng.randrange(5))), b"u"])
    return mutate_pickle(data, rng)


UNPICKLE = register(
    Target(
        "unpickle",
        tuple(_PLANNER + name for name in ("_unpickle", "_pickle_names", "_torch_tree", "_torch_objects")),
        _parse_pickle,
        _pickle_seeds,
        _mutate_pickle,
    )
)


# --- torch zip archives ----------------------------------------------------------------------------------------------


def _parse_torch(data: bytes) -> None:
    store = MemoryStore({"m.pt": data})
    assert_sound(TorchZip().read(store, "m.pt"), store)


def _members(data: bytes) -> tuple[mutators_zip.Member, ...]:
    archive = mutators_zip.parse(data)
    return () if archive is None else archive.members


def _mutate_torch(data: bytes, rng: random.Random) -> bytes:
    """The pickle inside, the list of members, a record's field, or any byte."""
    draw = rng.random()
    if draw < 0.25:
        return mutators_zip.mutate_fields(data, rng)
    archive = mutators_zip.parse(data) if draw < 0.92 else None
    if archive is None:
        return mutate_bytes(data, rng)
    if draw < 0.6:
        archive = mutators_zip.mutate_archive(archive, rng)
    if draw > 0.55:
        archive = replace(archive, members=tuple(_repickled(member, rng) for member in archive.members))
    return mutators_zip.build(archive)


def _repickled(member: mutators_zip.Member, rng: random.Random) -> mutators_zip.Member:
    return replace(member, payload=mutate_pickle(member.payload, rng)) if member.name.endswith(b"data.pkl") else member


TORCH_ZIP = register(
    Target(
        "torch_zip",
        (_PLANNER + "torch_zip", _PLANNER + "_zip"),
        _parse_torch,
        _archives,
        _mutate_torch,
        elsewhere=(
            f"{_PLANNER}torch_zip:TorchZip.lay_out",
            f"{_PLANNER}torch_zip:_Numbering",
            f"{_PLANNER}torch_zip:_nbytes",
            f"{_PLANNER}_zip:Layout",
        ),
    )
)


# --- zarr ------------------------------------------------------------------------------------------------------------


def _parse_zarr(data: bytes) -> None:
    store = store_of(data)
    assert_sound(Zarr().read(store, "w"), store)


@functools.cache
def _zarr_seeds() -> list[bytes]:
    ours = Zarr().lay_out(
        "w", [TensorSpec("model.a.weight", "float32", (4, 3)), TensorSpec("b", "bfloat16", (2,)), TensorSpec("e", "uint8", (0,))]
    )
    scalar = Zarr().lay_out("w", [TensorSpec("s", "float16", ())], metadata={"k": [1, {"a": None}]})
    return [pack(_written(ours)), pack(_written(scalar)), *_zarr_python()]


def _zarr_python() -> list[bytes]:
    """Groups that zarr-python wrote: plain, nested, sharded with the index at either end, wide chunks, old chunk keys."""
    import numpy as np
    import zarr

    made = []
    plain: dict[str, Any] = {"compressors": None, "filters": None}
    for location in ("start", "end"):
        with tempfile.TemporaryDirectory() as folder:
            group = zarr.open_group(f"{folder}/w", mode="w", zarr_format=3, attributes={"a": 1})
            array = group.create_array("x", shape=(4, 3), chunks=(4, 3), dtype="f4", **plain)
            array[:] = np.ones((4, 3), "f4")
            group.require_group("sub").create_array("y", shape=(3, 2), chunks=(4, 5), dtype="i2", **plain)[:] = 1
            shards = {"shape": (4, 2), "index_location": location}
            group.create_array("z", shape=(3, 2), chunks=(1, 2), shards=shards, dtype="u1", fill_value=7, **plain)[:] = 1
            old = {"name": "v2", "separator": "."}
            group.create_array("v", shape=(2,), chunks=(2,), dtype="bool", chunk_key_encoding=old, fill_value=False, **plain)[:] = True
            files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}
            made.append(pack(files))
    return made


_ZARR_WORDS = (
    *(
        "zarr_format",
        "node_type",
        "attributes",
        "shape",
        "data_type",
        "fill_value",
        "dimension_names",
        "chunk_grid",
        "codecs",
        "array",
        "group",
    ),
    *(
        "chunk_key_encoding",
        "storage_transformers",
        "configuration",
        "chunk_shape",
        "name",
        "separator",
        "default",
        "v2",
        "regular",
        "bytes",
    ),
    *("endian", "little", "big", "sharding_indexed", "index_codecs", "index_location", "start", "end", "crc32c", "gzip", "must_understand"),
    *(
        "torch_dtype",
        "torch.bfloat16",
        "uint16",
        "float32",
        "bf16",
        "float4_e2m1fn",
        False,
        [],
        [1],
        [4, 3],
        3,
        2,
        {"must_understand": False},
    ),
)


def _mutate_zarr(data: bytes, rng: random.Random) -> bytes:
    """A document, a chunk or the tree; chunk shapes, sizes and checksums are made true again in many draws."""
    files, sizes = unpack(data)
    if not files or rng.random() < 0.05:
        return mutate_bytes(data, rng)
    documents = [path for path in files if path.endswith("zarr.json")]
    others = [path for path in files if path not in documents]
    draw = rng.random()
    if documents and draw < 0.65:
        path = rng.choice(documents)
        files[path] = mutate_json(files[path], rng, _ZARR_WORDS)
        if rng.random() < 0.6:
            _refit_array(path, files, sizes, rng)
    elif others and draw < 0.8:
        _edit_chunk(rng.choice(others), files, sizes, rng)
    else:
        _edit_tree(files, sizes, rng)
    return pack(files, sizes)


def _refit_array(path: str, files: dict[str, bytes], sizes: dict[str, int], rng: random.Random) -> None:
    """One chunk as large as the array's shape says."""
    try:
        document = json.loads(files[path])
        shape, kind = document["shape"], BY_NAME[document["data_type"]]
        if count_elements(shape) < 0:
            return
        chunk = [max(1, extent) + rng.choice((0, 0, 0, 1)) * (i > 0) for i, extent in enumerate(shape)]
        document["chunk_grid"]["configuration"]["chunk_shape"] = chunk
        nbytes = min(prod(chunk) * kind.itemsize, 1 << 62)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    folder = path.removesuffix("zarr.json")
    for file in [name for name in files if name.startswith(folder) and not name.endswith("zarr.json") and folder != "w/"]:
        del files[file]
    file = folder + "/".join(["c", *["0"] * len(shape)])
    files[path], files[file], sizes[file] = json.dumps(document).encode(), b"", nbytes


def _edit_chunk(path: str, files: dict[str, bytes], sizes: dict[str, int], rng: random.Random) -> None:
    data = files[path]
    draw = rng.random()
    if draw < 0.3:
        sizes[path] = edge(rng, (len(data),))
    elif draw < 0.6 and len(data) > 20:
        # A shard's index ends in the checksum of what precedes it, at the file's end for a number of chunks, or at its start.
        length = 16 * rng.choice((1, 2, 3, 4))
        begin = 0 if rng.random() < 0.5 else max(0, len(data) - length - 4)
        index = mutate_bytes(data[begin : begin + length], rng)[:length].ljust(length, b"\xff")
        files[path] = data[:begin] + index + _crc32c(index).to_bytes(4, "little") + data[begin + length + 4 :]
    else:
        files[path] = mutate_bytes(data, rng)


def _edit_tree(files: dict[str, bytes], sizes: dict[str, int], rng: random.Random) -> None:
    path, other = rng.choice(list(files)), rng.choice(list(files))
    draw = rng.random()
    if draw < 0.2:
        del files[path]
    elif draw < 0.5:
        name = rng.choice(
            (path.replace("/", ".", 1), "w/" + text(rng) + "/zarr.json", path.replace("x", "y"), "w/.zgroup", "w/x/y/zarr.json", path + "x")
        )
        files[name] = files[path]
        sizes[name] = sizes.get(path, 0)
    elif draw < 0.7:
        files[path] = files[other]
    else:
        for name in [name for name in files if name.startswith("w/x/")]:
            files[name.replace("w/x/", f"w/{rng.choice(('q', 'sub.y', 'a/b', 'é'))}/", 1)] = files[name]


ZARR = register(
    Target(
        "zarr",
        (_PLANNER + "zarr",),
        _parse_zarr,
        _zarr_seeds,
        _mutate_zarr,
        elsewhere=tuple(
            f"{_PLANNER}zarr:{name}"
            for name in (
                "Zarr.lay_out",
                "_array_files",
                "_check_name",
                "_inner_chunks",
                "_array_document",
                "_bytes_codec",
                "_document_file",
                "_shard_index",
            )
        ),
    )
)
