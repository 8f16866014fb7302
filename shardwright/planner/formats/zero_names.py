"""Names of parameters in a DeepSpeed run, and the dialects' names for them.

* A pipeline calls a parameter ``LL.KEY``: the number of its layer, those without parameters counted too, and its key in the
  layer's file. The tied embedding is ``tied_modules.embed.KEY`` on the first and the last stage. The dialect
  ``megatron-deepspeed`` has ``layers.N.KEY`` for blocks and the bare KEY for the rest.
* Other models have their module's own names: Megatron's nested ones, or those of a Hugging Face model, perhaps with the
  ``module.`` of a wrapper before them.
* Experts of deepspeed.moe are counted from 0 on each expert-parallel rank in ZeRO's files (``global_expert``).

Sources: deepspeed ``runtime/pipe/module.py`` (``_build``), ``moe/experts.py``, ``runtime/engine.py`` (``_save_moe_checkpoint``).
Boundary: text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Names", "global_expert", "local_experts"]

_PIPELINE = re.compile(r"(\d{1,9})\.(.+)")
_TIED = re.compile(r"tied_modules\.[^.]+\.(.+)")
_BLOCK = re.compile(r"(?:self_attention|attention)\.")
_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d{1,9})(\..+)")


class Names:
    """The names of one run.

    Attributes
    ----------
    pipeline
        Whether they are a pipeline's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        held = list(names)
        matches = [_PIPELINE.fullmatch(name) for name in held]
        self.pipeline = bool(held) and all(m or _TIED.fullmatch(name) for m, name in zip(matches, held, strict=True))
        blocks = {int(m[1]) for m in matches if m and _BLOCK.match(m[2])}
        self._blocks = range(min(blocks), max(blocks) + 1) if blocks else range(0)
        self._wrappers = 0
        while held and not self.pipeline and all(name.startswith("module.") for name in held):
            held, self._wrappers = [name.removeprefix("module.") for name in held], self._wrappers + 1

    def plain(self, name: str) -> str:
        """The dialect's name."""
        if not self.pipeline:
            for _ in range(self._wrappers):
                name = name.removeprefix("module.")
            return name
        if match := _TIED.fullmatch(name):
            return match[1]
        match = _PIPELINE.fullmatch(name)
        if match is None:
            return name
        number = int(match[1])
        return f"layers.{number - self._blocks.start}.{match[2]}" if number in self._blocks else match[2]

    def of_layer(self, layer: int, key: str) -> str:
        """The dialect's name of what the file of a pipeline's layer holds under `key`."""
        return self.plain(f"{layer}.{key}")


def local_experts(names: Iterable[str]) -> int:
    """Experts of each layer that one expert-parallel rank holds."""
    return max((int(match[2]) + 1 for name in names if (match := _EXPERT.fullmatch(name))), default=0)


def global_expert(name: str, first: int) -> str:
    """A name with its expert counted over all expert-parallel ranks.

    >>> global_expert("moe.0.deepspeed_moe.experts.deepspeed_experts.1.0.weight", 4)
    'moe.0.deepspeed_moe.experts.deepspeed_experts.5.0.weight'
    """
    match = _EXPERT.fullmatch(name)
    return name if match is None else f"{match[1]}{int(match[2]) + first}{match[3]}"
