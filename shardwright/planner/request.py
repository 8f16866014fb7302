"""What is asked for: a conversion's recipe, as the user gave it. What follows from it is `passes.request`'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .layout import Layout

__all__ = ["Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; together with the source it determines every byte of the target.

    Attributes
    ----------
    to
        Target format.
    dialect, container, spec
        Of the target; None is the format's default.
    dtype
        Cast floating tensors to it, except those the family keeps; None stores as in the source.
    quantize
        Name of a scheme.
    pad_vocab_to
        Pad the vocabulary to a multiple of this; None is the dialect's default.
    trust_replicas
        Do not read and compare copies.
    drop
        Patterns of stored names to leave out, or one pattern.
    optimizer
        ``"keep"`` or ``"drop"`` what the source has of the optimizer's state; None keeps it where the target can hold it.
    sha256
        Record each file's SHA-256, too; the finished target is read once more for it.
    """

    to: str
    layout: Layout = field(default_factory=Layout)
    dialect: str | None = None
    container: str | None = None
    spec: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: int = 5_000_000_000
    pad_vocab_to: int | None = None
    trust_replicas: bool = False
    drop: str | Sequence[str] = ()
    sha256: bool = False
    optimizer: str | None = None

    def __post_init__(self) -> None:
        # Text is one pattern, not a pattern for each of its characters.
        object.__setattr__(self, "drop", (self.drop,) if isinstance(self.drop, str) else tuple(self.drop))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "layout": self.layout.to_json(), "drop": list(self.drop)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request that a recipe holds: of `to_json`, or of an older version that knew fewer fields."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "layout": Layout.from_json(values["layout"]), "drop": values["drop"]})
