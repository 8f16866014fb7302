"""The command line: thin. Parse, call the API, render.

Exit codes are the errors' own: 0 done, 1 a bug, 2 usage, 3 refused, 4 the data contradicts the plan, 5 failed or
stopped while running. With ``--json`` standard output holds one object, also for a refusal; everything else goes to
standard error.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource
from click.exceptions import Exit

from .commands_diff import diff
from .errors import RunError, ShardwrightError, StoppedError, UsageError, VerificationError
from .options import as_json_option, bounds_options, drop_option, job_of, open_source_of, source_options, target_options

if TYPE_CHECKING:
    from .api import Checkpoint, Conversion, Verification
    from .executors.execute import Outcome

__all__ = ["main"]

# Nothing here uses BLAS: its idle threads, which numpy starts when it is imported, cost start-up time and memory.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class _Root(click.RichGroup):
    """The command group, with errors turned into exit codes."""

    def main(self, args: Any = None, **_: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        wants_json = "--json" in words
        try:
            with _terminable():
                super().main(args=words, prog_name="shardwright", standalone_mode=False)
        except ShardwrightError as error:
            _fail(error, type(error).__name__, str(error), wants_json, error.exit_code)
        except click.ClickException as error:
            _fail(error, "UsageError", error.format_message(), wants_json, 2)
        except Exit as stop:
            sys.exit(stop.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail(StoppedError("stopped by SIGINT"), "StoppedError", "stopped by SIGINT; nothing was published", wants_json, 5)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        sys.exit(0)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what was begun is cleaned up, and the exit code is 5."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped by SIGTERM; nothing was published", remedy="Run the same command again")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: BaseException, kind: str, text: str, wants_json: bool, code: int) -> None:
    if wants_json:
        shown = ("file", "tensor", "expected", "actual", "remedy", "partial")
        fields = {k: v for k, v in vars(error).items() if k in shown and v is not None}
        _print({"error": {"type": kind, "message": text, **fields}})
    _say(f"[bold red]{kind}[/bold red] {_plain(text)}")
    if isinstance(error, RunError) and error.partial is not None:
        done, all_tiles = error.tiles
        _say(f"Nothing is lost: {done} of {all_tiles} tiles are done, in {_plain(error.partial)}. Resume with")
        _say(f"  {_plain(_resume_command())}")
    sys.exit(code)


def _resume_command() -> str:
    """This command, but for what would start over."""
    return shlex.join(["shardwright", *(word for word in sys.argv[1:] if word != "--fresh")])


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _plain(value: object) -> str:
    """A path or name that rich prints as it is, but for what would drive the terminal: names come from strangers."""
    from .render import printable

    return printable(str(value))


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, default=str) + "\n")


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardwright")
def main() -> None:
    """Convert model checkpoints between frameworks and parallel layouts: planned, bounded, proven.

    A conversion is decided on paper first (`plan`), from headers alone, and then moves every byte once (`convert`).
    """


main.add_command(diff)


@main.command()
@click.argument("src", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@drop_option
@source_options
@as_json_option
def inspect(src: str, tensors: bool, as_json: bool, **hints: Any) -> None:
    """Say what a checkpoint is, or what a config.json implies: format, family, layout, config, bytes."""
    checkpoint = open_source_of(src, hints)
    source = checkpoint.source
    found: dict[str, Any] = {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "dialect": source.dialect.name,
        "container": source.container,
        "layout": checkpoint.layout.to_json(),
        "family": checkpoint.family,
        "config": dict(checkpoint.config.fields),
        "tensors": sum(len(unit) for unit in source.units.values()),
        "files": len(source.files),
        "bytes": checkpoint.nbytes,
        "dtypes": _dtypes(checkpoint),
        "padded_vocab": source.padded_vocab,
        "quantization": source.scheme.name if source.scheme else None,
        "planes": list(source.planes),
        "dropped": [{"name": d.name, "reason": d.reason} for d in source.dropped],
        "warnings": list(source.warnings),
    }
    from .planner.passes.build import read_names

    found["dropped"] += [{"name": d.name, "reason": d.reason} for d in read_names(source).dropped]
    if tensors:
        listed = [(rank, chunk, t) for (rank, chunk), unit in source.units.items() for t in unit.values()]
        found["stored"] = [
            {"name": t.name, "rank": rank, "chunk": chunk, "dtype": t.dtype, "shape": list(t.shape), "file": t.file}
            for rank, chunk, t in listed
        ]
    if as_json:
        _print(found)
        return
    from .render import show_checkpoint

    show_checkpoint(found)


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    from .planner.passes.sides import stored_bytes

    sizes: dict[str, int] = {}
    for unit in checkpoint.source.units.values():
        for tensor in unit.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + stored_bytes(tensor)
    return sizes


@main.command()
@click.argument("src", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@target_options
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False, writable=True), help="Write the plan as one static page.")
@click.option("--save", metavar="FILE", type=click.Path(dir_okay=False, writable=True), help="Save the plan for convert --plan; needs OUT.")
@as_json_option
def plan(src: str, out: str | None, html: str | None, save: str | None, as_json: bool, **options: Any) -> None:
    """Decide a conversion on paper and show what it costs; nothing is written.

    SRC may be a config.json alone: shapes then come from the family's table, before anything is downloaded.
    """
    if save and out is None:
        raise UsageError("a plan without a target cannot be run", actual=f"--save {save} without OUT", remedy="Give OUT as well")
    job = job_of(src, out, options)
    summary = job.summary()
    if html:
        job.visualize(html)
    if save:
        job.save(save)
    if as_json:
        _print(summary)
        return
    from .render import show_plan

    show_plan(summary, job.memory)
    for path in filter(None, (html, save)):
        _say(f"wrote {_plain(path)}")


@main.command()
@click.argument("src", type=click.Path(), required=False)
@click.argument("out", type=click.Path(), required=False)
@target_options
@click.option("--plan", "plan_file", metavar="FILE", type=click.Path(dir_okay=False), help="Run a saved plan.")
@click.option("--scheduler", default="threads", show_default=True, metavar="threads|ADDRESS", help="Where to run.")
@click.option("--fresh", is_flag=True, help="Start over: forget what an unfinished run left.")
@click.option("--overwrite", is_flag=True, help="Replace a finished target.")
@click.option("--verify", "then_verify", is_flag=True, help="Verify the target against the source afterwards.")
@as_json_option
def convert(
    src: str | None,
    out: str | None,
    plan_file: str | None,
    scheduler: str,
    fresh: bool,
    overwrite: bool,
    then_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a checkpoint: plan, check, move every byte once, publish whole or not at all.

    A run that was stopped, or failed, is resumed by the same command.
    """
    job = _saved(plan_file, options) if plan_file else job_of(_need(src, "SRC"), _need(out, "OUT"), options)
    summary = job.summary()
    if not as_json:
        from .render import show_plan

        show_plan(summary, job.memory)
    if job.is_done() and not overwrite:
        job.tidy()
        _say(f"[green]done already[/green] {_plain(job.out)} was made by this very plan")
        outcome = None
    else:
        from .executors.progress import StderrProgress

        outcome = job.execute(scheduler=scheduler, overwrite=overwrite, fresh=fresh, progress=StderrProgress())
    verified = _verified(job, src or job.plan.source_root, options) if then_verify else None
    _finish(job, summary, outcome, verified, as_json)


