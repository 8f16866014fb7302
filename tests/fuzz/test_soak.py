"""A million mutations over all targets, guided by what they reach; then at least 95 % of each parser's lines are reached.

``make soak``, or ``python -m pytest tests/fuzz/test_soak.py -m soak -s`` for this test alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import load_targets
from .processes import in_processes
from .reach import measure

MUTATIONS = 1_000_000
PROCESSES = 2
HOURS = 3

TARGETS = load_targets()


@pytest.mark.soak
def test_a_million_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = str(-(-MUTATIONS // PROCESSES // len(TARGETS)))
    folders = [tmp_path / f"new-{seed}" for seed in range(PROCESSES)]
    commands = [["evolve", "--runs", runs, "--seed", str(seed), "--into", str(folder)] for seed, folder in enumerate(folders)]
    reports = in_processes(commands, tmp_path, timeout=HOURS * 3600)
    failures = [report[name]["failure"] for report in reports for name in TARGETS if "failure" in report[name]]
    sums = {name: [sum(report[name].get(key, 0) for report in reports) for key in ("inputs", "accepted")] for name in TARGETS}
    with capsys.disabled():
        for name, (inputs, accepted) in sums.items():
            print(f"\n{name}: {inputs} inputs, {accepted / max(1, inputs):.1%} accepted", end="", flush=True)
    assert not failures, "\n".join(failures)
    for name, reach in measure(TARGETS, folders).items():
        with capsys.disabled():
            print(f"\n{name}: {reach.share:.1%} of {reach.lines} lines", end="", flush=True)
        assert reach.share >= 0.95, (name, reach.missed)
        assert not reach.strayed, (name, reach.strayed)
    assert all(accepted >= 0.1 * inputs for inputs, accepted in sums.values()), sums
    assert sum(inputs for inputs, _ in sums.values()) >= MUTATIONS
