"""What people see on a terminal: plans and checkpoints as short tables, on standard error."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["printable", "rate", "show_checkpoint", "show_diff", "show_plan", "size"]


def printable(text: str) -> str:
    """Text that rich prints as it is, but for what would drive the terminal: names come from strangers.

    >>> printable("a[b]\\x1b")
    'a\\\\[b]\\\\x1b'
    """
    return escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> size(1234), size(5.0e9), size(12)
    ('1.23 KB', '5.00 GB', '12 B')
    """
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"


def rate(nbytes: float, seconds: float) -> str:
    """Bytes per second for people."""
    return f"{size(nbytes / seconds)}/s" if seconds else "at once"


def axes(layout: dict[str, Any]) -> str:
    """``tp 8 × pp 4``, leaving out axes of size 1.

    >>> axes({"tp": 8, "pp": 4, "vpp": 1, "etp": None, "stages": [2, 3]})
    'tp 8 × pp 4 × stages 2,3'
    """
    shown = [f"{k} {','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in layout.items() if v not in (None, 1)]
    return " × ".join(shown) or "one rank"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def show_plan(plan: dict[str, Any], memory: int) -> None:
    """A plan's summary: warnings first, then what moves, then memory."""
    console = Console(stderr=True, highlight=False)
    for warning in plan["warnings"]:
        console.print(f"[yellow]warning[/yellow] {printable(warning)}", soft_wrap=True)
    for entry in plan["dropped"][:10]:
        console.print(f"[yellow]dropped[/yellow] {printable(entry['name'])}: {printable(entry['reason'])}", soft_wrap=True)
    if len(plan["dropped"]) > 10:
        console.print(f"[yellow]dropped[/yellow] … {len(plan['dropped']) - 10} more (--json lists them)")
    table = _table()
    table.add_row("from", f"{plan['source_format']} ({axes(plan['source_layout'])}), {plan['family']}")
    stored = f"{_count(plan['tensors'], 'tensor')} in {_count(plan['files'], 'file')}"
    table.add_row("to", f"{plan['target_format']} ({axes(plan['target_layout'])}): {stored}")
    table.add_row("read", f"{size(plan['bytes_read'])}, amplification {plan['read_amplification']:.3f}")
    table.add_row("write", f"{size(plan['bytes_written'])}, amplification {plan['write_amplification']:.3f}")
    table.add_row(
        "work", f"{plan['tiles']:,} tiles, {plan['requests']:,} requests, {plan['pieces']:,} pieces in {plan['programs']:,} programs"
    )
    table.add_row(
        "memory",
        f"{size(plan['peak_bytes'])} at most (base {size(plan['base_bytes'])}); "
        f"bound {size(memory)}, smallest {size(plan['min_memory_bytes'])}",
    )
    console.print(table)


def show_checkpoint(found: dict[str, Any]) -> None:
    """What `inspect` found, on standard output."""
    console = Console(highlight=False)
    table = _table()
    table.add_row("path", printable(found["path"]))
    table.add_row("format", f"{found['format']}, dialect {found['dialect']}, container {found['container']}, {axes(found['layout'])}")
    table.add_row("family", found["family"])
    table.add_row("size", f"{_count(found['tensors'], 'tensor')} in {_count(found['files'], 'file')}, {size(found['bytes'])}")
    table.add_row("dtypes", ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found["dtypes"].items()))
    if found["planes"]:
        table.add_row("optimizer", printable(", ".join(found["planes"])))
    table.add_row("config", printable(", ".join(f"{k} {v}" for k, v in found["config"].items())))
    if found["padded_vocab"]:
        table.add_row("vocabulary", f"padded to {found['padded_vocab']} rows")
    if found["quantization"]:
        table.add_row("quantised", found["quantization"])
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"[yellow]warning[/yellow] {printable(warning)}", soft_wrap=True)
    for entry in found["dropped"]:
        console.print(f"[yellow]left out[/yellow] {printable(entry['name'])}: {printable(entry['reason'])}", soft_wrap=True)
    for tensor in found.get("stored", ()):
        console.print(
            f"{tensor['rank']:5}  {tensor['dtype']:10} {printable(tensor['shape'].__str__()):20} {printable(tensor['name'])}",
            soft_wrap=True,
        )


_LISTED = 20
"""Entries of one kind that are listed; --json has them all."""


def show_diff(found: dict[str, Any]) -> None:
    """What `diff` found (as its JSON object), on standard output: what the sides are, what does not count, what does."""
    console = Console(highlight=False)
    table = _table()
    for label, side in zip("AB", found["sides"], strict=True):
        what = f"{side['format']}, dialect {side['dialect']}, container {side['container']}, {axes(side['layout'])}, {side['family']}"
        padded = f", vocabulary padded to {side['padded_vocab']} rows" if side["padded_vocab"] else ""
        quantised = f", quantised {side['quantization']}" if side["quantization"] else ""
        table.add_row(label, f"{printable(side['path'])}: {what}{quantised}{padded}")
    console.print(table)
    _list(console, "[yellow]config[/yellow]", [f"{c['field']}: {c['values'][0]} in A, {c['values'][1]} in B" for c in found["config"]])
    for label, side in zip("AB", found["sides"], strict=True):
        _list(console, f"[yellow]not compared[/yellow] in {label}", [f"{d['name']}: {d['reason']}" for d in side["dropped"]])
    _list(console, "[yellow]within the tolerance[/yellow]", [_difference(entry) for entry in found["within"]])
    _list(console, "[red]only in A[/red]", found["missing"])
    _list(console, "[red]only in B[/red]", found["extra"])
    _list(console, "[red]copies differ[/red]", [f"{c['name']} in {c['path']}, first at {tuple(c['index'])}" for c in found["copies"]])
    _list(console, "[red]different[/red]", [_difference(entry) for entry in found["different"]])
    ok = not (found["different"] or found["missing"] or found["extra"] or found["copies"])
    close = f", {len(found['within'])} within the tolerance" if found["within"] else ""
    verdict = "[green]equal[/green]" if ok else "[red]different[/red]"
    console.print(f"{verdict}: {found['equal']:,} of {_count(found['tensors'], 'tensor')} are equal{close}", soft_wrap=True)


def _list(console: Console, label: str, lines: list[str]) -> None:
    for line in lines[:_LISTED]:
        console.print(f"{label} {printable(line)}", soft_wrap=True)
    if len(lines) > _LISTED:
        console.print(f"{label} … {len(lines) - _LISTED:,} more (--json lists them)", soft_wrap=True)


def _difference(entry: dict[str, Any]) -> str:
    """One tensor: ``name: bfloat16 and float32; 3 of 4,096 elements, first at (1, 6): 0.25 and 0.5; …``."""
    parts = []
    for what in ("shape", "dtype"):
        if what in entry["what"]:
            one, two = entry[f"{what}s"]
            parts.append(f"{what} {tuple(one)} and {tuple(two)}" if what == "shape" else f"{one} and {two}")
    if first := entry["first"]:
        one, two = first["values"]
        parts.append(f"{entry['differing']:,} of {entry['elements']:,} elements, first at {tuple(first['index'])}: {one} and {two}")
    if at := entry["largest_at"]:
        parts.append(f"largest difference {entry['largest']} at {tuple(at['index'])}, relative {entry['relative']}")
    elif first:
        parts.append("values equal, bits not")
    elif "values" not in entry["what"] and "shape" not in entry["what"]:
        parts.append("values equal")
    return f"{entry['name']}: {'; '.join(parts)}"


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
