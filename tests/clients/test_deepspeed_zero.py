"""What real DeepSpeed saved, read and written again: its live optimizer, its own tools and its own resumed runs are the judges.

1. Masters, moments and step counts of every stage and layout, to the bit.
2. Consolidated weights: ``zero_to_fp32``'s, and the low-precision copies that DeepSpeed keeps itself.
3. Universal checkpoints: ``ds_to_universal``'s, and runs that go on from ours as from DeepSpeed's; also across stage 3, where its
   own do not.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import shardwright as sw
from tests.clients.deepspeed_stack import STACKS
from tests.clients.deepspeed_tables import BUFFERS, opened
from tests.clients.judge import assert_same_bits
from tests.clients.test_deepspeed_harness import FROZEN, KINDS, NOT_BY_UNIVERSAL, NOT_BY_ZERO_TO_FP32, RUNS, universal_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.clients.deepspeed import DeepSpeed, Run

pytestmark = pytest.mark.clients("deepspeed", "transformers")

SHARDED = [name for name in RUNS if not name.startswith(("stage 0", "experts, stage 0"))]
FILES = dict(zip(KINDS, ("fp32", "exp_avg", "exp_avg_sq"), strict=True))


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def ours(trained: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The universal checkpoint that we make of a run."""
    made: dict[str, Path] = {}

    def convert(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("ours")
            run = trained(**RUNS[name])
            source = opened(run, run.folder, folder)
            assert source.format == "deepspeed-zero"
            sw.convert(source, folder / "out", to="deepspeed-universal", drop=dropped(run), workers=1)
            assert sw.verify(opened(run, folder / "out", folder), source).ok
            made[name] = folder / "out"
        return made[name]

    return convert


def dropped(run: Run) -> tuple[str, ...]:
    return () if run.job.model in STACKS or run.job.model in ("uneven", "experts") else BUFFERS


def live(run: Run, kind: str) -> dict[str, torch.Tensor]:
    """What the live optimizers hold, whole, experts under their numbers in the model."""
    if run.job.model in STACKS:
        return run.joined(kind)
    found = {}
    for (_, _, expert_rank), state in run.states.items():
        for name, tensor in getattr(state, kind).items():
            parts = name.split(".")
            if name in state.expert:
                parts[5] = str(int(parts[5]) + 2 * expert_rank)
            found[".".join(parts)] = tensor
    return found


@pytest.mark.parametrize("name", SHARDED)
def test_every_stage_is_read_to_the_bit(name: str, trained: Callable[..., Run], ours: Callable[[str], Path]) -> None:
    run = trained(**RUNS[name])
    trainable = live(run, "param").keys()
    for kind, file in FILES.items():
        found = universal_tensors(ours(name), file)
        assert_same_bits({key: tensor for key, tensor in found.items() if key in trainable}, live(run, kind))
        assert kind == "param" or found.keys() == trainable
    steps = {float(torch.load(path, weights_only=False)) for path in ours(name).glob("*/zero/*/step.pt")}
    assert steps == {state.step for state in run.states.values()} == {2.0}


@pytest.mark.parametrize("name", [n for n in SHARDED if n not in NOT_BY_ZERO_TO_FP32])
def test_consolidated_weights_are_zero_to_fp32s(name: str, trained: Callable[..., Run], deepspeed: DeepSpeed, tmp_path: Path) -> None:
    run = trained(**RUNS[name])
    sw.convert(opened(run, run.folder, tmp_path), tmp_path / "out", to="huggingface", drop=dropped(run), workers=1)
    found, theirs = load_file(tmp_path / "out" / "model.safetensors"), deepspeed.zero_to_fp32(run.folder)
    lost = {key for key in run.truth.module if key not in theirs}  # at stage 1 it forgets what is not trained
    assert bool(lost) == (name == "stage 1, frozen")
    assert_same_bits({k: t for k, t in found.items() if k not in lost}, {k: theirs[k] for k in found if k not in lost})
    assert found.keys() == run.truth.module.keys() - run.truth.shared.keys()
    assert_same_bits({k: found[k] for k in lost}, {k: run.truth.module[k] for k in lost})


@pytest.mark.parametrize("name", ["BF16_Optimizer", "stage 3, bfloat16", "stage 2, float16"])
def test_a_cast_gives_the_copies_that_deepspeed_keeps(name: str, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained(**RUNS[name])
    sw.convert(opened(run, run.folder, tmp_path), tmp_path / "out", to="huggingface", dtype=run.job.dtype, drop=dropped(run), workers=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(found, {key: run.truth.module[key] for key in found})


@pytest.mark.parametrize("name", ["stage 2, tied", "stage 3, tied", "tp 2", "pp 2"])
def test_transformers_has_the_next_loss(name: str, trained: Callable[..., Run], ours: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained(**RUNS[name])
    for number, folder in enumerate((run.folder, ours(name))):
        sw.convert(opened(run, folder, tmp_path), tmp_path / f"{number}", to="huggingface", drop=dropped(run) * (1 - number), workers=1)
        assert run.next_loss(tmp_path / f"{number}") == pytest.approx(run.losses[0], abs=1e-5)
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [n for n in SHARDED if n not in NOT_BY_UNIVERSAL])
def test_universal_checkpoints_are_ds_to_universals(
    name: str, trained: Callable[..., Run], universal: Callable[[Run], Path], ours: Callable[[str], Path], tmp_path: Path
) -> None:
    run = trained(**RUNS[name])
    theirs, mine = (next(folder.glob("*/zero")) for folder in (universal(run), ours(name)))
    names = {path.relative_to(mine).as_posix() for path in mine.rglob("*.pt")}
    for path in theirs.rglob("*.pt"):
        key = path.relative_to(theirs).as_posix()
        one, two = (torch.load(root / key, weights_only=False) if root == theirs or key in names else None for root in (theirs, mine))
        if key == "optimizer_state.pt":
            assert one["param_groups"] == two["param_groups"]
        elif path.parent.name not in run.truth.param if run.job.model not in STACKS else False:
            continue  # buffers through float32, and second names
        elif path.stem == "step":
            assert torch.equal(one, two)
        elif run.job.model in STACKS:
            assert one.keys() == two.keys() and torch.equal(one.pop("param"), two.pop("param")) and one == two, key
        else:
            flat = one["param"] if isinstance(one, dict) else one.reshape(two["param"].shape)
            assert torch.equal(flat, two["param"]), key
    for path in theirs.parent.glob("*.pt"):
        assert (mine.parent / path.name).read_bytes() == path.read_bytes()
    read = sw.convert(opened(run, universal(run), tmp_path), tmp_path / "out", to="huggingface", drop=dropped(run), workers=1)
    sw.convert(opened(run, ours(name), tmp_path), tmp_path / "mine", to="huggingface", workers=1)
    assert read.is_done()
    if not run.job.frozen:  # those went through low precision, or are not there
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "mine" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("stage 1", {"dp": 4}),
        ("stage 2, float16", {"dp": 1}),
        ("stage 3, uneven", {"dp": 2}),
        ("BF16_Optimizer", {"dp": 1}),
        ("pp 2", {"tp": 2, "pp": 3, "dp": 1}),
        ("tp 2, pp 2", {"tp": 1, "dp": 1}),
    ],
)
def test_runs_go_on_from_ours_as_from_deepspeeds(
    name: str,
    layout: dict[str, Any],
    trained: Callable[..., Run],
    universal: Callable[[Run], Path],
    ours: Callable[[str], Path],
    deepspeed: DeepSpeed,
) -> None:
    run = trained(**RUNS[name])
    job = dataclasses.replace(run.job, **layout)
    again = deepspeed.resume(job, ours(name), universal=True)
    assert again.losses == deepspeed.resume(job, universal(run), universal=True).losses
    assert again.losses == pytest.approx(run.losses, abs=1e-5 if run.job.dtype == "float32" else 5e-3)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("stage 2, tied", {"stage": 3, "dp": 1}),
        ("stage 3, tied", {"stage": 2, "dp": 1}),
        ("stage 2, round robin", {"dp": 1}),
        ("stage 2, elastic", {"dp": 1}),
        ("BF16_Optimizer, uneven", {"dp": 2}),
    ],
)
def test_runs_go_on_from_ours_where_deepspeeds_fail(
    name: str, layout: dict[str, Any], trained: Callable[..., Run], ours: Callable[[str], Path], deepspeed: DeepSpeed
) -> None:
    run = trained(**RUNS[name])
    again = deepspeed.resume(dataclasses.replace(run.job, **layout), ours(name), universal=True)
    # Stage 3 gives every group the first one's hyper-parameters, which is its own doing: these runs show it in the second step.
    crosses = 3 in (run.job.stage, layout.get("stage"))
    assert again.losses[0] == pytest.approx(run.losses[0], abs=1e-5 if run.job.dtype == "float32" else 5e-3)
    assert again.losses == pytest.approx(run.losses, abs=1e-3 if crosses else 1e-5 if run.job.dtype == "float32" else 5e-3)


def test_what_is_not_trained_keeps_its_values(trained: Callable[..., Run], ours: Callable[[str], Path]) -> None:
    for name in ("stage 1, frozen", "stage 2, frozen", "stage 3, frozen"):
        run = trained(**RUNS[name])
        frozen = {key: tensor for key, tensor in run.truth.module.items() if key not in run.truth.param}
        assert frozen and (run.job.model == "uneven" or len(frozen) == len(FROZEN))
        assert_same_bits({key: tensor for key, tensor in universal_tensors(ours(name), "fp32").items() if key in frozen}, frozen)
