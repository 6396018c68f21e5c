"""The wheel: it holds the shelves, and an install of it compiles far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pfmc", "passes", "targets", "models")
FILES = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (made,) = out.glob("pfmc-*.whl")
    return made


def pip(verb: str, *words: str) -> None:
    """Runs pip without looking anything up."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", "--no-index", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_shelves(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for shelf in ("passes", "targets", "models"):
        wanted = {f"pfmc/_library/{shelf}/{p.name}" for p in (ROOT / shelf).glob("*.toml")}
        assert wanted
        assert wanted <= held
    bard = {f"pfmc/_library/models/bard/{p.name}" for p in (ROOT / "models/bard").iterdir()}
    assert {b for b in bard if "__pycache__" not in b} <= held
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pfmc").rglob("*.py")}
    assert code <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    outside = {n.split("/")[0] for n in held} - {"pfmc"}
    assert all(n.endswith(".dist-info") for n in outside), "nothing else at top level"


def test_an_install_compiles_its_own_shelf(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip("install", "--no-compile", "--target", str(site), str(wheel))
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pfmc", *map(str, words)], capture_output=True, text=True,
            cwd=work, env=env, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import pfmc; print(pfmc.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=work, env=env, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(site), "the installed one is under test"
    assert "bard" in run("models")
    assert "optical" in run("targets")
    assert "stream" in run("passes")
    model = site / "pfmc" / "_library" / "models" / "bard" / "model.onnx"
    out = run("compile", model, "--target", "rom", "--recipe", "stream", "-o", "bard.pfm")
    assert "written: bard.pfm" in out
    assert run("check", "bard.pfm").startswith("bard.pfm: ")
    text = run("run", "bard.pfm", "--prompt", "ROMEO:", "--max-new-tokens", 8, "--quiet")
    assert text.startswith("ROMEO:")
    assert len(text) > len("ROMEO:\n")
    script = site / "bin" / "pfmc"
    assert subprocess.run([script, "--version"], env=env, capture_output=True).returncode == 0
