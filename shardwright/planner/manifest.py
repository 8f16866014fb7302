"""DeepSpeed's JSON manifests: which files make up a checkpoint that is loaded by one file's name.

1. `is_manifest` tells one from any other JSON: it lists ``checkpoints`` beside a ``type`` or a ``version``.
2. `read_manifest` checks every field; whatever is wrong is refused with the key, what was expected and what is there.
3. `resolve` finds the files. Names count from ``base_dir`` where that is given and there, else from the manifest's own folder:
   ``base_dir`` is written as an absolute path, and a folder that was moved since then is no other checkpoint. An absolute name
   that leads nowhere is looked for beside the manifest by its last parts. What was moved is told.
4. `manifest_bytes` writes one whose names count from itself.

Source: DeepSpeed ``runtime/state_dict_factory.py`` (``get_sd_loader_json``: type, checkpoints, version, parallelization, mp_size),
``module_inject/replace_module.py`` (tp_size, then mp_size; base_dir; tp and non_tp; ``ds_inference_config.json``); ``non-tp``
was the key of earlier releases (DeepSpeed issue 2442).

Boundary: what the files hold is the formats' business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, UnsupportedError, short
from .identity import read_json
from .store import Store

__all__ = [
    "CONFIG_NAME",
    "Manifest",
    "Resolved",
    "below",
    "find_manifest",
    "is_manifest",
    "known_version",
    "manifest_bytes",
    "manifests_in",
    "names_shards",
    "names_weights",
    "of_shards",
    "read_manifest",
    "resolve",
]

CONFIG_NAME = "ds_inference_config.json"
"""What DeepSpeed calls the manifest that it writes itself."""
VERSIONS = (0, 1.0, 2.0, 3.0)
_TYPES = {"bloom": "BLOOM", "ds_model": "ds_model"}
"""Types whose case does not matter; ``Megatron`` is spelled so."""
_LARGEST = 1 << 20
"""Larger JSON files are looked at when they are given as SRC, not for being in a folder."""
_MOST_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest's content, checked.

    Attributes
    ----------
    path
        Its own name in the store, for messages.
    type
        ``"Megatron"``, ``"BLOOM"`` or ``"ds_model"``.
    files
        As they are named; of a manifest with ``tp`` and ``non_tp``, the former.
    whole
        The names under ``non_tp``; None where there is a list.
    version
        Checkpoint version of the QKV rows, or None where the files say.
    parallelization
        ``"pp"`` (files are unsharded) or ``"tp"``.
    size
        Tensor-parallel ranks, where they are given.
    base_dir
        Where names count from, if it is given.
    """

    path: str
    type: str
    files: tuple[str, ...]
    whole: tuple[str, ...] | None
    version: float | None
    parallelization: str
    size: int | None
    base_dir: str | None


class Resolved(NamedTuple):
    """A manifest's files where they are, in its order, and what was found elsewhere than it says."""

    files: tuple[str, ...]
    warnings: tuple[str, ...]


def is_manifest(value: object) -> bool:
    """Whether a JSON value is meant to be a manifest, a good one or not.

    >>> is_manifest({"type": "Megatron", "checkpoints": []}), is_manifest({"model_type": "llama"})
    (True, False)
    """
    return isinstance(value, Mapping) and "checkpoints" in value and ("type" in value or "version" in value)


def find_manifest(store: Store) -> Manifest | None:
    """The root's manifest: DeepSpeed's own name for it, else the one JSON file that is a manifest.

    Raises
    ------
    CheckpointError
        There are several, or it is a bad one.
    """
    found = manifests_in(store)
    if len(found) > 1 and CONFIG_NAME not in found:
        raise CheckpointError("several manifests lie in one folder", file=store.root, actual=list(found), remedy="Give one of them as SRC")
    if not found:
        return None
    return read_manifest(store, CONFIG_NAME if CONFIG_NAME in found else next(iter(found)))


