"""Kill the run anywhere, pull the plug anywhere: the next run finishes what was begun, to the byte.

Every stop is one side of one numbered system call of a run (`boundaries`). After it OUT is absent, the old one, or
whole; nothing unfinished can be opened; the journal vouches for all that was durable; and resuming gives, byte for byte,
what an undisturbed run gives, with no more than the unsynced batches and the tiles in flight done again.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from shardwright.api import Conversion
from tests.faults.boundaries import Host, Order, Point, Report, cannot
from tests.faults.broken import Forgetful, Hasty, unsynced
from tests.faults.scenes import BATCH_BYTES, MEMORY, SCENES, SMALL_BATCHES, Digests, Scene, digests, journal_of, make_scene, vouched

LANES = 2
KINDS = {
    "pwrite data", "sync data", "sync folder", "append journal", "sync journal", "ftruncate data", "allocate data", "sync plan",
    "rename plan", "rename data", "exchange data", "unlink journal", "preadv source", "rmtree data", "rmdir partial",
}  # fmt: skip
"""What a run must consist of; a call that went past `executors.system` would not be counted."""
TEARABLE = ("pwrite data", "append journal", "rmtree data", "rmtree old")

Find = Callable[[str], Scene]
Side = Literal["before", "after", "torn"]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host.running() as found:
        yield found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """Scenes by name, each made once."""
    root, made = tmp_path_factory.mktemp("scenes"), dict[str, Scene]()

    def find(name: str) -> Scene:
        if name not in made:
            made[name] = make_scene(root / name, name)
        return made[name]

    return find


def old_target(out: Path) -> Digests:
    """Something that --overwrite replaces."""
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "precious").write_bytes(b"old" * 1000)
    (out / "config.json").write_text("{}")
    return digests(out)


class Crash:
    """One target that is stopped, looked at, and resumed."""

    def __init__(self, host: Host, scene: Scene, out: Path, *, overwrite: bool = False, **settings: object) -> None:
        self.host, self.scene, self.out = host, scene, out
        self.settings = {**SMALL_BATCHES, **{f"shardwright.executors.{place}": value for place, value in settings.items()}}
        self.exchange = "system:exchange" not in settings
        self.partial = out.with_name(out.name + ".partial")
        self.old = old_target(out) if overwrite else None

    def run(self, point: Point | None = None, **options: Any) -> Report:
        options = {"memory": MEMORY, "workers": LANES, "overwrite": self.old is not None, **options}
        report = self.host.run(Order(self.scene.plan, str(self.out), options, self.settings, point))
        assert report.status in (0, -9)
        return report

    def stop(self, point: Point) -> Report:
        """Run until the point; what that leaves is as it must be."""
        before = vouched(journal_of(self.out))
        report = self.run(point)
        assert report.error is None, report.error
        self.scene.look(self.out, self.old, always=self.old is not None and self.exchange)
        if report.status and not self.published():
            self.weigh(report, before)
        return report

    def published(self) -> bool:
        return self.out.exists() and digests(self.out) == self.scene.whole

    def weigh(self, report: Report, before: set[int]) -> None:
        """What was durable is vouched for; what is not is no more than was in flight."""
        found, written = vouched(journal_of(self.out)), self.scene.plan.tiles.bytes_written
        assert found >= before | vouched(report.kept), "durable lines are lost"
        lost = report.written - int(written[list(found - before)].sum())
        # One batch is being synced, and lanes wait once two more are full; each may have added its tile.
        assert lost <= 4 * BATCH_BYTES + 2 * LANES * int(written.max()), f"{lost} bytes are to be written again"

    def resume(self, **options: Any) -> None:
        """The same command again finishes it."""
        journal, published = journal_of(self.out), self.published()
        if published and not journal:
            job = Conversion(self.scene.plan, self.out)
            assert job.is_done()
            job.tidy()
            self.scene.done(self.out)
            return
        report = self.run(**options)
        if report.error is not None:
            raise report.error
        self.scene.done(self.out)
        kept = vouched(journal)
        assert (report.outcome.tiles_resumed, report.begun) == (len(kept), len(self.scene.plan.tiles) - len(kept))
        assert report.outcome.padding == self.scene.padding


def census(host: Host, scene: Scene, folder: Path, *, overwrite: bool, **settings: object) -> Counter[str]:
    """How often an undisturbed run makes each call."""
    crash = Crash(host, scene, folder / "counted", overwrite=overwrite, **settings)
    report = crash.run()
    assert report.error is None, report.error
    scene.done(crash.out)
    shutil.rmtree(crash.out)
    return report.calls


def stops(calls: Counter[str], chance: random.Random, *, power: bool, each: int) -> Iterator[Point]:
    """For each kind and side, that many points, spread over the run."""
    for kind, count in sorted(calls.items()):
        sides: tuple[Side, ...] = ("before", "after", "torn") if kind in TEARABLE else ("before", "after")
        for side in sides:
            for part in range(each):
                # Batches close as time allows, so a later run may make fewer calls.
                number = 1 + int((part + chance.random()) / each * 0.7 * count)
                yield Point(kind, side, number, power, chance.randrange(1 << 30))


def test_every_call_of_a_run_is_a_boundary(host: Host, scene: Find, tmp_path: Path) -> None:
    found = census(host, scene("ranks"), tmp_path, overwrite=False) + census(host, scene("ranks"), tmp_path, overwrite=True)
    assert set(found) >= KINDS


def struck(crash: Crash, point: Point) -> bool:
    """Stop a run; later runs may make fewer calls of a kind, so the number is halved until it is reached."""
    while crash.stop(point).status == 0:
        assert point.number > 1, f"{point.kind} is never called"
        shutil.rmtree(crash.out)
        if crash.old is not None:
            old_target(crash.out)
        point = replace(point, number=point.number // 2)
    return True


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
def test_a_sample_of_stops(host: Host, scene: Find, tmp_path: Path, name: str, power: bool) -> None:
    chance = random.Random(f"{name} {power}")
    points = list(stops(census(host, scene(name), tmp_path, overwrite=False), chance, power=power, each=1))
    for number, point in enumerate(chance.sample(points, 4)):
        crash = Crash(host, scene(name), tmp_path / str(number))
        assert struck(crash, point)
        crash.resume(workers=1 + number % 3)


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize(
    ("kind", "side"), [("exchange data", "before"), ("exchange data", "after"), ("sync folder", "after"), ("unlink journal", "after")]
)
def test_replacing_a_target(host: Host, scene: Find, tmp_path: Path, kind: str, side: Side, power: bool) -> None:
    """There is an old or a new OUT at any moment."""
    crash = Crash(host, scene("ranks"), tmp_path / "out", overwrite=True)
    last = census(host, scene("ranks"), tmp_path, overwrite=True)[kind]
    assert struck(crash, Point(kind, side, last, power))
    crash.resume()


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
@pytest.mark.parametrize(
    ("kind", "side"), [("rename target", "before"), ("rename target", "after"), ("rename data", "before"), ("rename data", "after")]
)
def test_replacing_a_target_where_the_kernel_cannot_exchange(
    host: Host, scene: Find, tmp_path: Path, kind: str, side: Side, power: bool
) -> None:
    """Between the two renames there is no OUT; the next run finishes, whichever it sees."""
    crash = Crash(host, scene("gathered"), tmp_path / "out", overwrite=True, **{"system:exchange": cannot})
    assert struck(crash, Point(kind, side, 1, power))
    crash.resume()


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
def test_a_run_that_is_stopped_again_and_again(host: Host, scene: Find, tmp_path: Path, power: bool) -> None:
    """Each run gets a little further, and the last one to the end."""
    crash, chance, resumed = Crash(host, scene("gathered"), tmp_path / "out"), random.Random(power), 0
    for round in range(8):
        kind = ("sync journal", "append journal", "pwrite data")[round % 3]
        side: Side = "torn" if round % 3 else "after"
        report = crash.stop(Point(kind, side, 30 if kind == "pwrite data" else 2, power, chance.randrange(1 << 30)))
        if report.status == 0:
            break
        resumed = max(resumed, len(vouched(journal_of(crash.out))))
    assert resumed > 0
    if not crash.published():
        crash.resume()
    crash.scene.done(crash.out)


@pytest.mark.parametrize(
    ("place", "wrong", "point", "says"),
    [
        ("execute:Ledger", Hasty, Point("sync journal", "after", 4, power=True), "not what an undisturbed run makes"),
        ("publish:sync_path", unsynced, Point("sync journal", "after", 4, power=True), "durable lines are lost"),
        ("publish:Journal", Forgetful, Point("append journal", "torn", 3), "bytes are to be written again"),
    ],
    ids=["lines before data", "folders not synced", "torn line not cut"],
)
def test_a_wrong_order_is_seen(host: Host, scene: Find, tmp_path: Path, place: str, wrong: object, point: Point, says: str) -> None:
    """The same checks fail when the code does not do what they are there for."""

    def twice(seed: int) -> None:
        crash = Crash(host, scene("gathered"), tmp_path / str(seed), **{place: wrong})
        assert struck(crash, replace(point, seed=seed))
        crash.stop(replace(point, kind="rename data", side="before", number=1, seed=seed))
        crash.resume()

    with pytest.raises(AssertionError, match=says):
        [twice(seed) for seed in range(8)]


class TestAll:
    """Everything: hours on a small machine."""

    pytestmark = pytest.mark.soak

    @pytest.mark.parametrize("mode", ["new", "exchange", "renames"])
    @pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
    @pytest.mark.parametrize("name", SCENES)
    def test_every_kind_of_boundary(self, host: Host, scene: Find, tmp_path: Path, name: str, power: bool, mode: str) -> None:
        """Five scenes: at least twenty hits per kind, side and mode in all."""
        chance, hits = random.Random(f"{name} {power} {mode}"), Counter[str]()
        settings = {"system:exchange": cannot} if mode == "renames" else {}
        calls = census(host, scene(name), tmp_path, overwrite=mode != "new", **settings)
        for number, point in enumerate(stops(calls, chance, power=power, each=2)):
            crash = Crash(host, scene(name), tmp_path / str(number), overwrite=mode != "new", **settings)
            assert struck(crash, point)
            if chance.random() < 0.3 and not crash.published():  # and again, while it is resumed
                kind = chance.choice((point.kind, "ftruncate journal"))
                crash.stop(Point(kind, "after" if point.side == "torn" else point.side, 1 + number % 3, power, number))
            if not crash.out.exists() or crash.partial.exists():
                crash.resume(workers=1 + number % 3)
            hits[point.kind] += 1
            shutil.rmtree(crash.out)
        print(f"{hits.total()} stops: {dict(hits)}")
        assert set(hits) == set(calls)
