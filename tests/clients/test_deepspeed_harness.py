"""The DeepSpeed harness itself is right, and sees what is wrong.

Nothing of shardwright takes part. What the live engine holds is what its module computes with, what its own files load
back, what ``zero_to_fp32`` and ``ds_to_universal`` make of them, and what transformers computes the next loss with.
Where DeepSpeed's own tools are wrong or refuse, a test says so: there they are no judges.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.clients import deepspeed_shards, deepspeed_stack
from tests.clients.deepspeed import DeepSpeed, Job, RankError, Run
from tests.clients.deepspeed_shards import Classic
from tests.clients.judge import assert_same_bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("deepspeed", "transformers")

KINDS = ("param", "exp_avg", "exp_avg_sq")
FROZEN = ("embed_tokens", "layers.0.self_attn.q_proj")

RUNS: dict[str, dict[str, Any]] = {
    "stage 0": {"model": "gpt2", "stage": 0, "groups": 2},
    "stage 0, bfloat16": {"model": "gpt2", "stage": 0, "dtype": "bfloat16"},
    "stage 1": {"model": "llama", "stage": 1, "groups": 2},
    "stage 1, frozen": {"model": "llama", "stage": 1, "frozen": FROZEN},
    "stage 1, uneven": {"model": "uneven", "stage": 1, "dp": 4, "groups": 2},
    "stage 1, bfloat16": {"model": "gpt2", "stage": 1, "dtype": "bfloat16"},
    "stage 2, tied": {"model": "llama_tied", "stage": 2, "dp": 4, "groups": 3},
    "stage 2, frozen": {"model": "llama", "stage": 2, "frozen": FROZEN, "groups": 2},
    "stage 2, float16": {"model": "gpt2", "stage": 2, "dtype": "float16"},
    "stage 2, round robin": {"model": "llama", "stage": 2, "groups": 2, "zero": (("round_robin_gradients", True),)},
    "stage 2, aligned": {"model": "uneven", "stage": 2, "dp": 4, "groups": 2, "zero": (("parameter_alignment", True),)},
    "stage 2, elastic": {"model": "uneven", "stage": 2, "groups": 2, "zero": (("elastic_checkpoint", True),)},
    "stage 3, tied": {"model": "llama_tied", "stage": 3},
    "stage 3, uneven": {"model": "uneven", "stage": 3, "dp": 4},
    "stage 3, sub-groups": {"model": "uneven", "stage": 3, "groups": 2, "zero": (("sub_group_size", 10),)},
    "stage 3, frozen": {"model": "uneven", "stage": 3, "dp": 4, "frozen": ("embed", "out.bias")},
    "stage 3, bfloat16": {"model": "gpt2", "stage": 3, "dtype": "bfloat16", "groups": 2},
    "BF16_Optimizer": {"model": "llama_tied", "stage": 1, "dtype": "bfloat16", "gradients": "fp32", "groups": 2},
    "BF16_Optimizer, uneven": {"model": "uneven", "stage": 1, "dp": 4, "dtype": "bfloat16", "gradients": "fp32", "groups": 2},
    "tp 2": {"model": "bloom", "stage": 1, "tp": 2, "groups": 2},
    "tp 2, gpt": {"model": "gpt", "stage": 2, "tp": 2, "dp": 1},
    "pp 2": {"model": "bloom", "stage": 1, "pp": 2},
    "tp 2, pp 2": {"model": "bloom_drift", "stage": 1, "tp": 2, "pp": 2, "dtype": "bfloat16", "gradients": "fp32"},
    "pp 2, stage 0, bfloat16": {"model": "gpt_untied", "pp": 2, "dp": 1, "dtype": "bfloat16"},
    "experts": {"model": "experts", "stage": 2, "dp": 4, "ep": 2},
    "experts, stage 0": {"model": "experts", "stage": 0, "ep": 2},
}
NOT_BY_ZERO_TO_FP32 = {name for name in RUNS if name.startswith(("stage 0", "BF16", "tp", "pp", "experts"))}
NOT_BY_UNIVERSAL = {name for name in RUNS if name.startswith(("stage 0", "experts")) or "stage 0" in name} | {
    "stage 2, elastic",
    "stage 2, round robin",
    "BF16_Optimizer, uneven",
}


def assert_same_state(actual: Run, expected: Run) -> None:
    assert actual.states.keys() == expected.states.keys()
    for rank, state in expected.states.items():
        for kind in (*KINDS, "module"):
            assert_same_bits(getattr(actual.states[rank], kind), getattr(state, kind))
        assert actual.states[rank].step == state.step


def universal_tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """``fp32``, ``exp_avg`` or ``exp_avg_sq`` of every parameter that has it; flat where DeepSpeed writes it flat."""
    zero = folder / (folder / "latest_universal").read_text() / "zero"
    found = {file.parent.name: torch.load(file, weights_only=False) for file in zero.glob(f"*/{kind}.pt")}
    return {name: value["param"] if isinstance(value, dict) else value for name, value in found.items()}


@pytest.mark.parametrize("name", RUNS)
def test_masters_are_what_the_module_computes_with(name: str, trained: Callable[..., Run]) -> None:
    run = trained(**RUNS[name])
    for state in run.states.values():
        assert state.param.keys() == state.exp_avg.keys() == state.exp_avg_sq.keys()
        assert state.module.keys() - state.param.keys() == {n for n in state.module if any(part in n for part in run.job.frozen)}
        for key, master in state.param.items():
            assert torch.equal(master.to(state.module[key].dtype), state.module[key]), key
            assert state.exp_avg[key].any() or is_idle(key, run), key
        assert state.step == (3 if name == "stage 0, bfloat16" else 2)  # the wrapper of that optimizer makes a step of its own


def is_idle(key: str, run: Run) -> bool:
    """No gradient reaches what a pipeline's last stage holds beside the tied weight, nor an expert without tokens."""
    return (run.job.pp > 1 and key.startswith("tied_modules")) or "deepspeed_experts" in key


