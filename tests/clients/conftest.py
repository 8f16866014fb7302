"""Clients that are absent skip their tests; where SHARDWRIGHT_REQUIRE_CLIENTS=1 or CI=true says that they must be there, they fail."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import hf_models
from tests.clients.deepspeed import DeepSpeed, Job, Run
from tests.clients.deepspeed_stack import STACKS
from tests.clients.mcore import Megatron

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [name for mark in item.iter_markers("clients") for name in mark.args if not _installed(name)]
    if not missing:
        return
    message = f"{', '.join(missing)} not installed here; `make test-clients` installs it"
    if os.environ.get("SHARDWRIGHT_REQUIRE_CLIENTS") == "1" or os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


@pytest.fixture(scope="session")
def mcore() -> Iterator[Megatron]:
    """One Megatron server for the session; see `mcore.Megatron.logits`."""
    with Megatron() as server:
        yield server


@pytest.fixture(scope="session")
def deepspeed() -> Iterator[DeepSpeed]:
    """One DeepSpeed server for the session."""
    with DeepSpeed() as server:
        yield server


@pytest.fixture(scope="session")
def trained(deepspeed: DeepSpeed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``trained("llama", stage=2, …)``: the run of that `Job`, made by the first call. Leave its folder unchanged."""
    made: dict[Job, Run] = {}

    def run(model: str, **options: Any) -> Run:
        job = Job(model, **options)
        if job not in made:
            made[job] = deepspeed.train(job, tmp_path_factory.mktemp("deepspeed") / "run")
        return made[job]

    return run


@pytest.fixture(scope="session")
def universal(deepspeed: DeepSpeed, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Path]:
    """What ``ds_to_universal`` makes of a run: the folder with ``latest_universal``, made by the first call."""
    made: dict[Path, Path] = {}

    def convert(run: Run) -> Path:
        if run.folder not in made:
            out = tmp_path_factory.mktemp("universal") / "run"
            made[run.folder] = deepspeed.to_universal(run.tag, out, inject=run.job.model not in STACKS)
        return made[run.folder]

    return convert


@pytest.fixture(scope="session")
def hf_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hf_case("llama", dtype="bfloat16", …)``: the folder of that checkpoint, made by the first call. Leave it unchanged."""
    made: dict[str, Path] = {}

    def folder(case: str, **options: object) -> Path:
        key = "-".join([case, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in made:
            made[key] = hf_models.make(case, tmp_path_factory.mktemp("hf") / case, **options)
        return made[key]

    return folder
