"""Clients that are absent skip their tests; where SHARDWRIGHT_REQUIRE_CLIENTS=1 or CI=true says that they must be there, they fail."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

from tests.clients import hf_models
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
def hf_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hf_case("llama", dtype="bfloat16", …)``: the folder of that checkpoint, made by the first call. Leave it unchanged."""
    made: dict[str, Path] = {}

    def folder(case: str, **options: object) -> Path:
        key = "-".join([case, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in made:
            made[key] = hf_models.make(case, tmp_path_factory.mktemp("hf") / case, **options)
        return made[key]

    return folder
