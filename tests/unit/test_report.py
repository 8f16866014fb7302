"""The report page: its figures are the plan's, names stay text, and it asks for nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from math import prod
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import UsageError
from shardwright.planner import report
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints
from shardwright.planner.layout import Layout
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Bindings, Cost, Dropped, Plan
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from shardwright.planner.tensor.dtypes import dtype as dtype_of
from tests.unit.tiny import tiny_llama

COST = Cost(150, 7, 1_548_032, 1_618_432, 1_548_000, 1_618_432, 263, 5, 30, 9, 60 << 20, 900 << 20, 80 << 20)
HOSTILE = "</script><script>document.title='hit'</script><img src=x onerror=alert(1)>"
FIELDS = [
    "source_format", "source_layout", "family", "target_format", "target_layout", "tensors", "files", "bytes_read", "bytes_written",
    "source_bytes", "target_bytes", "read_amplification", "write_amplification", "requests", "tiles", "pieces", "programs", "base_bytes",
    "peak_bytes", "min_memory_bytes", "dropped", "warnings",
]  # fmt: skip
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """Collects elements, attributes and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] == "script" and self.lasttag == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "plan"))
        return found


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = open_source(LocalStore(tiny_llama(tmp_path_factory.mktemp("s"))), Hints())
    made = build(source, Request("megatron-legacy", Layout(tp=2, pp=2)))
    return replace(made, dropped=(Dropped("rotary.inv_freq", "made from the config"),))


@pytest.fixture(scope="module")
def hostile(plan: Plan) -> Plan:
    """The plan with a name in every place that is markup."""
    bound = plan.bindings[0]
    return replace(
        plan,
        bindings=(Bindings((HOSTILE,), bound.source_file, bound.source_offset, bound.target_file, bound.target_offset), *plan.bindings[1:]),
        source_tensors=tuple(t._replace(name=HOSTILE) for t in plan.source_tensors),
        target_tensors=tuple(t._replace(name=HOSTILE) for t in plan.target_tensors),
        source_files=tuple(replace(f, path=HOSTILE) for f in plan.source_files),
        target_files=tuple(replace(f, path=HOSTILE) for f in plan.target_files),
        summary={**plan.summary, "source_format": HOSTILE, "family": HOSTILE},
        dropped=(Dropped(HOSTILE, HOSTILE),),
        warnings=(HOSTILE,),
    )


def test_figures_are_the_plans(plan: Plan) -> None:
    cost = Page(report.render(plan, COST)).data["cost"]
    assert list(cost) == FIELDS
    for name in FIELDS:
        if hasattr(COST, name):
            assert cost[name] == getattr(COST, name), name
    assert {k: cost[k] for k in plan.summary} == plan.summary
    assert cost["warnings"] == list(plan.warnings) and cost["dropped"] == [{"name": "rotary.inv_freq", "reason": "made from the config"}]


def test_tensors_and_files(plan: Plan) -> None:
    data = Page(report.render(plan, COST)).data
    assert data["target_files"] == {"path": [f.path for f in plan.target_files], "bytes": [f.nbytes for f in plan.target_files]}
    shown = [
        (data["names"][n], r, *data["kinds"][k], f)
        for n, r, k, f in zip(*(data["targets"][key] for key in ("name", "rank", "kind", "file")), strict=True)
    ]
    assert shown == [(t.name, t.rank, t.dtype, list(t.shape), dtype_of(t.dtype).nbytes(prod(t.shape)), t.file) for t in plan.target_tensors]
    assert data["ranks"]["rank"] == [0, 1, 2, 3] and sum(data["ranks"]["tensors"]) == len(plan.target_tensors)
    assert sum(data["ranks"]["bytes"]) == sum(row[4] for row in shown)


def test_every_tensor_has_its_lineage(plan: Plan) -> None:
    data = Page(report.render(plan, COST)).data
    made: dict[int, set[str]] = {}
    for program, bound in zip(data["programs"], data["bindings"], strict=True):
        for operand, rows in enumerate(bound["targets"]):
            for row, tensor in enumerate(rows):
                sources = [bound["sources"][slot][row] for slot in program["made"][operand]["from"]]
                made.setdefault(tensor, set()).update(data["names"][data["sources"]["name"][s]] for s in sources)
    assert sorted(made) == list(range(len(plan.target_tensors)))
    qkv = next(i for i, t in enumerate(plan.target_tensors) if t.name.endswith("layers.0.self_attention.linear_qkv.weight"))
    assert made[qkv] == {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"}


def test_names_stay_text(hostile: Plan) -> None:
    text = report.render(hostile, COST)
    page = Page(text)
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script", "script"]
    assert HOSTILE in page.data["names"] and HOSTILE in page.data["target_files"]["path"]
    assert "<img" not in text and "innerHTML" not in text


def test_asks_for_nothing(plan: Plan) -> None:
    text = report.render(plan, COST)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "import(" not in text
    tags = Page(text).tags
    assert not [attrs for _, attrs in tags if "src" in attrs or "href" in attrs]
    policy = next(a["content"] for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy


def test_write(plan: Plan, tmp_path: Path) -> None:
    report.write(plan, COST, tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == report.render(plan, COST)
    with pytest.raises(UsageError, match="cannot be written"):
        report.write(plan, COST, tmp_path / "absent" / "plan.html")


def draw(file: Path, chosen: str = "") -> str:
    """The document as a browser shows it."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={file.parent / 'profile'}",
        "--virtual-time-budget=4000",
        "--dump-dom",
    ]
    address = file.as_uri() + (f"#tensor={chosen}" if chosen else "")
    return subprocess.run([str(CHROMIUM), *flags, address], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to draw the page with")
@pytest.mark.parametrize("name", ["plan", "hostile"])
def test_a_browser_draws_it(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    report.write(request.getfixturevalue(name), COST, tmp_path / "plan.html")
    dom = draw(tmp_path / "plan.html", "model.embedding.word_embeddings.weight")
    assert "Target tensors" in dom and "1,548,032 bytes" in dom and "263 requests" in dom
    if name == "hostile":
        assert "<title>hit" not in dom and "<img" not in dom and "&lt;img src=x" in dom
    else:
        assert "rotary.inv_freq" in dom and "rows 0…127" in dom and "model.embed_tokens.weight" in dom


ACT = """<script>
const at = (ms, act) => setTimeout(act, ms);
const box = document.querySelector("input");
at(500, () => { box.value = "LINEAR_QKV.weight mp_rank_01_001"; box.dispatchEvent(new Event("input")); });
at(1000, () => document.querySelectorAll(".head button")[0].click());
at(1200, () => document.querySelectorAll(".head button")[0].click());
at(1500, () => document.querySelector(".view .row").click());
at(1800, () => document.querySelector(".view .row").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true })));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to draw the page with")
def test_search_sort_and_keys(plan: Plan, tmp_path: Path) -> None:
    """Search for two tensors, sort them downwards, click the first, step to the second."""
    file = tmp_path / "plan.html"
    file.write_text(report.render(plan, COST).replace("</body>", ACT + "</body>"), encoding="utf-8")
    dom = draw(file)
    assert f"2 of {len(plan.target_tensors)}" in dom and 'aria-sort="descending"' in dom
    panel = dom[dom.index("<aside") :]
    assert "model.decoder.layers.0.self_attention.linear_qkv.weight" in panel and "model.layers.2.self_attn.v_proj.weight" in panel
