"""The docs are as fresh as the code: generated pages, links, and the worked example of a target."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HAND = sorted(p for p in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(generate: ModuleType) -> None:
    assert generate.stale() == [], "run: python docs/generate.py"


def test_a_change_is_seen(generate: ModuleType) -> None:
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    assert generate.fill(page, "metrics", "nothing") != page
    with pytest.raises(ValueError, match="no part"):
        generate.fill(page, "nowhere", "")


def test_every_validation_row_is_judged(generate: ModuleType) -> None:
    from pfmc import technology
    from pfmc.targets.crossbar import validation as crossbar
    from pfmc.targets.rom import validation as rom

    rows = [*rom.rows(), *crossbar.rows(technology.load("crossbar"))]
    assert {generate.evidence(r) for r in rows} == {"independent", "same inputs", "calibrated"}
    unknown = next(iter(rows)).__class__("news", 1.0, 1.0, "1", "", "full")
    with pytest.raises(KeyError, match="news"):
        generate.evidence(unknown)


@pytest.mark.parametrize("page", HAND, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", HAND, ids=lambda p: str(p.relative_to(DOCS)))
def test_python_in_the_docs_is_python(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        compile(code, f"{page.name}[{number}]", "exec")


def test_the_example_target_fits_the_protocol() -> None:
    from pfmc import technology
    from pfmc.targets.base import Target

    code = re.findall(r"```python\n(# pfmc_serial.py\n.*?)```", _architecture(), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(code, "pfmc_serial.py", "exec"), names)
    target = names["SerialTarget"]
    wanted = [n for n in vars(Target) if not n.startswith("_")]
    missing = [n for n in (*wanted, "kind", "exact") if not hasattr(target, n)]
    assert not missing
    assert technology.load("fabric_n7").kind == "fabric"


def test_the_example_target_lowers_and_computes(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from pfmc import technology
    from pfmc.hardware import FixedLinear, QuantisedMatrix, Workload
    from pfmc.targets.base import Die, StoredLinear

    python = re.findall(r"```python\n(# pfmc_serial.py\n.*?)```", _architecture(), re.DOTALL)[0]
    toml = re.findall(r"```toml\n(# serial.toml\n.*?)```", _architecture(), re.DOTALL)[0]
    (tmp_path / "serial.toml").write_text(toml, encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(python, "pfmc_serial.py", "exec"), names)
    target = names["SerialTarget"]()  # type: ignore[operator]
    tech = technology.load(str(tmp_path / "serial.toml"))
    target.check(tech)
    codes = np.array([[1, -2], [3, 4], [5, -6]], np.int8)
    matrix = QuantisedMatrix(codes, 4, np.array([[0.5, 0.25]], np.float32), 3)
    tiled = target.lower_linear(FixedLinear("layer", matrix, None, 8, 1.0), tech)
    tensors = {**tiled.tensors, "codes": codes, "scale": matrix.scale}
    stored = StoredLinear("layer", 3, 2, tiled.tiles, tensors, None, 8, 1.0)
    y = target.layer(stored, tech, Die())(torch.tensor([[1.0, 2.0, 3.0]]))
    assert y.tolist() == [[11.0, -3.0]]
    report = target.cost([tiled.summary()], [], tech, Workload("decode", 16))
    assert report["energy__token"].typical > 6 * 0.1e-12
    assert report["throughput__user"].typical == pytest.approx(1e9 / 6)


def _architecture() -> str:
    return (DOCS / "architecture.md").read_text(encoding="utf-8")
