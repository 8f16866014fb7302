"""The main job on a small checkpoint made on the spot: plan shown, converted, verified, and back again."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from .api import plan, verify
from .errors import VerificationError
from .executors.progress import StderrProgress
from .planner.layout import Layout
from .render import show_plan
from .synthetic import synth

__all__ = ["run"]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def run(folder: Path | None = None) -> None:
    """Hugging Face → Megatron ranks (tp 2 × pp 2) → Hugging Face, in `folder` or a temporary one.

    Raises
    ------
    VerificationError
        Something came back different.
    """
    console = Console(stderr=True, highlight=False)
    root = Path(tempfile.mkdtemp(prefix="shardwright-")) if folder is None else folder
    root.mkdir(parents=True, exist_ok=True)
    try:
        (root / "config.json").write_text(json.dumps(CONFIG, indent=2))
        source = synth(root / "config.json", root / "llama", max_shard_size=40_000_000)
        console.print(f"[bold]made[/bold] a small Llama in {source}")
        ranks = _convert(console, source, root / "megatron", "megatron-legacy", Layout(tp=2, pp=2))
        back = _convert(console, ranks, root / "back", "huggingface", Layout())
        _verify(console, back, source)
        console.print("[green]the round trip is bit-identical[/green]")
    finally:
        if folder is None:
            shutil.rmtree(root)


def _convert(console: Console, source: Path, out: Path, to: str, layout: Layout) -> Path:
    console.print(f"\n[bold]{source.name} → {out.name}[/bold]")
    job = plan(source, out, to=to, layout=layout, memory="256MiB", max_shard_size=40_000_000)
    show_plan(job.summary(), job.memory)
    outcome = job.execute(progress=StderrProgress())
    console.print(f"converted in {outcome.seconds:.2f} s")
    _verify(console, out, source)
    return out


def _verify(console: Console, out: Path, source: Path) -> None:
    found = verify(out, source, memory="256MiB")
    if not found.ok:
        raise VerificationError(
            "the conversion differs from its source", file=out, actual=[*found.different, *found.missing, *found.extra][:5]
        )
    console.print(f"verified {found.equal} of {found.tensors} tensors of {out.name} against {source.name}: equal")
