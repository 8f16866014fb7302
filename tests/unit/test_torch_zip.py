"""The torch container against torch itself: files of `torch.save` read by us, layouts of ours read by `torch.load`."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ContainerError, Refusal, ShardwrightError, UnsafePickleError, UnsupportedError, UsageError
from shardwright.executors.checksums import RunningCrc, combine_in_python, crc32, crc32_combine
from shardwright.planner.containers._zip import Layout, read_directory
from shardwright.planner.containers.base import ContainerIndex, StoredTensor, TensorSpec, UnitLayout
from shardwright.planner.containers.torch_zip import Inert, Namespace, TensorRef, TorchDtype, TorchSize, TorchZip
from shardwright.planner.store import LocalStore
from shardwright.planner.tensor.dtypes import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def read(path: Path) -> ContainerIndex:
    return TorchZip().read(LocalStore(path), path.name)


def save(path: Path, value: Any, **options: Any) -> ContainerIndex:
    torch.save(value, path, **options)
    return read(path)


def elements(path: Path, tensor: StoredTensor) -> bytes:
    """The row-major bytes of a stored tensor, gathered element by element from the file alone."""
    data, size = path.read_bytes(), BY_NAME[tensor.dtype].itemsize
    if tensor.strides is None:
        return data[tensor.offset : tensor.offset + prod(tensor.shape) * size]
    places = (tensor.offset + size * sum(map(int.__mul__, at, tensor.strides)) for at in np.ndindex(tensor.shape))
    return b"".join(data[place : place + size] for place in places)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(path: Path, index: ContainerIndex, expected: dict[str, torch.Tensor]) -> None:
    assert list(index.tensors) == list(expected)
    for name, tensor in expected.items():
        found = index.tensors[name]
        assert (found.dtype, found.shape, found.file) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), path.name)
        assert elements(path, found) == bytes_of(tensor), name


def materialise(root: Path, unit: UnitLayout, specs: list[TensorSpec], data: dict[str, bytes]) -> Path:
    """What the executor will do: static bytes, data, checksums."""
    (layout,) = unit.files
    path = root / layout.path
    with path.open("w+b") as file:
        file.truncate(layout.nbytes)
        for offset, piece in layout.static:
            file.seek(offset)
            file.write(piece)
        for spec, place in zip(specs, unit.places, strict=True):
            file.seek(place.offset)
            file.write(data[spec.name])
        for crc in layout.crcs:
            file.seek(crc.offset)
            value = crc32(file.read(crc.nbytes)).to_bytes(4, "little")
            for patch in crc.patches:
                file.seek(patch)
                file.write(value)
    assert path.stat().st_size == layout.nbytes
    return path


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8)
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 complex64 float8_e4m3fn float8_e5m2 "
    kinds += "float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    tensors = {kind: raw.clone().view(getattr(torch, kind)).reshape(2, -1) for kind in kinds.split()}
    return {**tensors, "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(7.5), "empty": torch.empty(0, 3)}


# Reading what torch writes.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_dtype_and_protocol(tmp_path: Path, protocol: int) -> None:
    tensors = every_dtype()
    index = save(tmp_path / "m.pt", tensors, pickle_protocol=protocol)
    assert_same(tmp_path / "m.pt", index, tensors)
    assert all(found.strides is None for found in index.tensors.values())
    assert index.objects == {name: TensorRef(name) for name in tensors}


def test_reads_views_aliases_and_transposes(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "base": base,
        "alias": base,
        "view": base.view(24),
        "rows": base[1:3],
        "column": base[:, 2],
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, dtype=torch.int8).expand(3, 2),
        "one_column": base[:1].t()[:, :1],
        "parameter": torch.nn.Parameter(base[2]),
        "no_grad": torch.nn.Parameter(torch.tensor([3]), requires_grad=False),
    }
    index = save(tmp_path / "m.pt", tensors)
    assert_same(tmp_path / "m.pt", index, tensors)
    found = index.tensors
    assert found["alias"].offset == found["base"].offset == found["transposed"].offset
    assert found["rows"].offset == found["base"].offset + 24 and found["rows"].strides is None
    assert found["transposed"].strides == (1, 6) and found["expanded"].strides == (0, 0) and found["strided"].strides == (12, 3)


def test_reads_a_megatron_file(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    fields = {"num_layers": 2, "params_dtype": torch.bfloat16, "lr": np.float64(0.5), "size": np.int32(-7), "list": [1, (2, None)]}
    saved = {
        "args": argparse.Namespace(**fields, inner=argparse.Namespace(deep=True), path=Path("x")),
        "checkpoint_version": 3.0,
        "iteration": 1 << 70,
        "model": {
            "language_model": {"embedding": {"w.with.dots": torch.ones(2, 3)}, "layers": [torch.zeros(1), torch.ones(1)]},
            "layer._extra_state": io.BytesIO(b"\x00\xffextra"),
            "empty._extra_state": io.BytesIO(),
            "linear": layer.state_dict(),
        },
        "rng_state": [
            {"np_rng_state": ("MT19937", np.arange(3, dtype=np.uint32), 624), "torch_rng_state": torch.zeros(4, dtype=torch.uint8)}
        ],
        "optimizer": {0: {"exp_avg": torch.ones(2)}, "groups": [{"params": [0], "betas": (0.9, 0.95)}]},
        "shape": torch.Size([2, 3]),
        "set": {1, 2},
        "frozen": frozenset("a"),
        "bytes": b"\x80abc",
        "no_bytes": b"",
        "bytearray": bytearray(b"xyz"),
        "complex": 1 + 2j,
        "default": collections.defaultdict(dict, a=1),
        "device": torch.device("cpu"),
    }
    index = save(tmp_path / "model_optim_rng.pt", saved)
    assert_same(
        tmp_path / "model_optim_rng.pt",
        index,
        {
            "model.language_model.embedding.w.with.dots": torch.ones(2, 3),
            "model.language_model.layers.0": torch.zeros(1),
            "model.language_model.layers.1": torch.ones(1),
            "model.linear.weight": layer.weight,
            "model.linear.bias": layer.bias,
            "rng_state.0.torch_rng_state": torch.zeros(4, dtype=torch.uint8),
            "optimizer.0.exp_avg": torch.ones(2),
        },
    )
    objects = index.objects
    read_fields = objects["args"].fields
    assert isinstance(objects["args"], Namespace)
    assert {k: read_fields[k] for k in fields} == {**fields, "params_dtype": TorchDtype("bfloat16"), "lr": 0.5, "size": -7}
    assert type(read_fields["lr"]) is float and type(read_fields["size"]) is int
    assert read_fields["inner"] == Namespace({"deep": True}) and read_fields["path"].args == ("x",)
    assert (objects["iteration"], objects["checkpoint_version"]) == (1 << 70, 3.0)
    extra = objects["model"]["layer._extra_state"]
    assert isinstance(extra, Inert) and (extra.module, extra.name, extra.args) == ("io", "BytesIO", (b"\x00\xffextra",))
    assert objects["model"]["empty._extra_state"].args == (b"",)
    linear = objects["model"]["linear"]
    assert type(linear) is collections.OrderedDict and linear._metadata == {"": {"version": 1}}
    assert linear == {"weight": TensorRef("model.linear.weight"), "bias": TensorRef("model.linear.bias")}
    array = objects["rng_state"][0]["np_rng_state"][1]
    assert isinstance(array, Inert) and array.name == "_reconstruct" and array.state[-1] == np.arange(3, dtype=np.uint32).tobytes()
    assert type(objects["shape"]) is TorchSize and objects["shape"] == (2, 3)
    for key in ("set", "frozen", "bytes", "no_bytes", "bytearray", "complex", "default"):
        assert objects[key] == saved[key], key
    assert (objects["device"].module, objects["device"].name, objects["device"].args) == ("torch", "device", ("cpu",))


def test_framework_objects_become_inert(tmp_path: Path) -> None:
    # GLOBAL, REDUCE by value as Python pickles enums today; getattr as Python 3.11.0 did.
    by_value = b"cmegatron.core.transformer.enums\nMode\nK\x05\x85R"
    by_name = b"c__builtin__\ngetattr\ncmegatron.core.transformer.enums\nMode\nX\x04\x00\x00\x00FAST\x86R"
    built = b"ctransformer_engine.common.recipe\nDelayedScaling\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    bare = b"ctorch._C._nn\ngelu\n"
    index = read(craft(tmp_path / "m.pt", b"\x80\x02(" + by_value + by_name + built + bare + b"t."))
    value, name, recipe, function = index.objects[""]
    assert (value.module, value.name, value.args) == ("megatron.core.transformer.enums", "Mode", (5,))
    assert (name.name, name.args) == ("Mode.FAST", None)
    assert (recipe.args, recipe.state) == ((), {"a": 1})
    assert (function.module, function.name, function.args) == ("torch._C._nn", "gelu", None)


def test_reads_values_that_are_no_dict(tmp_path: Path) -> None:
    index = save(tmp_path / "t.pt", torch.arange(3))
    assert index.objects == {"": TensorRef("")} and index.tensors[""].shape == (3,)
    assert save(tmp_path / "l.pt", [1, torch.arange(3)]).objects == {"": [1, TensorRef("1")]}


def test_header_digest_follows_the_headers(tmp_path: Path) -> None:
    first = save(tmp_path / "a.pt", {"w": torch.zeros(4)})
    assert save(tmp_path / "a.pt", {"w": torch.zeros(4)}).header_digest == first.header_digest
    assert save(tmp_path / "a.pt", {"w": torch.zeros(5)}).header_digest != first.header_digest
    assert len(first.header_digest) == 64


def test_many_tensors_take_linear_time_and_few_reads(tmp_path: Path) -> None:
    specs = [TensorSpec(f"layers.{i}.weight", "float16", (3,)) for i in range(20_000)]
    unit = TorchZip().lay_out("many.pt", specs)
    path = materialise(tmp_path, unit, specs, {spec.name: i.to_bytes(6, "little") for i, spec in enumerate(specs)})

    class Counting(LocalStore):
        reads = 0

        def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
            self.reads += 1
            return super().read(path, offset, nbytes)

    store = Counting(path)
    started = time.perf_counter()
    index = TorchZip().read(store, path.name)
    assert time.perf_counter() - started < 5
    assert store.reads < 20
    assert list(index.tensors) == [spec.name for spec in specs]
    assert elements(path, index.tensors["layers.19999.weight"]) == (19_999).to_bytes(6, "little")


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    layout = Layout("many.zip", "m")
    offsets = [layout.reserve(f"data/{i}", 0) for i in range(66_000)]
    with (tmp_path / "many.zip").open("wb") as file:
        for offset, piece in layout.finish().static:
            file.seek(offset)
            file.write(piece)
    members = read_directory(LocalStore(tmp_path / "many.zip"), "many.zip").members
    assert [member.offset for member in members.values()] == offsets
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        assert archive.namelist() == list(members)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.zeros(2).untyped_storage(), "bare storage"),
    ],
    ids=["sparse", "conj", "complex128", "meta", "storage"],
)
def test_refuses_tensors_that_are_not_plain(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        save(tmp_path / "m.pt", {"model": {"bad": value}})
    assert caught.value.tensor == "model.bad" and caught.value.file == "m.pt"


def test_refuses_quantised_tensors(tmp_path: Path) -> None:
    tensor = b"ctorch._utils\n_rebuild_qtensor\n(tR"
    with pytest.raises(UnsupportedError, match="_rebuild_qtensor"):
        read(craft(tmp_path / "m.pt", b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."))


def test_reads_a_parameter_through_rebuild_from_type(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tensor_model_parallel = True
    index = save(tmp_path / "m.pt", {"w": parameter})
    assert_same(tmp_path / "m.pt", index, {"w": torch.ones(2)})


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="two tensors") as caught:
        save(tmp_path / "m.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})
    assert caught.value.tensor == "a.b"


@pytest.mark.parametrize("legacy", ["pickle", "tar"])
def test_refuses_files_older_than_the_zip_format(tmp_path: Path, legacy: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    if legacy == "pickle":
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(b"storages".ljust(257, b"\0") + b"ustar".ljust(600, b"\0"))
    with pytest.raises(UnsupportedError, match=r"before torch 1\.6.*torch\.save"):
        read(path)


def test_refuses_big_endian_data_and_torchscript(tmp_path: Path) -> None:
    pickled = pickle.dumps({}, 2)
    with pytest.raises(UnsupportedError, match="little-endian"):
        read(craft(tmp_path / "b.pt", pickled, {"m/byteorder": b"big"}))
    with pytest.raises(UnsupportedError, match="TorchScript"):
        read(craft(tmp_path / "s.pt", pickled, {"m/constants.pkl": b""}))


# Files that lie.


def craft(path: Path, pickled: bytes, members: dict[str, bytes] | None = None, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("m/data.pkl", pickled)
        for name, payload in (members or {}).items():
            archive.writestr(name, payload)
    return path


def tensor_pickle(key: bytes = b"0", count: int = 4, offset: int = 0, size: int = 4, stride: int = 1) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    text = [b"X" + struct.pack("<I", len(t)) + t for t in (b"storage", key, b"cpu")]
    identity = b"(" + text[0] + b"ctorch\nFloatStorage\n" + text[1] + text[2] + number(count) + b"tQ"
    rest = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + identity + rest + b"\x89}tRs."


def test_the_crafted_tensor_is_good(tmp_path: Path) -> None:
    index = read(craft(tmp_path / "m.pt", tensor_pickle(), {"m/data/0": bytes(range(16))}))
    assert elements(tmp_path / "m.pt", index.tensors["w"]) == bytes(range(16))


@pytest.mark.parametrize(
    "lie",
    [
        {"key": b"1"},
        {"count": 5},
        {"count": -4},
        {"offset": 1},
        {"offset": -1},
        {"size": 5},
        {"size": -1},
        {"size": 1 << 62},
        {"stride": 2},
        {"stride": -1},
        {"key": b"../data.pkl"},
    ],
    ids=str,
)
def test_refuses_tensors_outside_their_storage(tmp_path: Path, lie: dict[str, Any]) -> None:
    path = craft(tmp_path / "m.pt", tensor_pickle(**lie), {"m/data/0": bytes(16)})
    with pytest.raises(ContainerError) as caught:
        read(path)
    assert caught.value.file == "m.pt"


def test_refuses_compressed_members(tmp_path: Path) -> None:
    path = craft(tmp_path / "m.pt", tensor_pickle(), {"m/data/0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ContainerError, match=r"'m/data\.pkl' is compressed"):
        read(path)


@pytest.mark.parametrize(("at", "value"), [(0, 1), (2, 8)], ids=["encrypted", "deflated"])
def test_refuses_storages_that_are_not_plain(tmp_path: Path, at: int, value: int) -> None:
    path = craft(tmp_path / "m.pt", tensor_pickle(), {"m/data/0": bytes(16)})
    data = bytearray(path.read_bytes())
    local, central = data.index(b"m/data/0") - 30, data.rindex(b"m/data/0") - 46
    data[local + 6 + at] = data[central + 8 + at] = value
    path.write_bytes(data)
    with pytest.raises(ContainerError, match="'m/data/0' is compressed or encrypted") as caught:
        read(path)
    assert caught.value.tensor == "w"
    data[local + 6 + at] = 0
    path.write_bytes(data)
    with pytest.raises(ContainerError, match="local header disagree"):
        read(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "m/../../x", "C:x", "m\\..\\x"])
def test_refuses_names_that_escape(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContainerError, match="leaves the archive"):
        read(craft(tmp_path / "m.pt", tensor_pickle(), {"m/data/0": bytes(16), name: b""}))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_refuses_duplicates_and_overlaps(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", tensor_pickle())
        archive.writestr("m/data/0", bytes(16))
        archive.writestr("m/data/0", bytes(16))
    with pytest.raises(ContainerError, match="appears twice"):
        read(tmp_path / "m.pt")
    path = craft(tmp_path / "o.pt", tensor_pickle(), {"m/data/0": bytes(16), "m/data/1": bytes(16)})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", data.index(b"m/data/0", directory))
    grown = struct.pack("<2L", 1000, 1000)
    data[second - 46 - 8 + 20 : second - 46 - 8 + 28] = grown  # data/0 in the directory …
    data[data.index(b"m/data/0") - 12 : data.index(b"m/data/0") - 4] = grown  # … and in its local header
    path.write_bytes(data)
    with pytest.raises(ContainerError, match="overlaps"):
        read(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(Refusal):
            read(tmp_path / "cut.pt")


def test_other_archives_are_no_torch_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", b"")
    with pytest.raises(ContainerError, match=r"no data\.pkl"):
        read(tmp_path / "a.npz")


# Pickles that attack. Each would leave a mark if any part of it ran.


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def attacks() -> dict[str, bytes]:
    mark = "touch MARK"
    import runpy
    import webbrowser

    calls = {
        "os.system": Call(os.system, mark),
        "eval": Call(eval, "open('MARK','w')"),
        "exec": Call(exec, "open('MARK','w')"),
        "import": Call(__import__, "os"),
        "subprocess": Call(subprocess.Popen, ["touch", "MARK"]),
        "torch.load": Call(torch.load, "MARK"),
        "runpy": Call(runpy.run_path, "MARK"),
        "webbrowser": Call(webbrowser.open, "http://localhost"),
        "numpy.load": Call(np.load, "MARK"),
        "open": Call(open, "MARK", "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "builtin-getattr": Call(getattr, list, "append"),
    }
    made = {f"{name}-{protocol}": pickle.dumps({"w": call}, protocol) for name, call in calls.items() for protocol in (2, 4)}
    dotted = b"\x80\x04" + stack_global("os", "path.os.system") + text(mark) + b"\x85R."
    return {
        **made,
        "nested": pickle.dumps({"model": [{"a": ({"b": Call(os.system, mark)},)}]}, 4),
        "stack-global": b"\x80\x04" + stack_global("posix", "system") + text(mark) + b"\x85R.",
        "dotted": dotted,
        "attrgetter": b"\x80\x04" + stack_global("operator", "attrgetter") + text("system") + b"\x85R.",
        "partial": b"\x80\x04" + stack_global("functools", "partial") + b")\x81.",
        "load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x00\x85R.",
        "reduce-inert": b"\x80\x02cmegatron.x\nf\n)RX\x00\x00\x00\x00\x85R.",
        "call-a-string": b"\x80\x02" + text("system") + b")R.",
        "getattr-on-rebuild": b"\x80\x02c__builtin__\ngetattr\nctorch._utils\n_rebuild_tensor_v2\n" + text("__globals__") + b"\x86R.",
        "getattr-call": b"\x80\x02c__builtin__\ngetattr\ncmegatron.x\nf\n" + text("__globals__") + b"\x86R)R.",
        "build-on-global": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"NsR\x86b.",
        "build-on-list": b"\x80\x02]}" + text("append") + b"Nsb.",
        "instance": b"\x80\x02(" + text(mark) + b"ios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\n" + text(mark) + b"o.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent-text": b"\x80\x02P0\n.",
        "persistent-global": b"\x80\x02cos\nsystem\nQ.",
        "new-object-ex": b"\x80\x04" + stack_global("os", "system") + b")}\x92.",
        "buffer": b"\x80\x05\x97.",
        "encode-rot13": b"\x80\x02c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R.",
        "bytes-of-a-number": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "reconstructor": b"\x80\x02ccopy_reg\n_reconstructor\ncos\nsystem\nc__builtin__\nobject\nN\x87R.",
    }


@pytest.mark.parametrize(("name", "pickled"), attacks().items(), ids=attacks())
def test_nothing_in_a_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pickled: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    with pytest.raises((ContainerError, UnsafePickleError)) as caught:
        read(craft(tmp_path / "m.pt", pickled))
    assert caught.value.file == "m.pt"
    assert not (tmp_path / "MARK").exists() and set(sys.modules) == before


def test_a_refused_global_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsafePickleError, match=r"'posix\.system'.*file m\.pt.*torch\.save"):
        read(craft(tmp_path / "m.pt", pickle.dumps(Call(os.system, "x"), 2)))


def bombs() -> dict[str, bytes]:
    laughs = b"\x80\x02]q\x00"
    for level in range(40):
        laughs += b"](" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    long_value = text("x" * 100_000) + text("latin1") + b"\x86q\x00"
    return {
        "memo-index": b"\x80\x02Nr\xff\xff\xff\xff.",
        "bytes8": b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b".",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "laughs": laughs + b".",
        "tuple-key": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
        "deep-tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "deep-key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        "deep-dicts": b"\x80\x02" + b"}N" * 100_000 + b"s" * 99_999 + b".",
        "cycle": b"\x80\x02]q\x00h\x00a.",
        "copies": b"\x80\x02" + long_value + b"0" + b"c_codecs\nencode\nq\x01" + b"(" + b"h\x01h\x00R" * 100_000 + b"l.",
        "long-prefix": b"\x80\x02}" + text("k" * 1_000_000) + b"}s.",
        "big-key": b"\x80\x02}\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000 + b"Ns.",
        "odd-keys": b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", i) + b"\x85N" for i in range(5000)) + b"u.",
        "sets": b"\x80\x04" + b"\x8f" * 1_000_000 + b".",
        "empty": b"",
        "only-stop": b".",
        "no-stop": b"\x80\x02}",
    }


@pytest.mark.parametrize(("name", "pickled"), bombs().items(), ids=bombs())
def test_bombs_are_refused_in_bounded_time(tmp_path: Path, name: str, pickled: bytes) -> None:
    path = craft(tmp_path / "m.pt", pickled)
    started = time.process_time()
    if name == "memo-index":  # only a number here: the memo is a dict
        read(path)
    else:
        with pytest.raises(ContainerError, match=r"m\.pt"):
            read(path)
    assert time.process_time() - started < 5


def test_a_directory_that_promises_too_much_is_not_believed(tmp_path: Path) -> None:
    path = craft(tmp_path / "m.pt", tensor_pickle(), {"m/data/0": bytes(16)})
    data = bytearray(path.read_bytes())
    data[-10:-6] = struct.pack("<L", 0xFFFFFF00)
    path.write_bytes(data)
    with pytest.raises(ContainerError, match="outside the file"):
        read(path)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "good.pt"
    state = {
        "args": argparse.Namespace(x=1, d=torch.float32),
        "model": torch.nn.Linear(2, 2).state_dict(),
        "f8": every_dtype()["float8_e5m2"],
    }
    torch.save(state, path)
    return path


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_files_are_refused_or_sound(good_file: Path, edits: list[tuple[float, int]]) -> None:
    data = bytearray(good_file.read_bytes())
    # Data bytes and padding are most of the file and change nothing: aim at the pickle and the directory.
    spots = [*range(64, 900), *range(data.index(b"PK\1\2"), len(data)), *range(0, len(data), 16)]
    for where, value in edits:
        data[spots[int(where * len(spots))]] = value
    path = good_file.with_name("mutated.pt")
    path.write_bytes(data)
    try:
        index = read(path)
    except ShardwrightError:
        return
    for tensor in index.tensors.values():
        size = BY_NAME[tensor.dtype].itemsize
        last = (
            sum((e - 1) * s for e, s in zip(tensor.shape, tensor.strides or (), strict=False)) if tensor.strides else prod(tensor.shape) - 1
        )
        assert prod(tensor.shape) == 0 or 0 <= tensor.offset <= tensor.offset + (last + 1) * size <= len(data)


# Writing what torch reads.


def assert_torch_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    for mmap in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(expected)
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
            assert bytes_of(loaded[name]) == bytes_of(tensor), name


def assert_zip_tools_agree(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-tqq", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_torch_reads_every_dtype(tmp_path: Path) -> None:
    tensors = every_dtype()
    specs = specs_of(tensors)
    unit = TorchZip().lay_out("model.pt", specs)
    assert all(place.offset % 64 == 0 and place.file == 0 for place in unit.places)
    static = unit.files[0].static
    assert all(a + len(x) <= b for (a, x), (b, _) in pairwise(static))
    path = materialise(tmp_path, unit, specs, {name: bytes_of(t) for name, t in tensors.items()})
    assert_torch_reads(path, tensors)
    assert_zip_tools_agree(path)
    assert_same(path, read(path), tensors)


def test_members_are_those_of_torch_save(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int8)}
    torch.save(tensors, tmp_path / "model.pt")
    specs = specs_of(tensors)
    with zipfile.ZipFile(tmp_path / "model.pt") as theirs:
        expected = {name: theirs.read(name) for name in theirs.namelist() if name.count("/") == 1 and not name.endswith(".pkl")}
        names = theirs.namelist()
    (tmp_path / "ours").mkdir()
    with zipfile.ZipFile(
        materialise(tmp_path / "ours", TorchZip().lay_out("model.pt", specs), specs, {"a": bytes(12), "b": b"ab"})
    ) as ours:
        assert ours.namelist() == names
        assert {name: ours.read(name) for name in expected} == expected


def test_torch_reads_a_megatron_tree(tmp_path: Path) -> None:
    weights = collections.OrderedDict(weight=TensorRef("w"), tied=TensorRef("w"))
    weights._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    numbers = [0, 255, 256, 65535, 65536, -1, 1 << 31, -(1 << 31), 1 << 63, -(1 << 80), 1 << 3000]
    tree = {
        "args": Namespace({"dtype": TorchDtype("bfloat16"), "inner": Namespace({}), "é": "ü☃"}),
        "model": {"layers": [weights, (TensorRef("f8"),)], "extra": Inert("io", "BytesIO", (b"\x00\xff",))},
        "numbers": numbers,
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "plain": [None, True, False, 1.5, float("inf"), "", b"", b"\x80x", bytearray(b"q"), {3, 1}, 1j, {}, []],
        "size": TorchSize((2, 3)),
        "keys": {0: "int", (1, "a"): "tuple", None: "none"},
    }
    tensors = {"f8": torch.arange(4, dtype=torch.uint8).view(torch.float8_e4m3fn), "w": torch.ones(2, 3, dtype=torch.bfloat16)}
    specs = specs_of(tensors)
    path = materialise(
        tmp_path, TorchZip().lay_out("model_optim_rng.pt", specs, objects=tree), specs, {n: bytes_of(t) for n, t in tensors.items()}
    )
    loaded = torch.load(path, weights_only=False)
    assert loaded["args"] == argparse.Namespace(dtype=torch.bfloat16, inner=argparse.Namespace(), é="ü☃")
    first, second = loaded["model"]["layers"][0], loaded["model"]["layers"][1][0]
    assert type(first) is collections.OrderedDict and first._metadata == {"": {"version": 1}}
    assert first["weight"].data_ptr() == first["tied"].data_ptr() and bytes_of(first["tied"]) == bytes_of(tensors["w"])
    assert bytes_of(second) == bytes_of(tensors["f8"])
    assert loaded["model"]["extra"].getvalue() == b"\x00\xff"
    for key in ("tuples", "plain", "keys"):
        assert repr(loaded[key]) == repr(tree[key])
    assert loaded["numbers"] == numbers
    assert loaded["size"] == (2, 3)
    assert type(loaded["size"]) is torch.Size
    assert_zip_tools_agree(path)
    again = read(path).objects
    assert again["args"] == tree["args"] and again["plain"] == tree["plain"] and again["keys"] == tree["keys"]
    assert again["model"]["layers"][0]["tied"] == TensorRef("model.layers.0.tied")


def test_namespaces_load_with_weights_only(tmp_path: Path) -> None:
    specs = [TensorSpec("w", "float32", (2,))]
    unit = TorchZip().lay_out("m.pt", specs, objects={"args": Namespace({"x": 1}), "model": {"w": TensorRef("w")}})
    path = materialise(tmp_path, unit, specs, {"w": bytes_of(torch.ones(2))})
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mmap in (True, False):
            loaded = torch.load(path, weights_only=True, mmap=mmap)
            assert loaded["args"] == argparse.Namespace(x=1) and torch.equal(loaded["model"]["w"], torch.ones(2))


def test_what_we_read_we_can_write(tmp_path: Path) -> None:
    saved = {
        "args": argparse.Namespace(a=[1, {"b": torch.int8}]),
        "sd": torch.nn.Linear(2, 3).state_dict(),
        "x": io.BytesIO(b"e"),
        "s": {1},
    }
    index = save(tmp_path / "a.pt", saved)
    specs = [TensorSpec(t.name, t.dtype, t.shape) for t in index.tensors.values()]
    unit = TorchZip().lay_out("b.pt", specs, objects=index.objects)
    path = materialise(tmp_path, unit, specs, {n: elements(tmp_path / "a.pt", t) for n, t in index.tensors.items()})
    loaded = torch.load(path, weights_only=False)
    assert loaded["args"] == saved["args"] and loaded["s"] == {1} and loaded["x"].getvalue() == b"e"
    assert all(torch.equal(loaded["sd"][k], v) for k, v in saved["sd"].items()) and loaded["sd"]._metadata == saved["sd"]._metadata


def test_four_bit_floats_come_in_pairs(tmp_path: Path) -> None:
    specs = [TensorSpec("w", "float4_e2m1fn", (2, 6))]
    path = materialise(tmp_path, TorchZip().lay_out("m.pt", specs), specs, {"w": b"abcdef"})
    loaded = torch.load(path, weights_only=True)["w"]
    assert loaded.dtype == torch.float4_e2m1fn_x2 and loaded.shape == (2, 3) and bytes(loaded.untyped_storage()) == b"abcdef"
    assert read(path).tensors["w"].shape == (2, 6)
    with pytest.raises(UnsupportedError, match="pairs"):
        TorchZip().lay_out("m.pt", [TensorSpec("w", "float4_e2m1fn", (2, 3))])
    with pytest.raises(UnsupportedError, match="no dtype"):
        TorchZip().lay_out("m.pt", [TensorSpec("w", "float6_e2m3", (4,))])


def test_layouts_that_make_no_sense_are_refused() -> None:
    spec = TensorSpec("w", "int8", (1,))
    with pytest.raises(UsageError, match="same name"):
        TorchZip().lay_out("m.pt", [spec, spec])
    with pytest.raises(UsageError, match="not laid out"):
        TorchZip().lay_out("m.pt", [], objects={"w": TensorRef("w")})
    with pytest.raises(UsageError, match="does not mention"):
        TorchZip().lay_out("m.pt", [spec], objects={})
    with pytest.raises(UnsupportedError, match="metadata"):
        TorchZip().lay_out("m.pt", [spec], metadata={"format": "pt"})
    for foreign in (object(), Inert("megatron.x", "f", ()), np.float64(1)):
        with pytest.raises(UnsupportedError, match=r"'a\.b'"):
            TorchZip().lay_out("m.pt", [], objects={"a": {"b": foreign}})
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UsageError, match="contains itself"):
        TorchZip().lay_out("m.pt", [], objects={"a": cycle})


def test_folder_names_follow_torch() -> None:
    def folder(path: str) -> bytes:
        static = TorchZip().lay_out(path, []).files[0].static[0][1]
        return static[30 : static.index(b"/")]

    assert folder("mp_rank_00/model_optim_rng.pt") == b"model_optim_rng"
    assert folder("pytorch_model-00001-of-00002.bin") == b"pytorch_model-00001-of-00002"
    assert folder("modèle.pt") == folder("...pt") == b"archive"


def test_zip64_layouts_agree_with_torch(tmp_path: Path) -> None:
    """Sparse files: a member of 4 GiB, and members behind it; torch computes the same offsets and reads the same bytes."""
    big = (1 << 32) + 64
    specs = [TensorSpec("big", "uint8", (big,)), TensorSpec("after", "float32", (5,)), TensorSpec("none", "int64", (0,))]
    specs += [TensorSpec("edge", "uint8", ((1 << 32) - 1,)), TensorSpec("last", "uint16", (3,))]
    unit = TorchZip().lay_out("big.pt", specs)
    (layout,) = unit.files
    path = tmp_path / "big.pt"
    after = torch.arange(5, dtype=torch.float32)
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for offset, piece in layout.static:
            file.seek(offset)
            file.write(piece)
        file.seek(unit.places[1].offset)
        file.write(bytes_of(after))
    index = read(path)
    assert [index.tensors[spec.name].offset for spec in specs] == [place.offset for place in unit.places]
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert torch.equal(loaded["after"], after) and [tuple(t.shape) for t in loaded.values()] == [spec.shape for spec in specs]
    with torch._subclasses.FakeTensorMode():
        fake = torch.load(path, weights_only=True)
    assert [t.untyped_storage()._checkpoint_offset for t in fake.values()] == [place.offset for place in unit.places]
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["big/data/0"] == big and sizes["big/data/3"] == (1 << 32) - 1
        info = archive.getinfo("big/data/1")
        info.CRC = crc32(bytes_of(after))
        assert archive.read(info) == bytes_of(after)
    theirs = tmp_path / "theirs.pt"
    with torch._subclasses.FakeTensorMode():
        state = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, theirs)
    found = read(theirs)
    assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == [(s.name, s.dtype, s.shape) for s in specs]
    with torch._subclasses.FakeTensorMode():
        fake = torch.load(theirs, weights_only=True)
    assert [t.untyped_storage()._checkpoint_offset for t in fake.values()] == [t.offset for t in found.tensors.values()]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=8), stem=st.sampled_from(["m", "model_optim_rng", "x" * 70]))
def test_torch_computes_our_offsets(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], stem: str) -> None:
    specs = [TensorSpec(f"w{i}", "int16", (size,)) for i, size in enumerate(sizes)]
    unit = TorchZip().lay_out(f"{stem}.pt", specs)
    root = tmp_path_factory.getbasetemp()
    path = materialise(root, unit, specs, {spec.name: os.urandom(2 * prod(spec.shape)) for spec in specs})
    with torch._subclasses.FakeTensorMode():
        fake = torch.load(path, weights_only=True)
    assert [t.untyped_storage()._checkpoint_offset for t in fake.values()] == [place.offset for place in unit.places]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_the_planner_reads_without_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    program = (
        "import sys; from shardwright.planner.containers.torch_zip import TorchZip; from shardwright.planner.store import LocalStore; "
        "index = TorchZip().read(LocalStore(sys.argv[1]), 'm.pt'); TorchZip().lay_out('n.pt', []); "
        "assert list(index.tensors) == ['w'] and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.pt")], check=True, cwd=Path(__file__).parents[2])


# Checksums.


@settings(max_examples=200, deadline=None)
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_of_neighbours_combine(first: bytes, second: bytes) -> None:
    both = (crc32(first), crc32(second), len(second))
    assert crc32_combine(*both) == combine_in_python(*both) == crc32(first + second) == crc32(second, crc32(first))


def test_combining_agrees_for_long_lengths_and_is_fast() -> None:
    for length in (0, 1, (1 << 20) + 1, 1 << 32, (1 << 40) - 3):
        assert combine_in_python(0x12345678, 0x9ABCDEF0, length) == crc32_combine(0x12345678, 0x9ABCDEF0, length)
    started = time.perf_counter()
    for _ in range(1000):
        crc32_combine(1, 2, 1 << 20)
    assert time.perf_counter() - started < 0.05


@settings(max_examples=100, deadline=None)
@given(data=st.data(), payload=st.binary(max_size=200), offset=st.integers(0, 1 << 40))
def test_running_crc_takes_any_order(data: st.DataObject, payload: bytes, offset: int) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=10)))
    extents = list(zip([0, *cuts], [*cuts, len(payload)], strict=True))
    whole = RunningCrc(offset, len(payload))
    for begin, end in data.draw(st.permutations(extents)):
        whole.add(offset + begin, end - begin, crc32(payload[begin:end]))
    assert whole.complete and whole.value == crc32(payload)


def test_running_crc_refuses_what_does_not_fit() -> None:
    whole = RunningCrc(10, 10)
    whole.add(12, 4, 1)
    for offset, nbytes in ((9, 2), (19, 2), (10, 3), (12, 4), (15, 1), (11, 8), (10, -1)):
        with pytest.raises(UsageError):
            whole.add(offset, nbytes, 0)
    assert not whole.complete
    with pytest.raises(UsageError, match="complete"):
        _ = whole.value
