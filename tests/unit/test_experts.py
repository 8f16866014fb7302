"""Models with experts in every dialect and layout, against the plain numpy reference, and home again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import shardwright as sw
from shardwright.cli import main
from shardwright.errors import (
    LayoutError,
    MissingTensorError,
    ReplicaMismatchError,
    ShapeMismatchError,
    UnknownTensorError,
    UnsupportedError,
    UsageError,
)
from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.experts_reference import ExpertCut, Experts

MODELS = {
    "mixtral": Experts(family="mixtral"),
    "qwen2_moe": Experts(family="qwen2_moe", qkv_bias=True, shared=16, dense=(1,)),
    "qwen3_moe": Experts(family="qwen3_moe", qk_norm=True, dense=(0, 3), tied=True),
}
CUTS = (
    ExpertCut(),
    ExpertCut(2, 1, 1, None, 2),
    ExpertCut(1, 1, 1, None, 12),
    ExpertCut(2, 2, 2, None, 3),
    ExpertCut(4, 2, 1, (1, 3), 2),
    ExpertCut(1, 2, 2, (1, 0, 2, 1), 4),
)
UNEQUAL = (ExpertCut(4, 1, 1, None, 2, 2), ExpertCut(2, 2, 1, None, 6, 1), ExpertCut(4, 2, 2, None, 1, 1))


def _turns(cuts: tuple[ExpertCut, ...], words: tuple[str, ...]) -> list[tuple[str, ExpertCut, str]]:
    """Every model in every layout, the words in turn, so that each meets each."""
    return [(name, cut, words[(i + k) % len(words)]) for i, name in enumerate(MODELS) for k, cut in enumerate(cuts)]


def layout(cut: ExpertCut) -> sw.Layout:
    return sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, ep=cut.ep, etp=cut.etp, stages=cut.stages)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {name: ref.write(root / name, model, model.weights()) for name, model in MODELS.items()}


def assert_home(there: Path, model: Experts, tmp_path: Path) -> None:
    """Back under the names on disk, every bit."""
    sw.convert(there, tmp_path / "home", to="huggingface")
    assert ref.differences({0: model.weights()}, {0: ref.read_huggingface(tmp_path / "home")}) == []
    assert json.loads((tmp_path / "home" / "config.json").read_text()) == model.config()


@pytest.mark.parametrize(("name", "cut", "spec"), _turns(CUTS, ("te", "te-sequential", "local")), ids=str)
def test_megatron(name, cut, spec, sources, tmp_path):
    model = MODELS[name]
    sw.convert(sources[name], tmp_path / "out", to="megatron-legacy", layout=layout(cut), spec=spec)
    assert ref.differences(moe.megatron(model.weights(), model, cut, spec), moe.read_megatron(tmp_path / "out", cut)) == []
    opened = sw.open(tmp_path / "out")
    assert opened.source.spec == spec and opened.layout == layout(cut)
    assert sw.verify(tmp_path / "out", sources[name]).ok
    assert_home(tmp_path / "out", model, tmp_path)


@pytest.mark.parametrize("cut", UNEQUAL, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_experts_cut_less_than_the_rest(name, cut, sources, tmp_path):
    model = MODELS[name]
    sw.convert(sources[name], tmp_path / "out", to="ranks", dialect="megatron", layout=layout(cut), pad_vocab_to=4)
    expected = moe.megatron(model.weights(), model, cut, "te", 4)
    assert ref.differences(expected, moe.read_ranks(tmp_path / "out", cut, chunked=True)) == []
    assert sw.verify(tmp_path / "out", sources[name]).ok
    assert_home(tmp_path / "out", model, tmp_path)


@pytest.mark.parametrize(("name", "cut", "spelling"), _turns((CUTS[0], CUTS[2], CUTS[4], *UNEQUAL[:2]), ("per-expert", "stacked")), ids=str)
def test_hugging_face_ranks(name, cut, spelling, sources, tmp_path):
    model = MODELS[name]
    sw.convert(sources[name], tmp_path / "out", to="ranks", layout=layout(cut), spec=spelling, pad_vocab_to=4)
    expected = moe.huggingface(model.weights(), model, cut, spelling, 4)
    assert ref.differences(expected, moe.read_ranks(tmp_path / "out", cut)) == []
    assert sw.open(tmp_path / "out").source.spec == spelling
    assert_home(tmp_path / "out", model, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_the_stacked_spelling_both_ways(name, sources, tmp_path):
    """Files saved from transformers 5's memory are told by their names; written are the names on disk."""
    model = MODELS[name]
    sw.convert(sources[name], tmp_path / "stacked", to="huggingface", spec="stacked")
    wanted = moe.stacked(model.weights(), model)
    assert ref.differences({0: wanted}, {0: ref.read_huggingface(tmp_path / "stacked")}) == []
    cut = ExpertCut(2, 2, 1, None, 3)
    sw.convert(tmp_path / "stacked", tmp_path / "out", to="megatron-legacy", layout=layout(cut))
    assert ref.differences(moe.megatron(model.weights(), model, cut), moe.read_megatron(tmp_path / "out", cut)) == []
    assert_home(tmp_path / "stacked", model, tmp_path)


