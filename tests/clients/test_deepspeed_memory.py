"""One and a half to two gigabytes that real DeepSpeed saved: what consolidating them takes, beside DeepSpeed's own ``zero_to_fp32``.

Each runs in a process of its own, which says at its end how much memory it held at most and how many bytes it read.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

import shardwright as sw
from tests.clients.deepspeed import Job
from tests.clients.judge import assert_same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.deepspeed import DeepSpeed

pytestmark = [pytest.mark.clients("deepspeed", "transformers"), pytest.mark.soak]

_AT_THE_END = """
import re, time
text = open("/proc/self/status").read() + open("/proc/self/io").read()
print(*(re.search(name + r":\\s+(\\d+)", text)[1] for name in ("VmHWM", "rchar")), time.process_time())
"""


def measured(code: str, *arguments: object) -> tuple[int, int, float]:
    """Peak resident bytes, bytes read, and CPU seconds of a process that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code + _AT_THE_END, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=900
    )
    peak, read, seconds = done.stdout.split()[-3:]
    return int(peak) << 10, int(read), float(seconds)


OURS = """
import sys, shardwright
shardwright.convert(sys.argv[1], sys.argv[2], to="huggingface", drop=("extra_*",))
"""
THEIRS = """
import sys, logging
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], safe_serialization=True)
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tenth_of_the_memory_and_each_byte_once(stage: int, deepspeed: DeepSpeed, tmp_path: Path) -> None:
    run = deepspeed.train(Job("llama_large", stage=stage), tmp_path / "run", steps=1, more=0)
    size = sum(path.stat().st_size for path in run.tag.iterdir())
    assert size > (2.0e9 if stage == 2 else 1.5e9)
    needed = sw.plan(run.folder, None, to="huggingface", drop=("extra_*",)).cost.bytes_read
    ours = measured(OURS, run.folder, tmp_path / "ours")
    theirs = measured(THEIRS, run.folder, tmp_path / "theirs")
    imports = measured("import shardwright, shardwright.api")
    print(f"stage {stage}: {size / 1e9:.2f} GB; peak {ours[0] / 1e6:.0f} MB, zero_to_fp32 {theirs[0] / 1e6:.0f} MB")
    print(f"read {ours[1] / 1e9:.3f} GB of {needed / 1e9:.3f} GB planned, zero_to_fp32 {theirs[1] / 1e9:.3f} GB")
    print(f"CPU {ours[2]:.1f} s, zero_to_fp32 {theirs[2]:.1f} s")
    assert ours[0] * 10 < theirs[0]
    assert ours[1] < 1.01 * needed + imports[1] + 20_000_000  # headers and Python's own modules
    wanted = {name: tensor for path in (tmp_path / "theirs").glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = {name: tensor for path in (tmp_path / "ours").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert_same_bits(found, {name: tensor for name, tensor in wanted.items() if name in found})
    assert {name for name in wanted if not name.startswith("extra_")} == set(found)
