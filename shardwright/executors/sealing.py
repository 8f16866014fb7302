"""The last bytes of a target: what can only be written when all the others are.

1. Each container's checksums of data are patched in, and the CRC-32 of every file is put together from its extents: no
   byte is read again for it.
2. Small files are carried over, their CRC-32 taken on the way.
3. SHA-256, where it was asked for, reads every finished file once more.
4. The sums go, in hexadecimal, to the places that the plan keeps for them in ``shardwright.json``.

Everything here can be done again: a run that resumes after step 4 begins with step 1.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import RunError
from ..planner.plan import Plan
from . import system
from .checksums import crc32
from .descriptors import failed, open_regular
from .digests import digests_of
from .extents import Checksums
from .stopping import Stop
from .targets import TargetFiles

__all__ = ["seal"]

BLOCK_BYTES = 1 << 20


def seal(plan: Plan, targets: TargetFiles, checksums: Checksums, workers: int, stop: Stop) -> int:
    """Write what is left; bytes that were read again.

    Raises
    ------
    ContradictionError
        Some byte of a file was never written.
    RunError
        The system reports an error, or the run is stopped.
    """
    files = len(plan.target_files)
    crcs: dict[int, int] = {}
    for number, file in enumerate(plan.target_files):
        stop.raise_cause()
        if not file.seals:
            crcs[number], patches = checksums.seal(number)
            with targets.writing(number) as write:
                for offset, patch in patches:
                    write(offset, memoryview(patch))
    for number, (source, target) in enumerate(plan.copies):
        stop.raise_cause()
        crcs[files + number] = _copy(Path(plan.source_root) / source, targets.root / target, source)
    paths = [file.path for file in plan.target_files] + [target for _, target in plan.copies]
    hashed = [paths[place.file] for file in plan.target_files for place in file.seals if place.kind == "sha256"]
    digests = digests_of(targets.root, dict.fromkeys(hashed, ("sha256",)), workers=workers, stop=stop)
    for number, file in enumerate(plan.target_files):
        with targets.writing(number) as write:
            for place in file.seals:
                text = digests[paths[place.file]]["sha256"] if place.kind == "sha256" else f"{crcs[place.file]:08x}"
                write(place.offset, memoryview(text.encode()))
    return sum((targets.root / path).stat().st_size for path in hashed)


def _copy(source: Path, target: Path, name: str) -> int:
    """Carry a small file over, synced; its CRC-32."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(source), "rb") as reading, open(target, "wb", buffering=0) as writing:
            crc = at = 0
            while block := memoryview(reading.read(BLOCK_BYTES)):
                crc = crc32(block, crc)
                while block:
                    written = system.pwrite(writing.fileno(), block, at)
                    block, at = block[written:], at + written
            system.sync(writing.fileno())
            return crc
    except FileNotFoundError:
        raise RunError("a file to be carried over is missing", file=name) from None
    except OSError as error:
        raise failed(error, name, "copying") from error
