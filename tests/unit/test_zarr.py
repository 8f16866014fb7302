"""zarr groups: what we lay out, tensorstore and zarr-python read; what they write, we read; the rest is refused."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ContainerError, ShardwrightError, UnsupportedError, UsageError
from shardwright.planner.containers import zarr as module
from shardwright.planner.containers.base import ContainerIndex, StoredTensor, TensorSpec, UnitLayout
from shardwright.planner.containers.zarr import Zarr
from shardwright.planner.store import LocalStore
from shardwright.planner.tensor.dtypes import BY_NAME, dtype
from tests.unit.materialise import materialise

DTYPES = [d.name for d in BY_NAME.values() if d.bits >= 8]
SHAPES = [(2, 3), (), (0, 4), (3, 0), (5,), (1, 2, 1)]
UNIT = "rank_00003_tp1_pp1"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of bytes where the real ones are megabytes."""
    monkeypatch.setattr(module, "SINGLE_CHUNK_MAX", 256)
    monkeypatch.setattr(module, "INNER_MIN", 16)
    monkeypatch.setattr(module, "INNER_MAX", 64)


def blobs_of(specs: list[TensorSpec]) -> list[bytes]:
    made = []
    for i, spec in enumerate(specs):
        raw = random.Random(i).randbytes(math.prod(spec.shape) * dtype(spec.dtype).itemsize)
        made.append(bytes(byte & 1 for byte in raw) if spec.dtype == "bool" else raw)
    return made


def write(root: Path, specs: list[TensorSpec], metadata: dict[str, Any] | None = None) -> tuple[UnitLayout, list[bytes]]:
    layout, blobs = Zarr().lay_out(UNIT, specs, metadata=metadata), blobs_of(specs)
    materialise(layout, root, blobs)
    return layout, blobs


def read(root: Path, unit: str = UNIT) -> ContainerIndex:
    return Zarr().read(LocalStore(root), unit)


def open_tensorstore(folder: Path, **more: Any) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open({**spec, **more}, create="metadata" in more, open=True).result()


def bytes_at(root: Path, found: StoredTensor) -> bytes:
    """A stored tensor's bytes, gathered by its strides."""
    data = np.fromfile(root / found.file, np.uint8)
    width = dtype(found.dtype).itemsize
    if 0 in found.shape:
        return b""
    strides = found.strides or tuple(math.prod(found.shape[i + 1 :]) for i in range(len(found.shape)))
    view = np.lib.stride_tricks.as_strided(data[found.offset :], (*found.shape, width), (*(s * width for s in strides), 1))
    return view.tobytes()


# --- what we lay out -------------------------------------------------------------------------------------------------


def test_tensorstore_reads_every_dtype(tmp_path: Path) -> None:
    specs = [TensorSpec(f"layers.0.{name}.{j}", name, shape) for name in DTYPES for j, shape in enumerate(SHAPES)]
    _, blobs = write(tmp_path, specs)
    assert len(DTYPES) == 19
    for spec, blob in zip(specs, blobs, strict=True):
        array = open_tensorstore(tmp_path / UNIT / spec.name)
        assert (array.dtype.name, array.shape) == (spec.dtype, spec.shape)
        assert array.read().result().tobytes() == blob