@pytest.mark.parametrize("name", sorted(RUNS.keys() - NOT_BY_ZERO_TO_FP32))
def test_zero_to_fp32_gives_the_masters(name: str, trained: Callable[..., Run], deepspeed: DeepSpeed) -> None:
    run = trained(**RUNS[name])
    found, state = deepspeed.zero_to_fp32(run.folder), run.truth
    frozen = {key: state.module[key] for key in state.module.keys() - state.param.keys() if run.job.stage > 1}
    shared = {alias: state.param[key] for alias, key in state.shared.items()}
    buffers = {key: buffer for key, buffer in state.buffer.items() if "inv_freq" not in key}
    assert_same_bits(found, state.param | frozen | shared | buffers)


@pytest.mark.parametrize("name", sorted(NOT_BY_ZERO_TO_FP32))
def test_zero_to_fp32_refuses(name: str, trained: Callable[..., Run], deepspeed: DeepSpeed) -> None:
    with pytest.raises(RankError):
        deepspeed.zero_to_fp32(trained(**RUNS[name]).folder)


@pytest.mark.parametrize(
    "name",
    [
        *("stage 0", "stage 0, bfloat16", "stage 1, bfloat16", "stage 2, tied", "stage 2, round robin", "stage 2, aligned"),
        *("stage 3, sub-groups", "stage 3, bfloat16", "BF16_Optimizer, uneven", "tp 2", "pp 2", "experts"),
    ],
)
def test_its_own_files_bring_everything_back(name: str, trained: Callable[..., Run], deepspeed: DeepSpeed) -> None:
    run = trained(**RUNS[name])
    again = deepspeed.resume(run.job, run.folder)
    if run.job.pp == 1:
        assert_same_state(again, run)
    assert again.losses == run.losses