def manifests_in(store: Store) -> dict[str, Mapping[str, Any]]:
    """The root's JSON files that are manifests, good ones or not, with their content."""
    found = {}
    for name in store.list():
        if not name.endswith(".json") or name.endswith(".index.json") or "/" in name:
            continue
        if store.exists(name) and store.stat(name).nbytes <= _LARGEST:  # a link may lead nowhere
            # Most folders' JSON files are no manifests and do not even mention the word.
            if b'"checkpoints"' not in store.read(name):
                continue
            try:
                value = read_json(store, name)
            except CheckpointError:  # what it is, if not JSON, is for the format to say that needs it
                continue
            if is_manifest(value):
                found[name] = value
    return found


def names_weights(manifest: Manifest) -> bool:
    """Whether it lists a model's own weight files, which every rank reads whole and cuts (``parallelization`` pp)."""
    return manifest.type != "Megatron" and manifest.whole is None and manifest.parallelization == "pp"


def names_shards(store: Store) -> bool:
    """Whether a manifest in the root is `of_shards`."""
    return any(map(of_shards, manifests_in(store).values()))


def of_shards(value: Mapping[str, Any]) -> bool:
    """Whether a manifest is of Megatron's shards, or of DeepSpeed-Inference's."""
    return value.get("type") == "Megatron" or isinstance(value["checkpoints"], dict)


def read_manifest(store: Store, path: str) -> Manifest:
    """The manifest at `path`.

    Raises
    ------
    CheckpointError
        It lacks a key, or one has a value that DeepSpeed does not know.
    UnsupportedError
        Its type is none that DeepSpeed knows.
    """
    value = read_json(store, path)
    if not isinstance(value, dict):
        raise CheckpointError("a manifest is a JSON object", file=path, actual=type(value).__name__, remedy="Correct or remove it")
    for key in ("type", "checkpoints", "version"):
        if key not in value:
            raise CheckpointError(
                f"the manifest has no {key!r}", file=path, expected=f"a key {key!r}", actual=sorted(map(str, value))[:10], remedy="Add it"
            )
    files, whole = _files(value["checkpoints"], path)
    parallel = value.get("parallelization", "pp")
    if parallel not in ("pp", "tp"):
        raise CheckpointError(
            "the manifest's 'parallelization' is none", file=path, expected="'pp' or 'tp'", actual=short(parallel), remedy="Correct it"
        )
    base = value.get("base_dir")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(
            "the manifest's 'base_dir' is no folder's name", file=path, actual=short(base), remedy="Correct it, or leave it out"
        )
    return Manifest(
        path, _type(value["type"], path), files, whole, _version(value["version"], path), parallel, _size(value, path), base or None
    )


def _type(value: Any, path: str) -> str:
    if value == "Megatron":
        return "Megatron"
    known = _TYPES.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        raise UnsupportedError(
            "the manifest is of a type that DeepSpeed does not know",
            file=path,
            expected="Megatron (in this spelling), BLOOM or ds_model",
            actual=short(value),
            remedy="Correct its 'type'",
        )
    return known


def _files(value: Any, path: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The names, and those of unsplit tensors where the manifest has them apart."""
    if isinstance(value, list):
        return _names(value, "checkpoints", path), None
    if isinstance(value, dict):
        whole = [key for key in ("non_tp", "non-tp") if key in value]
        if len(whole) != 1 or set(value) != {"tp", whole[0]}:
            raise CheckpointError(
                "the manifest's 'checkpoints' has other keys", file=path, expected=["tp", "non_tp"], actual=sorted(value)[:10],
                remedy="Correct it",
            )  # fmt: skip
        return _names(value["tp"], "checkpoints.tp", path), _names(value[whole[0]], f"checkpoints.{whole[0]}", path)
    raise CheckpointError(
        "the manifest's 'checkpoints' is neither a list nor tp and non_tp", file=path, actual=short(value), remedy="List the files there"
    )


def _names(value: Any, key: str, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or len(value) > _MOST_FILES or not all(isinstance(n, str) and n for n in value):
        raise CheckpointError(
            f"the manifest's {key!r} is no list of file names", file=path, actual=short(value), remedy="List the files there"
        )
    if len(set(value)) != len(value):
        raise CheckpointError(
            f"the manifest's {key!r} names one file twice", file=path, actual=next(n for n in value if value.count(n) > 1),
            remedy="List each file once",
        )  # fmt: skip
    return tuple(value)


def _version(value: Any, path: str) -> float | None:
    """A checkpoint version, or None where the files say."""
    return None if value is None else known_version(value, path, "the manifest's 'version'")


def known_version(value: Any, file: str, what: str) -> float:
    """A Megatron checkpoint version.

    Raises
    ------
    UnsupportedError
        Nobody knows it.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or value not in VERSIONS:
        raise UnsupportedError(
            f"{what} is none that Megatron or DeepSpeed has", file=file, expected=f"one of {', '.join(map(str, VERSIONS))}",
            actual=short(value), remedy="Find out in which order its QKV rows lie, and correct it",
        )  # fmt: skip
    return float(value)


def _size(value: Mapping[str, Any], path: str) -> int | None:
    """Tensor-parallel ranks; the two keys that say it must agree."""
    found = {key: value[key] for key in ("tp_size", "mp_size") if value.get(key) is not None}
    for key, size in found.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"the manifest's {key!r} is no number of ranks", file=path, actual=short(size), remedy="Correct it")
    if len(set(found.values())) > 1:
        raise CheckpointError(
            "the manifest's 'tp_size' and 'mp_size' differ", file=path, expected=found["tp_size"], actual=found["mp_size"],
            remedy="Leave the wrong one out: both are the number of files",
        )  # fmt: skip
    return next(iter(found.values()), None)


