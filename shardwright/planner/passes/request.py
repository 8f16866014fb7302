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
    """The target's words, settled.

    Attributes
    ----------
    dtype
        Floating weights are cast to it; None stores them as they are.
    planes
        What is converted beside the weights.
    """

    dialect: Dialect
    container: str
    spec: str
    padded_vocab: int | None
    config: ModelConfig
    scheme: Scheme | None
    dtype: str | None = None
    planes: tuple[str, ...] = ()


def settle_words(source: Source, request: Request) -> Words:
    """Settle the target's words; refuse combinations that make no sense."""
    target = FORMATS.get(request.to)
    if not target.ranked and request.layout.ranks > 1:
        raise UsageError(f"{request.to} holds one rank", actual=f"{request.layout.ranks} ranks", remedy="For rank files use --to ranks")
    # A target that goes on with a training run calls its tensors what the run does.
    same = getattr(target, "keeps_names", False)
    if same and request.pad_vocab_to is not None:
        raise UsageError(f"{request.to} holds the true vocabulary", actual="--pad-vocab-to", remedy="Leave it out")
    dialects = (source.dialect.name,) if same else target.dialects
    dialect = DIALECTS.get(_one_of(request.dialect, dialects, f"{request.to} has no dialect"))
    container = _one_of(request.container, target.containers, f"{request.to} has no container")
    specs = (source.spec,) if same else specs_of(dialect, source.family)
    spec = _one_of(request.spec, specs, f"dialect {dialect.name} has no spec")
    if source.scheme is not None:
        raise UsageError(
            "a quantised source can only be verified, not converted", actual=source.scheme.name, remedy="Convert the original weights"
        )
    scheme = None if request.quantize is None else SCHEMES.get(request.quantize)
    if scheme is not None and dialect.rows is not None:
        raise UsageError(f"dialect {dialect.name!r} has no place for quantised weights", remedy="Use --dialect huggingface")
    if scheme is not None and source.config.fields.get("num_experts"):
        raise UnsupportedError(f"models with experts are not quantised yet, as {scheme.name!r} does not know their names")
    padded = None if same else padded_vocab(source, request, dialect)
    fields = dict(source.config.fields)
    if not target.ranked and padded is not None:
        fields["vocab_size"] = padded  # nothing but config.json says how long the table is
    config = ModelConfig(source.config.family, fields)
    return Words(dialect, container, spec, padded, config, scheme, _dtype(request), _planes(source, request))


def _dtype(request: Request) -> str | None:
    """The target's own dtype, or the one asked for."""
    fixed: str | None = getattr(FORMATS.get(request.to), "dtype", None)
    if fixed is not None and request.dtype is not None and castable(request.dtype) != fixed:
        raise UsageError(f"{request.to} holds {fixed} and nothing else", actual=f"--dtype {request.dtype}", remedy="Leave it out")
    return fixed or request.dtype


def _planes(source: Source, request: Request) -> tuple[str, ...]:
    """The source's planes, where the target can hold them and they are wanted."""
    if request.optimizer not in (None, "keep", "drop"):
        raise UsageError("--optimizer is keep or drop", actual=request.optimizer)
    holds = getattr(FORMATS.get(request.to), "planes", False)
    if request.optimizer == "keep" and not (holds and source.planes):
        what = f"{request.to} has no place for the optimizer's state" if not holds else "the source holds no optimizer state"
        able = [f.name for f in FORMATS if getattr(f, "planes", False)]
        raise UsageError(what, remedy=f"Formats that hold it: {', '.join(able)}. Leave out --optimizer keep to convert the weights")
    return tuple(source.planes) if holds and request.optimizer != "drop" else ()


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
