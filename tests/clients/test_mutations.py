"""Wrong plans and damaged files: the client computes something else, and `verify` says so (exit code 4).

A round trip is blind to a lens that undoes itself; here every kind of mistake that planning or writing could make is put
into a good plan or a good file, one at a time, and both judges must see it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from shardwright.errors import ContradictionError, PlanError
from shardwright.planner.tensor.pieces import Piece
from tests.clients.judge import MEMORY, TOLERANCE, distance, huggingface_logits, megatron_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardwright.planner.plan import Plan, Program
    from tests.clients.mcore import Megatron

pytestmark = pytest.mark.clients("transformers", "megatron.core")

VISIBLE = 10 * TOLERANCE
Pieces = tuple[Piece, ...]


def _program(plan: Plan, label: str) -> int:
    """The number of the program of that label."""
    (found,) = [number for number, program in enumerate(plan.programs) if label in program.label]
    return found


def _runs(pieces: Pieces, slot: int, run: int) -> list[Piece]:
    """A slot's pieces as contiguous runs of `run` elements, in the order of their source."""
    found = []
    for piece in pieces:
        if piece.slot != slot:
            continue
        places = [(piece.dst_off, piece.src_off)]
        for extent, dst, src in piece.dims:
            places = [(d + i * dst, s + i * src) for d, s in places for i in range(extent)]
        found += [Piece(slot, d, s, ((run, 1, 1),)) for d, s in places if s % run == 0]
    return sorted(found, key=lambda p: p.src_off)


def swap_query_heads(pieces: Pieces, head: int) -> Pieces:
    """Two neighbouring query heads change places."""
    runs = _runs(pieces, 0, head)
    runs[0], runs[1] = runs[0]._replace(src_off=runs[1].src_off), runs[1]._replace(src_off=runs[0].src_off)
    return _sorted([p for p in pieces if p.slot != 0] + runs)


def swap_operands(pieces: Pieces, head: int) -> Pieces:
    """Gate for up; in a scatter, the first rank's part for the second's."""
    return _sorted([p._replace(slot={0: 1, 1: 0}.get(p.slot, p.slot)) for p in pieces])


def swap_key_and_value(pieces: Pieces, head: int) -> Pieces:
    return _sorted([p._replace(slot={1: 2, 2: 1}.get(p.slot, p.slot)) for p in pieces])


def drop_piece(pieces: Pieces, head: int) -> Pieces:
    return pieces[1:]


def double_piece(pieces: Pieces, head: int) -> Pieces:
    """The second piece repeats what the first brings."""
    return (pieces[0], pieces[1]._replace(slot=pieces[0].slot, src_off=pieces[0].src_off), *pieces[2:])


