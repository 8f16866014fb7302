"""Every kept input of every target, then 20,000 fresh mutations in all: no uncaught error, and a tenth accepted."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import CORPUS, load_targets
from .processes import in_processes

MUTATIONS = 20_000
"""Over all targets; with the corpus they take less than a minute on two cores."""
CORPUS_BYTES = 1 << 20

TARGETS = load_targets()


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    names = sorted(TARGETS)
    runs = str(-(-MUTATIONS // len(names)))
    halves = [["replay", *names[i::2], "--runs", runs] for i in range(2)]
    first, second = in_processes(halves, tmp_path_factory.mktemp("replay"), timeout=600)
    return {**first, **second}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_replay(replayed: dict[str, dict[str, Any]], name: str) -> None:
    found = replayed[name]
    assert "failure" not in found, found["failure"]
    assert found["inputs"] >= MUTATIONS // len(TARGETS)
    assert found["accepted"] >= 0.1 * found["inputs"], found


def test_the_corpus_is_small_and_all_of_it_is_replayed() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    assert sum(file.stat().st_size for file in CORPUS.glob("*/*")) <= CORPUS_BYTES