def test_experts_by_hub_name(sources):
    opened = sw.open(sources["mixtral"])
    model = MODELS["mixtral"]
    found = ref.to_bits(opened["model.layers.2.mlp.experts.11.up_proj.weight"].torch())
    assert (found == model.weights()["model.layers.2.block_sparse_moe.experts.11.w3.weight"]).all()


@pytest.mark.parametrize("cut", [CUTS[3], UNEQUAL[1]], ids=str)
def test_state_dicts_are_the_ranks(cut, sources):
    model = MODELS["qwen2_moe"]
    expected = moe.megatron(model.weights(), model, cut, "te", 4)
    opened = sw.open(sources["qwen2_moe"])
    for (t, p, v, e), arrays in expected.items():
        held = opened.state_dict(
            to="ranks", dialect="megatron", layout=layout(cut), rank={"tp": t, "pp": p, "ep": e}, pad_vocab_to=4,
        )  # fmt: skip
        prefix = f"model{v}." if cut.vpp > 1 else ""
        own = {name.removeprefix(prefix): ref.to_bits(tensor) for name, tensor in held.items() if name.startswith(prefix)}
        assert ref.differences({0: arrays}, {0: own}) == []


def test_from_one_expert_layout_to_another(sources, tmp_path):
    model, one, two = MODELS["qwen2_moe"], ExpertCut(2, 2, 2, None, 3), ExpertCut(4, 1, 1, None, 4)
    sw.convert(sources["qwen2_moe"], tmp_path / "one", to="megatron-legacy", layout=layout(one))
    sw.convert(tmp_path / "one", tmp_path / "two", to="megatron-legacy", layout=layout(two), spec="local")
    assert ref.differences(moe.megatron(model.weights(), model, two, "local"), moe.read_megatron(tmp_path / "two", two)) == []


def test_copies_that_differ_are_told(sources, tmp_path):
    """Each ep rank has its own copy of what is not an expert; they are compared."""
    sw.convert(sources["mixtral"], tmp_path / "out", to="ranks", layout=sw.Layout(tp=1, ep=2))
    path = tmp_path / "out" / "rank_00001_tp0_pp0_ep1.safetensors"
    held = load_file(path)
    held["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ReplicaMismatchError, match=r"layers.1.input_layernorm.weight.*ep0.*ep1"):
        sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")


def test_the_number_in_the_name_decides(sources, tmp_path):
    """Expert 10 comes after 9, not after 1; rank 10 after rank 9."""
    model, cut = MODELS["mixtral"], ExpertCut(1, 1, 1, None, 12)
    sw.convert(sources["mixtral"], tmp_path / "out", to="ranks", layout=layout(cut))
    (tmp_path / "out" / "shardwright.json").unlink()
    opened = sw.open(tmp_path / "out", config=sources["mixtral"] / "config.json")
    assert opened.layout == layout(cut)
    assert ref.differences(moe.huggingface(model.weights(), model, cut, "per-expert"), moe.read_ranks(tmp_path / "out", cut)) == []
    assert_home(tmp_path / "out", model, tmp_path)


def test_folders_that_could_mean_two_things(sources, tmp_path):
    """``mp_rank_00_001`` is a stage or an expert rank; ``args`` says which."""
    for number, cut in enumerate((ExpertCut(1, 2), ExpertCut(1, 1, 1, None, 2))):
        out = tmp_path / f"out{number}"
        sw.convert(sources["qwen3_moe"], out, to="megatron-legacy", layout=layout(cut))
        assert sorted(p.name for p in (out / "release").iterdir()) == ["mp_rank_00_000", "mp_rank_00_001"]
        (out / "shardwright.json").unlink()
        assert sw.open(out).layout == layout(cut)


def test_megatron_that_says_only_its_args(sources, tmp_path):
    for name, model in MODELS.items():
        sw.convert(sources[name], tmp_path / name, to="megatron-legacy", layout=sw.Layout(tp=2, ep=3))
        (tmp_path / name / "shardwright.json").unlink()
        (tmp_path / name / "hf" / "config.json").unlink()
        opened = sw.open(tmp_path / name)
        assert opened.family == model.family and dict(opened.config.fields) == dict(sw.open(sources[name]).config.fields)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (sw.Layout(ep=5), "ep 5 does not divide the experts.*divisor of 12"),
        (sw.Layout(tp=5), "tp 5 does not divide"),
    ],
)
def test_experts_that_do_not_divide(wanted, message, sources):
    with pytest.raises(LayoutError, match=message):
        sw.plan(sources["mixtral"], to="ranks", layout=wanted, pad_vocab_to=5)


