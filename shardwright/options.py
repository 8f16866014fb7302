"""The command line's options, in groups that commands share, and what they mean: a layout, a checkpoint, a conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

from .errors import LayoutError, UsageError

if TYPE_CHECKING:
    from .api import Checkpoint, Conversion
    from .planner.layout import Layout

__all__ = ["as_json_option", "bounds_options", "drop_option", "job_of", "open_source_of", "source_options", "target_options"]

_LARGEST_LAYOUT = 1 << 20
F = TypeVar("F", bound=Callable[..., Any])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def wrap(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return wrap


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
drop_option = click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out stored tensors of that name.")
source_options = _options(
    click.option("--family", metavar="NAME|FILE", help="Model family, or a family table of your own."),
    click.option("--config", "config", metavar="FILE", type=click.Path(dir_okay=False), help="config.json, where the source has none."),
    click.option("--vocab-size", type=click.IntRange(1), help="True vocabulary size, where only a padded one is stored."),
)
bounds_options = _options(
    click.option("--memory", metavar="SIZE", help="Memory bound, e.g. 1GiB. Default: a quarter of what is free, at most 2 GiB."),
    click.option("--workers", type=click.IntRange(1), help="Lanes that run at once. Default: cores, at most 8."),
)
target_options = _options(
    click.option("--to", metavar="FORMAT", help="Target format."),
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor parallel size."),
    click.option("--pp", type=click.IntRange(1), default=1, help="Pipeline parallel size."),
    click.option("--vpp", type=click.IntRange(1), default=1, help="Model chunks per pipeline stage."),
    click.option("--ep", type=click.IntRange(1), default=1, help="Expert parallel size."),
    click.option("--etp", type=click.IntRange(1), help="Tensor parallel size of the experts. Default: tp."),
    click.option("--pp-layers", metavar="LIST", help="Layers of each stage (chunk), e.g. 10,11,11."),
    click.option("--layout", "layout_file", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="Layout as a JSON file."),
    click.option("--dialect", metavar="D", help="Names and fusion of the target's tensors."),
    click.option("--container", metavar="C", help="Container of the target's files."),
    click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest Hugging Face file."),
    click.option("--dtype", metavar="D", help="Cast floating tensors, e.g. bfloat16."),
    click.option("--quantize", metavar="S", help="Quantisation scheme, e.g. int8."),
    click.option("--pad-vocab-to", type=click.IntRange(1), metavar="M", help="Pad the vocabulary to a multiple of M."),
    click.option(
        "--megatron-spec",
        metavar="SPEC",
        help="Megatron layer spec whose names are written: te (default), te-sequential (experts as modules of their own), local; of "
        "deepspeed-mp: layernorm (default), transformer, gpt2, and with -v1 or -v0 the QKV rows of that checkpoint version.",
    ),
    click.option("--spelling", metavar="S", help="Which of its family's spellings a Hugging Face target has, e.g. stacked."),
    click.option("--trust-replicas", is_flag=True, help="Do not read and compare copies."),
    drop_option,
    click.option(
        "--optimizer", type=click.Choice(["keep", "drop"]), help="The optimizer's state. Default: keep it where the target can hold it."
    ),
    click.option("--sha256", is_flag=True, help="Record each file's SHA-256, too: reads the finished target once more."),
    source_options,
    bounds_options,
)


def open_source_of(src: str, hints: dict[str, Any]) -> Checkpoint:
    from .api import open as open_checkpoint

    given = {name: hints[name] for name in ("family", "config", "vocab_size", "drop") if name in hints}
    return open_checkpoint(src, **given)


def job_of(src: str, out: str | None, options: dict[str, Any]) -> Conversion:
    from .api import parse_size
    from .api import plan as make_plan

    if options["to"] is None:
        raise UsageError("say what to make of it", remedy="Give --to FORMAT; `shardwright formats` lists them")
    return make_plan(
        open_source_of(src, options),
        out,
        to=options["to"],
        layout=layout_of(options),
        memory=options["memory"],
        workers=options["workers"],
        dialect=options["dialect"],
        container=options["container"],
        spec=_spec_of(options),
        dtype=options["dtype"],
        quantize=options["quantize"],
        max_shard_size=parse_size(options["max_shard_size"]),
        pad_vocab_to=options["pad_vocab_to"],
        trust_replicas=options["trust_replicas"],
        sha256=options["sha256"],
        optimizer=options["optimizer"],
    )


def _spec_of(options: dict[str, Any]) -> str | None:
    """A dialect's variant, under the option that its users know it by."""
    spec: str | None = options["megatron_spec"]
    spelling: str | None = options["spelling"]
    if spec is not None and spelling is not None:
        raise UsageError("--megatron-spec and --spelling are of different dialects", remedy="Give one of them")
    return spec if spelling is None else spelling


def layout_of(options: dict[str, Any]) -> Layout:
    from .planner.layout import Layout

    if options["layout_file"]:
        if [options[size] for size in ("tp", "pp", "vpp", "ep", "etp", "pp_layers")] != [1, 1, 1, 1, None, None]:
            raise UsageError("--layout and the sizes contradict each other", remedy="Give one or the other")
        return read_layout(options["layout_file"])
    stages = None
    if options["pp_layers"]:
        try:
            stages = tuple(int(n) for n in options["pp_layers"].split(","))
        except ValueError:
            raise UsageError("--pp-layers is a list of numbers", expected="e.g. 10,11,11", actual=options["pp_layers"]) from None
    return Layout(tp=options["tp"], pp=options["pp"], vpp=options["vpp"], ep=options["ep"], etp=options["etp"], stages=stages)


def read_layout(file: str) -> Layout:
    from .planner.layout import Layout

    remedy = 'Write an object like {"tp": 8, "pp": 4}; axes: tp, pp, vpp, ep, etp, stages'
    try:
        if Path(file).stat().st_size > _LARGEST_LAYOUT:
            raise LayoutError("the layout file is larger than 1 MiB", file=file, remedy=remedy)
        found = json.loads(Path(file).read_text())
        if not isinstance(found, dict):
            raise LayoutError("the layout file does not hold a JSON object", file=file, actual=type(found).__name__, remedy=remedy)
        return Layout.from_json(found)
    except (LayoutError, UsageError) as error:
        raise LayoutError(error.message, file=file, expected=error.expected, actual=error.actual, remedy=error.remedy or remedy) from None
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise LayoutError(f"the layout file cannot be read ({error})", file=file, remedy=remedy) from None
