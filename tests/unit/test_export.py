"""``families --json`` is enough to rebuild a checkpoint: names and shapes from the JSON, by the rules of docs/families.md alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright.cli import main
from shardwright.planner.operations import OPERATIONS
from shardwright.planner.tables import Alias, ConfigRule, Family, HubTensor, Ignore, Row
from tests.unit.configs import CONFIGS

Shape = tuple[int, ...]
WORDS = {"true": True, "false": False, "none": None}


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    """What the command prints."""
    from io import StringIO
    from unittest.mock import patch

    with patch("sys.stdout", StringIO()) as printed, pytest.raises(SystemExit, match="0"):
        main(["families", "--json"])
    found = json.loads(printed.getvalue())
    assert isinstance(found, dict)
    return found


# A reader that knows the schema and nothing of shardwright.


def value(text: str, scope: dict[str, Any]) -> Any:
    """An expression: Python's, over fields, words and true, false, none."""
    return eval(text, {"__builtins__": {}}, {**WORDS, **scope})


def at(raw: dict[str, Any], key: str) -> Any:
    """What is under a key; dots lead into objects."""
    head, _, rest = key.partition(".")
    return at(raw.get(head) or {}, rest) if rest else raw.get(head)


def fields_of(table: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in table["config"]:
        held = {key: at(raw, key) for key in (rule["key"], *rule["other_keys"]) if key is not None}
        given = [content for content in held.values() if content is not None]
        null = rule.get("null") if any(key in raw for key in held) else None
        found[rule["name"]] = given[0] if given else value(null or rule["default"], found)
    return found


def joined(parts: list[Shape], layout: list[Any]) -> Shape:
    """The shape that a row's operations make, but for stack_experts."""
    for name, _ in layout:
        if name in ("packed", "grouped_qkv", "interleave"):
            parts = [(sum(shape[0] for shape in parts), *parts[0][1:])]
        elif name == "transpose":
            parts = [parts[0][::-1]]
        elif name not in ("stack_experts", "pad_vocab", "roll"):
            raise NotImplementedError(f"say in docs/families.md and here which shape {name} makes")
    return parts[0]


def stored(table: dict[str, Any], raw: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of the family's own files in the spelling written first."""
    fields = fields_of(table, raw)
    experts = fields.get("num_experts", 0)
    spelling = (table["spellings"] or [""])[0]
    tied = {alias["name"] for alias in table["aliases"] if value(alias["when"], fields)}
    found: dict[str, Shape] = {}
    for layer in (None, *range(fields["num_hidden_layers"])):
        scope = fields if layer is None else {**fields, "layer": layer}
        scope = scope if layer is None else {**scope, **{word: value(text, scope) for word, text in table["layer"].items()}}
        here = [t for t in table["tensors"] if (t["stage"] == "layer") == (layer is not None) and value(t["when"], scope)]
        shapes = {t["name"]: tuple(value(extent, scope) for extent in t["shape"]) for t in here if t["name"] not in tied}
        plain = {t["name"]: t["huggingface"] for t in here if t["name"] in shapes}
        asked = {"family": table["name"], "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "moe": False, "gated_mlp": True, "num_experts": 0}
        for row in table["rows"]:
            if spelling in row["names"] and set(row["hub"]) <= set(shapes) and value(row["when"], {**asked, **scope}):
                shape = joined([shapes[name] for name in row["hub"]], row["layout"])
                stack = bool(row["layout"]) and row["layout"][-1][0] == "stack_experts"
                _put(found, row["names"][spelling], (experts, *shape) if stack else shape, layer, experts)
                for name in row["hub"]:
                    del plain[name]
        for name, own in plain.items():
            _put(found, own, shapes[name], layer, experts)
    return found


def _put(found: dict[str, Shape], name: str, shape: Shape, layer: int | None, experts: int) -> None:
    for expert in range(experts) if "{expert}" in name else (0,):
        found[name.replace("{layer}", str(layer)).replace("{expert}", str(expert))] = shape


@pytest.mark.parametrize("family", CONFIGS)
def test_a_checkpoint_is_rebuilt_from_the_json(family: str, tables: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    opened = sw.open(tmp_path / "config.json")
    assert stored(tables[family], CONFIGS[family]) == {name: t.shape for name, t in opened.source.units[0, 0].items()}
    assert fields_of(tables[family], CONFIGS[family]).keys() == opened.config.fields.keys()


def test_every_field_of_every_table_is_there(tables: dict[str, Any]) -> None:
    assert set(tables) == set(CONFIGS)
    spelled = {"stored": "huggingface", "layer_words": "layer"}
    for table in tables.values():
        assert set(table) == {"schema", *(spelled.get(f.name, f.name) for f in dataclasses.fields(Family))} - {"origin"}
        assert table["schema"] == 1
        for key, kind in {"config": ConfigRule, "tensors": HubTensor, "rows": Row, "aliases": Alias, "ignore": Ignore}.items():
            for entry in table[key]:
                assert set(entry) == {spelled.get(f.name, f.name) for f in dataclasses.fields(kind)}


def test_the_schema_is_documented(tables: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").partition("## Tables as JSON")[2]
    for key in {key for table in tables.values() for key in table}:
        assert f"`{key}`" in text, key
    for key in {key for table in tables.values() for part in ("config", "tensors", "rows", "aliases") for e in table[part] for key in e}:
        assert f"`{key}`" in text, key
    refusals = [refusal for table in tables.values() for several in table["refuse"].values() for refusal in several]
    assert refusals and all(f"`{key}`" in text for refusal in refusals for key in refusal)
    used = {name for table in tables.values() for row in table["rows"] for name, _ in row["layout"]}
    assert used <= set(OPERATIONS.names()) and all(f"`{name}`" in text for name in used)
