"""What a format is: how a checkpoint is recognised and opened, and how a target's tensors are filed.

Opening reads headers and small metadata files through a store and returns a `Source`: the four words (dialect, layout,
container, and the format's own filing), the family and canonical config, and every stored tensor by (rank, virtual
chunk) and name. Filing takes what the target stores and returns units (one container file or folder each), small files
of bytes, and files to carry over. Boundary: a format knows no operation and no pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Protocol

from ...errors import CheckpointError
from ..config import ModelConfig
from ..containers.base import StoredTensor, TensorSpec
from ..layout import Layout
from ..manifest import Manifest
from ..passes.rows import RowClass, hub_tensors
from ..passes.sides import Units, Wanted
from ..plan import Dropped
from ..schemes import Scheme
from ..store import Store
from ..tables import Dialect, Family

__all__ = ["COMPANIONS", "Filing", "Format", "Hints", "Source", "Target", "Training", "Unit", "companions"]

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.tiktoken",
    "generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*", "README*", "USE_POLICY*",
)  # fmt: skip
"""Small files that belong to a model and travel with it."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user adds where a checkpoint does not say: a family, a config.json's content, the true vocabulary size; and the
    manifest that SRC is, with names that count from the store's root."""

    family: Family | None = None
    config: Mapping[str, Any] | None = None
    vocab_size: int | None = None
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Training:
    """What a checkpoint holds of a training run besides tensors of the model's shapes.

    Attributes
    ----------
    tag
        The run's own name for it, e.g. ``global_step10``.
    optimizer
        The optimizer's hyper-parameters, the loss scaler's state and the like, as the format keeps them.
    steps
        By stored name, how many updates the parameter has had: a number, or a `TensorValue`.
    names
        By stored name, what the run itself calls the parameter.
    files
        (path in the store, plain name) of the files that hold counters, schedules and random states.
    state
        Those of the first one's entries that are plain values.
    """

    tag: str
    optimizer: Mapping[str, Any]
    steps: Mapping[str, Any]
    names: Mapping[str, str]
    files: tuple[tuple[str, str], ...]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: headers only.

    Attributes
    ----------
    spec
        Name variant of the dialect (``""`` where it has none).
    raw_config
        The model's own config.json, where one is at hand.
    padded_vocab
        Rows of the stored embedding where they are padded, else None.
    units
        Stored tensors by (rank, virtual chunk) and name.
    files
        Every file that is read, with the digest of its header.
    companions
        (path in the store, plain name) of small files that travel along.
    norm_shift
        What is added to stored norm weights to give the model's own: 1 where they are stored less 1 and the family's are not,
        -1 the other way round.
    config_path
        Where the model's own config.json lies, if it does.
    on_paper
        Whether there is nothing but a config: shapes, and no values.
    copies
        What repeats weights, perhaps rounded to a narrower dtype (a 16-bit module beside its float32 masters), as `units` are.
    planes
        What is stored beside the weights (``exp_avg``), as `units` are; a plane has the tensors that are trained.
    training
        What else a training run needs to go on.
    drop
        Patterns of stored names to leave out, whatever is done with the checkpoint.
    given
        What the user said of it: of ``--family``, ``--config``.
    """

    store: Store
    format: str
    dialect: Dialect
    spec: str
    container: str
    layout: Layout
    family: Family
    config: ModelConfig
    raw_config: Mapping[str, Any] | None
    padded_vocab: int | None
    units: Units
    files: Mapping[str, str]
    companions: tuple[tuple[str, str], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    warnings: tuple[str, ...] = ()
    scheme: Scheme | None = None
    identity: Mapping[str, Any] | None = None
    config_path: str = "hf/config.json"
    on_paper: bool = False
    norm_shift: int = 0
    copies: Units = field(default_factory=dict)
    planes: Mapping[str, Units] = field(default_factory=dict)
    training: Training | None = None
    drop: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    def stored(self) -> Iterator[StoredTensor]:
        """Every stored tensor, the planes' after the weights."""
        for units in (self.units, *self.planes.values()):
            for unit in units.values():
                yield from unit.values()

    @cached_property
    def hub(self) -> Mapping[str, tuple[int, ...]]:
        """Every hub tensor of the model, with its shape.

        Raises
        ------
        CheckpointError
            The config has more layers or tensors than the files can hold: it would list what cannot be there.
        """
        layers, stored = self.config["num_hidden_layers"], sum(map(len, self.units.values()))
        if layers > stored:
            raise CheckpointError(
                "the config has more layers than the checkpoint has tensors",
                file=self.store.root,
                expected=f"{layers} layers",
                actual=f"{stored} tensors",
                remedy="Copy the checkpoint again, or give the config.json that belongs to it (--config)",
            )
        return hub_tensors(self.family, self.config, most=self._most_tensors())

    def _most_tensors(self) -> int:
        """Far more hub tensors than lie in what is stored: of those that are merely missing, the name is worth more than this."""
        rows = [row for row in (self.family.rows if self.dialect.rows is None else self.dialect.rows) if self.spec in row.names]
        each = max(_MOST_PER_STORED, *(len(row.hub) for row in rows), 0)
        if not any(row.experts == "stack" for row in rows):
            return each * sum(map(len, self.units.values()))
        # A stack has one of each per expert.
        stored = (tensor.shape for unit in self.units.values() for tensor in unit.values())
        return each * sum(max(1, shape[0]) if len(shape) > 1 else 1 for shape in stored)


