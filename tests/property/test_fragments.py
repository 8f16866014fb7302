"""A tensor cut into runs over several files gives what the tensor in one place gives.

Any checkpoint's tensors are cut at random into fragments, which are scattered over files in random order with gaps, and
padding is put beside some. Whatever is made of the cut checkpoint is compared with what is made of the whole one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.checkpoint import Checkpoint
from shardwright.errors import PaddingError, PlanError
from shardwright.planner import codec
from shardwright.planner.containers.base import Fragment, StoredTensor
from shardwright.planner.formats.base import Source
from shardwright.planner.passes.build import build
from shardwright.planner.passes.sides import stored_bytes
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from shardwright.planner.tensor.dtypes import dtype as dtype_of
from tests.property.test_invariance import digest
from tests.unit.tiny import tiny_llama

FILES = 3
REQUESTS = (
    Request("huggingface"),
    Request("huggingface", dtype="bfloat16"),
    Request("ranks", sw.Layout(tp=2, pp=2), dialect="megatron"),
    Request("megatron-legacy", sw.Layout(tp=4)),
    Request("ranks", sw.Layout(tp=4), trust_replicas=True, pad_vocab_to=4),
)
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fragments")
    whole = tiny_llama(root / "whole", layers=2, hidden=32, heads=4, kv=2, vocab=27)
    sw.convert(whole, root / "ranks", to="ranks", layout=sw.Layout(tp=2, pp=2), pad_vocab_to=4)
    sw.convert(whole, root / "megatron", to="ranks", layout=sw.Layout(tp=2), dialect="megatron", pad_vocab_to=6)
    return {"whole": whole, "ranks": root / "ranks", "megatron": root / "megatron"}


def cut(source: Source, folder: Path, dice: random.Random, *, blank: bytes = b"\0") -> Source:
    """The checkpoint with its tensors in fragments in `folder`; `blank` fills the padding beside them."""
    blobs = [bytearray(dice.randbytes(dice.randrange(40))) for _ in range(FILES)]

    def put(data: bytes) -> tuple[str, int]:
        number = dice.randrange(FILES)
        blobs[number] += dice.randbytes(4 * dice.randrange(3))
        at = len(blobs[number])
        blobs[number] += data
        return f"flat{number}.bin", at

    units = {}
    for key, unit in source.units.items():
        units[key] = {name: _cut_tensor(source, tensor, put, dice, blank) for name, tensor in unit.items()}
    folder.mkdir()
    for number, blob in enumerate(blobs):
        (folder / f"flat{number}.bin").write_bytes(blob)
    files = {f"flat{number}.bin": f"cut {number}" for number in range(FILES)}
    return replace(source, store=LocalStore(folder), units=units, files=files, companions=(), config_path="none")


def _cut_tensor(source: Source, tensor: StoredTensor, put, dice: random.Random, blank: bytes) -> StoredTensor:
    itemsize = dtype_of(tensor.dtype).itemsize
    data = source.store.read(tensor.file, tensor.offset, stored_bytes(tensor))
    elements = len(data) // itemsize
    edges = sorted({0, elements, *(dice.randrange(elements + 1) for _ in range(dice.choice((0, 0, 1, 2, 7))))})
    runs = [(*put(data[a * itemsize : b * itemsize]), b - a) for a, b in pairwise(edges)]
    fragments = tuple(Fragment(*run) for run in runs)
    sizes = [dice.randrange(1, 5) for _ in range(dice.choice((0, 0, 1, 2)))]
    blanks = tuple(Fragment(*put(blank * itemsize * size), size) for size in sizes)
    one = len(fragments) == 1
    return StoredTensor(tensor.name, tensor.dtype, tensor.shape, *runs[0][:2], None, () if one else fragments, blanks)


def outcome(source: Source, request: Request, out: Path, tile_bytes: int) -> str:
    plan = build(source, request, tile_bytes=tile_bytes)
    again = codec.from_json(codec.to_json(plan, target_root=None))
    assert again.programs == plan.programs
    sw.Conversion(again, out, workers=2, memory="1GiB").execute()
    return digest(out, skip=("shardwright.json",))


@few
@given(kind=st.sampled_from(["whole", "ranks", "megatron"]), request_=st.sampled_from(REQUESTS), seed=st.integers(0, 2**32))
def test_any_cut_gives_the_same_target(kind, request_, seed, sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("cut")
    dice = random.Random(seed)
    source = sw.open(sources[kind]).source
    pieces = cut(source, root / "pieces", dice)
    expected = outcome(replace(source, companions=(), config_path="none"), request_, root / "expected", 1 << 20)
    assert outcome(pieces, request_, root / "found", dice.choice([700, 3001, 1 << 20])) == expected


@few
@given(kind=st.sampled_from(["whole", "ranks", "megatron"]), seed=st.integers(0, 2**32))
def test_any_cut_is_read_compared_and_explained_alike(kind, seed, sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("cut")
    whole = sw.open(sources[kind])
    pieces = Checkpoint(cut(whole.source, root / "pieces", random.Random(seed)))
    for name in whole:
        assert (pieces[name].numpy() == whole[name].numpy()).all()
    for name, tensor in whole.stored.items():
        assert (pieces.stored[name][..., ::2].numpy() == tensor[..., ::2].numpy()).all()
    one, two = (c.state_dict(to="megatron-legacy", layout=sw.Layout(tp=2), rank=1) for c in (whole, pieces))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    report = sw.diff(whole, pieces, memory="1GiB")
    assert report.ok and report.equal == len(whole)
    job = sw.plan(pieces, to="huggingface")
    name = "model.layers.0.mlp.down_proj.weight"
    said = job.explain(name)
    assert job.lineage(name).number_of_nodes() >= 5
    first = next(unit[name].runs[0] for unit in pieces.source.units.values() if name in unit) if kind != "megatron" else None
    assert first is None or f"{first.file} @ {first.offset:,}" in said


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("to", ["huggingface", "megatron-legacy"])
def test_padding_that_is_not_padding_is_refused(seed, to, sources, tmp_path):
    source = sw.open(sources["whole"]).source
    pieces = cut(source, tmp_path / "pieces", random.Random(seed), blank=b"\1")
    assert any(t.blanks for t in pieces.units[0, 0].values())
    with pytest.raises(PaddingError) as refused:
        sw.Conversion(build(pieces, Request(to)), tmp_path / "out").execute()
    error = refused.value
    assert error.exit_code == 4 and error.file.startswith("flat") and error.expected == "zeros" and not (tmp_path / "out").exists()
    assert any(name in error.tensor for name, t in pieces.units[0, 0].items() if t.blanks)


def test_a_saved_plan_cannot_call_read_operands_padding(sources, tmp_path):
    pieces = cut(sw.open(sources["whole"]).source, tmp_path / "pieces", random.Random(3))
    saved = codec.to_json(build(pieces, Request("huggingface")), target_root=None)
    program = next(p for p in saved["programs"] if p.get("blank"))
    program["blank"][0] = program["gather"][0][0]
    with pytest.raises(PlanError, match=r"programs\[\d+\].blank names an operand that is not padding alone"):
        codec.from_json(saved)