def test_layouts_that_make_no_sense(sources, tmp_path):
    with pytest.raises(LayoutError, match=r"etp must divide tp.*divisor of 4"):
        sw.Layout(tp=4, etp=3)
    with pytest.raises(UsageError, match="etp must be a positive integer"):
        sw.Layout(etp=0)
    with pytest.raises(UnsupportedError, match="expert tensor size of its own"):
        sw.plan(sources["mixtral"], to="megatron-legacy", layout=sw.Layout(tp=2, etp=1))
    with pytest.raises(UnsupportedError, match="models with experts are not quantised yet"):
        sw.plan(sources["mixtral"], to="huggingface", quantize="int8")
    dense = ref.Model(layers=1)
    ref.write(tmp_path / "dense", dense, dense.weights(), 1)
    with pytest.raises(LayoutError, match="this model has none"):
        sw.plan(tmp_path / "dense", to="ranks", layout=sw.Layout(ep=2))


def test_experts_are_those_of_the_config(sources, tmp_path):
    """0 … E-1, all of them and no other."""
    model = MODELS["mixtral"]
    with pytest.raises(ShapeMismatchError, match=r"block_sparse_moe.gate.weight.*expected \(13, 32\), actual \(12, 32\)"):
        sw.plan(sw.open(sources["mixtral"], config=model.config() | {"num_local_experts": 13}), to="ranks")
    names = model.names(2, 11)
    lacks = {name: array for name, array in model.weights().items() if name != names[1]}
    ref.write(tmp_path / "lacks", model, lacks, 1)
    with pytest.raises(MissingTensorError, match=r"layers.2.*experts.11.w3.weight.*expected experts 0 … 11, actual experts 0 … 10"):
        sw.plan(tmp_path / "lacks", to="ranks")
    more = {**model.weights(), model.names(2, 12)[0]: model.weights()[names[0]]}
    ref.write(tmp_path / "more", model, more, 1)
    with pytest.raises(UnknownTensorError, match=r"experts.12.w1.weight.*expected experts 0 … 11, actual experts 0 … 12"):
        sw.plan(tmp_path / "more", to="ranks")


def test_the_command_line(sources, tmp_path):
    """``--ep``, ``--etp``, ``--spelling`` and ``--megatron-spec te-sequential`` say what the API says."""

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    model, cut = MODELS["qwen3_moe"], ExpertCut(2, 2, 1, None, 6, 1)
    to = ("--to", "ranks", "--dialect", "megatron", "--megatron-spec", "te-sequential", "--pad-vocab-to", 4)
    done = run("convert", sources["qwen3_moe"], tmp_path / "out", *to, "--tp", 2, "--pp", 2, "--ep", 6, "--etp", 1)
    assert done.exit_code == 0, done.output
    expected = moe.megatron(model.weights(), model, cut, "te-sequential", 4)
    assert ref.differences(expected, moe.read_ranks(tmp_path / "out", cut, chunked=True)) == []
    done = run("convert", tmp_path / "out", tmp_path / "stacked", "--to", "huggingface", "--spelling", "stacked")
    assert done.exit_code == 0, done.output
    assert ref.differences({0: moe.stacked(model.weights(), model)}, {0: ref.read_huggingface(tmp_path / "stacked")}) == []
    for words, said in ((("--spelling", "stackd"), "stacked"), (("--spelling", "stacked", "--megatron-spec", "te"), "different dialects")):
        refused = run("plan", tmp_path / "out", "--to", "huggingface", *words)
        assert refused.exit_code == 2 and said in refused.stderr


def test_all_layers_and_experts_share_their_programs(tmp_path):
    """As many programs for 12 layers of 64 experts on 256 ranks as for two of each."""
    plans = []
    for layers, experts, layout in ((2, 2, sw.Layout()), (12, 64, sw.Layout(tp=4, pp=4, ep=16))):
        model = Experts(layers=layers, heads=8, kv=8, hidden=64, experts=experts, expert_ffn=64, dense=(0,), vocab=64, dtype="bfloat16")
        (tmp_path / f"{layers}.json").write_text(json.dumps(model.config()))
        source = sw.synth(tmp_path / f"{layers}.json", tmp_path / f"{layers}", sparse=True)
        plans.append(sw.plan(source, to="megatron-legacy", layout=layout).plan)
    few, many = plans
    assert len(many.programs) == len(few.programs)
    experts = next(b for p, b in zip(many.programs, many.bindings, strict=True) if "down_proj" in p.label and "expert" in p.label)
    assert len(experts.names) == 11 * 64 and experts.target_file.shape == (11 * 64, 4)
    assert len(many.target_tensors) == len({(t.name, t.rank) for t in many.target_tensors})
