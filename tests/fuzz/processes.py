"""The harness in processes of its own, two at a time: limits on memory stay there, and a crash or a hang costs one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import load_targets, recover

__all__ = ["ROOT", "in_processes"]

ROOT = Path(__file__).parent.parent.parent


def in_processes(commands: Sequence[Sequence[str]], folder: Path, timeout: float) -> list[dict[str, Any]]:
    """Run ``python -m tests.fuzz <command>`` for each command at once; what each printed.

    Raises
    ------
    AssertionError
        One died or took longer than `timeout` seconds; the input that it was parsing is kept.
    """
    load_targets()
    lasts = [folder / f"last-{i}" for i in range(len(commands))]
    running = [
        subprocess.Popen([sys.executable, "-m", "tests.fuzz", *command, "--last", str(last)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for command, last in zip(commands, lasts, strict=True)
    ]
    found = []
    try:
        for process, last in zip(running, lasts, strict=True):
            out, _ = process.communicate(timeout=timeout)
            assert process.returncode >= 0, recover(last)
            assert out, "the harness itself failed; its error output says how"
            found.append(json.loads(out))
    except subprocess.TimeoutExpired:
        raise AssertionError(recover(last)) from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    return found
