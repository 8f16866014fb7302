"""The argument list beside a Megatron target: Megatron-LM's own flags, and what they parse to is what the checkpoint's args say.

`megatron_flags.txt` is what Megatron-LM's parser has; an argparse parser is built from it here and given the list as a launch
script would give it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from shardwright.planner.megatron_flags import FILE_NAME, argument_list, unsaid, with_newer_names
from shardwright.planner.tables import FAMILIES
from tests.unit.configs import CONFIGS, experts, holds

FLAGS = [line.split() for line in (Path(__file__).parent / "megatron_flags.txt").read_text().splitlines() if not line.startswith("#")]
DERIVED = {
    "params_dtype", "padded_vocab_size", "virtual_pipeline_model_parallel_size", "use_mcore_models", "consumed_train_samples",
    "consumed_valid_samples", "iteration", "norm_epsilon", "apply_layernorm_1p",
}  # fmt: skip
"""Arguments that no flag sets: worked out of others, a run's state, or older names of others."""


FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""What Megatron's config for latent attention has by default, and no flag changes."""


CHOICES = {"position_embedding_type": ["learned_absolute", "rope", "mrope", "relative", "none"], "rope_type": ["rope", "yarn"]}


def parser() -> argparse.ArgumentParser:
    """Megatron-LM's, as far as the file goes; its types as in training/arguments.py."""
    kinds: dict[str, Any] = {
        "int": int, "float": float, "bool": bool, "tuple_type": lambda text: tuple(int(n) for n in text.strip("()").split(",")),
        "moe_freq_type": lambda text: eval(text, {"__builtins__": {}}) if "[" in text else int(text),
    }  # fmt: skip
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for flag, name, kind in FLAGS:
        if kind in ("true", "false"):
            made.add_argument(flag, dest=name, action=f"store_{kind}")
        else:
            several, choices = "+" if kind.endswith("+") else None, CHOICES.get(name)
            made.add_argument(flag, dest=name, type=kinds.get(kind.rstrip("+"), str), nargs=several, choices=choices)
    return made