def resolve(
    manifest: Manifest, names: Iterable[str], exists: Callable[[str], bool], folder: str = "", also: Sequence[str] = ()
) -> Resolved:
    """Where the named files are.

    Parameters
    ----------
    exists
        Whether a path is a file: below the store's root, or (for whoever may look there) absolute.
    folder
        The manifest's own, as `exists` takes it: ``""`` or ending with a slash.
    also
        Further folders that names may count from, the same way.

    Raises
    ------
    CheckpointError
        A file is nowhere.
    """
    names = list(names)
    bases = ([manifest.base_dir.rstrip("/") + "/"] if manifest.base_dir else []) + [folder]
    # A relative base_dir counts from the working directory for DeepSpeed; here, from the manifest.
    bases = [*dict.fromkeys(f"{folder}{b}" if b != folder and not b.startswith("/") else b for b in bases), *also]
    for base in bases:
        found = [name if name.startswith("/") else f"{base}{name}" for name in names]
        if all(map(exists, found)):
            moved = manifest.base_dir is not None and base != bases[0]
            return Resolved(tuple(found), _moved(manifest, manifest.base_dir or "") if moved else ())
    beside = [_beside(name, folder, exists) for name in names]
    if None not in beside:
        return Resolved(tuple(path for path in beside if path is not None), _moved(manifest, names[0]))
    missing = names[beside.index(None)]
    raise CheckpointError(
        "the manifest names a file that is not there",
        file=manifest.path,
        expected=f"{missing} in {' or in '.join(b or 'the folder of the manifest' for b in bases)}",
        actual=f"{sum(path is None for path in beside)} of {len(names)} files missing",
        remedy="Copy it there, or correct the manifest's 'base_dir' or 'checkpoints'",
    )


def below(store: Store) -> Callable[[str], bool]:
    """Whether a path is a file of the store; one that leads out of it is none."""
    return lambda path: not path.startswith("/") and ".." not in path.split("/") and store.exists(path)


def _beside(name: str, folder: str, exists: Callable[[str], bool]) -> str | None:
    """The longest end of a name that is a file beside the manifest."""
    parts = PurePosixPath(name).parts
    ends = ("/".join(parts[at:]) for at in range(1 if name.startswith("/") else 0, len(parts)))
    return next((f"{folder}{end}" for end in ends if ".." not in end.split("/") and exists(f"{folder}{end}")), None)


def _moved(manifest: Manifest, where: str) -> tuple[str, ...]:
    return (f"{manifest.path} says {where!r}, which is not there; its files were found beside it",)


def manifest_bytes(kind: str, files: Iterable[str], version: float, size: int) -> bytes:
    """A manifest whose names count from its own folder."""
    value = {"type": kind, "checkpoints": list(files), "version": version, "parallelization": "tp", "tp_size": size, "mp_size": size}
    return (json.dumps(value, indent=2) + "\n").encode()
