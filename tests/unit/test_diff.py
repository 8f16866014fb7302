"""Two checkpoints against each other, whatever their formats: what differs, where first, how far; and the command's contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import shardwright as sw
from shardwright import errors
from shardwright.cli import main
from shardwright.difference import Element
from shardwright.executors import diff as diff_module
from shardwright.planner.passes import face as face_module
from shardwright.planner.passes import facing, tiling
from shardwright.planner.passes.face import face
from shardwright.planner.schemes import SCHEMES
from tests.unit.tiny import tiny_llama

Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MIB = 1 << 20
Arrays = dict[str, np.ndarray[Any, Any]]

TARGETS: dict[str, dict[str, Any]] = {
    "huggingface": {"to": "huggingface", "max_shard_size": 100_000},
    "ranks": {"to": "ranks", "layout": sw.Layout(tp=2)},
    "serving ranks": {"to": "ranks", "layout": sw.Layout(tp=8, pp=2), "pad_vocab_to": 8},
    "megatron ranks in zarr": {"to": "ranks", "layout": sw.Layout(tp=4), "dialect": "megatron", "container": "zarr"},
    "megatron": {"to": "megatron-legacy", "layout": sw.Layout(tp=2, pp=2)},
    "megatron chunks": {"to": "megatron-legacy", "layout": sw.Layout(tp=2, pp=2, vpp=2), "spec": "local"},
}


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("diff") / "src")


@pytest.fixture(scope="module")
def made(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in every format."""
    root = tmp_path_factory.mktemp("made")
    for number, options in enumerate(TARGETS.values()):
        options = {"pad_vocab_to": options.get("layout", sw.Layout()).tp, **options} if options["to"] != "huggingface" else options
        sw.convert(src, root / str(number), **options)
    return {name: root / str(number) for number, name in enumerate(TARGETS)}


def arrays_of(folder: Path) -> Arrays:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def write(folder: Path, arrays: Arrays, config: Path, **fields: Any) -> Path:
    """A one-file checkpoint of these arrays, with another's config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**json.loads((config / "config.json").read_text()), **fields}))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes, strips and blocks that divide nothing."""
    monkeypatch.setattr(facing, "STRIP_BYTES", 1100)
    monkeypatch.setattr(facing, "STRIP_FLOOR", 1100)
    monkeypatch.setattr(facing, "TILE_BYTES_WHOLE", 9000)
    monkeypatch.setattr(tiling, "STRIP_BYTES", 1100)
    monkeypatch.setattr(diff_module, "BLOCK", 37)


# -- equal ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_every_format_equals_the_source(src: Path, made: dict[str, Path], name: str, tolerance: float | None) -> None:
    for pair in ((src, made[name]), (made[name], src), (made[name], made["megatron"])):
        found = sw.diff(*pair, tolerance=tolerance)
        assert (found.ok, found.tensors, found.equal) == (True, 39, 39)
        assert not (found.different or found.within or found.missing or found.extra or found.copies or found.config)