_MOST_PER_STORED = 16


@dataclass(frozen=True, slots=True)
class Target:
    """What a format needs to know to file a target.

    Attributes
    ----------
    wanted
        Every stored tensor, in order.
    dtype
        Main floating dtype, for configs.
    config_json
        The config.json that goes with the target.
    verbatim
        Its exact bytes where nothing changed from the source.
    rows
        The row of each of `wanted`, by its bound.
    training
        The source's.
    """

    layout: Layout
    dialect: Dialect
    spec: str
    container: str
    config: ModelConfig
    family: Family
    dtype: str
    padded_vocab: int | None
    max_shard_size: int
    wanted: Sequence[Wanted]
    config_json: Mapping[str, Any]
    verbatim: bytes | None
    companions: Sequence[tuple[str, str]]
    rows: Sequence[RowClass] = ()
    training: Training | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """One container file or folder: its path, its tensors as positions in `Target.wanted` with their keys, its objects.

    `place` is the unit's rank among those of its pipeline stage, tp fastest: its place in the `ranks` of tensors that the whole
    stage holds.
    """

    path: str
    members: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    objects: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    place: int = 0


@dataclass(frozen=True, slots=True)
class Filing:
    """All files of a target: units, small files, carried files (source path, target path), and warnings."""

    units: tuple[Unit, ...]
    files: tuple[tuple[str, bytes], ...]
    copies: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = field(default=())


class Format(Protocol):
    """A named preset of dialect, layout, filing and container, with its config and marker files.

    A format may say more of its targets: ``planes = True`` if they can hold optimizer state, ``keeps_names = True`` if their
    tensors are always called what the source calls them, ``dtype`` if there is only one for weights.
    """

    name: str
    ranked: bool
    """Whether the format can hold more than one rank."""

    @property
    def dialects(self) -> tuple[str, ...]:
        """Dialects that it can be written in, the default first."""

    @property
    def containers(self) -> tuple[str, ...]:
        """Containers that it can be written in, the default first."""

    def detect(self, store: Store) -> bool:
        """Whether the store looks like this format."""

    def open(self, store: Store, hints: Hints) -> Source:
        """Read headers; raise a `Refusal` that names what is wrong."""

    def file(self, target: Target) -> Filing:
        """Decide files and keys; refuse what the format cannot be. A load asks for that alone, with no tensors."""


def companions(store: Store, folder: str = "") -> tuple[tuple[str, str], ...]:
    """(path, plain name) of the companion files directly in `folder` (``""`` or ``"hf/"``)."""
    found = []
    for path in store.list():
        name = path.removeprefix(folder)
        if path.startswith(folder) and "/" not in name and any(fnmatchcase(name, pattern) for pattern in COMPANIONS):
            found.append((path, name))
    return tuple(found)