def test_we_read_what_we_wrote(tmp_path: Path, small: None) -> None:
    specs = [TensorSpec(f"{name}.{j}", name, shape) for name in DTYPES for j, shape in enumerate([*SHAPES, (64, 9), (257,)])]
    layout, blobs = write(tmp_path, specs, {"rank": 3, "mesh": {"tp": 2}})
    index = read(tmp_path)
    assert index.metadata == {"rank": 3, "mesh": {"tp": 2}}
    assert list(index.tensors) == sorted(spec.name for spec in specs)
    for spec, blob, place in zip(specs, blobs, layout.places, strict=True):
        found = index.tensors[spec.name]
        assert (found.dtype, found.shape, found.strides) == (spec.dtype, spec.shape, None)
        assert (found.file, found.offset) == (layout.files[place.file].path, place.offset)
        assert bytes_at(tmp_path, found) == blob


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(64, 9), (40, 3, 5), (300,), (8, 40)])
def test_tensorstore_reads_a_shard(tmp_path: Path, small: None, name: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("w", name, shape)
    layout, (blob,) = write(tmp_path, [spec])
    array = open_tensorstore(tmp_path / UNIT / "w")
    assert array.read().result().tobytes() == blob
    assert array[shape[0] // 2 :].read().result().tobytes() == blob[len(blob) // shape[0] * (shape[0] // 2) :]
    codec = json.loads(layout.files[1].static[0][1])["codecs"][0]
    divides = any(shape[0] % n == 0 and 16 <= len(blob) // n <= 64 for n in range(1, shape[0] + 1))
    assert codec["name"] == ("sharding_indexed" if len(blob) > 256 and divides else "bytes")
    if codec["name"] == "sharding_indexed":
        assert codec["configuration"]["chunk_shape"] == [layout.places[0].grain, *shape[1:]]


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunks"),
    [
        ((256 << 20,), 1, 1),
        ((512 << 20,), 1, 8),
        ((16384, 16384), 2, 8),
        ((151936, 8192), 2, 53),
        ((3 * 2**20, 100), 1, 5),
        ((7, 100 << 20), 1, 1),
        ((1, 1 << 30), 2, 1),
        ((268435459,), 2, 1),
        ((), 2, 1),
    ],
)
def test_inner_chunks_divide_the_rows(shape: tuple[int, ...], itemsize: int, chunks: int) -> None:
    nbytes = math.prod(shape) * itemsize
    found = module._inner_chunks(shape, nbytes)
    assert found == 1 or (shape[0] % found == 0 and 16 << 20 <= nbytes // found <= 64 << 20)
    if shape in [(151936, 8192), (3 * 2**20, 100)]:
        assert found > 1
    else:
        assert found == chunks


def test_zarr_python_reads_arrays_shards_and_the_group(tmp_path: Path, small: None) -> None:
    names = ["float32", "int8", "float16", "bool", "uint16", "complex64", "int64"]
    specs = [TensorSpec(f"m.{name}.{j}", name, shape) for name in names for j, shape in enumerate([*SHAPES, (96, 7)])]
    _, blobs = write(tmp_path, specs, {"rank": 3})
    group = zarr.open_group(tmp_path / UNIT, mode="r")
    assert group.attrs.asdict() == {"rank": 3}
    assert sorted(group.array_keys()) == sorted(spec.name for spec in specs)
    for spec, blob in zip(specs, blobs, strict=True):
        array = group[spec.name]
        assert array.shape == spec.shape
        assert np.asarray(array[...]).tobytes() == blob
        assert array.attrs["torch_dtype"] == spec.dtype
    assert group["m.float32.6"].shards == (96, 7)


def test_zarr_python_reads_known_arrays_beside_unknown_ones(tmp_path: Path) -> None:
    _, blobs = write(tmp_path, [TensorSpec("a", "bfloat16", (4,)), TensorSpec("b", "float32", (4,))])
    assert zarr.open_group(tmp_path / UNIT, mode="r")["b"][...].tobytes() == blobs[1]


def test_files_and_places(small: None) -> None:
    specs = [TensorSpec("big", "int8", (512,)), TensorSpec("none", "int8", (0, 2)), TensorSpec("zero", "int8", ())]
    layout = Zarr().lay_out("r", specs)
    names = ["zarr.json", "big/zarr.json", "big/c/0", "none/zarr.json", "zero/zarr.json", "zero/c"]
    assert [file.path for file in layout.files] == [f"r/{name}" for name in names]
    assert [place.file for place in layout.places] == [2, 3, 5]
    assert layout.places[0].grain == 64
    assert layout.files[2].nbytes == 512 + 8 * 16 + 4
    assert layout.places[1].offset == layout.files[3].nbytes
    assert all(not file.crcs for file in layout.files)


def test_a_unit_may_be_the_root(tmp_path: Path) -> None:
    layout = Zarr().lay_out("", [TensorSpec("w", "int8", (2,))])
    materialise(layout, tmp_path, [b"ab"])
    found = read(tmp_path, "").tensors["w"]
    assert (found.file, found.offset) == ("w/c/0", 0)


@pytest.mark.parametrize(
    ("specs", "options", "kind", "reason"),
    [
        ([TensorSpec("a", "int8", (1,))] * 2, {}, UsageError, "given twice"),
        ([TensorSpec("a", "float4_e2m1fn", (4,))], {}, UnsupportedError, "uint8"),
        ([TensorSpec("a", "int8", (-1,))], {}, UsageError, "not a shape"),
        ([TensorSpec("", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("a/b", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("..", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec(".a", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("__a", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("zarr.json", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("\ud800", "int8", (1,))], {}, UsageError, "zarr node"),
        ([TensorSpec("é" * 128, "int8", (1,))], {}, UsageError, "zarr node"),
        ([], {"metadata": {"a": math.nan}}, UsageError, "JSON"),
        ([], {"metadata": {"a": {1}}}, UsageError, "JSON"),
        ([], {"objects": {}}, UsageError, "no objects"),
    ],
)
def test_unwritable(specs: list[TensorSpec], options: dict[str, Any], kind: type[ShardwrightError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        Zarr().lay_out("r", specs, **options)


# --- what others lay out ---------------------------------------------------------------------------------------------


def test_we_read_what_zarr_python_wrote(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g", mode="w", zarr_format=3, attributes={"a": 1})
    values = {}
    for name, shape, more in [
        ("plain", (4, 3), {"chunks": (4, 3)}),
        ("padded", (4, 3), {"chunks": (5, 4)}),
        ("shard", (8, 3), {"chunks": (2, 3), "shards": (8, 3)}),
        ("rest", (7, 3), {"chunks": (2, 3), "shards": (8, 3)}),
        ("zero", (), {}),
        ("old.keys", (2, 2), {"chunks": (2, 2), "chunk_key_encoding": {"name": "v2", "separator": "."}}),
        ("sub/node", (3,), {"chunks": (3,)}),
    ]:
        values[name.replace("/", ".")] = np.arange(1, 1 + math.prod(shape), dtype="<f4").reshape(shape)
        group.create_array(name, shape=shape, dtype="<f4", compressors=None, **more)[...] = values[name.replace("/", ".")]
    group.create_array("empty", shape=(0, 3), dtype="<f4", chunks=(1, 3), compressors=None)
    index = read(tmp_path, "g")
    assert index.metadata == {"a": 1}
    assert set(index.tensors) == {*values, "empty"}
    for name, want in values.items():
        assert bytes_at(tmp_path, index.tensors[name]) == want.tobytes()
    assert index.tensors["padded"].strides == (4, 1)


@pytest.mark.parametrize("location", ["start", "end"])
def test_we_read_what_tensorstore_wrote(tmp_path: Path, location: str) -> None:
    write(tmp_path, [])
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {"chunk_shape": [2, 3], "codecs": [little], "index_codecs": [little, {"name": "crc32c"}], "index_location": location}
    want = np.arange(1, 25).reshape(8, 3).astype(ml_dtypes.bfloat16)
    metadata = {"shape": [8, 3], "data_type": "bfloat16", "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 3]}}}
    sharded = {**metadata, "codecs": [{"name": "sharding_indexed", "configuration": inner}]}
    open_tensorstore(tmp_path / UNIT / "s", metadata=sharded).write(want).result()
    open_tensorstore(tmp_path / UNIT / "p", metadata=metadata).write(want).result()
    fp8 = want.astype(ml_dtypes.float8_e4m3fn)
    open_tensorstore(tmp_path / UNIT / "f", metadata={**metadata, "data_type": "float8_e4m3fn"}).write(fp8).result()
    tensors = read(tmp_path).tensors
    assert bytes_at(tmp_path, tensors["s"]) == bytes_at(tmp_path, tensors["p"]) == want.tobytes()
    assert bytes_at(tmp_path, tensors["f"]) == fp8.tobytes()
    assert (tensors["s"].offset > 0) == (location == "start")


def test_an_unsigned_integer_may_stand_in(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g", mode="w", zarr_format=3)
    group.create_array("w", shape=(2,), dtype="uint16", compressors=None, attributes={"torch_dtype": "torch.bfloat16"})[...] = 7
    assert read(tmp_path, "g").tensors["w"].dtype == "bfloat16"


def test_a_group_reads_only_its_own_nodes(tmp_path: Path) -> None:
    for unit in ["r1", "r10", "r1-x"]:
        materialise(Zarr().lay_out(unit, [TensorSpec(f"in.{unit}", "int8", (1,))]), tmp_path, [b"x"])
    assert list(read(tmp_path, "r1").tensors) == ["in.r1"]


def test_the_digest_follows_what_says_where_data_lies(tmp_path: Path, small: None) -> None:
    specs = [TensorSpec("w", "int8", (512,)), TensorSpec("v", "int8", (3,))]
    for name, metadata in [("a", {"x": 1}), ("b", {"x": 1}), ("c", {"x": 2})]:
        materialise(Zarr().lay_out(UNIT, specs, metadata=metadata), tmp_path / name, blobs_of(specs))
    (tmp_path / "b" / UNIT / "v" / "c" / "0").write_bytes(b"new")
    digests = [read(tmp_path / name).header_digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


# --- refused ---------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def shard(document: dict[str, Any]) -> dict[str, Any]:
    return document["codecs"][0]["configuration"]


DOCUMENTS: dict[str, tuple[str, Change, type[ShardwrightError], str]] = {
    "v2 in v3's place": ("v", lambda d: d.update(zarr_format=2), ContainerError, "zarr v3"),
    "no kind": ("v", lambda d: d.pop("node_type"), ContainerError, "zarr v3"),
    "kind is a list": ("v", lambda d: d.update(node_type=["array"]), ContainerError, "zarr v3"),
    "no shape": ("v", lambda d: d.pop("shape"), ContainerError, "malformed shape"),
    "negative shape": ("v", lambda d: d.update(shape=[-3]), ContainerError, "malformed shape"),
    "boolean shape": ("v", lambda d: d.update(shape=[True]), ContainerError, "malformed shape"),
    "huge shape": ("v", lambda d: d.update(shape=[2**64]), ContainerError, "malformed shape"),
    "shape past the file": ("v", lambda d: (d.update(shape=[2**40]), grid(d, [2**40])), ContainerError, "wrong size"),
    "unknown dtype": ("v", lambda d: d.update(data_type="int4"), UnsupportedError, "data type"),
    "dtype of six bits": ("v", lambda d: d.update(data_type="float6_e2m3"), UnsupportedError, "data type"),
    "dtype is a list": ("v", lambda d: d.update(data_type=[]), ContainerError, "not a JSON object"),
    "dtype without name": ("v", lambda d: d.update(data_type={}), ContainerError, "no name"),
    "dtype with configuration": (
        "v",
        lambda d: d.update(data_type={"name": "int8", "configuration": {"a": 1}}),
        UnsupportedError,
        "data type",
    ),
    "other dtype": ("v", lambda d: d.update(data_type="int16", codecs=[module._LITTLE]), ContainerError, "torch_dtype contradicts"),
    "torch_dtype unknown": ("v", lambda d: d.update(attributes={"torch_dtype": "int3"}), ContainerError, "torch_dtype contradicts"),
    "torch_dtype is a list": ("v", lambda d: d.update(attributes={"torch_dtype": []}), ContainerError, "torch_dtype contradicts"),
    "torch_dtype wider": (
        "v",
        lambda d: d.update(data_type="uint8", attributes={"torch_dtype": "float16"}),
        ContainerError,
        "torch_dtype contradicts",
    ),
    "attributes": ("v", lambda d: d.update(attributes=[]), ContainerError, "attributes is not a JSON object"),
    "several chunks": ("v", lambda d: grid(d, [2]), UnsupportedError, "several chunk files"),
    "chunk of zero": ("v", lambda d: grid(d, [0]), ContainerError, "chunk shape"),
    "chunk of other rank": ("v", lambda d: grid(d, [3, 1]), ContainerError, "chunk shape"),
    "no grid": ("v", lambda d: d.pop("chunk_grid"), ContainerError, "not a JSON object"),
    "other grid": ("v", lambda d: d.update(chunk_grid={"name": "rectilinear"}), UnsupportedError, "regular"),
    "no codecs": ("v", lambda d: d.pop("codecs"), ContainerError, "not a list"),
    "compressed": ("v", lambda d: d["codecs"].append({"name": "zstd"}), UnsupportedError, "zstd"),
    "transposed": ("v", lambda d: d["codecs"].insert(0, {"name": "transpose"}), UnsupportedError, "transpose"),
    "big-endian": ("w", lambda d: shard(d)["codecs"][0].update(configuration={"endian": "big"}), UnsupportedError, "little-endian"),
    "no endian": ("w", lambda d: shard(d)["codecs"][0].pop("configuration"), UnsupportedError, "little-endian"),
    "other keys": ("v", lambda d: d.update(chunk_key_encoding={"name": "hashed"}), UnsupportedError, "key encoding"),
    "other separator": (
        "v",
        lambda d: d["chunk_key_encoding"].update(configuration={"separator": "/../"}),
        UnsupportedError,
        "key encoding",
    ),
    "extension": ("v", lambda d: d.update(novel={"must_understand": True}), UnsupportedError, "novel"),
    "storage transformers": ("v", lambda d: d.update(storage_transformers=[{"name": "x"}]), UnsupportedError, "storage transformers"),
    "inner chunks not rows": ("w", lambda d: shard(d).update(chunk_shape=[32, 1]), UnsupportedError, "whole rows"),
    "inner chunks do not divide": ("w", lambda d: shard(d).update(chunk_shape=[5, 4]), UnsupportedError, "whole rows"),
    "inner chunk of zero": ("w", lambda d: shard(d).update(chunk_shape=[0, 4]), ContainerError, "inner chunk shape"),
    "inner chunks compressed": ("w", lambda d: shard(d)["codecs"].append({"name": "gzip"}), UnsupportedError, "gzip"),
    "another number of inner chunks": ("w", lambda d: shard(d).update(chunk_shape=[4, 4]), ContainerError, "checksum"),
    "huge shard": ("w", lambda d: (d.update(shape=[2**50, 4]), grid(d, [2**50, 4])), ContainerError, "wrong size"),
    "huge inner chunk": ("w", lambda d: enlarge(d, [2**60, 4]), ContainerError, "wrong size"),
    "index compressed": ("w", lambda d: shard(d)["index_codecs"].append({"name": "gzip"}), UnsupportedError, "index codecs"),
    "index location": ("w", lambda d: shard(d).update(index_location="middle"), ContainerError, "index_location"),
    "index at the wrong end": ("w", lambda d: shard(d).update(index_location="start"), ContainerError, "checksum"),
    "no index codecs": ("w", lambda d: shard(d).pop("index_codecs"), ContainerError, "not a list"),
}


def enlarge(document: dict[str, Any], shape: list[int]) -> None:
    document.update(shape=shape, data_type="float64", attributes={})
    grid(document, shape)
    shard(document)["chunk_shape"] = shape


def grid(document: dict[str, Any], chunk: list[int]) -> None:
    document["chunk_grid"]["configuration"]["chunk_shape"] = chunk


def victim(root: Path) -> Path:
    """A group with a shard ``w`` of eight chunks (64 × 4 float16) and a plain array ``v`` (three int8)."""
    write(root, [TensorSpec("w", "float16", (64, 4)), TensorSpec("v", "int8", (3,))])
    return root / UNIT


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_refused(tmp_path: Path, small: None, case: str) -> None:
    name, change, kind, reason = DOCUMENTS[case]
    path = victim(tmp_path) / name / "zarr.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(kind, match=reason) as caught:
        read(tmp_path)
    assert name in str(caught.value)


def test_optional_extensions_are_ignored(tmp_path: Path, small: None) -> None:
    path = victim(tmp_path) / "v" / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "novel": {"must_understand": False}, "dimension_names": ["x"]}))
    assert read(tmp_path).tensors["v"].shape == (3,)


def index_of(*entries: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return body + struct.pack("<I", module._crc32c(body))


ORDER = [(i * 64, 64) for i in range(8)]
LOST = (2**64 - 1, 2**64 - 1)
SHARDS = {
    "cut": (bytes(512) + index_of(*ORDER)[:-1], ContainerError, "checksum"),
    "shorter than its index": (bytes(10), ContainerError, "wrong size"),
    "bytes more": (bytes(513) + index_of(*ORDER), ContainerError, "wrong size"),
    "checksum": (bytes(512) + index_of(*ORDER)[:-4] + bytes(4), ContainerError, "checksum"),
    "swapped": (bytes(512) + index_of(ORDER[1], ORDER[0], *ORDER[2:]), UnsupportedError, "row order"),
    "a chunk lost": (bytes(448) + index_of(*ORDER[:-1], LOST), ContainerError, "inner chunk 7 is missing"),
    "past the end": (bytes(512) + index_of(*ORDER[:-1], (2**63, 64)), UnsupportedError, "row order"),
    "other size": (bytes(512) + index_of(*ORDER[:-1], (448, 63)), UnsupportedError, "row order"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_refused(tmp_path: Path, small: None, case: str) -> None:
    data, kind, reason = SHARDS[case]
    (victim(tmp_path) / "w" / "c" / "0" / "0").write_bytes(data)
    with pytest.raises(kind, match=reason):
        read(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path, small: None) -> None:
    chunk = victim(tmp_path) / "v" / "c" / "0"
    for data in [b"", b"12", b"1234"]:
        chunk.write_bytes(data)
        with pytest.raises(ContainerError, match=f"expected 3 bytes, actual {len(data)} bytes"):
            read(tmp_path)
    chunk.unlink()
    with pytest.raises(ContainerError, match="write_empty_chunks") as caught:
        read(tmp_path)
    assert caught.value.tensor == "v"


def test_no_group(tmp_path: Path) -> None:
    (tmp_path / UNIT).mkdir()
    with pytest.raises(ContainerError, match=r"zarr\.json is missing"):
        read(tmp_path)
    (tmp_path / UNIT / ".zgroup").write_text("{}")
    with pytest.raises(UnsupportedError, match="zarr v2"):
        read(tmp_path)
    (tmp_path / UNIT / "zarr.json").write_text('{"zarr_format":3,"node_type":"array"}')
    with pytest.raises(ContainerError, match="not a group"):
        read(tmp_path)


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    write(tmp_path, [TensorSpec("a.b", "int8", (1,))])
    materialise(Zarr().lay_out(f"{UNIT}/a", [TensorSpec("b", "int8", (1,))]), tmp_path, [b"x"])
    with pytest.raises(ContainerError, match="joined with dots"):
        read(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff", b'{"a":' + b"[" * 100_000])
def test_broken_documents(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, [TensorSpec("v", "int8", (3,))])
    (tmp_path / UNIT / "v" / "zarr.json").write_bytes(text)
    with pytest.raises(ContainerError, match=r"v/zarr\.json"):
        read(tmp_path)


def test_mutations_are_read_or_refused(tmp_path: Path, small: None) -> None:
    root = victim(tmp_path)
    files = [root / "zarr.json", root / "w" / "zarr.json", root / "v" / "zarr.json", root / "w" / "c" / "0" / "0"]
    genuine = {file: file.read_bytes() for file in files}
    snippets = st.sampled_from([b"", b"0", b"9", b"-", b",", b"}", b"[", b'"', b"null", b"true", b"{}", b"[]", b"99999999999999999999"])

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files))
        raw = bytearray(genuine[file])
        start = 512 if file.name == "0" else 0
        at = data.draw(st.integers(start, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(snippets | st.binary(max_size=3))
        file.write_bytes(raw)
        try:
            index = read(tmp_path)
        except ShardwrightError:
            return
        finally:
            file.write_bytes(genuine[file])
        for found in index.tensors.values():
            bytes_at(tmp_path, found)

    check()


def test_a_stage_without_layers_is_a_group_without_arrays(tmp_path: Path) -> None:
    import shardwright as sw
    from tests.unit.tiny import tiny_llama

    source = tiny_llama(tmp_path / "src", layers=1)
    sw.convert(source, tmp_path / "out", to="ranks", layout=sw.Layout(pp=3, stages=(0, 0, 1)), container="zarr")
    sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert sw.diff(source, tmp_path / "back").equal
