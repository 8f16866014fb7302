"""Formats: named presets of dialect, layout, filing and container. One file and one registration each."""

from __future__ import annotations

from ...errors import CheckpointError
from ..manifest import names_weights
from ..registry import Registry
from ..store import Store
from .base import Format, Hints, Source
from .deepspeed_mp import DeepSpeedMp
from .deepspeed_universal import DeepSpeedUniversal
from .deepspeed_zero import DeepSpeedZero
from .huggingface import HuggingFace
from .megatron_deepspeed import MegatronDeepSpeed
from .megatron_legacy import MegatronLegacy
from .ranks import Ranks

__all__ = ["FORMATS", "open_source"]

FORMATS: Registry[Format] = Registry("format")
FORMATS.add("huggingface", HuggingFace())
FORMATS.add("ranks", Ranks())
FORMATS.add("megatron-legacy", MegatronLegacy())
FORMATS.add("deepspeed-mp", DeepSpeedMp())
FORMATS.add("megatron-deepspeed", MegatronDeepSpeed())
FORMATS.add("deepspeed-zero", DeepSpeedZero())
FORMATS.add("deepspeed-universal", DeepSpeedUniversal())


def open_source(store: Store, hints: Hints) -> Source:
    """Open a checkpoint in whatever format it is.

    Raises
    ------
    CheckpointError
        No format recognises it, or more than one does.
    """
    if hints.manifest is not None:
        return FORMATS.get("huggingface" if names_weights(hints.manifest) else "deepspeed-mp").open(store, hints)
    found = [format_ for format_ in FORMATS if format_.detect(store)]
    if not found:
        advice = " To plan from the config alone, give the path of config.json" if store.exists("config.json") else ""
        raise CheckpointError(
            "this is no checkpoint of a known format", file=store.root, remedy=f"Known: {', '.join(FORMATS.names())}.{advice}"
        )
    if len(found) > 1:
        raise CheckpointError(
            "this could be several formats", file=store.root, actual=[f.name for f in found], remedy="Give the folder of one of them"
        )
    return found[0].open(store, hints)
