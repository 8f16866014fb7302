"""A conversion that tests may disturb, and a place for its target."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shardwright.executors import ledger
from tests.faults.scenes import BATCH_BYTES, Scene, make_scene


@pytest.fixture(scope="session")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """From padded ranks to one file."""
    return make_scene(tmp_path_factory.mktemp("scenes") / "gathered", "gathered")


@pytest.fixture
def scene(gathered: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The same with small batches and a source of its own, which a test may harm."""
    monkeypatch.setattr(ledger, "BATCH_BYTES", BATCH_BYTES)
    root = tmp_path / "source"
    shutil.copytree(gathered.plan.source_root, root)  # with their times
    return replace(gathered, plan=replace(gathered.plan, source_root=str(root)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the target goes; its parent holds nothing else."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"
