"""Small conversions to disturb, and what must be true of them at any moment.

Five scenes write every container, through value ops and without, with replicas that are compared, tied tensors, padding
that is dropped and padding that is made. Each is cut into about forty tiles.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright.errors import Refusal
from shardwright.executors.execute import execute
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan
from shardwright.planner.request import Request
from tests.unit.tiny import tiny_llama

__all__ = ["MEMORY", "SCENES", "SMALL_BATCHES", "Scene", "digests", "journal_of", "make_scene", "vouched"]

MEMORY = 1 << 30
TILE_BYTES = 8192
BATCH_BYTES = 1 << 15
SMALL_BATCHES = {"shardwright.executors.ledger:BATCH_BYTES": BATCH_BYTES}

Digests = dict[str, str]


@dataclass(frozen=True)
class Scene:
    """A plan, and the digests of what it makes when nothing disturbs it."""

    plan: Plan
    whole: Digests
    padding: Mapping[str, Any]

    def look(self, out: Path, old: Digests | None = None, *, always: bool = False) -> None:
        """OUT is not there (unless it is there `always`), or the old one, or whole; what is in OUT.partial cannot be opened."""
        assert out.exists() or not always
        if out.exists() and (found := digests(out)) != old:
            assert found == self.whole, "OUT is not what an undisturbed run makes"
            assert len(sw.open(out))
        elif not out.exists():
            with pytest.raises(Refusal):
                sw.open(out)
        partial = out.with_name(out.name + ".partial")
        if partial.exists():
            with pytest.raises(Refusal):
                sw.open(partial)
        known = "unfinished conversion" if (partial / "plan.json").exists() else None
        for place in (partial / "data", *(partial / "data").glob("*/")):
            if place.exists():
                with pytest.raises(Refusal, match=known):
                    sw.open(place)

    def done(self, out: Path) -> None:
        """OUT is whole, and nothing lies beside it."""
        assert digests(out) == self.whole, "OUT is not what an undisturbed run makes"
        assert not out.with_name(out.name + ".partial").exists()


def _ranks(root: Path) -> Plan:
    source = tiny_llama(root / "source", layers=2)
    (source / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return _plan(source, Request("ranks", sw.Layout(tp=2, pp=2), dialect="megatron"))


def _gathered(root: Path) -> Plan:
    """From padded ranks, whose replicas are compared, to one file."""
    source = tiny_llama(root / "first", layers=2)
    sw.convert(source, root / "source", to="ranks", layout=sw.Layout(tp=2), dialect="megatron")
    return _plan(root / "source", Request("huggingface"))


def _megatron(root: Path) -> Plan:
    source = tiny_llama(root / "source", layers=2, dtype="bfloat16")
    return _plan(source, Request("megatron-legacy", sw.Layout(tp=2, pp=2)), TILE_BYTES // 2)


def _zarr(root: Path) -> Plan:
    source = tiny_llama(root / "source", layers=3, vocab=132, tie_word_embeddings=True)
    return _plan(source, Request("ranks", sw.Layout(tp=2), container="zarr"))


def _int8(root: Path) -> Plan:
    source = tiny_llama(root / "source", layers=2, vocab=132, dtype="bfloat16")
    return _plan(source, Request("ranks", sw.Layout(tp=2), quantize="int8"), TILE_BYTES // 2)


SCENES: dict[str, Callable[[Path], Plan]] = {
    "ranks": _ranks,
    "gathered": _gathered,
    "megatron": _megatron,
    "zarr": _zarr,
    "int8": _int8,
}


def _plan(source: Path, request: Request, tile_bytes: int = TILE_BYTES) -> Plan:
    plan = build(sw.open(source).source, request, tile_bytes=tile_bytes)
    assert len(plan.tiles) >= 30
    return plan


def make_scene(root: Path, name: str) -> Scene:
    """Make the source, plan, and run once undisturbed."""
    root.mkdir()
    plan = SCENES[name](root)
    outcome = execute(plan, root / "whole", memory=MEMORY)
    assert outcome.tiles_resumed == 0
    assert len(sw.open(root / "whole"))
    return Scene(plan, digests(root / "whole"), outcome.padding)


def digests(folder: Path) -> Digests:
    """SHA-256 of every file below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def journal_of(out: Path) -> bytes:
    """The journal on disk, if there is one."""
    path = out.with_name(out.name + ".partial") / "journal"
    return path.read_bytes() if path.exists() else b""


def vouched(journal: bytes) -> set[int]:
    """The tiles that a journal vouches for: lines up to the first bad one."""
    found: set[int] = set()
    for line in journal.splitlines(keepends=True):
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            break
        value = json.loads(text)
        found |= {value[1]} if value[0] == "tile" else set()
    return found
