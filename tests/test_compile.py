"""The road as a whole: the same bytes everywhere, whatever happens in between, and every phase."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pfmc as package
from pfmc import artifact
from pfmc.artifact import MANIFEST, STAGE, read_manifest
from pfmc.compile import PHASES, Options, compile_model
from pfmc.errors import UsageError

TARGETS = ("rom", "crossbar", "optical")
CALIBRATED = ("--set", "calibration.sequences=2", "--set", "calibration.length=16")
ROOT = Path(__file__).resolve().parents[1]
BARD = ROOT / "models" / "bard" / "model.onnx"


def files_of(path: Path) -> dict[str, str]:
    """Every file of an artifact but its provenance, with its sha256."""
    return {
        p.relative_to(path).as_posix(): artifact.sha256_file(p)
        for p in sorted(path.rglob("*"))
        if p.is_file() and not p.relative_to(path).as_posix().startswith(artifact.PROVENANCE)
    }


# -- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_bytes_everywhere(
    target: str, pfmc: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    """Hash seed, threads, jobs, folders and time zone of a process do not show in the result."""
    elsewhere = tmp_path / "another folder"
    shutil.copytree(tiny.parent, elsewhere)
    (tmp_path / "work").mkdir()
    ways: list[tuple[Any, Any, tuple[str, ...], dict[str, str]]] = [
        (tiny, tmp_path / "a.pfm", ("--jobs", "1"), {"PYTHONHASHSEED": "1"}),
        (
            "../another folder/model.onnx", "deep/b.pfm", ("--jobs", "3"),
            {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        ),
    ]  # fmt: skip
    for model, out, jobs, env in ways:
        words = ("compile", model, "--target", target, *CALIBRATED, *jobs, "-o", out)
        done = pfmc(*words, cwd=tmp_path / "work", env=env)
        assert done.code == 0, done.err
    first, second = tmp_path / "a.pfm", tmp_path / "work" / "deep" / "b.pfm"
    assert read_manifest(first).tree == read_manifest(second).tree
    assert files_of(first) == files_of(second), "the manifest too"
    for path in first.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(tmp_path).encode() not in content, path
            assert str(tiny.parent).encode() not in content, path


def test_what_decides_the_result_changes_the_tree(tiny: Path, tmp_path: Path) -> None:
    whole = {"target": "rom", "recipe": "stream"}
    changes: list[dict[str, Any]] = [
        {}, {"target": "rom_n28"}, {"settings": ("quantise.weight_bits=3",)}, {"context": 17},
    ]  # fmt: skip
    trees = set()
    for index, change in enumerate(changes):
        out = tmp_path / f"{index}.pfm"
        compile_model(tiny, out, options=Options(**{**whole, **change}))
        trees.add(read_manifest(out).tree)
    assert len(trees) == len(changes)


# -- killed and resumed --------------------------------------------------------------------------


def _killed_after(process: Any, out: Path, pause_s: float) -> bool:
    """Kills `process` `pause_s` after it began to write; whether it was still running."""
    while not (out / STAGE / "lock").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(pause_s)
    process.kill()
    process.communicate()
    return bool(process.returncode == -9)


def _drill(
    start: Callable[..., Any], words: tuple[Any, ...], folder: Path, kills: int, rounds: int
) -> tuple[Path, int]:
    """Kills compiles at random moments, `kills` times in each of `rounds` places.

    Returns an undisturbed artifact and how many of the kills hit.
    """
    whole, rng, hits = folder / "whole.pfm", random.Random(0), 0
    begun = start(*words, "-o", whole)
    while not (whole / STAGE / "lock").exists():
        time.sleep(0.005)
    from_lock = time.monotonic()
    assert begun.wait(timeout=300) == 0
    busy_s = time.monotonic() - from_lock
    expected = files_of(whole)
    for index in range(rounds):
        out = folder / f"killed{index}.pfm"
        for _ in range(kills):
            while not _killed_after(start(*words, "-o", out), out, rng.uniform(0, busy_s)):
                shutil.rmtree(out)  # it had finished: this machine is faster than a moment ago
                busy_s *= 0.7
            hits += 1
            if (out / MANIFEST).exists():
                assert not artifact.problems(out), "what looks finished is finished"
        assert start(*words, "-o", out).wait(timeout=300) == 0
        assert files_of(out) == expected
        assert not (out / STAGE).exists(), "no stray files"
    return whole, hits


@pytest.mark.slow
def test_killed_at_twenty_moments(start: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    words = ("compile", tiny, "--target", "rom", "--recipe", "stream")
    _, hits = _drill(start, words, tmp_path, kills=4, rounds=5)
    assert hits >= 12


@pytest.mark.slow
def test_a_real_model_killed_and_resumed(start: Callable[..., Any], tmp_path: Path) -> None:
    words = ("compile", BARD, "--target", "crossbar", *CALIBRATED)
    _, hits = _drill(start, words, tmp_path, kills=3, rounds=1)
    assert hits >= 1


def test_finished_layers_are_taken_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfmc import store

    write, calls = store.write_layer, []

    def tired(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(*given)

    options = Options(target="rom", recipe="stream")
    monkeypatch.setattr(store, "write_layer", tired)
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny, tmp_path / "out.pfm", options=options)
    monkeypatch.setattr(store, "write_layer", write)
    done = compile_model(tiny, tmp_path / "out.pfm", options=options)
    assert done.resumed == 5
    again = compile_model(tiny, tmp_path / "out.pfm", options=options)
    assert again.resumed == 15
    assert again.report == done.report


# -- the Python face -----------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["", "import pfmc.cli, pfmc.compile, pfmc.compare, pfmc.verify"])
def test_verbs_are_functions_of_the_package(first: str, tiny: Path, tmp_path: Path) -> None:
    """Also once a module of the same name was imported, and a second time."""
    code = f"""{first}