def arguments_of(root: Path) -> dict[str, Any]:
    (first, *_) = sorted(root.glob("release/*/model_optim_rng.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(vars(torch.load(first, weights_only=True)["args"]))


def differences(parsed: dict[str, Any], held: dict[str, Any]) -> list[str]:
    """Arguments that the flags and the checkpoint's args do not agree on."""
    found = []
    for name in sorted(set(held) - DERIVED - set(FIXED)):
        if name not in parsed:
            found.append(f"{name}: Megatron has no such argument")
            continue
        got = parsed[name][0] if isinstance(parsed[name], list) and not isinstance(held[name], list) else parsed[name]
        if got != held[name] and not (got is None and held[name] is None):
            found.append(f"{name}: the flags say {got!r}, the args {held[name]!r}")
    return found


LAYOUTS = (Layout(tp=2, pp=2, vpp=2), Layout(pp=2, stages=(1, 3)), Layout(tp=4))


CASES = [(name, layout) for name in CONFIGS for layout in LAYOUTS if holds(name, "megatron", None, layout)]


@pytest.mark.parametrize(
    ("family", "layout"), CASES, ids=lambda part: part if isinstance(part, str) else f"tp{part.tp}-pp{part.pp}-vpp{part.vpp}"
)
def test_flags_say_what_the_args_say(family: str, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    ep = 2 if experts(family) else 1
    here = Layout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=ep, stages=layout.stages)
    made, out = sw.synth(tmp_path / "config.json", tmp_path / "made", dtype="bfloat16"), tmp_path / "out"
    sw.convert(made, out, to="megatron-legacy", layout=here)
    text = (out / FILE_NAME).read_text()
    assert all(line.startswith("--") for line in text.splitlines()), "one flag to a line"
    assert len({line.split()[0] for line in text.splitlines()}) == len(text.splitlines())
    held = arguments_of(out)
    assert differences(vars(parser().parse_args(shlex.split(text))), held) == []
    padded = -(-held["vocab_size"] // (unit := held["make_vocab_size_divisible_by"] * layout.tp)) * unit
    assert padded == held["padded_vocab_size"], "Megatron's own padding of the vocabulary"
    assert FILE_NAME not in [p.name for p in sw.plan(out, tmp_path / "back", to="huggingface").plan.copies]


def test_a_larger_padding_than_needed_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    made = sw.synth(tmp_path / "config.json", tmp_path / "made")
    sw.convert(made, tmp_path / "out", to="megatron-legacy", layout=Layout(tp=2), pad_vocab_to=1024)
    held = arguments_of(tmp_path / "out")
    assert (held["padded_vocab_size"], held["make_vocab_size_divisible_by"]) == (1024, 512)


def test_a_shell_gives_megatron_these_words() -> None:
    """Patterns, bars and stars reach the command as they are."""
    held = {"moe_layer_freq": [0, 1, 1], "pipeline_model_parallel_layout": "Et*1|t*2L", "window_size": (63, 0), "rotary_base": 500000.0}
    text = argument_list(held)
    ran = subprocess.run(["xargs", "printf", "%s\\n"], input=text, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == shlex.split(text)
    parsed = vars(parser().parse_args(shlex.split(text)))
    assert {name: parsed[name] for name in held} == held | {"rotary_base": 500000}


def test_what_no_flag_can_say_is_warned_of() -> None:
    assert unsaid(FIXED | {"rotary_base": 10000.0, "num_layers": 3}) == []
    for name, value in ({name: value + 1 for name, value in FIXED.items()} | {"rotary_base": 10000.5}).items():
        (text,) = unsaid(FIXED | {name: value})
        assert f"{name} = {value}" in text
    assert not {name for _, name, _ in FLAGS} & set(FIXED), "Megatron has no such flags"


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_yarn_is_in_the_flags_or_in_a_warning(family: str, tmp_path: Path) -> None:
    """The launch script starts with the list as it is; whatever it cannot say of the args, the plan does."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family] | {"rope_scaling": YARN}))
    sw.synth(tmp_path / "config.json", tmp_path / "made")
    job = sw.convert(tmp_path / "made", tmp_path / "out", to="megatron-legacy")
    parsed = vars(parser().parse_args(shlex.split((tmp_path / "out" / FILE_NAME).read_text())))
    held = {name: value for name, value in arguments_of(tmp_path / "out").items() if value is not None}
    said = " ".join(job.plan.warnings)
    unlike = {text.partition(":")[0] for text in differences(parsed, held)} | (FIXED.keys() & held.keys())
    assert len(unlike) >= 3
    assert {name for name in unlike if f"{name} = " not in said and f"'{name}': " not in said} == set()


def test_a_wrong_list_is_noticed() -> None:
    held = {"num_layers": 4, "swiglu": True, "add_bias_linear": True, "no_such_argument": 3}
    parsed = vars(parser().parse_args(shlex.split(argument_list({"num_layers": 5, "add_bias_linear": False}))))
    assert [text.partition(":")[0] for text in differences(parsed, held)] == ["add_bias_linear", "no_such_argument", "num_layers", "swiglu"]


def test_names_of_both_versions() -> None:
    newer = with_newer_names({"norm_epsilon": 1e-6, "apply_layernorm_1p": True})
    assert newer == with_newer_names({"layernorm_epsilon": 1e-6, "layernorm_zero_centered_gamma": True})
    assert len(newer) == 4


def test_args_of_newer_megatron_are_read() -> None:
    """Since core_v0.16 the args have layernorm_epsilon, and no norm_epsilon."""
    from shardwright.planner.config import from_huggingface
    from shardwright.planner.megatron_args import from_megatron, to_megatron

    config = from_huggingface(CONFIGS["llama"], FAMILIES.get("llama"))
    held, _ = to_megatron(config, FAMILIES.get("llama"))
    held["layernorm_epsilon"] = held.pop("norm_epsilon")
    assert from_megatron(held, FAMILIES.get("llama"), None, "x.pt") == config
