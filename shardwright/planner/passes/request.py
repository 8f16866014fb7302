"""What is asked for, and the target's words that follow from it.

`settle_words` fills in the target format's defaults and refuses combinations that make no
sense; `casts` says which dtype a stored tensor gets. Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...errors import UnsupportedError, UsageError
from ..config import ModelConfig
from ..formats import FORMATS
from ..formats.base import Source
from ..request import Request
from ..schemes import SCHEMES, Scheme
from ..tables import DIALECTS, Dialect, Family, specs_of
from ..tensor.dtypes import dtype as dtype_of
from .rows import RowInstance, scope

__all__ = ["Cast", "Words", "castable", "casts", "padded_vocab", "settle_words"]


@dataclass(frozen=True)
class Words:
    """The target's words, settled."""

    dialect: Dialect
    container: str
    spec: str
    padded_vocab: int | None
    config: ModelConfig
    scheme: Scheme | None


def settle_words(source: Source, request: Request) -> Words:
    """Settle the target's words; refuse combinations that make no sense."""
    target = FORMATS.get(request.to)
    if not target.ranked and request.layout.ranks > 1:
        raise UsageError(f"{request.to} holds one rank", actual=f"{request.layout.ranks} ranks", remedy="For rank files use --to ranks")
    dialect = DIALECTS.get(_one_of(request.dialect, target.dialects, f"{request.to} has no dialect"))
    container = _one_of(request.container, target.containers, f"{request.to} has no container")
    spec = _one_of(request.spec, specs_of(dialect, source.family), f"dialect {dialect.name} has no spec")
    if source.scheme is not None:
        raise UsageError(
            "a quantised source can only be verified, not converted", actual=source.scheme.name, remedy="Convert the original weights"
        )
    scheme = None if request.quantize is None else SCHEMES.get(request.quantize)
    if scheme is not None and dialect.rows is not None:
        raise UsageError(f"dialect {dialect.name!r} has no place for quantised weights", remedy="Use --dialect huggingface")
    if scheme is not None and source.config.fields.get("num_experts"):
        raise UnsupportedError(f"models with experts are not quantised yet, as {scheme.name!r} does not know their names")
    padded = padded_vocab(source, request, dialect)
    fields = dict(source.config.fields)
    if not target.ranked and padded is not None:
        fields["vocab_size"] = padded  # nothing but config.json says how long the table is
    return Words(dialect, container, spec, padded, ModelConfig(source.config.family, fields), scheme)


def _one_of(wanted: str | None, known: Sequence[str], what: str) -> str:
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise UsageError(f"{what} {wanted!r}", remedy=f"Known: {', '.join(known)}" if any(known) else "It has none: leave it out")
    return wanted


def padded_vocab(source: Source, request: Request, dialect: Dialect) -> int | None:
    """Rows of the padded vocabulary, or None for the true one."""
    fields = scope(source.config, request.layout, None)
    multiple = request.pad_vocab_to or (dialect.pad_vocab(fields) if dialect.pad_vocab else None)
    if multiple is None:
        return None
    if type(multiple) is not int or multiple < 1:
        raise UsageError("--pad-vocab-to needs a positive number", actual=multiple)
    vocab: int = source.config["vocab_size"]
    return -(-vocab // multiple) * multiple


Cast = Callable[[RowInstance, str, str], str]


def casts(family: Family, dtype: str | None) -> Cast:
    """The user's dtype for floating tensors of 16 bits and more, but for those the family keeps."""
    after = None if dtype is None else castable(dtype)

    def cast(row: RowInstance, name: str, before: str) -> str:
        if after is None:
            return before
        known = dtype_of(before)
        if known.kind != "float" or known.bits < 16 or any(fnmatchcase(name, pattern) for pattern in family.keep_dtype):
            return before
        return after

    return cast


_CASTABLE = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip


def castable(dtype: str) -> str:
    """The full name of a dtype that weights can be cast to."""
    name = dtype_of(dtype).name
    if name not in _CASTABLE:
        raise UsageError(f"weights are not cast to {name}", remedy=f"Known: {', '.join(_CASTABLE)}; to integers with --quantize")
    return name
