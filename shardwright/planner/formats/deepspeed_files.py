"""What DeepSpeed's checkpoint formats share: which folder holds the checkpoint, and what one of its files says.

``<root>/latest`` names the tag, a folder; SRC may be the root or that folder. Numbers in names are numbers: ``mp_rank_100``
comes after ``mp_rank_99``, though DeepSpeed itself sorts names as text (``engine._get_all_ckpt_names``).
Source: DeepSpeed ``runtime/engine.py`` (``_get_ckpt_name``, ``_save_checkpoint``), ``runtime/pipe/module.py``
(``ckpt_layer_path``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, short
from ..config import ModelConfig
from ..containers.base import ContainerIndex
from ..containers.torch_zip import Namespace
from ..megatron_args import from_megatron, norm_shift
from ..megatron_deepspeed_args import words_of
from ..plan import Dropped
from ..store import Store
from ..tables import FAMILIES, Family
from .base import Hints
from .common import missing_config, settle

__all__ = [
    "LATEST",
    "LAYER_FILE",
    "MODEL_FILE",
    "TAG",
    "config_of",
    "dropped_of",
    "folder_of",
    "lost_masters",
    "numbered",
    "parallel_size",
    "tag_in",
]
_LONGEST_TAG = 4096

LATEST = "latest"
TAG = "global_step0"
"""The folder of a target."""
MODEL_FILE = re.compile(r"(?:(.+)/)?mp_rank_(\d{2,})_model_states\.pt$")
LAYER_FILE = re.compile(r"(?:(.+)/)?layer_(\d{2,})(?:-model_(\d{2,}))?-model_states\.pt$")
_UNIVERSAL = re.compile(r"(?:(.+)/)?zero/(?:optimizer_state|[^/]+/fp32)\.pt$")
_ZERO_FILE = re.compile(r"(?:(.+)/)?(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_?(?:optim|model)_states\.pt$")


def folder_of(store: Store, pattern: re.Pattern[str], beside: tuple[re.Pattern[str], ...] = ()) -> str | None:
    """The folder (``""`` or ending with a slash) of the checkpoint that is made of such files; None if there is none.

    A folder is passed over if it holds ZeRO's shards, a universal checkpoint, or files of a pattern in `beside`: those are other
    formats' checkpoints.

    Raises
    ------
    CheckpointError
        Several tags, and nothing says which.
    """
    folders = _folders(store, pattern)
    if store.exists(LATEST):
        tag = tag_in(store, LATEST)
        if tag in folders:
            folders = {tag}
        elif folders:
            raise CheckpointError(
                "the file latest names a tag whose files are not there", file=LATEST, expected=short(tag), actual=sorted(folders)[:5],
                remedy="Copy that tag too, or correct the file",
            )  # fmt: skip
    for other in (_ZERO_FILE, _UNIVERSAL, *beside):
        folders -= _folders(store, other)
    if len(folders) > 1:
        raise CheckpointError(
            "several tags and no file latest", file=store.root, actual=sorted(folders)[:5], remedy="Give the folder of one of them"
        )
    return next((f"{folder}/" if folder else "" for folder in folders), None)


def tag_in(store: Store, marker: str) -> str:
    """The folder that a marker file names."""
    return store.read(marker, 0, min(store.stat(marker).nbytes, _LONGEST_TAG)).decode("utf-8", "replace").strip()


def _folders(store: Store, pattern: re.Pattern[str]) -> set[str]:
    return {match[1] or "" for path in store.list() if (match := pattern.match(path))}


def numbered(store: Store, pattern: re.Pattern[str], folder: str) -> dict[tuple[int, ...], str]:
    """The folder's files of that pattern by the numbers in their names, in numerical order; an absent number is 0.

    Raises
    ------
    CheckpointError
        Two names have the same numbers.
    """
    found: dict[tuple[int, ...], str] = {}
    for path in store.list():
        match = pattern.match(path)
        if match is not None and (f"{match[1]}/" if match[1] else "") == folder:
            if found.setdefault(key := tuple(int(n or 0) for n in match.groups()[1:]), path) != path:
                raise CheckpointError("two files are of one rank", file=path, actual=found[key], remedy="Remove the stale one")
    return dict(sorted(found.items()))


def parallel_size(index: ContainerIndex, path: str, ranks: int, key: str = "mp_world_size") -> None:
    """Check the size that a file states against the number of ranks whose files are there.

    Raises
    ------
    CheckpointError
        They differ.
    """
    size = index.objects.get(key)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size != ranks):
        raise CheckpointError(
            f"the file's {key} is not the number of shards",
            file=path,
            expected=f"{short(size)} files",
            actual=f"{ranks} files",
            remedy="Copy the missing ranks' files here, or remove those of another checkpoint",
        )


def config_of(
    store: Store, hints: Hints, identity: Mapping[str, Any] | None, folder: str, objects: Mapping[str, Any], file: str, what: str
) -> tuple[Family, ModelConfig, Mapping[str, Any] | None, str, tuple[str, ...], int]:
    """Family, config, config.json and its path, from the user, the files that travelled along or lie beside, or ``args``; notes; and
    what stored norms lack (`Source.norm_shift`).

    Raises
    ------
    CheckpointError
        Nothing describes the model.
    """
    places = ("hf/config.json", "config.json", f"{folder}hf/config.json", f"{folder}config.json")
    path = next((p for p in places if store.exists(p)), places[0])
    arguments = objects.get("args")
    fields = arguments.fields if isinstance(arguments, Namespace) else arguments if isinstance(arguments, dict) else {}
    if settled := settle(store, hints, identity, path):
        return *settled, path, (), norm_shift(fields, settled[1])
    if not fields:
        raise missing_config(store, what)
    info = objects.get("checkpoint_info")
    vocab = hints.vocab_size
    if vocab is None and isinstance(info, dict) and isinstance(info.get("original_vocab_size"), int):
        vocab = info["original_vocab_size"]
    config = from_megatron(words_of(fields), hints.family, vocab, file)
    family = hints.family or FAMILIES.get(config.family)
    note = () if hints.family else (f"family {family.name!r} was told from the checkpoint's args; name another with --family",)
    return family, config, None, path, note, norm_shift(fields, config)


def dropped_of(objects: Mapping[str, Any], used: tuple[str, ...]) -> tuple[Dropped, ...]:
    """What a file holds besides the weights, where it holds anything under that name."""
    masters = {"optimizer": _LOST} if _has_masters(objects) else {}
    left = [key for key, value in objects.items() if key not in used and value]
    return tuple(Dropped(str(key), masters.get(str(key), "only weights are converted")) for key in left)


def lost_masters(objects: Mapping[str, Any], file: str) -> tuple[str, ...]:
    """A warning where the optimizer's entry holds more of the weights than the module does."""
    return (f"{file}: 'optimizer' is left out: {_LOST}",) if _has_masters(objects) else ()


_LOST = "the float32 master weights in it are lost, what is converted is the module's copy of lower precision"


def _has_masters(objects: Mapping[str, Any]) -> bool:
    """Whether it is the state of DeepSpeed's FP16_Optimizer (without ZeRO, for bfloat16 too), fused or not."""
    optimizer = objects.get("optimizer")
    return isinstance(optimizer, dict) and any(optimizer.get(key) for key in ("fp32_groups_flat", "fp32_groups"))
