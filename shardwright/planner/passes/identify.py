"""The ``shardwright.json`` that a target carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from json.encoder import encode_basestring_ascii

from ..fingerprint import plan_hash
from ..formats.base import Filing, Source, Unit
from ..identity import FILE_NAME, SCHEMA
from ..plan import SEAL_DIGITS, Plan, Seal, TargetFile
from ..request import Request
from .request import Words
from .sides import TargetSide

__all__ = ["with_identity"]


def with_identity(plan: Plan, source: Source, request: Request, words: Words, wanted: TargetSide, filing: Filing) -> Plan:
    """The plan with ``shardwright.json`` among its target files."""
    made = {
        "schema": SCHEMA,
        "format": request.to,
        "dialect": words.dialect.name,
        "spec": words.spec,
        "container": words.container,
        "layout": request.layout.to_json(),
        "family": source.family.name,
        "config": dict(words.config.fields),
        "padded_vocab": words.padded_vocab,
        "recipe": plan.recipe,
        "plan_hash": plan_hash(plan),
        "source_config": source.raw_config,
        "companions": [to for _, to in filing.copies],
        "source": {"format": source.format, "layout": source.layout.to_json(), "files": [asdict(f) for f in plan.source_files]},
        "dropped": [asdict(d) for d in plan.dropped],
    }
    text = json.dumps(made, sort_keys=False, default=str)
    head = f'{text[:-1]}, "tensors": {_tensor_table(plan, wanted, filing)}, "checksums": '.encode()
    table, seals = _checksum_table(plan, ("crc32", "sha256") if request.sha256 else ("crc32",), len(head))
    data = b"".join((head, table, b"}\n"))
    return replace(plan, target_files=(*plan.target_files, TargetFile(FILE_NAME, len(data), ((0, data),), (), seals)))


def _checksum_table(plan: Plan, kinds: Sequence[str], start: int) -> tuple[bytes, tuple[Seal, ...]]:
    """``{kind: {path: digits}}`` with zeros for digits, and where each file's digits begin; `start` is the table's own place."""
    # shardwright.json itself will be the last target file: copies are numbered behind it.
    files = [(number, f.path) for number, f in enumerate(plan.target_files)]
    files += [(len(files) + 1 + number, to) for number, (_, to) in enumerate(plan.copies)]
    parts, seals, at = [b"{"], [], start + 1

    def put(text: str) -> None:
        nonlocal at
        parts.append(text.encode())
        at += len(parts[-1])

    for number, kind in enumerate(kinds):
        put(f'{", " if number else ""}"{kind}": {{')
        for file, path in files:
            put(f'{", " if file else ""}{json.dumps(path)}: "')
            seals.append(Seal(kind, file, at))
            put(f'{"0" * SEAL_DIGITS[kind]}"')
        put("}")
    return b"".join((*parts, b"}")), tuple(seals)


def _tensor_table(plan: Plan, wanted: TargetSide, filing: Filing) -> str:
    """``[key, rank, dtype, shape, partition axis or null, file]`` per stored tensor, as JSON.

    Written by hand: there can be a million, and the tp ranks of a stage have all but rank and file in common.
    """
    paths = [json.dumps(f.path) for f in plan.target_files]
    rows: list[str] = []
    spelled: list[tuple[str, str]] = []
    before: Unit | None = None
    for unit in filing.units:
        if before is None or unit.tensors is not before.tensors or unit.members is not before.members:
            spelled = _spelled(unit, wanted)
        before = unit
        entries = plan.target_tensors[len(rows) : len(rows) + len(spelled)]
        rows += [f"{head}{t.rank}{tail}{paths[t.file]}]" for (head, tail), t in zip(spelled, entries, strict=True)]
    return f"[{', '.join(rows)}]"


def _spelled(unit: Unit, wanted: TargetSide) -> list[tuple[str, str]]:
    """What stands before the rank and between rank and file, for each tensor of a unit."""
    tails: dict[tuple[int, int], str] = {}
    found = []
    for position, (name, dtype, shape) in zip(unit.members, unit.tensors, strict=True):
        number, _, output = wanted.wanted[position][:3]
        if (number, output) not in tails:
            split = wanted.bounds[number].outputs[output].split
            tails[number, output] = f", {json.dumps([dtype, shape, split.axis if split.parts > 1 else None])[1:-1]}, "
        found.append((f"[{encode_basestring_ascii(name)}, ", tails[number, output]))
    return found