def test_the_sides_say_what_they_are(src: Path, made: dict[str, Path]) -> None:
    one, two = sw.diff(sw.open(src), made["serving ranks"]).sides
    assert (one.path, one.format, one.dialect, one.container, one.layout, one.family) == (
        str(src), "huggingface", "huggingface", "safetensors", sw.Layout(), "llama",
    )  # fmt: skip
    assert (two.format, two.layout, one.padded_vocab, two.padded_vocab) == ("ranks", sw.Layout(tp=8, pp=2), None, 136)
    assert (one.quantization, one.dropped) == (None, ())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read."""
    found: list[int] = []
    real = diff_module.gather

    def counting(*args: Any) -> int:
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(diff_module, "gather", counting)
    return found


def test_every_byte_is_read_once(src: Path, made: dict[str, Path], counted: list[int]) -> None:
    ckpts = [sw.open(folder) for folder in (src, made["serving ranks"])]
    assert sw.diff(*ckpts).ok
    padding = 2 * 5 * 64 * 4  # of the embedding and the head, which belong to no tensor
    assert sum(counted) == sum(ckpt.nbytes for ckpt in ckpts) - padding


# -- planted differences -------------------------------------------------------------------------------------------------------


def expected(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any], tolerance: float | None) -> tuple[Any, ...]:
    """(differing, first index, largest, its index) by numpy on whole arrays."""
    x, y = one.astype(np.float64), two.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
    apart[np.isnan(x) != np.isnan(y)] = np.inf
    apart[(np.isnan(x) & np.isnan(y)) | (x == y)] = 0
    differs = apart > (tolerance or 0)
    if tolerance is None and one.dtype == two.dtype:
        bits = f"u{one.dtype.itemsize}"
        differs = one.view(bits) != two.view(bits)
    first = tuple(int(i) for i in np.argwhere(differs)[0]) if differs.any() else None
    largest = apart.max()
    return int(differs.sum()), first, largest, tuple(int(i) for i in np.unravel_index(apart.argmax(), apart.shape)) if largest else None


def planted(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """A copy in which some elements of some tensors are others, by little or by much."""
    found = {name: array.copy() for name, array in arrays.items()}
    for name in rng.choice(sorted(found), 12, replace=False):
        flat = found[name].reshape(-1)
        for at in rng.integers(0, len(flat), rng.integers(1, 9)):
            flat[at] = rng.choice([0.0, -0.0, flat[at] * 1.001, -flat[at], np.inf, -np.inf, np.nan, 1e30])
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.usefixtures("small")
def test_planted_differences_are_what_numpy_finds(src: Path, tmp_path: Path, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    one = {name: array.astype(dtype) for name, array in arrays_of(src).items()}
    two = planted(one, rng)
    folders = [write(tmp_path / "one", one, src), write(tmp_path / "two", two, src)]
    options = list(TARGETS.values())[1 + seed % 5]
    sw.convert(folders[1], tmp_path / "there", **{"pad_vocab_to": options["layout"].tp, **options})
    for tolerance in (None, 0.0, 0.01):
        wanted = {name: expected(one[name], two[name], tolerance) for name in one}
        for workers in (1, 3):
            found = sw.diff(folders[0], tmp_path / "there", tolerance=tolerance, workers=workers)
            assert [d.name for d in found.different] == [name for name in sw.open(src) if wanted[name][0]]
            assert [d.name for d in found.within] == [n for n in sw.open(src) if not wanted[n][0] and wanted[n][2]]
            for d in (*found.different, *found.within):
                first, largest = (e and e.index for e in (d.first, d.largest_at))
                assert (d.differing, first, d.largest, largest) == wanted[d.name], d.name
                assert d.elements == one[d.name].size
                for element in filter(None, (d.first, d.largest_at)):
                    values = float(one[d.name][element.index]), float(two[d.name][element.index])
                    assert np.array_equal(element.values, values, equal_nan=True)


def test_one_flipped_bit(src: Path, made: dict[str, Path], tmp_path: Path) -> None:
    arrays = arrays_of(src)
    arrays[Q0].view(np.uint32)[33, 7] ^= 1
    found = sw.diff(made["megatron"], write(tmp_path / "b", arrays, src))
    (only,) = found.different
    assert (found.ok, found.equal, only.name, only.differing, only.what) == (False, 38, Q0, 1, ("values",))
    assert only.first == only.largest_at == Element((33, 7), (float(arrays_of(src)[Q0][33, 7]), float(arrays[Q0][33, 7])))
    assert 0 < only.largest < 1e-6 and only.relative == only.largest / max(map(abs, only.first.values))


def test_signs_of_zero_and_nans(src: Path, tmp_path: Path) -> None:
    one, two = arrays_of(src), arrays_of(src)
    one[Q0][3, 5], two[Q0][3, 5] = 0.0, -0.0
    one[EMBED][7, 1], two[EMBED][7, 1] = np.nan, np.array(0x7FC00001, np.uint32).view(np.float32)
    a, b = write(tmp_path / "a", one, src), write(tmp_path / "b", two, src)
    bits = sw.diff(a, b)
    assert [(d.name, d.differing, d.largest, d.largest_at) for d in bits.different] == [(EMBED, 1, 0, None), (Q0, 1, 0, None)]
    assert sw.diff(a, b, tolerance=0).equal == 39
    two[EMBED][7, 1] = 1.0
    worse = sw.diff(a, write(tmp_path / "c", two, src), tolerance=1e9)
    assert [(d.name, d.largest) for d in worse.different] == [(EMBED, np.inf)]


@pytest.mark.parametrize("box", [64 << 20, 256 << 10])
def test_a_transposed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int], box: int) -> None:
    """Tensors that a torch file stores as transposed views: read once where a lane can hold one, boxed where it cannot."""
    big = tiny_llama(tmp_path / "big", layers=1, hidden=512)
    arrays = arrays_of(big)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/config.json").write_bytes((big / "config.json").read_bytes())
    turned = {n: torch.from_numpy(a).T.contiguous().T if a.ndim == 2 else torch.from_numpy(a) for n, a in arrays.items()}
    turned[Q0][100, 3] += 1
    torch.save(turned, tmp_path / "t/pytorch_model.bin")
    monkeypatch.setattr(facing, "STRIP_BYTES", 64 << 10)
    monkeypatch.setattr(facing, "STRIP_FLOOR", 64 << 10)
    monkeypatch.setattr(tiling, "STRIP_BYTES", 64 << 10)
    monkeypatch.setattr(facing, "TILE_BYTES_WHOLE", box)
    ckpts = sw.open(big), sw.open(tmp_path / "t")
    found = sw.diff(*ckpts)
    (only,) = found.different
    waste = sum(counted) / sum(ckpt.nbytes for ckpt in ckpts)
    assert waste == 1 if box > MIB else 1 < waste < 4
    assert (only.name, only.differing, only.first.index) == (Q0, 1, (100, 3))


# -- names, shapes, dtypes -----------------------------------------------------------------------------------------------------


def test_layers_that_one_side_lacks(src: Path, tmp_path: Path) -> None:
    short = {name: array for name, array in arrays_of(src).items() if "layers.3" not in name}
    found = sw.diff(src, write(tmp_path / "b", short, src, num_hidden_layers=3))
    lacking = tuple(name for name in sw.open(src) if "layers.3" in name)
    assert (found.ok, found.tensors, found.equal, found.missing, found.extra) == (False, 39, 30, lacking, ())
    assert [(c.field, c.values) for c in found.config] == [("num_hidden_layers", (4, 3))]
    assert sw.diff(tmp_path / "b", src).extra == lacking


def test_tied_embeddings(src: Path, tmp_path: Path) -> None:
    tied = {name: array for name, array in arrays_of(src).items() if name != HEAD}
    b = write(tmp_path / "b", tied, src, tie_word_embeddings=True)
    found = sw.diff(b, src)
    assert (found.ok, found.equal, found.missing, found.extra) == (False, 38, (), (HEAD,))
    assert [c.field for c in found.config] == ["tie_word_embeddings"]
    sw.convert(b, tmp_path / "m", to="megatron-legacy", layout=sw.Layout(tp=2, pp=2))
    assert sw.diff(b, tmp_path / "m").ok  # whose last stage has a copy of its own


def test_other_shapes(src: Path, tmp_path: Path) -> None:
    arrays = arrays_of(src)
    arrays |= {name: arrays[name][:120] for name in (EMBED, HEAD)}
    found = sw.diff(src, write(tmp_path / "b", arrays, src, vocab_size=120))
    assert (found.ok, found.tensors, found.equal) == (False, 39, 37)
    assert [(d.name, d.what, d.shapes, d.first) for d in found.different] == [
        (name, ("shape",), ((131, 64), (120, 64)), None) for name in (EMBED, HEAD)
    ]


def test_other_dtypes(src: Path, tmp_path: Path) -> None:
    """A dtype is a difference of bits, and none of values."""
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays_of(src).items()}
    b = write(tmp_path / "b", rounded, src)
    sw.convert(b, tmp_path / "c", to="ranks", dtype="float32", layout=sw.Layout(tp=2), pad_vocab_to=2)
    widened = sw.diff(b, tmp_path / "c")
    assert (widened.ok, widened.equal, len(widened.different)) == (False, 0, 39)
    assert {(d.what, d.dtypes, d.differing) for d in widened.different} == {(("dtype",), ("bfloat16", "float32"), 0)}
    close = sw.diff(b, tmp_path / "c", tolerance=0)
    assert (close.ok, close.equal, len(close.within)) == (True, 0, 39)
    lost = sw.diff(src, b, tolerance=1.0)
    assert lost.ok and {d.what for d in lost.within} == {("dtype", "values")}
    assert [(d.name, d.largest, d.largest_at.index) for d in lost.within] == [
        (name, *expected(arrays_of(src)[name], rounded[name], 1.0)[2:]) for name in sw.open(src)
    ]
    assert len(sw.diff(src, b).different) == 39


# -- quantised -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(src: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The source in bfloat16, that in int8, and that over four ranks."""
    root = tmp_path_factory.mktemp("quantised")
    sw.convert(src, root / "plain", to="huggingface", dtype="bfloat16")
    sw.convert(root / "plain", root / "int8", to="huggingface", quantize="int8")
    sw.convert(root / "plain", root / "ranks", to="ranks", quantize="int8", layout=sw.Layout(tp=2, pp=2), pad_vocab_to=2)
    return root / "plain", root / "int8", root / "ranks"


