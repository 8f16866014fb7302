"""Family and dialect tables: what they say, and what each mistake in one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwright.errors import ShardwrightError, TableError, UnknownFamilyError, UsageError
from shardwright.planner.registry import Registry
from shardwright.planner.tables import DIALECTS, FAMILIES, load_dialect, load_family

FAMILY = """
name = "small"
model_types = ["small"]
architecture = "SmallForCausalLM"

[config]
hidden_size = { key = "hidden_size" }
num_hidden_layers = { key = "num_hidden_layers" }
tied = { key = "tie_word_embeddings", default = "false" }

[[tensor]]
name = "embed.weight"
shape = ["hidden_size", "hidden_size * 2"]
split = "rows"

[[tensor]]
name = "layers.{layer}.weight"
shape = ["hidden_size"]
when = "layer % 2 == 0"
huggingface = "h.{layer}.w"

[[alias]]
name = "head.weight"
of = "embed.weight"
when = "tied"

[[ignore]]
pattern = "*.inv_freq"
reason = "a buffer"
"""

DIALECT = """
name = "fused"
numbering = "local"
kv_heads = "cut"
pad_vocab = "64 * tp"
specs = ["one", "two"]

[[row]]
name = { one = "a.{layer}", two = "b.{layer}" }
hub = ["x.{layer}", "y.{layer}"]
layout = ["packed"]
split = "rows"
when = "layer > 0"

[[row]]
name = "c"
hub = ["z"]
layout = ["pad_vocab"]
split = "vocab"
stage = "last"
"""


def written(folder: Path, text: str, name: str = "my.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_family_table_as_data(tmp_path):
    family = load_family(written(tmp_path, FAMILY))
    assert (family.name, family.model_types, family.architecture) == ("small", ("small",), "SmallForCausalLM")
    embed, layer = family.tensors
    assert (embed.stage, embed.split, embed.stored) == ("first", "rows", "embed.weight")
    assert (layer.stage, layer.split, layer.stored) == ("layer", "none", "h.{layer}.w")
    assert [e({"hidden_size": 3}) for e in embed.shape] == [3, 6]
    assert layer.when({"layer": 4}) and not layer.when({"layer": 5})
    assert [(a.name, a.of) for a in family.aliases] == [("head.weight", "embed.weight")]
    assert [(i.pattern, i.reason) for i in family.ignore] == [("*.inv_freq", "a buffer")]


def test_a_dialect_table_as_data(tmp_path):
    dialect = load_dialect(written(tmp_path, DIALECT))
    fused, last = dialect.rows
    assert fused.names == {"one": "a.{layer}", "two": "b.{layer}"} and last.names == {"one": "c", "two": "c"}
    assert fused.layout == (("packed", ()),) and (fused.stage, last.stage) == ("layer", "last")
    assert dialect.pad_vocab({"tp": 4}) == 256


def test_a_table_extends_another(tmp_path):
    written(tmp_path, FAMILY, "small.toml")
    child = """