@pytest.mark.parametrize("name", sorted(RUNS.keys() - NOT_BY_UNIVERSAL))
def test_universal_holds_the_masters(name: str, trained: Callable[..., Run], universal: Callable[[Run], Path]) -> None:
    run = trained(**RUNS[name])
    for ours, theirs in zip(KINDS, ("fp32", "exp_avg", "exp_avg_sq"), strict=True):
        expected = run.joined(ours) if run.job.model in deepspeed_stack.STACKS else getattr(run.truth, ours)
        found = universal_tensors(universal(run), theirs)
        flat = {key: found[key].reshape(expected[key].shape) for key in expected}
        assert_same_bits(flat, expected)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("stage 1", {"dp": 4}),
        ("stage 1, uneven", {"dp": 2}),
        ("stage 2, tied", {"dp": 2, "stage": 1}),
        ("stage 2, frozen", {"dp": 1}),
        ("stage 2, float16", {"dp": 1}),
        ("stage 2, aligned", {"dp": 2}),
        ("stage 3, tied", {"dp": 1}),
        ("stage 3, uneven", {"dp": 2}),
        ("BF16_Optimizer", {"dp": 1}),
        ("tp 2", {"tp": 1}),
        ("pp 2", {"tp": 2, "pp": 3, "dp": 1}),
        ("tp 2, pp 2", {"tp": 1, "dp": 1}),
    ],
)
def test_resumed_from_universal_goes_on_the_same(
    name: str, layout: dict[str, Any], trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed
) -> None:
    run = trained(**RUNS[name])
    again = deepspeed.resume(dataclasses.replace(run.job, **layout), universal(run), universal=True)
    if run.job.model not in deepspeed_stack.STACKS:
        assert_same_state(again, run)
    assert again.losses == pytest.approx(run.losses, abs=1e-5 if run.job.dtype == "float32" else 5e-3)
    assert abs(run.losses[1] - run.losses[0]) > 0.02