def _verified(job: Conversion, source: str, options: dict[str, Any]) -> Verification:
    from .api import verify as verify_target

    assert job.out is not None
    hints = {name: options[name] for name in ("family", "config", "vocab_size")}
    found = verify_target(job.out, source, memory=job.memory, workers=job.workers, **hints)
    if not found.ok:
        raise VerificationError(
            "the target differs from the source", file=job.out, actual=[*found.different, *found.missing, *found.extra][:5]
        )
    return found


def _finish(job: Conversion, summary: dict[str, Any], outcome: Outcome | None, verified: Verification | None, as_json: bool) -> None:
    seconds = outcome.seconds if outcome else 0.0
    notes = [f"padding of {name}: {held}" for name, held in outcome.padding.items()] if outcome else []
    if outcome and outcome.averaged:
        held, elements = outcome.averaged, sum(outcome.averaged.values())
        notes.append(f"copies differed in {elements} elements of {len(held)} tensors ({next(iter(held))}, …); their means were taken")
    summary["warnings"] += [*notes, *(outcome.notes if outcome else ())]
    result = {
        **summary,
        "seconds": seconds,
        "bytes_per_second": summary["bytes_written"] / seconds if seconds else 0.0,
        "peak_rss_bytes": outcome.peak_rss_bytes if outcome else 0,
        "tiles_resumed": outcome.tiles_resumed if outcome else 0,
    }
    if verified is not None:
        result["verified"] = {"level": verified.level, "tensors": verified.tensors, "equal": verified.equal}
    if as_json:
        _print(result)
        return
    for note in (*notes, *(outcome.notes if outcome else ())):
        _say(_plain(note))
    if outcome:
        from .render import rate

        _say(
            f"[green]done[/green] {_plain(job.out)} in {seconds:.1f} s, {rate(summary['bytes_written'], seconds)}"
            + (f", {outcome.tiles_resumed} of {summary['tiles']} tiles resumed" if outcome.tiles_resumed else "")
            + (", verified" if verified else "")
        )
    elif verified:
        _say(f"[green]verified[/green] {verified.tensors} tensors")


_BESIDE_A_PLAN = (
    "plan_file", "memory", "workers", "scheduler", "fresh", "overwrite", "then_verify", "as_json", "family", "config", "vocab_size",
)  # fmt: skip


def _saved(plan_file: str, options: dict[str, Any]) -> Conversion:
    from .api import load_plan, parse_size

    context = click.get_current_context()
    assert context is not None
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _BESIDE_A_PLAN:
            what = parameter.human_readable_name if isinstance(parameter, click.Argument) else parameter.opts[0]
            raise UsageError(f"a saved plan decides {what} already", remedy="Leave it out, or plan again with it")
    job = load_plan(plan_file)
    if options["memory"] is not None:
        job.memory = parse_size(options["memory"])
    if options["workers"] is not None:
        job.workers = options["workers"]
    return job