def shift_head(pieces: Pieces, head: int) -> Pieces:
    """The first head starts one row late in its source."""
    runs = _runs(pieces, 0, head)
    runs[0] = runs[0]._replace(src_off=runs[0].src_off + head // 8)
    return _sorted([p for p in pieces if p.slot != 0] + runs)


def _sorted(pieces: list[Piece]) -> Pieces:
    return tuple(sorted(pieces, key=lambda p: (p.dst_off, p.slot)))


def _mutated(plan: Plan, label: str, side: str, change: Callable[[Pieces, int], Pieces], head: int) -> Plan:
    number = _program(plan, label)
    program: Program = plan.programs[number]
    if side == "gather":
        changed = dataclasses.replace(program, gather=change(program.gather, head))
    else:
        output = program.outputs[0]
        changed = dataclasses.replace(program, outputs=(dataclasses.replace(output, scatter=change(output.scatter, head)),))
    assert changed != program
    return dataclasses.replace(plan, programs=(*plan.programs[:number], changed, *plan.programs[number + 1 :]))


HEAD = 8 * 64
"""Elements of a head's rows in the ``llama`` case: head_dim × hidden_size."""


@pytest.mark.parametrize(
    ("label", "side", "change", "proof_fails"),
    [
        ("q_proj.weight", "gather", swap_query_heads, False),
        ("q_proj.weight", "gather", swap_key_and_value, False),
        ("q_proj.weight", "gather", shift_head, False),
        ("q_proj.weight", "gather", drop_piece, True),
        ("gate_proj.weight", "gather", swap_operands, False),
        ("gate_proj.weight", "gather", drop_piece, True),
        ("gate_proj.weight", "gather", double_piece, False),
        ("gate_proj.weight", "scatter", swap_operands, False),
        ("o_proj.weight", "scatter", swap_operands, False),
        ("down_proj.weight", "scatter", swap_operands, False),
    ],
)
def test_a_wrong_plan_is_seen(
    label: str, side: str, change: Callable[[Pieces, int], Pieces], proof_fails: bool, hf_case: Callable[..., Path], mcore: Megatron,
    tmp_path: Path,
) -> None:  # fmt: skip
    source, out, layout = hf_case("llama"), tmp_path / "out", Layout(tp=2)
    job = sw.plan(source, out, to="megatron-legacy", layout=layout, memory=MEMORY)
    job.plan = _mutated(job.plan, label, side, change, HEAD)
    if proof_fails:
        with pytest.raises(PlanError):
            job.check()
    job.execute()
    assert distance(megatron_logits(mcore, out, layout), huggingface_logits(source)) > VISIBLE
    assert not sw.verify(out, source, memory=MEMORY).ok


@pytest.mark.parametrize("label", ["gate_proj.weight", "o_proj.weight", "model.norm.weight"])
def test_a_part_that_is_not_written_is_seen(label: str, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    """Every byte of a target is accounted for before it is published, whatever its container."""
    source, layout = hf_case("llama"), Layout(tp=2)
    for to in ("megatron-legacy", "ranks"):
        job = sw.plan(source, tmp_path / to, to=to, dialect="megatron", layout=layout, memory=MEMORY)
        job.plan = _mutated(job.plan, label, "scatter", drop_piece, HEAD)
        with pytest.raises(PlanError):
            job.check()
        with pytest.raises(ContradictionError, match="never written"):
            job.execute()
    assert not list(tmp_path.iterdir())


def _assert_exit_4(out: Path, source: Path) -> None:
    """What the command line says of it."""
    command = [sys.executable, "-c", "from shardwright.cli import main; main()", "verify", str(out), str(source), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout)["different"]


@pytest.mark.parametrize("name", ["decoder.layers.5.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"])
def test_one_flipped_bit_in_a_megatron_file_is_seen(name: str, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    source, out, layout = hf_case("llama"), tmp_path / "out", Layout(tp=2)
    sw.convert(source, out, to="megatron-legacy", layout=layout, memory=MEMORY)
    file = out / "release" / "mp_rank_01" / "model_optim_rng.pt"
    _flip(file, torch.load(file, weights_only=False)["model"][name])
    assert distance(megatron_logits(mcore, out, layout), huggingface_logits(source)) > VISIBLE
    assert not sw.verify(out, source, memory=MEMORY).ok


def _flip(file: Path, tensor: torch.Tensor) -> None:
    """Flip the lowest exponent bit of the tensor's largest element, found in the file by the tensor's bytes."""
    element = tensor.abs().flatten().argmax().item()
    raw = bytearray(file.read_bytes())
    at = raw.index(tensor.contiguous().numpy().tobytes())
    raw[at + 4 * element + 3] ^= 0x02
    file.write_bytes(raw)


@pytest.mark.parametrize("container", ["safetensors", "zarr"])
def test_one_flipped_bit_in_a_rank_is_seen(container: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source, out = hf_case("llama"), tmp_path / "out"
    sw.convert(source, out, to="ranks", dialect="megatron", container=container, layout=Layout(tp=2), memory=MEMORY)
    pattern = "rank_00001_*.safetensors" if container == "safetensors" else "rank_00001_*/**/c/**/*"
    file = max(file for file in out.glob(pattern) if file.is_file())
    raw = bytearray(file.read_bytes())
    raw[-50] ^= 1
    file.write_bytes(raw)
    _assert_exit_4(out, source)