@pytest.mark.parametrize("name", ["stage 1", "stage 2, tied", "stage 0"])
def test_transformers_has_the_next_loss(name: str, trained: Callable[..., Run], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    run = trained(**RUNS[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run.folder), dtype=torch.float32)
    model.load_state_dict(run.truth.param | {alias: run.truth.param[key] for alias, key in run.truth.shared.items()})
    model.save_pretrained(tmp_path)
    assert run.next_loss(tmp_path) == pytest.approx(run.losses[0], abs=1e-5)


@pytest.mark.parametrize("name", ["tp 2", "pp 2"])
def test_the_stack_is_bloom(name: str, trained: Callable[..., Run]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    run = trained(**RUNS[name])
    stack = deepspeed_stack.STACKS[run.job.model]
    config = BloomConfig(vocab_size=stack.vocab, hidden_size=stack.hidden, n_layer=stack.layers, n_head=stack.heads)
    model = BloomForCausalLM(config)
    model.load_state_dict(deepspeed_stack.huggingface(run.joined("param")))
    assert run.next_loss_of(model) == pytest.approx(run.losses[0], abs=1e-5)


def swap_two_ranks(run: Run, folder: Path) -> None:
    first, second = sorted(folder.glob("*optim_states.pt"))[:2]
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)


def nudge_a_master(run: Run, folder: Path) -> None:
    file = sorted(folder.glob("*optim_states.pt"))[1]
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[7] += 1e-4
    torch.save(content, file)


@pytest.mark.parametrize("mutate", [swap_two_ranks, nudge_a_master])
def test_wrong_files_give_other_weights(
    mutate: Callable[[Run, Path], None], trained: Callable[..., Run], deepspeed: DeepSpeed, tmp_path: Path
) -> None:
    run = trained(**RUNS["stage 2, tied"])
    folder = shutil.copytree(run.folder, tmp_path / "run")
    mutate(run, folder / run.tag.name)
    found = deepspeed.zero_to_fp32(folder)
    assert not all(torch.equal(found[key], master) for key, master in run.truth.param.items())


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "step", "fp32"])
def test_wrong_universal_states_change_the_run(
    state: str, trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed, tmp_path: Path
) -> None:
    run = trained(**RUNS["stage 1"])
    folder = shutil.copytree(universal(run), tmp_path / "universal")
    for file in folder.glob(f"*/zero/*/{state}.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "param": content["param"] * 1.5} if isinstance(content, dict) else content * 3, file)
    again = deepspeed.resume(run.job, folder, universal=True)
    assert max(abs(a - b) for a, b in zip(again.losses, run.losses, strict=True)) > 1e-4


@pytest.mark.parametrize(("ours", "theirs"), [(2, 4), (4, 2), (3, 1), (1, 6)])
@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_shards_are_split_and_merged_by_their_definition(
    ours: int, theirs: int, version: float, deepspeed: DeepSpeed, tmp_path: Path
) -> None:
    tensors = deepspeed_shards.full(Classic())
    files = deepspeed_shards.write(tensors, tmp_path, ours, version)
    for rank in {0, theirs - 1}:
        found = deepspeed.load_shards(files, version=None, world=theirs, rank=rank)
        assert_same_bits(found, deepspeed_shards.shard(tensors, theirs, rank, version))


@pytest.mark.parametrize(
    ("model", "version", "worlds", "complaint"),
    [
        (Classic(), 3.0, (4, 2), "checkpoint version: 3.0 is not supported"),
        (Classic(), 2.0, (6, 4), "Invalid checkpoints and world size for sd merge"),
        (Classic(bias=False), 2.0, (4, 2), "dense_h_to_4h.bias is not found"),
    ],
)
def test_shards_that_deepspeed_refuses(
    model: Classic, version: float, worlds: tuple[int, int], complaint: str, deepspeed: DeepSpeed, tmp_path: Path
) -> None:
    files = deepspeed_shards.write(deepspeed_shards.full(model), tmp_path, worlds[0], version)
    with pytest.raises(RankError, match=complaint):
        deepspeed.load_shards(files, version=None, world=worlds[1], rank=0)


@pytest.mark.parametrize(
    ("model", "wrong"),
    [(Classic(head=True), {"output_layer.weight"}), (Classic(swiglu=True), {"dense_h_to_4h.weight", "dense_h_to_4h.bias"})],
)
def test_shards_that_deepspeed_scrambles(model: Classic, wrong: set[str], deepspeed: DeepSpeed, tmp_path: Path) -> None:
    tensors = deepspeed_shards.full(model)
    files = deepspeed_shards.write(tensors, tmp_path, 4, 2.0)
    found = deepspeed.load_shards(files, version=None, world=2, rank=1)
    expected = deepspeed_shards.shard(tensors, 2, 1, 2.0)
    different = {key for key in expected if found[key].shape != expected[key].shape or not torch.equal(found[key], expected[key])}
    assert {".".join(key.split(".")[-2:]) for key in different} == wrong


@pytest.mark.parametrize("rank", [0, 1])
def test_layer_files_are_loaded_without_a_key(rank: int, trained: Callable[..., Run], deepspeed: DeepSpeed) -> None:
    run = trained(**RUNS["pp 2"])
    files = sorted(run.tag.glob("layer_03-*"))
    found = deepspeed.load_shards(files, version=2.0, world=2, rank=rank, module_key=None)
    stack = deepspeed_stack.STACKS["bloom"]
    whole = {key[2:]: tensor for key, tensor in run.joined("module").items() if key.startswith("3.")}
    assert found.keys() == whole.keys()
    assert torch.equal(found["mlp.dense_4h_to_h.weight"], whole["mlp.dense_4h_to_h.weight"].chunk(2, 1)[rank])
    assert torch.equal(found["self_attention.query_key_value.weight"], whole["self_attention.query_key_value.weight"].chunk(2)[rank])
    assert torch.equal(found["input_layernorm.bias"], whole["input_layernorm.bias"])
    assert stack.heads % 2 == 0  # or the cut of the query, key and value rows above would go through a head


def test_expert_files_hold_the_experts(trained: Callable[..., Run]) -> None:
    run = trained(**RUNS["experts"])
    files = sorted(run.tag.glob("layer_*_expert_*_model_states.pt"))
    assert len(files) == 8
    found = {}
    for file in files:
        found |= torch.load(file, weights_only=False)
    expected = {}
    for (_, _, rank), state in run.states.items():
        for key in state.expert:
            before, number, after = key.partition("deepspeed_experts.")[0], int(key.split(".")[5]), key.split(".", 6)[6]
            expected[f"{before}deepspeed_experts.{rank * 2 + number}.{after}"] = state.module[key]
    assert_same_bits(found, expected)


# What DeepSpeed's own tools get wrong.


def test_ds_to_universal_scrambles_round_robin(trained: Callable[..., Run], universal: Callable[[Run], Path]) -> None:
    run = trained(**RUNS["stage 2, round robin"])
    found = universal_tensors(universal(run), "fp32")
    wrong = [key for key, master in run.truth.param.items() if not torch.equal(found[key], master)]
    assert len(wrong) > len(run.truth.param) / 2


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("stage 2, elastic", "'list' object has no attribute 'get'"),
        ("BF16_Optimizer, uneven", "length must be non-negative"),
        ("experts", "is invalid for input of size"),
    ],
)
def test_ds_to_universal_fails(name: str, complaint: str, trained: Callable[..., Run], universal: Callable[[Run], Path]) -> None:
    with pytest.raises(RankError, match=complaint):
        universal(trained(**RUNS[name]))