@main.command()
@click.argument("out", type=click.Path())
@click.argument("src", type=click.Path(), required=False)
@source_options
@bounds_options
@as_json_option
def verify(out: str, src: str | None, as_json: bool, **options: Any) -> None:
    """Open OUT as a stranger would; with SRC, recompute and compare every tensor."""
    from .api import verify as verify_target
    from .executors.progress import StderrProgress

    found = verify_target(out, src, progress=StderrProgress(doing="verifying"), **options)
    if as_json:
        _print(
            {
                "level": found.level,
                "tensors": found.tensors,
                "equal": found.equal,
                "different": list(found.different),
                "missing": list(found.missing),
                "extra": list(found.extra),
            }
        )
    if not found.ok:
        for what, names in (("different", found.different), ("missing", found.missing), ("extra", found.extra)):
            for name in names[:20]:
                _say(f"[red]{what}[/red] {_plain(name)}")
            if len(names) > 20:
                _say(f"[red]{what}[/red] … {len(names) - 20} more")
        if not as_json:
            raise VerificationError(
                f"{len(found.different) + len(found.missing) + len(found.extra)} differences at level {found.level}", file=out
            )
        sys.exit(4)
    if not as_json:
        what = {
            "values": "every byte equals what the source gives",
            "bytes": "every file has the checksums that were recorded when it was written",
            "names": "names, dtypes and shapes fit (no checksums are recorded; give SRC to compare values)",
        }[found.level]
        _say(f"[green]verified[/green] {found.tensors} tensors: {what}")


@main.command()
@click.argument("src", type=click.Path())
@click.argument("tensor")
@target_options
def explain(src: str, tensor: str, **options: Any) -> None:
    """Say how one tensor (stored, hub or target name) is made."""
    click.echo(job_of(src, None, options).explain(tensor))


@main.command()
@click.argument("config", type=click.Path(exists=True))
@click.argument("out", type=click.Path())
@click.option("--sparse", is_flag=True, help="Headers and holes only: enough to plan.")
@click.option("--dtype", help="Of every tensor. Default: the config's, else bfloat16.")
@click.option("--family", metavar="NAME|FILE", help="Model family, or a family table of your own.")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest file.")
@click.option("--seed", type=int, default=0, show_default=True)
def synth(config: str, out: str, sparse: bool, dtype: str | None, family: str | None, max_shard_size: str, seed: int) -> None:
    """Make a checkpoint of the right shapes from a config.json: random, or sparse."""
    from .api import find_family, parse_size
    from .synthetic import synth as make

    made = make(config, out, sparse=sparse, dtype=dtype, family=find_family(family), max_shard_size=parse_size(max_shard_size), seed=seed)
    _say(f"wrote {_plain(made)}")


@main.command()
@as_json_option
def formats(as_json: bool) -> None:
    """List formats, with their dialects and containers."""
    from .planner.formats import FORMATS

    found = {f.name: {"dialects": list(f.dialects), "containers": list(f.containers), "ranks": f.ranked} for f in FORMATS}
    _listing(found, as_json)


@main.command()
@as_json_option
def families(as_json: bool) -> None:
    """List model families; with --json, their whole tables (docs/families.md has the schema)."""
    from .planner.export import family_json
    from .planner.tables import FAMILIES

    found = {family.name: family_json(family) for family in FAMILIES}
    if as_json:
        _print(found)
        return
    shown = ("model_types", "architecture", "spellings")
    for name, facts in found.items():
        _listing({name: {key: facts[key] for key in shown if facts[key]}}, as_json)
        for dialect, refusals in facts["refuse"].items():
            for refusal in refusals:
                click.echo(
                    f"{'':18} not in {dialect}"
                    + ("" if refusal["when"] == "true" else f" where {refusal['when']}")
                    + f": {refusal['reason']}"
                )


@main.command()
@as_json_option
def schemes(as_json: bool) -> None:
    """List quantisation schemes."""
    from .planner.schemes import SCHEMES

    _listing({s.name: {"config": s.config()} for s in SCHEMES}, as_json, hide=("config",))


def _listing(found: dict[str, dict[str, Any]], as_json: bool, hide: tuple[str, ...] = ()) -> None:
    if as_json:
        _print(found)
        return
    for name, facts in found.items():
        shown = "  ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in facts.items() if k not in hide)
        click.echo(f"{name:18} {shown}")


@main.command()
@click.argument("folder", metavar="[DIR]", type=click.Path(), required=False)
def demo(folder: str | None) -> None:
    """Make a small Llama, convert it to Megatron ranks and back, and verify both."""
    from .demo import run

    run(Path(folder) if folder else None)


def _need(value: str | None, what: str) -> str:
    if value is None:
        raise UsageError(f"{what} is missing", remedy="shardwright convert SRC OUT --to FORMAT")
    return value