@pytest.mark.parametrize("tiny", [False, True])
def test_how_far_int8_is_off(quantised: tuple[Path, Path, Path], tiny: bool, request: pytest.FixtureRequest) -> None:
    if tiny:
        request.getfixturevalue("small")
    plain, int8, ranks = quantised
    stored, weights = arrays_of(int8), arrays_of(plain)
    taken = {n for n in weights if f"{n}_scale" in stored}
    assert len(taken) == 28
    for other in (int8, ranks):
        for tolerance in (None, 0.001, 0.05):
            found = sw.diff(plain, other, tolerance=tolerance)
            assert (found.tensors, found.equal) == (39, 11)
            assert {d.name for d in (*found.different, *found.within)} == taken
            for d in (*found.different, *found.within):
                values = stored[d.name].astype(np.float64) * stored[f"{d.name}_scale"].astype(np.float64)
                first, largest = (e and e.index for e in (d.first, d.largest_at))
                assert (d.differing, first, d.largest, largest) == expected(weights[d.name], values, tolerance or 0.0)
                assert d.dtypes == ("bfloat16", "int8")
        assert found.ok
        assert found.sides[1].quantization == "int8"


def test_one_scheme_on_both_sides_is_compared_as_stored(quantised: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, int8, ranks = quantised
    found = sw.diff(int8, ranks)
    assert (found.ok, found.tensors, found.equal) == (True, 67, 67)
    assert sw.diff(int8, ranks, tolerance=0).equal == 39
    arrays = arrays_of(int8)
    scale = f"{Q0}_scale"
    arrays[scale][5] *= 2
    bent = write(tmp_path / "bent", arrays, int8)
    (only,) = sw.diff(ranks, bent).different
    assert (only.name, only.differing, only.first.index, only.shapes[0]) == (scale, 1, (5, 0), (64, 1))
    (only,) = sw.diff(ranks, bent, tolerance=0).different
    assert (only.name, only.first.index[0], only.differing) == (Q0, 5, np.count_nonzero(arrays[Q0][5]))


def test_a_scheme_without_a_way_back_is_compared_with_itself_alone(
    quantised: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, int8, ranks = quantised
    monkeypatch.setattr(SCHEMES.get("int8"), "dequantise", None, raising=False)
    assert sw.diff(int8, ranks).ok
    with pytest.raises(errors.UnsupportedError, match=r"int8.*bit by bit"):
        sw.diff(plain, int8)


# -- copies --------------------------------------------------------------------------------------------------------------------


def test_copies_that_differ_count(src: Path, tmp_path: Path) -> None:
    """Replicated rows that no longer agree: the side contradicts itself."""
    sw.convert(src, tmp_path / "r", to="ranks", layout=sw.Layout(tp=8, pp=2), pad_vocab_to=8)
    path = tmp_path / "r/rank_00003_tp3_pp0.safetensors"
    arrays = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays[name][2, 9] += 1
    save_file(arrays, path, {"format": "pt"})
    for pair in ((src, tmp_path / "r"), (tmp_path / "r", src)):
        found = sw.diff(*pair)
        assert (found.ok, found.equal, found.different) == (False, 39, ())
        # Rank 3 holds the second copy of head 1, rows 8 to 15.
        assert [(c.path, c.name, c.index) for c in found.copies] == [(str(tmp_path / "r"), name, (10, 9))]


def test_scales_have_copies_too(quantised: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A matrix cut along its input is scaled by the same numbers on every rank."""
    plain, int8, _ = quantised
    sw.convert(plain, tmp_path / "r", to="ranks", quantize="int8", layout=sw.Layout(tp=2), pad_vocab_to=2)
    path = tmp_path / "r/rank_00001_tp1_pp0.safetensors"
    arrays = load_file(path)
    name = "model.layers.2.self_attn.o_proj.weight"
    arrays[f"{name}_scale"][9] *= 2
    save_file(arrays, path, {"format": "pt"})
    assert [(c.name, c.index) for c in sw.diff(plain, tmp_path / "r", tolerance=1.0).copies] == [(name, (9, 0))]
    assert [(c.name, c.index) for c in sw.diff(int8, tmp_path / "r").copies] == [(f"{name}_scale", (9, 0))]


# -- bounds --------------------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
from pathlib import Path
import shardwright as sw
one, two, memory, tolerance = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
most = 0
def watch():
    global most
    while True:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
        # The arena's maps are anonymous and shared: the kernel counts them as shared memory.
        most = max(most, sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem")))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
found = sw.diff(one, two, memory=memory, workers=4, tolerance=tolerance)
print(most, found.tensors, len(found.different), len(found.within), "torch" in sys.modules, "dask" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["equal", "cast", "int8", "transposed"])
def test_a_comparison_stays_inside_its_bound(tmp_path: Path, case: str) -> None:
    a = tiny_llama(tmp_path / "a", layers=1, hidden=2048, heads=16, kv=4, vocab=4000, dtype="bfloat16")
    if case == "equal":
        sw.convert(a, tmp_path / "b", to="megatron-legacy", layout=sw.Layout(tp=4))
    elif case == "cast":
        sw.convert(a, tmp_path / "b", to="ranks", layout=sw.Layout(tp=4), dtype="float32")
    elif case == "int8":
        sw.convert(a, tmp_path / "b", to="huggingface", quantize="int8")
    else:
        (tmp_path / "b").mkdir()
        (tmp_path / "b/config.json").write_bytes((a / "config.json").read_bytes())
        tensors = {name: sw.open(a)[name].torch() for name in sw.open(a)}
        torch.save({n: t.T.contiguous().T if t.ndim == 2 else t for n, t in tensors.items()}, tmp_path / "b/pytorch_model.bin")
    nbytes = sw.open(a).nbytes + sw.open(tmp_path / "b").nbytes
    memory = 96 * MIB
    assert nbytes > memory
    tolerance = "0.0" if case == "cast" else "0.001"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(a), str(tmp_path / "b"), str(memory), tolerance], capture_output=True, text=True, check=True
    )
    most, tensors, different, within, torch_in, dask_in = done.stdout.split()
    assert int(most) <= memory
    wanted = {"equal": (0, 0), "cast": (0, 12), "int8": (7, 0), "transposed": (0, 0)}[case]
    assert (int(tensors), int(different), int(within)) == (12, *wanted)
    assert (torch_in, dask_in) == ("False", "False")


def test_a_bound_that_is_too_small_says_what_works(src: Path, made: dict[str, Path]) -> None:
    with pytest.raises(errors.MemoryBoundError, match="--memory") as caught:
        sw.diff(src, made["megatron"], memory="10MiB")
    assert sw.diff(src, made["megatron"], memory=caught.value.expected).ok
    with pytest.raises(errors.MemoryBoundError):
        sw.diff(src, made["megatron"], memory=caught.value.expected - 1)


@pytest.mark.usefixtures("small")
def test_boxes_depend_on_the_bound_and_results_do_not(src: Path, made: dict[str, Path]) -> None:
    pair = face(sw.open(src).source, sw.open(made["megatron"]).source, values=False)
    fitted = facing.fit_facing(pair, 1 << 30, 4, work_bytes=0)
    assert len(fitted.facing.plan.tiles) > 20
    assert (fitted.workers, fitted.slab_bytes * 4 <= fitted.peak_bytes) == (4, True)
    names = [name for bound in fitted.facing.plan.bindings for name in bound.names]
    assert sorted(names) == sorted(sw.open(src))
    for program, (one, two) in zip(fitted.facing.plan.programs, fitted.facing.halves, strict=True):
        assert one.nbytes == two.nbytes == prod(program.shape) * 4
    assert len(fitted.facing.plan.programs) < 39  # layers share them


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_nonsense_is_refused(src: Path, tolerance: float) -> None:
    with pytest.raises(errors.UsageError, match="tolerance"):
        sw.diff(src, src, tolerance=tolerance)
    with pytest.raises(errors.UsageError, match="workers"):
        sw.diff(src, src, workers=0)


def test_a_file_that_changes_meanwhile(src: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b", arrays_of(src), src)
    ckpt = sw.open(b)
    pair = face(sw.open(src).source, ckpt.source, values=False)
    os.truncate(b / "model.safetensors", (b / "model.safetensors").stat().st_size - 4)
    with pytest.raises(errors.RunError, match=r"model\.safetensors"):
        diff_module.diff(pair, tolerance=None, memory=1 << 30, workers=2)


def test_an_error_in_a_lane_is_raised(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> int:
        raise ZeroDivisionError("in a lane")

    monkeypatch.setattr(diff_module, "gather", broken)
    with pytest.raises(ZeroDivisionError, match="in a lane"):
        sw.diff(src, src)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_a_stored_tensor_that_does_not_cover_is_refused(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = face_module.gather_row

    def short(*args: Any) -> Any:
        found = real(*args)
        return replace(found, tensor=replace(found.tensor, pieces=()))

    monkeypatch.setattr(face_module, "gather_row", short)
    with pytest.raises(errors.PlanError, match="cover"):
        sw.diff(src, src)


# -- the command ---------------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """Standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert (stop.value.code or 0) == code, err
    return out


class TestCommand:
    @pytest.fixture
    def bent(self, src: Path, tmp_path: Path) -> Path:
        arrays = arrays_of(src)
        arrays[Q0][1, 6] += 0.5
        arrays[EMBED][0, 0] = np.nan
        return write(tmp_path / "bent", arrays, src, rms_norm_eps=1e-5)

    def test_equal(self, src: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "diff", src, made["megatron"], "--memory", "256MiB", "--workers", 1)
        assert "39 of 39 tensors are equal" in out and "tp 2 × pp 2" in " ".join(out.split())  # long paths wrap
        found = json.loads(run(capsys, "diff", src, made["megatron"], "--json"))
        assert list(found) == [
            "tolerance", "sides", "tensors", "equal", "different", "within", "missing", "extra", "copies", "config",
        ]  # fmt: skip
        assert (found["tensors"], found["equal"], found["different"]) == (39, 39, [])
        assert list(found["sides"][1]) == [
            "path", "format", "dialect", "container", "layout", "family", "padded_vocab", "quantization", "dropped",
        ]  # fmt: skip
        assert found["sides"][1]["layout"] == sw.Layout(tp=2, pp=2).to_json()

    def test_different(self, src: Path, bent: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "diff", src, bent, code=4)
        assert all(text in out for text in (Q0, "first at (1, 6)", "rms_norm_eps", "37 of 39", "of 4,096 elements"))
        text = run(capsys, "diff", src, bent, "--json", code=4)
        assert text.count("\n") == 1 and "NaN" not in text and "Infinity" not in text
        found = json.loads(text)
        embed, q0 = found["different"]
        assert list(q0) == [
            "name", "shapes", "dtypes", "elements", "differing", "first", "largest", "largest_at", "relative", "what",
        ]  # fmt: skip
        assert (q0["name"], q0["first"]["index"], q0["what"]) == (Q0, [1, 6], ["values"])
        assert q0["largest"] == pytest.approx(0.5) and q0["largest_at"] == q0["first"]
        assert (embed["largest"], embed["first"]["values"][1]) == ("inf", "nan")
        assert found["config"] == [{"field": "rms_norm_eps", "values": [1e-06, 1e-05]}]

    def test_tolerance(self, src: Path, bent: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "diff", src, bent, "--tolerance", "0.6", code=4)
        assert "within the tolerance" in out
        found = json.loads(run(capsys, "diff", src, bent, "--tolerance", "0.6", "--json", code=4))
        assert ([d["name"] for d in found["different"]], [d["name"] for d in found["within"]]) == ([EMBED], [Q0])
        assert found["within"][0]["first"] is None and found["within"][0]["largest_at"]["index"] == [1, 6]

    def test_only_in_one(self, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tied = {name: array for name, array in arrays_of(src).items() if name != HEAD}
        b = write(tmp_path / "b", tied, src, tie_word_embeddings=True)
        assert f"only in A {HEAD}" in run(capsys, "diff", src, b, code=4)
        assert f"only in B {HEAD}" in run(capsys, "diff", b, src, code=4)

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "diff", "--help")
        assert "--tolerance" in out and "--memory" in out
        assert "diff" in run(capsys, "--help")

    def test_refusals(self, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(run(capsys, "diff", src, tmp_path, "--json", code=3))
        assert "error" in found
        run(capsys, "diff", src, src, "--memory", "1MiB", code=3)
        run(capsys, "diff", src, code=2)
        run(capsys, "diff", src, src, "--tolerance", "-1", code=2)
        run(capsys, "diff", src, src, "--tolerance", "nan", code=2)
        run(capsys, "diff", src, src, "--workers", "0", code=2)

    def test_hints_are_for_both(self, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        b = write(tmp_path / "b", arrays_of(src), src)
        (b / "config.json").unlink()
        run(capsys, "diff", src, b, code=3)
        run(capsys, "diff", src, b, "--config", src / "config.json")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("as_json", [False, True])
    def test_signals(self, src: Path, number: signal.Signals, as_json: bool) -> None:
        code = """
import sys, time
from shardwright.executors import diff
real = diff.gather
def slow(*args):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(0.2)
    return real(*args)
diff.gather = slow
from shardwright.cli import main
main(sys.argv[1:])
"""
        args = [sys.executable, "-c", code, "diff", str(src), str(src), *(["--json"] if as_json else [])]
        child = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert child.stderr.readline() == "reading\n"
        child.send_signal(number)
        began = time.monotonic()
        out, err = child.communicate(timeout=30)
        assert child.returncode == 5, err
        assert number.name in err and "Traceback" not in err
        assert time.monotonic() - began < 4  # all of it would take 16 s
        if as_json:
            assert json.loads(out)["error"]["type"] == "StoppedError"