@pytest.mark.parametrize(("name", "stage"), [("stage 2, tied", 3), ("stage 3, tied", 2)])
def test_universal_folders_of_deepspeed_do_not_cross_stage_3(
    name: str, stage: int, trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed
) -> None:
    run = trained(**RUNS[name])
    with pytest.raises(RankError):
        deepspeed.resume(dataclasses.replace(run.job, stage=stage, dp=1), universal(run), universal=True)


def test_resumed_at_stage_3_each_sub_group_counts_the_same_steps(
    trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed
) -> None:
    """The step that it loads is one tensor, shared by all sub-groups, and each adds to it; group 0's weight decay goes to all groups."""
    run = trained(**RUNS["stage 3, sub-groups"])
    again = deepspeed.resume(dataclasses.replace(run.job, dp=1), universal(run), universal=True)
    assert_same_state(again, run)
    assert again.losses[0] == pytest.approx(run.losses[0], abs=1e-5)
    assert abs(again.losses[1] - run.losses[1]) > 1e-4


@pytest.mark.parametrize(("name", "complaint"), [("stage 2, elastic", "AssertionError"), ("pp 2, stage 0, bfloat16", "KeyError: 0")])
def test_deepspeed_does_not_load_its_own_files(name: str, complaint: str, trained: Callable[..., Run], deepspeed: DeepSpeed) -> None:
    run = trained(**RUNS[name])
    with pytest.raises(RankError, match=complaint):
        deepspeed.resume(run.job, run.folder)


def test_stage_3_stores_its_padding(trained: Callable[..., Run]) -> None:
    """Each parameter is rounded up to the ranks; what fills the rest of a master is never set."""
    run = trained(**RUNS["stage 3, sub-groups"])
    files = sorted(run.tag.glob("*optim_states.pt"))
    shapes = torch.load(next(run.tag.glob("*model_states.pt")), weights_only=False)["param_shapes"]
    assert len(shapes) > 2
    for group, names in enumerate(shapes):
        parts = [torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"][group] for file in files]
        assert {len(part) for part in parts} == {sum(-(-shape.numel() // len(files)) for shape in names.values())}


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["uneven", "llama_tied"])
def test_twelve_ranks(stage: int, model: str, trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed) -> None:
    run = trained(model, stage=stage, dp=12, batch=12)
    found = deepspeed.zero_to_fp32(run.folder)
    assert_same_bits({key: found[key] for key in run.truth.param}, run.truth.param)
    again = deepspeed.resume(Job(model, stage=stage, dp=3, batch=12), universal(run), universal=True)
    assert_same_state(again, run)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["bloom", "gpt", "gpt_untied"])
@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 3), (1, 2, 3)])
def test_stacks_in_every_layout(
    name: str, layout: tuple[int, int, int], trained: Callable[..., Run], universal: Callable[[Run], Path], deepspeed: DeepSpeed
) -> None:
    dp, tp, pp = layout
    run = trained(name, stage=1, dp=dp, tp=tp, pp=pp, groups=2)
    for ours, theirs in zip(KINDS, ("fp32", "exp_avg", "exp_avg_sq"), strict=True):
        found = universal_tensors(universal(run), theirs)
        expected = run.joined(ours)
        assert_same_bits({key: found[key] for key in expected}, expected)
    again = deepspeed.resume(dataclasses.replace(run.job, dp=2, tp=1), universal(run), universal=True)
    assert again.losses == pytest.approx(run.losses, abs=1e-5)
