"""What fuzzing the containers' parsers, and reading them with an attacker's eyes, has found: one test each."""

from __future__ import annotations

import collections
import io
import json
import pickle
from math import prod
from typing import Any

import pytest
import torch

from shardwright.errors import ContainerError, UnsupportedError
from shardwright.planner.containers.torch_zip import TorchZip
from shardwright.planner.containers.zarr import Zarr

from .harness import attempt
from .mutators_pickle import text_op
from .mutators_zip import Archive, build
from .stores import MemoryStore, pack
from .targets_containers import SAFETENSORS, TORCH_ZIP, UNPICKLE, ZARR


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_default_factory_is_known_in_every_protocol(protocol: int) -> None:
    """Protocol 2 spells int and str as Python 2 did: a genuine file was refused."""
    buffer = io.BytesIO()
    torch.save(
        {"a": collections.defaultdict(int, x=1), "b": collections.defaultdict(str, y="z"), "c": [int, str]},
        buffer,
        pickle_protocol=protocol,
    )
    found = TorchZip().read(MemoryStore({"m.pt": buffer.getvalue()}), "m.pt").objects
    assert found["a"] == {"x": 1} and found["b"] == {"y": "z"}
    assert [(kind.module, kind.name) for kind in found["c"]] == [("builtins", "int"), ("builtins", "str")]


def test_an_archive_without_entries_is_refused() -> None:
    """It ended in an uncaught ValueError."""
    empty = b"PK\3\4" + bytes(60) + build(Archive(()))
    data = empty[:-6] + (len(empty) - 22).to_bytes(4, "little") + empty[-2:]
    refusal = attempt(TORCH_ZIP, data)
    assert isinstance(refusal, ContainerError) and "empty" in str(refusal)


@pytest.mark.parametrize(("axes", "fine"), [(64, True), (65, False), (100_000, False)])
def test_a_tensor_of_many_axes_is_refused(axes: int, fine: bool) -> None:
    """Each later step would have cost as many times as much; torch and numpy have no such tensors."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1] * axes, "data_offsets": [0, 1]}}, separators=(",", ":")).encode()
    for body in (header, header.replace(b":", b": ")):
        refusal = attempt(SAFETENSORS, len(body).to_bytes(8, "little") + body + b"\0")
        assert refusal is None if fine else isinstance(refusal, ContainerError) and "shape" in str(refusal)
    group, array = json.dumps({"zarr_format": 3, "node_type": "group"}), array_document([1] * axes, [1] * axes)
    refusal = attempt(ZARR, pack({"w/zarr.json": group.encode(), "w/a/zarr.json": array, "w/a/" + "/".join(["c", *["0"] * axes]): b"\0"}))
    assert refusal is None if fine else isinstance(refusal, ContainerError) and "shape" in str(refusal)


def array_document(shape: list[int], chunk: list[int], inner: list[int] | None = None) -> bytes:
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": inner, "codecs": [little], "index_codecs": [little, {"name": "crc32c"}]}
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}] if inner else [little],
    }
    return json.dumps(document).encode()


@pytest.mark.parametrize("rows", [1 << 20, 1 << 40])
def test_the_index_of_a_shard_is_read_only_when_it_is_small(rows: int) -> None:
    """A sparse file may be of any size: its index was read whole, and summed byte by byte, however long it claimed to be."""
    shape = [rows, 16]
    files = {
        "w/zarr.json": b'{"zarr_format": 3, "node_type": "group"}',
        "w/a/zarr.json": array_document(shape, shape, [1, 16]),
        "w/a/c/0/0": b"",
    }
    sizes = {"w/a/c/0/0": prod(shape) + 16 * rows + 4}
    refusal = attempt(ZARR, pack(files, sizes))
    assert isinstance(refusal, UnsupportedError) and "inner chunks" in str(refusal) and refusal.tensor == "a"
    with pytest.raises(UnsupportedError):
        Zarr().read(MemoryStore(files, sizes), "w")


@pytest.mark.parametrize(
    "header",
    [
        '{"a":1,"KEY":1,"KEY":2}',
        '{"__metadata__":{"KEY":1}}',
        '{"a":"\\ud800KEY"}',
        '{"a":{"dtype":"KEY","shape":[],"data_offsets":[0,0]}}',
    ],
)
def test_messages_do_not_repeat_megabytes_of_the_file(header: str) -> None:
    """A header's text came back whole in the error."""
    data = header.replace("KEY", "k" * 1_000_000).encode()
    refusal = attempt(SAFETENSORS, len(data).to_bytes(8, "little") + data)
    assert isinstance(refusal, ContainerError) and len(str(refusal)) < 2000


def test_a_long_tuple_is_no_key() -> None:
    """Hashes of tuples can be made to collide; how much each comparison costs is then the attack."""
    assert attempt(UNPICKLE, pickle.dumps({tuple(range(8)): 1}, 2)) is None
    assert isinstance(attempt(UNPICKLE, pickle.dumps({tuple(range(9)): 1}, 2)), ContainerError)


def test_a_size_of_torch_is_no_shape_of_a_tensor() -> None:
    """It was copied for each of any number of tensors that share it."""
    storage = b"(" + text_op("storage") + b"ctorch\nFloatStorage\n" + text_op("0") + text_op("cpu") + b"K\x04tQ"
    for size, fine in ((b"K\x02\x85", True), (b"ctorch\nSize\nK\x02\x85\x85R", False)):
        pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + b"K\x01\x85\x89}tR."
        refusal = attempt(UNPICKLE, pickled)
        assert refusal is None if fine else isinstance(refusal, ContainerError)
