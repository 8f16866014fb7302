"""safetensors headers: read like the library, written like the library, refused with a reason."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardwright.errors import ContainerError, UnsupportedError, UsageError
from shardwright.planner.containers import safetensors as module
from shardwright.planner.containers.base import ContainerIndex, TensorSpec
from shardwright.planner.containers.safetensors import Safetensors
from shardwright.planner.store import LocalStore, Stat
from shardwright.planner.tensor.dtypes import BY_TAG
from tests.unit.materialise import materialise

TORCH_DTYPES = [d.name for d in BY_TAG.values() if hasattr(torch, d.name)]
NAMES = ["model.layers.0.w", "z", "A", 'a"quote', "back\\slash", "é☃\u2028\x7f", "\x00\x01\b\t\n\f\r\x1f", "😀", "\uffff", ""]


class BytesStore:
    """One file in memory."""

    root = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def list(self) -> tuple[str, ...]:
        return ("f",)

    def exists(self, path: str) -> bool:
        return path == "f"

    def stat(self, path: str) -> Stat:
        return Stat(len(self.data), 0)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        end = len(self.data) if nbytes is None else offset + nbytes
        assert 0 <= offset <= end <= len(self.data), "read past the end"
        return self.data[offset:end]


def read_bytes(data: bytes) -> ContainerIndex:
    return Safetensors().read(BytesStore(data), "f")


def whole(header: bytes | str | dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(tag: object = "U8", shape: object = (1,), offsets: object = (0, 1)) -> dict[str, object]:
    return {"dtype": tag, "shape": shape, "data_offsets": offsets}


def sample(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    width = torch.empty(0, dtype=getattr(torch, name)).element_size()
    count = width
    for extent in shape:
        count *= extent
    raw = torch.tensor(list(random.Random(seed).randbytes(count)), dtype=torch.uint8)
    raw = raw & 1 if name == "bool" else raw
    return raw.view(getattr(torch, name)).reshape(shape) if count else torch.empty(shape, dtype=getattr(torch, name))


def blob(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()]


def same_as_library(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, tmp_path: Path) -> bytes:
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    layout = Safetensors().lay_out("ours.safetensors", specs_of(tensors), metadata=metadata)
    materialise(layout, tmp_path, [blob(t) for t in tensors.values()])
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    return ours


# --- as the library writes -------------------------------------------------------------------------------------------


def test_every_dtype_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    shapes = [(2, 3), (), (0, 4), (5,), (1, 1, 1)]
    tensors = {f"t{j}.{name}": sample(name, shape, j) for name in TORCH_DTYPES for j, shape in enumerate(shapes)}
    assert len(TORCH_DTYPES) == 19
    items = list(tensors.items())
    random.Random(3).shuffle(items)
    same_as_library(dict(items), {"format": "pt"}, tmp_path)
    for name, loaded in load_file(tmp_path / "ours.safetensors").items():
        assert loaded.dtype == tensors[name].dtype
        assert loaded.shape == tensors[name].shape
        assert blob(loaded) == blob(tensors[name])


def test_float4_counts_elements_not_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(32, dtype=torch.uint8).reshape(4, 8).view(torch.float4_e2m1fn_x2)
    save_file({"w": tensor, "v": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    layout = Safetensors().lay_out("ours.safetensors", [TensorSpec("w", "float4_e2m1fn", (4, 16)), TensorSpec("v", "float32", (3,))])
    materialise(layout, tmp_path, [bytes(range(32)), bytes(12)])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    found = Safetensors().read(LocalStore(tmp_path), "theirs.safetensors").tensors["w"]
    assert (found.dtype, found.shape) == ("float4_e2m1fn", (4, 16))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {'k"\\\n\x01é': 'v"\\\t☃'}])
def test_names_that_need_escapes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {name: sample("float32", (i,), i) for i, name in enumerate(NAMES)}
    same_as_library(tensors, metadata, tmp_path)
    index = Safetensors().read(LocalStore(tmp_path), "theirs.safetensors")
    assert set(index.tensors) == set(NAMES)
    assert index.metadata == (metadata or {})


@pytest.mark.parametrize("count", range(9))
def test_padding_for_every_header_length(tmp_path: Path, count: int) -> None:
    same_as_library({"n" * (count + 1): torch.ones(2)}, None, tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    same_as_library({}, None, tmp_path)
    ours = Safetensors().lay_out("f", [], metadata={}).files[0]
    # Here the library writes '{},"__metadata__":{}}', which its own reader refuses.
    assert ours.static[0][1][8:].rstrip() == b'{"__metadata__":{}}'


def test_several_metadata_keys_are_sorted(tmp_path: Path) -> None:
    metadata = {"z": "1", "a": "2", "m": "3"}
    layout = Safetensors().lay_out("ours.safetensors", [TensorSpec("w", "int8", (2,))], metadata=metadata)
    materialise(layout, tmp_path, [b"ab"])
    assert b'{"__metadata__":{"a":"2","m":"3","z":"1"},"w"' in layout.files[0].static[0][1]
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_places_follow_the_order_given() -> None:
    specs = [TensorSpec("b", "bool", (3,)), TensorSpec("a", "float64", (2,)), TensorSpec("c", "float64", (1,))]
    layout = Safetensors().lay_out("f", specs)
    base = len(layout.files[0].static[0][1])
    assert [place.offset - base for place in layout.places] == [24, 0, 16]
    assert {(place.file, place.grain) for place in layout.places} == {(0, 1)}


# --- as the library reads --------------------------------------------------------------------------------------------


def test_read_points_at_the_bytes(tmp_path: Path) -> None:
    tensors = {f"t{j}.{name}": sample(name, (3, j), j) for name in TORCH_DTYPES for j in range(3)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    data = (tmp_path / "m.safetensors").read_bytes()
    index = Safetensors().read(LocalStore(tmp_path), "m.safetensors")
    assert index.metadata == {"format": "pt"}
    assert index.header_digest == hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()
    assert set(index.tensors) == set(tensors)
    for name, found in index.tensors.items():
        want = tensors[name]
        assert (found.name, found.dtype, found.shape) == (name, str(want.dtype).removeprefix("torch."), tuple(want.shape))
        assert data[found.offset : found.offset + want.nbytes] == blob(want)
        assert found.file == "m.safetensors" and found.strides is None


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {"b": entry(offsets=(1, 2)), "empty": entry(shape=(0,), offsets=(1, 1)), "a": entry(offsets=(0, 1))}
    found = read_bytes(whole(header, b"xy"))
    assert list(found.tensors) == ["a", "empty", "b"]
    assert found.tensors["b"].offset - found.tensors["a"].offset == 1


@pytest.mark.parametrize(
    "header",
    ["{}", "{} \n\t", '{"__metadata__":null}', '{"__metadata__":{}}', '{ "__metadata__" : {"a": "\\u00e9"} }'],
)
def test_headers_without_tensors(header: str) -> None:
    assert read_bytes(whole(header)).tensors == {}


def test_six_bit_elements_that_fill_bytes() -> None:
    found = read_bytes(whole({"w": entry("F6_E2M3", (4,), (0, 3))}, b"abc")).tensors["w"]
    assert (found.dtype, found.shape) == ("float6_e2m3", (4,))


def test_entries_may_say_more() -> None:
    assert read_bytes(whole({"w": {**entry(), "note": 1}}, b"x")).tensors["w"].shape == (1,)


def test_a_hundred_thousand_tensors() -> None:
    specs = [TensorSpec(f"model.layers.{i // 100}.experts.{i % 100}.weight", "bfloat16", (2, 3)) for i in range(100_000)]
    layout = Safetensors().lay_out("f", specs, metadata={"format": "pt"})
    found = read_bytes(layout.files[0].static[0][1] + bytes(1_200_000))
    assert len(found.tensors) == 100_000
    assert all(found.tensors[spec.name].offset == place.offset for spec, place in zip(specs, layout.places, strict=True))


_TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
_SHAPES = st.lists(st.sampled_from([0, 1, 4, 8]), max_size=3)
_TENSORS = st.dictionaries(_TEXT, st.tuples(st.sampled_from(sorted(BY_TAG)), _SHAPES), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda kids: st.lists(kids) | st.dictionaries(_TEXT, kids),
    max_leaves=8,
)
_SNIPPETS = st.sampled_from([b"", b"0", b"9", b",", b"}", b"{", b'"', b"[", b"]", b" ", b"\\", b"-", b"e9", b"null", b"true"])


@settings(max_examples=100, deadline=None)
@given(_TENSORS, st.none() | st.dictionaries(_TEXT, _TEXT, max_size=2))
def test_both_ways_of_reading_agree(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> None:
    specs = [
        TensorSpec(name, BY_TAG[tag].name, tuple(shape) if BY_TAG[tag].bits % 8 == 0 else (8, *shape))
        for name, (tag, shape) in tensors.items()
        if name != "__metadata__"
    ]
    header = Safetensors().lay_out("f", specs, metadata=metadata).files[0].static[0][1]
    quick = module._quick(header)
    assert quick is None or quick == module._general(header, "f")
    plain = specs and not any(c in text for text in [s.name for s in specs] for c in '"\\') and header.isascii() and b"\\" not in header
    assert quick is not None or not plain


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_quick_way_accepts_nothing_that_the_general_one_refuses(data: st.DataObject) -> None:
    header = bytearray(GENUINE[: 8 + int.from_bytes(GENUINE[:8], "little")])
    at = data.draw(st.integers(8, len(header) - 1))
    header[at : at + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b"0", b",", b"}", b"{", b'"', b"[", b"]", b" ", b"\\", b"-"])
    )
    quick = module._quick(bytes(header))
    assert quick is None or quick == module._general(bytes(header), "f")


# --- refused ---------------------------------------------------------------------------------------------------------

GENUINE = whole(
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}',
    bytes(22),
)
MALFORMED = {
    "empty file": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "too short"),
    "no header": (b"\0" * 8, "does not begin with '{'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "header over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "longer than safetensors allows"),
    "length of all ones": (b"\xff" * 8 + b"{}", "longer than safetensors allows"),
    "cut inside the header": (GENUINE[:40], "Download or copy the file again"),
    "cut inside the data": (GENUINE[:-1], "is truncated"),
    "bytes after the data": (GENUINE + b"\0", "goes on after the last tensor"),
    "no brace": (whole(" {}"), "does not begin with '{'"),
    "a list": (whole("[]"), "does not begin with '{'"),
    "not utf-8": (whole(b'{"\xff":1}'), "not valid JSON"),
    "not json": (whole("{'a':1}"), "not valid JSON"),
    "half json": (whole('{"a":'), "not valid JSON"),
    "two documents": (whole("{}{}"), "not valid JSON"),
    "raw control character": (whole(b'{"a\n":1}'), "not valid JSON"),
    "half a surrogate pair": (whole('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogate"),
    "half a surrogate pair in metadata": (whole('{"__metadata__":{"a":"\\udc00"}}'), "surrogate"),
    "NaN": (whole('{"a":NaN}'), "no JSON number"),
    "deep nesting": (whole('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "deep nesting in the metadata": (whole('{"__metadata__":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "huge number": (whole('{"a":{"dtype":"U8","shape":[' + "9" * 10_000 + '],"data_offsets":[0,0]}}'), "not valid JSON"),
    "leading zero": (whole('{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', b"x"), "not valid JSON"),
    "leading zero in an offset": (whole('{"a":{"dtype":"U8","shape":[1],"data_offsets":[00,1]}}', b"x"), "not valid JSON"),
    "huge extent, backward offsets": (whole('{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[1,0]}}'), "malformed shape"),
    "number in other digits": (whole('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,١]}}', b"x"), "not valid JSON"),
    "duplicate tensor": (whole("{%s,%s}" % (('"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2)), "'a' twice"),
    "duplicate field": (whole('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "'dtype' twice"),
    "duplicate metadata key": (whole('{"__metadata__":{"k":"1","k":"2"}}'), "'k' twice"),
    "metadata twice": (whole('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "metadata is a list": (whole({"__metadata__": []}), "not a JSON object"),
    "metadata value": (whole({"__metadata__": {"a": 1}}), "not text"),
    "entry is a list": (whole({"a": []}), "not a JSON object"),
    "entry is null": (whole({"a": None}), "not a JSON object"),
    "no dtype": (whole({"a": {"shape": [], "data_offsets": [0, 1]}}, b"x"), "lacks dtype"),
    "no fields": (whole({"a": {}}), "lacks dtype, shape, data_offsets"),
    "unknown dtype": (whole({"a": entry("I4")}, b"x"), "unknown dtype"),
    "dtype is a list": (whole({"a": entry(["U8"])}, b"x"), "unknown dtype"),
    "dtype is null": (whole({"a": entry(None)}, b"x"), "unknown dtype"),
    "negative extent": (whole({"a": entry(shape=[-1, -1])}, b"x"), "malformed shape"),
    "boolean extent": (whole({"a": entry(shape=[True])}, b"x"), "malformed shape"),
    "float extent": (whole({"a": entry(shape=[1.0])}, b"x"), "malformed shape"),
    "infinite extent": (whole('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"x"), "malformed shape"),
    "text extent": (whole({"a": entry(shape="1")}, b"x"), "malformed shape"),
    "shape is an object": (whole({"a": entry(shape={})}, b"x"), "malformed shape"),
    "shape is a number": (whole({"a": entry(shape=1)}, b"x"), "malformed shape"),
    "huge extent": (whole({"a": entry(shape=[2**64])}, b"x"), "malformed shape"),
    "overflow before zero": (whole({"a": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))}), "malformed shape"),
    "overflow to the right size": (whole({"a": entry(shape=[2**32, 2**32], offsets=(0, 0))}), "malformed shape"),
    "one offset": (whole({"a": entry(offsets=[0])}, b"x"), "malformed data_offsets"),
    "three offsets": (whole({"a": entry(offsets=[0, 1, 1])}, b"x"), "malformed data_offsets"),
    "negative offset": (whole({"a": entry(offsets=[-1, 0])}, b"x"), "malformed data_offsets"),
    "boolean offset": (whole({"a": entry(offsets=[False, True])}, b"x"), "malformed data_offsets"),
    "float offset": (whole({"a": entry(offsets=[0, 1.0])}, b"x"), "malformed data_offsets"),
    "text offsets": (whole({"a": entry(offsets="01")}, b"x"), "malformed data_offsets"),
    "backward offsets": (whole({"a": entry(shape=[0], offsets=[1, 0])}, b"x"), "run backwards"),
    "backward offsets that equal a bad shape": (whole({"a": entry(shape=["x"], offsets=[1, 0])}, b"x"), "malformed shape"),
    "size too small": (whole({"a": entry("F32", [2], (0, 4))}, bytes(4)), "expected 8 bytes, actual 4 bytes"),
    "size too large": (whole({"a": entry("F32", [1], (0, 8))}, bytes(8)), "expected 4 bytes, actual 8 bytes"),
    "half a byte": (whole({"a": entry("F4", [3], (0, 2))}, bytes(2)), "do not fill whole bytes"),
    "gap at the start": (whole({"a": entry(offsets=(1, 2))}, b"xy"), "leaves a gap"),
    "gap": (whole({"a": entry(), "b": entry(offsets=(2, 3))}, b"xyz"), "leaves a gap"),
    "overlap": (whole({"a": entry(shape=[2], offsets=(0, 2)), "b": entry(shape=[2], offsets=(1, 3))}, b"xyz"), "overlaps"),
    "same bytes twice": (whole({"a": entry(), "b": entry()}, b"x"), "overlaps"),
    "past the end": (whole({"a": entry(shape=[2**40], offsets=(0, 2**40))}, b"x"), "is truncated"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    data, reason = MALFORMED[case]
    with pytest.raises(ContainerError) as caught:
        read_bytes(data)
    assert reason in str(caught.value)
    assert caught.value.file == "f"
    assert len(str(caught.value)) < 800


def test_faults_name_the_tensor() -> None:
    with pytest.raises(ContainerError, match="overlaps") as caught:
        read_bytes(whole({"first": entry(), "second": entry()}, b"x"))
    assert (caught.value.tensor, caught.value.expected, caught.value.actual) == ("second", "begin 1", "begin 0")


def test_nothing_is_read_by_an_unchecked_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    store = BytesStore(struct.pack("<Q", 99_999_999) + b"{}")
    monkeypatch.setattr(store, "read", lambda path, offset=0, nbytes=None: asked.append(nbytes) or store.data[offset : offset + nbytes])
    with pytest.raises(ContainerError, match="ends inside its header"):
        Safetensors().read(store, "f")
    assert asked == [8]


def test_the_genuine_file_of_the_mutations_is_genuine() -> None:
    assert list(read_bytes(GENUINE).tensors) == ["a", "b"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(GENUINE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | _SNIPPETS)
    try:
        index = read_bytes(bytes(raw))
    except ContainerError:
        return
    for found in index.tensors.values():
        assert 8 <= found.offset <= len(raw) and all(extent >= 0 for extent in found.shape)


@settings(max_examples=100, deadline=None)
@given(_JSON)
def test_any_json_for_an_entry(value: object) -> None:
    entries = [value, entry(value, value, value), entry(shape=value), entry(offsets=value)]
    for header in [{"__metadata__": value}, *({"a": item} for item in entries)]:
        with contextlib.suppress(ContainerError):
            read_bytes(whole(header, b"x"))


# --- refused to write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "options", "reason"),
    [
        ([TensorSpec("a", "int8", (1,))] * 2, {}, "given twice"),
        ([TensorSpec("__metadata__", "int8", (1,))], {}, "reserved"),
        ([TensorSpec("a", "int3", (1,))], {}, "no dtype"),
        ([TensorSpec("a", "float4_e2m1fn", (3,))], {}, "do not fill whole bytes"),
        ([TensorSpec("a", "int8", (-1,))], {}, "not a shape"),
        ([TensorSpec("\ud800", "int8", (1,))], {}, "UTF-8"),
        ([], {"metadata": {"a": 1}}, "text to text"),
        ([], {"metadata": {"a": "\ud800"}}, "UTF-8"),
        ([], {"objects": {}}, "no objects"),
    ],
)
def test_unwritable(specs: list[TensorSpec], options: dict[str, dict[str, object]], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Safetensors().lay_out("f", specs, **options)


def test_a_header_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec("a", "int8", (1,))]
    nbytes = len(Safetensors().lay_out("f", specs).files[0].static[0][1]) - 8
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", nbytes)
    Safetensors().lay_out("f", specs)
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", nbytes - 1)
    with pytest.raises(UnsupportedError, match="--max-shard-size"):
        Safetensors().lay_out("f", specs)