name = "child"
extends = "small"
model_types = ["child"]
[config]
extra = { key = "extra", default = "hidden_size * 2" }
tied = { value = "true" }
[[tensor]]
name = "embed.weight"
shape = ["hidden_size", "extra"]
[[tensor]]
name = "norm.weight"
shape = ["extra"]
stage = "last"
[[ignore]]
pattern = "more.*"
reason = "as well"
"""
    family = load_family(written(tmp_path, child, "child.toml"))
    assert {t.name: t.stage for t in family.tensors} == {"layers.{layer}.weight": "layer", "embed.weight": "first", "norm.weight": "last"}
    assert next(t for t in family.tensors if t.name == "embed.weight").split == "none", "an entry is replaced whole"
    assert [rule.name for rule in family.config] == ["hidden_size", "num_hidden_layers", "tied", "extra"]
    assert family.architecture == "SmallForCausalLM" and len(family.aliases) == 1
    assert [i.pattern for i in family.ignore] == ["*.inv_freq", "more.*"]
    grandchild = load_family(written(tmp_path, 'name = "grand"\nextends = "child"\nmodel_types = []\n', "grand.toml"))
    assert [t.name for t in grandchild.tensors] == [t.name for t in family.tensors]


FAMILY_MISTAKES = [
    # what is replaced, by what, where the error says it is, what it says
    ('name = "small"', "nam = 1", "my.toml", "has no entry 'nam'"),
    ('name = "small"', "", "my.toml", "needs 'name'"),
    ('name = "small"', "name = 3", "my.toml", "needs 'name': a string.*actual 3"),
    ('model_types = ["small"]', 'model_types = "small"', "my.toml", "'model_types' must be a list of strings.*actual 'small'"),
    ('architecture = "SmallForCausalLM"', "", "my.toml", "needs 'architecture'"),
    ('name = "small"', 'name = "small"\nextends = "nobody"', "my.toml", "extends is not known: .*actual 'nobody'.*Known: .*llama"),
    ('name = "small"', 'name = "small"\nextends = 3', "my.toml", "extends"),
    ('name = "small"', 'name = "small"\nextends = "my"', "my.toml", "extends"),
    ('name = "small"', 'name = "small"\ninfer = "f()"', "my.toml infer", "Call is not allowed.*actual 'f\\(\\)'"),
    ('key = "hidden_size"', 'keys = "hidden_size"', r"\[config\] hidden_size", "a config field is"),
    ('key = "hidden_size"', 'key = "hidden_size", value = "3"', r"\[config\] hidden_size", "a config field is"),
    ('{ key = "hidden_size" }', "3", r"\[config\] hidden_size", "a config field is"),
    ('default = "false"', 'default = "no)"', r"\[config\] tied", "not an expression .*actual 'no\\)'"),
    ("[config]", "[[config]]", "my.toml", "config. must be a table"),
    ("[config]", "[configs]", "my.toml", "has no entry 'configs'"),
    ('shape = ["hidden_size"]', 'shape = "hidden_size"', r"\[\[tensor\]\] 2", "needs a shape: a list"),
    ('shape = ["hidden_size"]', "", r"\[\[tensor\]\] 2", "needs a shape"),
    (
        'shape = ["hidden_size"]',
        'shape = ["hidden_sise"]',
        "layers",
        "'hidden_sise' is not in .config.*actual 'hidden_sise'.*Known: hidden_size",
    ),
    (
        'shape = ["hidden_size"]',
        'shape = ["hidden_size ** 2"]',
        r"\[\[tensor\]\] 2 shape",
        "Pow is not allowed.*actual 'hidden_size \\*\\* 2'",
    ),
    ('when = "layer % 2 == 0"', 'when = "layer %"', r"\[\[tensor\]\] 2 when", "not an expression.*actual 'layer %'"),
    ('when = "layer % 2 == 0"', 'when = "tp > 1"', "layers", "'tp' is not in .config"),
    ('when = "layer % 2 == 0"', 'where = "x"', r"\[\[tensor\]\] 2", "a tensor has no entry 'where'.*Known: dtype, huggingface, name"),
    ('split = "rows"', 'split = "row"', r"\[\[tensor\]\] 1", "unknown split: .*actual 'row'.*Known: none, rows"),
    ('split = "rows"', 'stage = "middle"', r"\[\[tensor\]\] 1", "unknown stage: .*actual 'middle'.*Known: first, last, layer"),
    (
        'name = "layers.{layer}.weight"',
        'name = "layers.{expert}.weight"',
        r"\[\[tensor\]\] 2",
        "counts {expert} counts {layer} too: .*{expert}",
    ),
    ('name = "layers.{layer}.weight"', 'name = "layers.{layer}.w}"', r"\[\[tensor\]\] 2", "can count only {layer}"),
    (
        "[[ignore]]",
        '[[tensor]]\nname = "embed.weight"\nshape = ["3"]\n[[ignore]]',
        "my.toml",
        r"\[\[tensor\]\] names one tensor twice: .*actual 'embed.weight'",
    ),
    (
        "[[ignore]]",
        '[[tensor]]\nname = "x"\nshape = ["3"]\nhuggingface = "embed.weight"\n[[ignore]]',
        "my.toml",
        "huggingface names one tensor twice: .*'embed.weight'",
    ),
    ('huggingface = "h.{layer}.w"', 'huggingface = "h.w"', r"\[\[tensor\]\] 2", "{layer}"),
    ('huggingface = "h.{layer}.w"', "huggingface = 3", r"\[\[tensor\]\] 2", "a name is a string.*actual 3"),
    ('key = "hidden_size"', "key = 3", r"\[config\] hidden_size", "a config field is"),
    ('name = "layers.{layer}.weight"', 'name = "layers.{layer}.weight"\nstage = "last"', r"\[\[tensor\]\] 2", "{layer}"),
    ('of = "embed.weight"', 'of = "embedding.weight"', r"\[\[alias\]\] 1", "does not have: .*'embedding.weight'"),
    ('of = "embed.weight"', "", r"\[\[alias\]\] 1", "needs 'of'"),
    ('when = "tied"', 'when = "tide"', "head.weight", "'tide' is not in .config"),
    ('when = "tied"', 'if = "tied"', r"\[\[alias\]\] 1", "an alias has no entry 'if'"),
    ('reason = "a buffer"', "", "my.toml", "needs 'reason'"),
    ('reason = "a buffer"', 'reason = "a buffer"\nwhen = "x"', "my.toml", "'when'"),
    ("[[ignore]]", "[ignore]", "my.toml", "ignore.* must be a list of tables"),
    ("[[tensor]]", "[[tensors]]", "my.toml", "has no entry 'tensors'"),
    ("[config]", "[config", "my.toml", "not TOML"),
]


@pytest.mark.parametrize(("old", "new", "where", "message"), FAMILY_MISTAKES, ids=lambda text: str(text)[:40])
def test_each_mistake_in_a_family_names_file_entry_and_text(old, new, where, message, tmp_path):
    assert old in FAMILY
    path = written(tmp_path, FAMILY.replace(old, new) if old.startswith("[[") else FAMILY.replace(old, new, 1))
    with pytest.raises(TableError, match=message) as refused:
        load_family(path)
    assert str(path) in str(refused.value)
    assert re.search(where, refused.value.file)


DIALECT_MISTAKES = [
    ('name = "fused"', 'name = "fused"\nformat = "x"', "my.toml", "the dialect has no entry 'format'"),
    ('name = "fused"', "", "my.toml", "needs 'name'"),
    ('numbering = "local"', 'numbering = "locally"', "my.toml", "unknown numbering: .*'locally'.*Known: global, local"),
    ('kv_heads = "cut"', 'kv_heads = "share"', "my.toml", "unknown kv_heads"),
    ('pad_vocab = "64 * tp"', 'pad_vocab = "64 * "', "my.toml pad_vocab", "not an expression.*'64 \\* '"),
    ('specs = ["one", "two"]', 'specs = ["one"]', r"\[\[row\]\] 1", "a name, or one per spec"),
    ('specs = ["one", "two"]', "specs = [1]", "my.toml", "list of strings"),
    ('{ one = "a.{layer}", two = "b.{layer}" }', '"a.{expert}"', r"\[\[row\]\] 1", "row of experts .*a.{expert}"),
    ('two = "b.{layer}"', 'three = "b.{layer}"', r"\[\[row\]\] 1", "a name, or one per spec; expected|a name, or one per spec"),
    ('two = "b.{layer}"', "two = 4", r"\[\[row\]\] 1", "name"),
    ('two = "b.{layer}"', 'two = "c"', r"\[\[row\]\] 1", "needs {layer} in each.*actual 'c'"),
    ('hub = ["z"]', "", r"\[\[row\]\] 2", "needs the hub tensors"),
    ('hub = ["z"]', "hub = [4]", r"\[\[row\]\] 2", "'hub' must be a list of strings"),
    ('hub = ["z"]', 'hub = ["z.{expert}"]', r"\[\[row\]\] 2", "row of experts counts {expert}"),
    ('hub = ["z"]', 'hub = ["z.{layer}"]', r"\[\[row\]\] 2", "{layer}"),
    ('layout = ["packed"]', "", r"\[\[row\]\] 1", "needs a layout that joins them"),
    ('layout = ["packed"]', 'layout = ["gateup"]', r"\[\[row\]\] 1", "unknown operation: .*'gateup'.*Known: grouped_qkv, interleave"),
    ('layout = ["packed"]', 'layout = ["packed(tp)"]', r"\[\[row\]\] 1", "must be literals: .*'packed\\(tp\\)'"),
    ('layout = ["packed"]', 'layout = ["packed(1"]', r"\[\[row\]\] 1", "packed\\(1"),
    ('layout = ["packed"]', 'layout = "packed"', r"\[\[row\]\] 1", "'layout' must be a list"),
    ('split = "vocab"', 'split = "vocabulary"', r"\[\[row\]\] 2", "unknown split"),
    ('stage = "last"', 'stage = "end"', r"\[\[row\]\] 2", "unknown stage"),
    ('when = "layer > 0"', 'when = "len(layer)"', r"\[\[row\]\] 1 when", "Call is not allowed"),
    ('when = "layer > 0"', 'order = "layer > 0"', r"\[\[row\]\] 1", "a row has no entry 'order'"),
    ('name = "c"', 'name = "a.{layer}"', r"\[\[row\]\] 2", "nothing else may have it.*actual 'a.{layer}'"),
    (
        'hub = ["z"]',
        'hub = ["z"]\nwhen = "layer"\n[[row]]\nname = "c"\nhub = ["y"]',
        "my.toml",
        r"\[\[row\]\] one names one tensor twice.*'c'",
    ),
    ("[[row]]", "[row]", "my.toml", "row.* must be a list of tables|not TOML"),
    ('name = "fused"', 'name = "fused"\nrows = "mine"', "my.toml", "rows"),
]


@pytest.mark.parametrize(("old", "new", "where", "message"), DIALECT_MISTAKES, ids=lambda text: str(text)[:40])
def test_each_mistake_in_a_dialect_names_file_entry_and_text(old, new, where, message, tmp_path):
    assert old in DIALECT
    path = written(tmp_path, DIALECT.replace(old, new, 1))
    with pytest.raises(TableError, match=message) as refused:
        load_dialect(path)
    assert str(path) in str(refused.value)
    assert re.search(where, refused.value.file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TableError, match="cannot be read"):
        load_family(tmp_path / "nowhere.toml")
    with pytest.raises(TableError, match="cannot be read"):
        load_family(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(TableError, match="not TOML"):
        load_dialect(tmp_path / "latin.toml")
    (tmp_path / "deep.toml").write_text("x = " + "[" * 5000)
    with pytest.raises(TableError, match="not TOML"):
        load_family(tmp_path / "deep.toml")


def test_a_broken_base_is_the_bases_error(tmp_path):
    written(tmp_path, "name = ", "base.toml")
    with pytest.raises(TableError, match=r"base\.toml"):
        load_family(written(tmp_path, 'name = "x"\nextends = "base"\n'))


def test_tables_that_extend_each_other_are_refused(tmp_path):
    written(tmp_path, 'name = "a"\nextends = "b"\n', "a.toml")
    written(tmp_path, 'name = "b"\nextends = "a"\n', "b.toml")
    with pytest.raises(TableError, match="extends"):
        load_family(tmp_path / "a.toml")


def test_what_ships():
    assert {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"} <= set(FAMILIES.names())
    assert not any(name.startswith("_") for name in FAMILIES.names()), "parts of tables are no families"
    assert {"huggingface", "megatron", "megatron-nested"} <= set(DIALECTS.names())
    for family in FAMILIES:
        names = {t.name for t in family.tensors}
        assert len(names) == len(family.tensors) and all(a.of in names for a in family.aliases)
    known = {t.name for family in FAMILIES for t in family.tensors}
    for dialect in DIALECTS:
        for row in dialect.rows or ():
            assert set(row.hub) <= known, row


def test_registries():
    registry: Registry[str] = Registry("thing", UnknownFamilyError)
    assert registry.add("alpha", "a") == "a" and registry.add("alpha", "a") == "a"
    with pytest.raises(UsageError, match="'alpha' is registered already"):
        registry.add("alpha", "b")
    registry.add("beta", "b")
    with pytest.raises(UnknownFamilyError, match=r"no thing is named 'alpah'.*Nearest: alpha.*Known: alpha, beta") as unknown:
        registry.get("alpah")
    assert isinstance(unknown.value, ShardwrightError) and isinstance(unknown.value, LookupError)
    assert "alpha" in registry and list(registry) == ["a", "b"] and registry.names() == ["alpha", "beta"]
    registry.remove("alpha")
    registry.remove("alpha")
    assert "alpha" not in registry
