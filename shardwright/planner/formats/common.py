"""What several formats share: reading containers in bulk, and settling family and config from what is at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...errors import CheckpointError, ConfigError, UnsupportedError, short
from ..config import ModelConfig, carried_method, family_of, from_huggingface, valid
from ..containers import CONTAINERS
from ..containers.base import ContainerIndex
from ..identity import FILE_NAME, named_in, read_object
from ..schemes import SCHEMES, Scheme
from ..store import Store
from ..tables import DIALECT_WORDS, FAMILIES, Dialect, Family, specs_of
from .base import Hints, Target

__all__ = ["carried", "config_bytes", "missing_config", "read_unit", "scheme_of", "settle", "stages", "told_spec", "versioned_spec"]


def read_unit(store: Store, container: str, path: str) -> ContainerIndex:
    """One container's header."""
    return CONTAINERS.get(container).read(store, path)


def settle(
    store: Store, hints: Hints, identity: Mapping[str, Any] | None, config_path: str
) -> tuple[Family, ModelConfig, Mapping[str, Any] | None] | None:
    """Family, canonical config and config.json: from the user, the checkpoint's own config, or its identity file.

    Returns None where nothing says; the format may then ask its own arguments.

    Raises
    ------
    ConfigError
        The config cannot be read under the family.
    """
    raw = hints.config
    if raw is None and store.exists(config_path):
        raw = read_object(store, config_path)
    if raw is not None:
        family = hints.family or _family(raw, identity, config_path)
        config = from_huggingface(raw, family, config_path)
    elif identity is not None:
        family = hints.family or named_in(identity, "family", FAMILIES)
        config = ModelConfig(family.name, valid(_identity_fields(identity, family), FILE_NAME))
    else:
        return None
    if hints.vocab_size is not None:
        config = ModelConfig(config.family, {**config.fields, "vocab_size": hints.vocab_size})
    return family, config, raw


def _family(raw: Mapping[str, Any], identity: Mapping[str, Any] | None, file: str) -> Family:
    """The config's own family; a user's table that the target names comes first, if it is registered."""
    if identity is not None and identity["family"] in FAMILIES:
        return FAMILIES.get(identity["family"])
    return family_of(raw, file)


def _identity_fields(identity: Mapping[str, Any], family: Family) -> dict[str, Any]:
    fields: dict[str, Any] = identity["config"]
    for rule in family.config:
        if rule.name not in fields:
            raise ConfigError(f"shardwright.json has no config field {rule.name!r}", file=FILE_NAME)
    return fields


def scheme_of(raw: Mapping[str, Any] | None, family: Family, file: str) -> Scheme | None:
    """The scheme of a config's ``quantization_config``, or None for plain weights and for what the family carries as it is.

    Raises
    ------
    UnsupportedError
        No scheme here reads it.
    """
    config = (raw or {}).get("quantization_config")
    if not config or carried_method(raw, family):
        return None
    if not isinstance(config, dict):
        raise ConfigError("quantization_config must be an object", file=file, actual=short(config))
    for scheme in SCHEMES:
        if scheme.recognises(config):
            return scheme
    raise UnsupportedError(
        "the checkpoint is quantised in a way that no scheme here reads",
        file=file,
        actual=short(config.get("quant_method")),
        remedy="Convert a checkpoint with plain weights",
    )


_CHUNK = re.compile(r"model\d+\.")
_NUMBER = re.compile(r"\d+")


def told_spec(dialect: Dialect, family: Family, config: ModelConfig, names: Iterable[str]) -> str:
    """The variant of the dialect's names that explains most of these; the default among equals."""
    specs = specs_of(dialect, family)
    if len(specs) == 1:
        return specs[0]
    counted = {_NUMBER.sub("#", _CHUNK.sub("", name, count=1) if name.startswith("model") else name) for name in names}
    return max(specs, key=lambda spec: len(counted & {_NUMBER.sub("#", name) for name in _open_names(dialect, family, config, spec)}))


def versioned_spec(dialect: Dialect, told: str, version: float) -> str:
    """The spec of a Megatron dialect whose names were told, with the order of QKV rows that a checkpoint version has.

    Raises
    ------
    UnsupportedError
        There are no such names of that version.
    """
    spec = told if version >= 2 else f"{told}-v{int(version)}"
    if spec not in dialect.specs:
        raise UnsupportedError(f"names of spec {told!r} are of checkpoint versions 2.0 and above", actual=version)
    return spec


def _open_names(dialect: Dialect, family: Family, config: ModelConfig, spec: str) -> Iterator[str]:
    """Stored names of a variant, ``#`` for each counter, but for rows that this model has in no layer and no layout."""
    words = {**DIALECT_WORDS, **config.fields, "family": family.name, "true": True, "false": False, "none": None}
    fixed = words.keys() - {name for name, _ in family.layer_words}
    rows = [row for row in (family.rows if dialect.rows is None else dialect.rows) if not row.when.names <= fixed or row.when(words)]
    fused = {name for row in rows if spec in row.names for name in row.hub}
    own = [family.stored_name(t, spec) for t in family.tensors if t.name not in fused] if dialect.rows is None else []
    for name in (*(row.names[spec] for row in rows if spec in row.names), *own):
        yield name.replace("{layer}", "#").replace("{expert}", "#")


def missing_config(store: Store, what: str) -> CheckpointError:
    """The refusal of a checkpoint that nothing describes."""
    return CheckpointError(
        f"nothing describes the model of this {what} checkpoint",
        file=store.root,
        remedy="Give --config config.json (and --family NAME|FILE)",
    )


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """config.json as transformers writes it: indented, keys sorted, a final newline."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def stages(target: Target) -> dict[tuple[int, ...], list[int]]:
    """The tp ranks of every (stage, ep rank), with the positions in `Target.wanted` of the tensors that each of them holds."""
    layout = target.layout
    held: dict[tuple[int, ...], list[int]] = {}
    for i, wanted in enumerate(target.wanted):
        held.setdefault(wanted.ranks, []).append(i)
    found = {}
    for pp in range(layout.pp):
        everywhere = layout.stage_ranks(pp)
        for ep in range(layout.ep):
            ranks = layout.stage_ranks(pp, ep)
            own = held.get(ranks, []) if ranks != everywhere else []
            found[ranks] = sorted([*held.get(everywhere, []), *own])
    return found


def carried(target: Target, folder: str) -> tuple[tuple[tuple[str, bytes], ...], tuple[tuple[str, str], ...]]:
    """(small files, copies) that put config.json and companions into `folder` of the target."""
    config = target.verbatim if target.verbatim is not None else config_bytes(target.config_json)
    return ((f"{folder}config.json", config),), tuple((path, f"{folder}{name}") for path, name in target.companions)
