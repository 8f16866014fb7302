"""Which files a ZeRO or universal checkpoint of DeepSpeed has, by the numbers in their names.

1. `folder_of` finds the step's folder: the one that ``latest`` (or ``latest_universal``) names, the given folder itself, or
   the only folder below it that has such files.
2. `Files.of` sorts the folder's files by what they hold. Numbers are read as numbers: rank 10 follows rank 9.

Names (deepspeed ``runtime/engine.py``: ``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``, ``_get_expert_ckpt_name``;
``runtime/pipe/module.py``: ``ckpt_layer_path``): ``mp_rank_MP_model_states.pt``, with ZeRO-3
``zero_pp_rank_DP_mp_rank_MP_model_states.pt``; ``[bf16_|fp16_]zero_pp_rank_DP_mp_rank_MP_optim_states.pt`` (once without the
underscore before ``optim``); ``layer_LL[-model_TP]-model_states.pt``; ``[layer_L_]expert_E_mp_rank_MP_model_states.pt`` and
``expp_rank_EP_mp_rank_MP_optim_states.pt``. What names call ``pp_rank`` is the data-parallel rank; MP is pp · tp_size + tp.

Boundary: names only; no file is opened but the marker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...errors import CheckpointError
from ..store import Store
from .deepspeed_files import tag_in

__all__ = ["OPTIMIZER", "Files", "folder_of", "missing_rank"]

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt")


@dataclass(slots=True)
class Files:
    """The files of one step.

    Attributes
    ----------
    folder
        Where they lie: ``""`` or a path that ends in ``/``.
    models
        Model states by (model-parallel rank, data-parallel rank): ``mp_rank_…``, whose data-parallel rank is 0.
    partitions
        The same of ZeRO-3: ``zero_pp_rank_…_mp_rank_…``.
    optimizers
        Optimizer states by (model-parallel rank, data-parallel rank).
    layers
        A pipeline's layer files by (number, tensor-parallel rank).
    experts
        Files of expert weights and of their optimizers.
    """

    folder: str
    models: dict[tuple[int, int], str] = field(default_factory=dict)
    partitions: dict[tuple[int, int], str] = field(default_factory=dict)
    optimizers: dict[tuple[int, int], str] = field(default_factory=dict)
    layers: dict[tuple[int, int], str] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, store: Store, folder: str) -> Files:
        """The files directly in `folder`.

        Raises
        ------
        CheckpointError
            Two files are of one rank.
        """
        found = cls(folder)
        for name in _names(store, folder):
            if match := _MODEL.fullmatch(name):
                table = found.models if match[1] is None else found.partitions
                _once(table, (int(match[2]), int(match[1] or 0)), folder + name)
            elif match := OPTIMIZER.fullmatch(name):
                _once(found.optimizers, (int(match[2]), int(match[1])), folder + name)
            elif match := _LAYER.fullmatch(name):
                _once(found.layers, (int(match[1]), int(match[2] or 0)), folder + name)
            elif _EXPERT.fullmatch(name):
                found.experts.append(folder + name)
        for table in (found.models, found.partitions, found.optimizers, found.layers):
            ordered = sorted(table.items())
            table.clear()
            table.update(ordered)
        return found


def _names(store: Store, folder: str) -> list[str]:
    return [path[len(folder) :] for path in store.list() if path.startswith(folder) and "/" not in path[len(folder) :]]


def _once(table: dict[tuple[int, int], str], key: tuple[int, int], path: str) -> None:
    if table.setdefault(key, path) != path:
        raise CheckpointError("two files are of one rank", file=path, actual=f"{table[key]} and {path}", remedy="Remove the stale one")


def folder_of(store: Store, marker: str, wanted: re.Pattern[str]) -> str | None:
    """The folder of the step to open: ``""`` or a path that ends in ``/``; None where no path matches.

    Parameters
    ----------
    marker
        Name of the file in the root that names the step's folder.
    wanted
        What the path of a file below that folder looks like; a path without ``/`` lies in the root.

    Raises
    ------
    CheckpointError
        The marker names a folder without such files, or there are several and no marker.
    """
    folders = []
    for path in store.list():
        parts = path.split("/")
        folders += ["/".join((*parts[:k], "")) for k in (0, 1) if wanted.fullmatch("/".join(parts[k:]))]
    found = list(dict.fromkeys(folders))
    if not found:
        return None
    if store.exists(marker):
        tag = tag_in(store, marker)
        if f"{tag}/" in found:
            return f"{tag}/"
        if tag in ("", ".") and "" in found:
            return ""
        raise CheckpointError(
            f"{marker} names a folder that holds no such checkpoint",
            file=marker,
            expected=", ".join(name.rstrip("/") or "." for name in found[:5]),
            actual=repr(tag)[:200],
            remedy="Copy the folder again, or correct the file",
        )
    if len(found) > 1:
        raise CheckpointError(
            "several steps lie here and nothing says which one is meant",
            file=store.root,
            actual=", ".join(name.rstrip("/") or "." for name in found[:5]),
            remedy=f"Give the folder of one of them, or write its name into a file {marker}",
        )
    return found[0]


def missing_rank(store: Store, folder: str, what: str, expected: Iterable[int], actual: Iterable[int]) -> None:
    """Refuse a set of ranks that is not the expected one; names those that are missing or too many."""
    wanted, held = set(expected), set(actual)
    if wanted != held:
        kind, odd = ("missing", sorted(wanted - held)) if wanted - held else ("too many", sorted(held - wanted))
        raise CheckpointError(
            f"the checkpoint does not have the files of its {what} ranks",
            file=folder or store.root,
            expected=f"ranks 0 … {max(wanted, default=0)}",
            actual=f"{kind}: {', '.join(map(str, odd[:6]))}{', …' if len(odd) > 6 else ''}",
            remedy="Copy the missing ranks' files here" if kind == "missing" else "Remove the files of another run",
        )
