"""The house rules, held by `ast`: floors, imports, shelves, packages, the light command line."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pfmc import library, technology

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "pfmc"

FLOORS = [
    {
        "__init__", "errors", "library", "quantity",
    },
    {
        "artifact", "child", "compensation", "cost", "formats", "hadamard", "hardware", "ir",
        "layer_rounding", "netlist", "noise", "noise_laws", "rounding", "technology",
    },
    {
        "distill", "ingest", "report", "targets",
    },
    {
        "passes",
    },
    {
        "adapt", "against_experts", "against_source", "calibration", "compile", "distillation",
        "distilled", "evaluation", "inspect_model", "lint", "lowered", "numbers", "oracle",
        "reduce", "rotation", "simulate", "store", "verification", "verify", "with_adapter",
    },
    {
        "compare", "explore",
    },
    {
        "__main__", "cli",
    },
]
ONLY_IN = {
    "onnx": {"ingest"},
    "onnxruntime": {"oracle"},
    "onnx_ir": {
        "ingest", "ir", "passes", "distill", "targets", "lowered", "compile", "simulate", "verify",
        "adapt", "against_experts", "against_source", "calibration", "distillation", "distilled",
        "evaluation", "inspect_model", "lint", "numbers", "rotation",
    },
    "torch": {
        "distill", "targets", "simulate", "against_experts", "against_source", "calibration",
        "distillation", "distilled",
    },
}
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "scipy", "pyarrow")


def room(path: Path) -> str:
    """The first name below pfmc/ that a file belongs to."""
    relative = path.relative_to(HOUSE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def floor(name: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if name in rooms]
    assert found, f"pfmc/{name} stands on no floor: add it to FLOORS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file; imports for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


FILES = sorted(p for p in HOUSE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_nothing_imports_upwards(path: Path) -> None:
    here = room(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "pfmc" and len(parts) > 1 and (HOUSE / parts[1]).exists() | (
            HOUSE / f"{parts[1]}.py"
        ).exists():
            assert floor(parts[1]) <= floor(here), f"{here} imports {module}, a floor above"


def test_rooms_form_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "pfmc" and len(parts) > 1 and parts[1] != room(path):
                arrows.setdefault(room(path), set()).add(parts[1])

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        below = arrows.get(start, set()) - seen
        return goal in below or any(reaches(b, goal, seen | below) for b in below)

    circles = [r for r in arrows if reaches(r, r, set())]
    assert not circles, f"rooms in a circle: {circles}"


def test_no_target_imports_another() -> None:
    for kind in ("rom", "crossbar", "optical"):
        for path in (HOUSE / "targets" / kind).rglob("*.py"):
            others = {f"pfmc.targets.{o}" for o in ("rom", "crossbar", "optical") if o != kind}
            assert not {m for m in imports(path) if m.startswith(tuple(others))}, path


def test_no_pass_imports_a_target() -> None:
    for path in (HOUSE / "passes").rglob("*.py"):
        assert not {m for m in imports(path) if m.startswith("pfmc.targets")}, path


def test_no_target_imports_a_pass() -> None:
    for path in (HOUSE / "targets").rglob("*.py"):
        assert not {m for m in imports(path) if m.startswith("pfmc.passes")}, path


@pytest.mark.parametrize("library_name", sorted(ONLY_IN))
def test_a_library_is_imported_only_in_its_rooms(library_name: str) -> None:
    for path in FILES:
        if any(m.split(".")[0] == library_name for m in imports(path)):
            assert room(path) in ONLY_IN[library_name], f"{path} imports {library_name}"


def test_the_command_line_is_light() -> None:
    code = f"import sys, pfmc.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nothing_imports_the_command_line() -> None:
    for path in FILES:
        if room(path) not in ("cli", "__main__"):
            assert not {m for m in imports(path) if m.startswith("pfmc.cli")}, path


def test_every_module_and_package_says_what_it_is_for() -> None:
    silent = [p for p in FILES if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert not silent


def test_the_package_list_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in HOUSE.rglob("__init__.py")}
    assert found == {p for p in listed if not p.startswith("pfmc._library")}


@pytest.mark.parametrize("name", sorted(library.entries("targets")))
def test_every_technology_loads(name: str) -> None:
    """Loading refuses a number without range, unit, source or grade."""
    assert technology.load(name).constants


@pytest.mark.parametrize("shelf", ["passes", "targets", "models"])
def test_every_shelf_explains_itself(shelf: str) -> None:
    assert (library.shelf(shelf) / "README.md").is_file()


def test_no_test_is_timed() -> None:
    """Speed belongs in ``benchmarks/``: a test must not depend on the machine it runs on."""
    timed = [
        path.name for path in (ROOT / "tests").rglob("test_*.py")
        if "process_time()" in path.read_text(encoding="utf-8") and path.name != "test_house.py"
    ]  # fmt: skip
    assert timed == []