import pfmc
made = [pfmc.compile({str(tiny)!r}, f{str(tmp_path)!r} + f'/{{i}}', target='rom', recipe='stream')
        for i in range(2)]
found = [pfmc.compare([m.path for m in made]), pfmc.verify(made[0].path, level=0)]
print(len(pfmc.compare([m.path for m in made]).names), found[1].passed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "3 True\n", done.stderr


def test_the_python_face(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out.pfm"
    done = package.compile(tiny, out, target="rom", recipe="stream", progress=said.append)
    assert done.path == out
    assert done.model is not None
    assert {"ingest", "canonical", "lower", "assemble", "commit"} <= set(done.timing_s)
    assert all(seconds >= 0 for seconds in done.timing_s.values())
    assert said[0] == "ingest"
    assert said[-1] == "commit"
    assert "energy__token" in done._repr_html_()
    on_disk = json.loads((out / "report" / "report.json").read_bytes())
    assert json.loads(json.dumps(done.report)) == on_disk


def test_the_report_counts_what_the_model_has(artifacts: dict[str, Path], tiny: Path) -> None:
    """15 matrices: 4 of 64 x 64 and 3 of 64 x 96 in each of 2 layers, and a head of 64 x 128."""
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 128
    for path in artifacts.values():
        model = json.loads((path / "report" / "report.json").read_bytes())["model"]
        assert model["fixed_linears"] == 15
        assert model["fixed_weights"] == weights


@pytest.mark.parametrize("phase", PHASES)
def test_stopping_after_a_phase_writes_nothing(
    phase: str, here: Callable[..., Any], tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = here("compile", tiny, "-t", "rom", "--recipe", "stream", "--stop-after", phase)
    assert (done.code, done.err) == (0, "")
    counts = dict(line.split() for line in done.out.splitlines())
    named = {"ingest": "MatMul", "canonical": "pfmc.FixedLinear"}
    assert int(counts[named.get(phase, "pfmc.QuantisedLinear")]) >= 15
    assert not list(tmp_path.iterdir())


def test_dumped_stages_can_be_opened(here: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    words = ("compile", tiny, "-t", "rom", "--recipe", "stream", "--stop-after", "quantised")
    assert here(*words, "--dump-ir", tmp_path / "ir").code == 0
    assert len(list((tmp_path / "ir").glob("*.onnx"))) > 5
    (dumped,) = (tmp_path / "ir").rglob("*_quantise.onnx")
    last = here("inspect", dumped, "--json")
    assert any("pfmc.QuantisedLinear" in r["operators"] for r in last.json()["rows"])


def test_timing_is_printed_on_request(here: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    words = ("compile", tiny, "-t", "rom", "--recipe", "stream", "-o", tmp_path / "out.pfm")
    done = here(*words, "--timing")
    assert [line.split()[0] for line in done.out.splitlines() if line.endswith("CPU s")] == [
        "ingest", "canonical", "calibrate", "quantise", "lower", "assemble", "commit"
    ]  # fmt: skip


def test_the_default_place_is_named_after_model_and_target(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compile_model(tiny, target="rom", recipe="stream")
    assert os.listdir(tmp_path) == ["model-rom.pfm"]


def test_an_unknown_phase_of_the_python_face(tiny: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'lowered'"):
        compile_model(tiny, target="rom", recipe="stream", stop_after="lowerd")
