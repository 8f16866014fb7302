"""The flags that `tests/unit/megatron_flags.txt` lists are Megatron-core's: those of its configs are fields of the installed ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytestmark = [pytest.mark.clients("megatron.core"), pytest.mark.filterwarnings("ignore")]  # importing it warns of much


def test_flags_of_the_transformer_config_are_its_fields() -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    text = (Path(__file__).parents[1] / "unit" / "megatron_flags.txt").read_text()
    listed = text.partition("# [transformer configuration]\n")[2].partition("# [")[0].split("\n")[:-1]
    assert len(listed) > 150
    assert {name for _, name, _ in (line.split() for line in listed)} <= fields
    for name, usual in {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}.items():
        assert next(field.default for field in dataclasses.fields(MLATransformerConfig) if field.name == name) == usual
