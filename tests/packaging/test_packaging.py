"""What is shipped, who may import whom, and what must not be in the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "shardwright"
HEAVY = {"torch", "dask", "distributed", "zarr", "tensorstore"}
SHIPPED = sorted(
    path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".swp"}
)


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed, run in the repository's root."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# -- the wheel ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", out)
    with zipfile.ZipFile(next(out.glob("shardwright-*.whl"))) as archive:
        yield archive


def test_wheel_holds_the_package_once_and_whole(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == {path.relative_to(ROOT).as_posix() for path in SHIPPED}
    assert "shardwright/py.typed" in names


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = {name.split("/", 1)[1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "shardwright = shardwright.cli:main" in info["entry_points.txt"]
    assert "Apache License" in info["licenses/LICENSE"]
    assert "License-Expression: Apache-2.0" in info["METADATA"]
    torch = [line for line in info["METADATA"].splitlines() if line.startswith("Requires-Dist: torch")]
    assert torch
    assert not any("<" in line or "==" in line for line in torch), "torch has no upper pin"


# -- the links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planner", "executors"])
def test_root_links(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"shardwright/{name}"
    assert (link / "__init__.py").samefile(PACKAGE / name / "__init__.py")


def test_ruff_sees_each_file_once() -> None:
    seen = run(sys.executable, "-m", "ruff", "check", "--show-files", ".").split()
    real = [os.path.realpath(path) for path in seen]
    assert len(real) == len(set(real))
    assert {str(path) for path in SHIPPED if path.suffix == ".py"} <= set(seen)


# -- imports -----------------------------------------------------------------------------------------------------------------

WALK = """
import importlib, pkgutil, sys
package, last, forbidden = sys.argv[1], sys.argv[2], sys.argv[3:]
root = importlib.import_module(package)
names = [package, *(module.name for module in pkgutil.walk_packages(root.__path__, package + "."))]
names.sort(key=lambda name: name.rpartition(".")[2] == last)
blamed = set()
for name in names:
    importlib.import_module(name)
    for module in forbidden:
        if module in sys.modules and module not in blamed and not (module == "networkx" and name.endswith("." + last)):
            blamed.add(module)
            print(name, "imports", module)
"""

HELP = """
import sys
from shardwright.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit:
    print("MODULES", *sys.modules)
"""


def walk(package: str, *forbidden: str, last: str = "") -> str:
    """Import a package's modules one after the other, ``last`` at the end; a line for each forbidden module that appears."""
    return run(sys.executable, "-c", WALK, package, last, *forbidden)


def test_planner_imports_no_executor_and_nothing_heavy() -> None:
    assert walk("shardwright.planner", *sorted(HEAVY), "shardwright.executors", "networkx", last="lineage") == ""


def test_executors_import_no_format_and_no_family() -> None:
    forbidden = ("formats", "families", "dialects")
    assert walk("shardwright.executors", *(f"shardwright.planner.{name}" for name in forbidden)) == ""


def test_import_is_light() -> None:
    out = run(sys.executable, "-c", "import sys, shardwright; print(*sys.modules)")
    assert not set(out.split()) & (HEAVY | {"numpy", "networkx", "rich", "click"})


def test_help_is_light() -> None:
    out = run(sys.executable, "-c", HELP)
    assert "Usage" in out
    assert not set(out.rpartition("MODULES")[2].split()) & (HEAVY | {"networkx"})


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also inside functions, except for type checkers alone."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in _running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out ``if TYPE_CHECKING:`` blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _running(child)


def within(module: str, roots: set[str]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def test_no_planner_file_imports_them_later_either() -> None:
    forbidden = HEAVY | {"shardwright.executors", "shardwright.api", "shardwright.cli"}
    for path in (PACKAGE / "planner").rglob("*.py"):
        extra = set() if path.name == "lineage.py" else {"networkx"}
        guilty = [name for name in imports(path) if within(name, forbidden | extra)]
        assert not guilty, f"{path.relative_to(ROOT)} imports {guilty}"


def test_no_executor_file_imports_a_format_later_either() -> None:
    forbidden = {f"shardwright.planner.{name}" for name in ("formats", "families", "dialects")}
    for path in (PACKAGE / "executors").rglob("*.py"):
        guilty = [name for name in imports(path) if within(name, forbidden | {"shardwright.api", "shardwright.cli"})]
        assert not guilty, f"{path.relative_to(ROOT)} imports {guilty}"


def test_nothing_imports_through_the_links() -> None:
    for path in SHIPPED:
        if path.suffix == ".py":
            assert not [name for name in imports(path) if within(name, {"planner", "executors", "tests"})], path


def test_the_test_of_imports_sees_them() -> None:
    assert "json imports json.decoder" in walk("json", "json.decoder")
    assert "json.decoder" in set(imports_of("from json import decoder"))
    assert not set(imports_of("if TYPE_CHECKING:\n    import torch"))
    assert "torch" in set(imports_of("def f():\n    import torch"))


def imports_of(source: str) -> Iterator[str]:
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# -- the console script ------------------------------------------------------------------------------------------------------


def test_console_script() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="shardwright")
    assert entry.value == "shardwright.cli:main"
    assert callable(entry.load())
    out = run(Path(sys.executable).with_name("shardwright"), "--help")
    for command in ("inspect", "plan", "convert", "verify"):
        assert command in out


# -- pins and texts ----------------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(package): version for package, version in found.items()}


def canonical(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_everything_that_is_needed_is_pinned() -> None:
    declared = project()
    needed = {canonical(line) for line in [*declared["dependencies"], *declared["optional-dependencies"]["test"]]}
    assert needed <= pins("constraints.txt").keys()
    assert {canonical(line) for line in declared["dependencies"]} <= pins("requirements-clients.txt").keys()


def test_pins_agree_and_come_from_a_public_index() -> None:
    ours, theirs = pins("constraints.txt"), pins("requirements-clients.txt")
    assert {name: ours[name] for name in ours.keys() & theirs.keys()} == {name: theirs[name] for name in ours.keys() & theirs.keys()}
    assert all(re.fullmatch(r"[\w.]+", version) for version in [*ours.values(), *theirs.values()]), "no local version, no URL"


def texts() -> Iterator[tuple[str, str]]:
    folders = [PACKAGE, ROOT / "tests", ROOT / "docs", ROOT / "benchmarks", ROOT / ".ci"]
    files = [path for path in ROOT.iterdir() if path.is_file()] + [path for folder in folders for path in folder.rglob("*")]
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts and path.stat().st_size < 2**20:
            yield path.relative_to(ROOT).as_posix(), path.read_text(errors="replace")


def test_no_machine_is_mentioned() -> None:
    """Folders of somebody's machine and private indexes have no place in a repository that others clone."""
    private = re.compile(r"(?<![\w.~}/-])/(?:home|Users|root|work|opt)/\w|file:///\w|--(?:extra-index-url|find-links)|--trusted-host")
    here = Path(__file__).relative_to(ROOT).as_posix()
    found = [f"{name}: {match.group()}" for name, text in texts() if name != here for match in private.finditer(text)]
    assert not found


def test_version_is_stated_once() -> None:
    assert metadata.version("shardwright") == project()["version"]
    assert f"## [{project()['version']}]" in (ROOT / "CHANGELOG.md").read_text()
