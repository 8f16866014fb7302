"""The fuzz harness: one registration per parser, one way to run any of them.

1. A `Target` names a parser, how to call it on bytes, genuine inputs for it and a mutation that knows its structure.
   A file ``targets_*.py`` in this folder registers its targets when it is imported; `load_targets` imports them all.
2. `attempt` parses one input under the guards of `guard`. A return is an acceptance, a `ShardwrightError` a refusal;
   anything else is a `FailedInputError`. A refusal that hides a `MemoryError` is a failure too.
3. `run` does so for many inputs and counts. The first failure is written beside the corpus as ``crash-<sha>``, and its
   message says how to repeat it.
4. The corpus of a target is the folder ``corpus/<name>``: one input per file, named by its hash. What it holds is
   replayed by every test run.

Adding a parser: write ``targets_<topic>.py`` with ``register(Target(…))``; nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shardwright.errors import ShardwrightError

from .guard import BreachError, guarded

__all__ = [
    "CORPUS",
    "TARGETS",
    "FailedInputError",
    "Statistics",
    "Target",
    "attempt",
    "corpus",
    "fresh",
    "keep",
    "load_targets",
    "recover",
    "register",
    "remember_in",
    "run",
    "signature",
]

CORPUS = Path(__file__).parent / "corpus"
MEASURED = 16
"""One input in so many has its memory measured; measuring makes a parse several times slower."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes
    ----------
    name
        Its corpus lies in ``tests/fuzz/corpus/<name>/``.
    modules
        Dotted names of the modules that parse; at least 95 % of their lines must be reached.
    parse
        Runs the parser on one input: returns on acceptance, raises a `ShardwrightError` on refusal. What it needs beyond
        the parser's own modules is imported when the target is registered: under the guard an import is a failure.
    seeds
        Genuine inputs, made by the real writers. Called before the guard is up, so it may import and write.
    mutate
        One input made into another; knows the structure, so that many results are still valid. Takes any bytes at all.
    elsewhere
        Functions and classes in `modules` that are not the parser (``"<module>:<qualified name>"``), for example a
        writer in the same file. Their lines do not count, and a test shows that no input reaches them.
    """

    name: str
    modules: tuple[str, ...]
    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    elsewhere: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make `target` known under its name."""
    if target.name in TARGETS:
        raise ValueError(f"two fuzz targets are called {target.name!r}")
    TARGETS[target.name] = target
    return target


def load_targets() -> dict[str, Target]:
    """Every target of this folder, by name."""
    for file in sorted(Path(__file__).parent.glob("targets_*.py")):
        importlib.import_module(f"{__package__}.{file.stem}")
    return TARGETS


@dataclass
class Statistics:
    """What became of a number of inputs; `errors` counts refusals by their type's name."""

    accepted: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    @property
    def refused(self) -> int:
        return self.errors.total()

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused

    def count(self, error: ShardwrightError | None, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)
        if error is None:
            self.accepted += 1
        else:
            self.errors[type(error).__name__] += 1

    def report(self) -> dict[str, object]:
        """As JSON holds it."""
        return {"inputs": self.inputs, "accepted": self.accepted, "errors": dict(self.errors.most_common()), "slowest": self.slowest}


class _Last:
    descriptor: int | None = None


def remember_in(file: Path) -> None:
    """Write each input to `file` before it is parsed, for the case that the process does not live to tell."""
    _Last.descriptor = os.open(file, os.O_RDWR | os.O_CREAT)


def recover(file: Path) -> str:
    """Keep the input that a process was parsing when it ended or hung, and say how to repeat it."""
    name, length, data = file.read_bytes().split(b"\n", 2)
    kept = keep(TARGETS[name.decode()], data[: int(length)], "crash-")
    return f"the process did not survive {kept}; repeat with: python -m tests.fuzz repeat {name.decode()} --input {kept}"


class FailedInputError(AssertionError):
    """An input did what none may; the message says what, and how to repeat it."""


def attempt(target: Target, data: bytes, *, measure: bool = True) -> ShardwrightError | None:
    """Parse one input under the guards: None when it is accepted, else the refusal.

    Raises
    ------
    FailedInputError
        Anything but those two; the input is kept as ``crash-<sha>``.
    """
    if _Last.descriptor is not None:
        os.pwrite(_Last.descriptor, f"{target.name}\n{len(data)}\n".encode() + data, 0)
    try:
        with guarded(len(data), measure=measure):
            target.parse(data)
    except ShardwrightError as refusal:
        # Some parsers turn whatever hostile bytes raise into a refusal. Running out of memory must not hide there.
        error: BaseException | None = refusal
        while error is not None:
            if isinstance(error, MemoryError) and not isinstance(error, ShardwrightError):
                raise _failed(target, data, error) from error
            error = error.__context__
        return refusal
    except (Exception, BreachError) as error:
        raise _failed(target, data, error) from error
    return None


def run(target: Target, inputs: Iterable[bytes], *, measured: int = MEASURED) -> Statistics:
    """Parse every input; the memory of one in `measured` is measured."""
    found = Statistics()
    for index, data in enumerate(inputs):
        started = time.perf_counter()
        error = attempt(target, data, measure=index % measured == 0)
        found.count(error, time.perf_counter() - started)
    return found


def fresh(target: Target, count: int, seed: int = 0) -> Iterable[bytes]:
    """`count` mutations, half of seeds and half of the corpus: the same for the same numbers and the same corpus."""
    rng = random.Random(f"{target.name}:{seed}")
    seeds = target.seeds()
    parents = (seeds, corpus(target) or seeds)
    for _ in range(count):
        yield target.mutate(rng.choice(rng.choice(parents)), rng)


def corpus(target: Target) -> list[bytes]:
    """The inputs that the repository keeps, crashes included, in order of name."""
    return [file.read_bytes() for file in sorted((CORPUS / target.name).glob("*")) if file.is_file()]


def keep(target: Target, data: bytes, prefix: str = "") -> Path:
    """Write `data` into the target's corpus."""
    file = CORPUS / target.name / (prefix + hashlib.sha256(data).hexdigest()[:12])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def signature(error: ShardwrightError) -> str:
    """The kind of a refusal: its type and message without what it quotes, names and counts."""
    return type(error).__name__ + ":" + re.sub(r"'.*'|\".*\"|\(.*|\S*[^\sa-zA-Z,:;.'-]\S*", "#", error.message)[:60]


def _failed(target: Target, data: bytes, error: BaseException) -> FailedInputError:
    file = keep(target, data, "crash-")
    shown = file.relative_to(CORPUS.parent.parent.parent)
    what = f"{type(error).__name__}: {error!s:.300}"
    return FailedInputError(f"{target.name}: {what}\nrepeat with: python -m tests.fuzz repeat {target.name} --input {shown}")
