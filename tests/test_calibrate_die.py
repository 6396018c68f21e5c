"""Correcting one die: quality, budget, cost, bytes, measurements, drift, resuming, bad input."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pfmc import artifact, simulate, store
from pfmc.against_source import drive_of, feeds_of
from pfmc.calibration import beside, measured
from pfmc.calibration.calibrate import calibrate
from pfmc.calibration.choices import COURSE, Calibration, Choices
from pfmc.calibration.notice import warning
from pfmc.compile import compile_model
from pfmc.distill import train
from pfmc.distill.side import Plant, Side
from pfmc.distill.student import Student
from pfmc.errors import InputError, UsageError
from pfmc.evaluation import evaluate
from pfmc.oracle import Oracle
from pfmc.targets.base import Die

QUICK = ("calibration.sequences=2", "calibration.length=16", "quantise.search=plain")
COURSE_ = replace(
    COURSE, steps=0, sequences=24, held_out=8, length=16, batch=4, judge_every=3, fabric_lr=1e-3
)
SHORT = Choices(die=3, course=COURSE_)


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama under Gaussian weight noise of 10 %; read only."""
    out = tmp_path_factory.mktemp("plain") / "plain.pfm"
    done = compile_model(tiny, out, target="crossbar_gaussian10", settings=QUICK)
    assert done.path is not None
    return done.path


@pytest.fixture(scope="module")
def closed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Its die 3, corrected by closed forms; read only."""
    return calibrate(plain, tmp_path_factory.mktemp("closed") / "three.pfm", choices=SHORT)


def trained(plain: Path, out: Path, steps: int = 6, **more: Any) -> Calibration:
    choices = replace(SHORT, course=replace(COURSE_, steps=steps), **more)
    return calibrate(plain, out, choices=choices)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name, provenance left out."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
    return {n: b for n, b in names.items() if not n.startswith("provenance")}


def sides_of(path: Path) -> dict[str, Side]:
    return beside.take(ir.load(path / "model.onnx"))


# -- quality and budget --------------------------------------------------------------------------


def test_a_corrected_die_is_better_on_text_it_never_saw(
    plain: Path, closed: Calibration, tmp_path: Path
) -> None:
    held = closed.notes["held_out"]
    assert held["reconstructed"]["loss"] < 0.6 * held["before"]["loss"]
    before, after = (
        evaluate(p, dies=(3,), documents=8, length=16, seed=77)["KL divergence"].value
        for p in (plain, closed.manifest.path)
    )
    assert after < 0.7 * before
    other = evaluate(closed.manifest.path, dies=(4,), documents=8, length=16, seed=77)
    assert other["KL divergence"].value > after


def test_distillation_improves_on_closed_forms(plain: Path, tmp_path: Path) -> None:
    done = trained(plain, tmp_path / "d.pfm", steps=12)
    held = done.notes["held_out"]
    assert done.notes["kept"] == "distilled"
    assert held["distilled"]["loss"] < held["reconstructed"]["loss"]


def test_the_budget_is_kept_and_counted(plain: Path, closed: Calibration, tmp_path: Path) -> None:
    weights = sum(r.inputs * r.outputs for r in store.layer_records(plain))
    held = sides_of(closed.manifest.path)
    count = sum(s.gain.size + s.offset.size + s.down.size + s.up.size for s in held.values())
    assert count == closed.notes["parameters"] <= 0.2 * weights
    assert count > 0.19 * weights
    ranked = calibrate(plain, tmp_path / "r.pfm", choices=replace(SHORT, rank=2))
    assert set(ranked.notes["ranks"].values()) == {2}
    with pytest.raises(UsageError, match="no room for gains"):
        calibrate(plain, tmp_path / "none.pfm", choices=replace(SHORT, share=1e-3))


def test_what_does_not_help_is_not_kept(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were every correction worse than none, the die stays as it is."""
    judge, calls = train.Training.judge, []

    def worse(self: train.Training, converters: bool) -> dict[str, float]:
        calls.append(1)
        found = judge(self, converters)
        return {k: v + (len(calls) > 1) * 1e3 for k, v in found.items()}

    monkeypatch.setattr(train.Training, "judge", worse)
    done = calibrate(plain, tmp_path / "n.pfm", choices=SHORT)
    assert done.notes["kept"] == "before"
    assert done.notes["parameters"] == 0
    assert sides_of(tmp_path / "n.pfm") == {}


# -- the artifact --------------------------------------------------------------------------------


def test_hardware_is_shared_and_the_graph_runs_in_onnx_runtime(
    plain: Path, closed: Calibration
) -> None:
    path = closed.manifest.path
    assert artifact.problems(path) == []
    before, after = files(plain), files(path)
    same = {n for n in before if n.startswith(("tiles", "weights", "hardware", "tokenizer"))}
    assert same
    assert all(before[n] == after[n] for n in same)
    assert before["layers.json"] == after["layers.json"]
    ideal = simulate.open_machine(path, Die(None, 0.0, False))
    model = ir.load(path / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 128, (1, 9))
    decoder = ideal.decoder()
    ours = decoder.logits(ids)
    student = Student(model).eval()
    drive = drive_of(model)
    assert drive is not None
    feeds = feeds_of(drive, ids)
    with Oracle(path / "model.onnx") as oracle:
        truth = np.asarray(oracle.run(feeds)[drive.logits], np.float32)
    with torch.no_grad():
        graph = student(**feeds)[drive.logits].numpy()
    np.testing.assert_allclose(graph, truth, atol=2e-3 * np.abs(truth).max())
    assert ours.shape == truth.shape


def test_cost_rows_equal_a_hand_count(plain: Path, closed: Calibration) -> None:
    old, new = (simulate.read_report(p) for p in (plain, closed.manifest.path))
    held = sides_of(closed.manifest.path)
    outputs = sum(s.gain.size for s in held.values())
    down, up = (sum(getattr(s, n).size for s in held.values()) for n in ("down", "up"))
    energy = {t["name"]: t for t in new["cost"]["metrics"]["energy__token"]["terms"]}
    wide = sum(s.gain.size for s in held.values() if s.rank)
    for name, count in {
        "side_path.macs8": down, "side_path.macs16": up, "side_path.adds": wide,
        "side_path.adapter_read_values": down + up, "trim.muls": outputs, "trim.adds": outputs,
        "trim.adapter_read_values": 4 * outputs,
    }.items():  # fmt: skip
        formula = energy[f"fabric.{name}"]["formula"].replace(",", "")
        assert formula.startswith(f"{count} {name.split('.')[1]} "), (name, formula)
        assert energy[f"fabric.{name}"]["typical"] > 0
    area = {t["name"]: t for t in new["cost"]["metrics"]["area__total"]["terms"]}
    assert (
        area["fabric.adapters"]["formula"]
        .replace(",", "")
        .startswith(f"{down + up + 4 * outputs} adapter numbers")
    )
    assert area["fabric.trim"]["typical"] > 0
    for metric in ("energy__token", "area__total"):
        ours = new["cost"]["metrics"][metric]["typical"]
        assert ours > old["cost"]["metrics"][metric]["typical"]
    netlist = (closed.manifest.path / "netlist.json").read_text()
    assert "trim" in netlist
    assert "side_path" in netlist


def test_taking_a_correction_out_gives_the_graph_back(plain: Path, closed: Calibration) -> None:
    first, second = (ir.load(p / "model.onnx") for p in (plain, closed.manifest.path))
    assert len(beside.take(second)) == len(store.layer_records(plain))
    assert [n.name for n in first.graph] == [n.name for n in second.graph]
    assert [v.name for v in first.graph.outputs] == [v.name for v in second.graph.outputs]
    assert set(first.graph.initializers) == set(second.graph.initializers)


def test_the_manifest_says_for_which_die(closed: Calibration, plain: Path) -> None:
    config = closed.manifest["config"]
    assert config["calibration"]["die"] == 3
    assert config["calibration"]["of"] == artifact.read_manifest(plain).tree
    assert warning(config, [3], 0.0) is None
    assert "die 3, used with die 4" in str(warning(config, [3, 4], 0.0))
    assert "the ideal die" in str(warning(config, [None], 0.0))
    assert "at age 0 s, used at 60 s" in str(warning(config, [3], 60.0))
    assert warning(artifact.read_manifest(plain)["config"], [4], 5.0) is None


# -- bytes, resuming -----------------------------------------------------------------------------


def test_the_same_bytes_twice_and_after_an_interruption(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(plain, tmp_path / "a.pfm")
    assert trained(plain, tmp_path / "a.pfm").ready
    advance = train.Training.advance

    def stop(self: train.Training) -> float:
        loss = advance(self)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(train.Training, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(plain, tmp_path / "b.pfm")
    assert not artifact.is_artifact(tmp_path / "b.pfm")
    monkeypatch.undo()
    lines: list[str] = []
    choices = replace(SHORT, course=replace(COURSE_, steps=6))
    second = calibrate(plain, tmp_path / "b.pfm", choices=choices, progress=lines.append)
    assert "calibrate: resumed at step 3" in lines
    assert first.manifest.tree == second.manifest.tree
    assert files(tmp_path / "a.pfm") == files(tmp_path / "b.pfm")
    with pytest.raises(UsageError, match="made from another"):
        trained(plain, tmp_path / "a.pfm", die=4)


# -- measurements --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readings(plain: Path) -> dict[str, np.ndarray]:
    """What the simulated die 3 answers to the probes that `calibrate` itself would apply."""
    machine = simulate.describe_machine(plain, Die(3, 0.0, True))
    found: dict[str, np.ndarray] = {}
    original = measured.probe

    def spy(name: str, layer: Any, spread: Any, seed: int) -> Any:
        found[name + measured.PROBES], found[name + measured.READINGS] = made = original(
            name, layer, spread, seed
        )
        return made

    measured.probe = spy
    try:
        calibrate(plain, plain.parent / "spied.pfm", choices=SHORT)
    finally:
        measured.probe = original
    assert machine.die.seed == 3
    return found


def saved(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return path


def test_a_measured_die_gives_the_same_correction_as_the_simulated_one(
    plain: Path, closed: Calibration, readings: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = saved(tmp_path / "die.npz", readings)
    done = calibrate(plain, tmp_path / "m.pfm", choices=replace(SHORT, measured=file))
    ours, theirs = sides_of(tmp_path / "m.pfm"), sides_of(closed.manifest.path)
    assert done.notes["ranks"] == closed.notes["ranks"]
    for name, side in theirs.items():
        np.testing.assert_allclose(ours[name].gain, side.gain, rtol=2e-3)
        np.testing.assert_allclose(ours[name].down @ ours[name].up, side.down @ side.up, atol=1e-5)


def test_matrices_may_be_given_instead(plain: Path, tmp_path: Path) -> None:
    """A die whose every output is 0.8 of what was meant is mended by gains alone."""
    model = ir.load(plain / "model.onnx")
    meant = measured.nominal(Student(model))
    arrays: dict[str, np.ndarray] = {}
    for name, plant in meant.items():
        arrays[name] = 0.8 * plant.wanted
        arrays[name + measured.CONSTANT] = 0.8 * plant.bias
    file = saved(tmp_path / "faded.npz", arrays)
    choices = replace(SHORT, measured=file, only_gain=True)
    done = calibrate(plain, tmp_path / "g.pfm", choices=choices)
    told = str(warning(done.manifest["config"], [SHORT.die], 0.0))
    assert "a die that was measured" in told, "no simulated die is this one, whatever its seed"
    for side in sides_of(tmp_path / "g.pfm").values():
        np.testing.assert_allclose(side.gain, 1.25, rtol=1e-3)
        assert side.rank == 0
    held = done.notes["held_out"]
    assert held["gain"]["loss"] < 0.05 * held["before"]["loss"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"drop": 1}, "1 layers were not measured"),
        ({"add": "encoder.7"}, "has no layer 'encoder.7'"),
        ({"cut": 1}, "not numbers"),
        ({"nan": 1}, "NaN or infinity"),
        ({"empty": 1}, "has no rows"),
    ],
)
def test_measurements_that_do_not_fit_are_refused(
    harm: dict[str, Any], message: str, plain: Path, readings: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:  # fmt: skip
    arrays = dict(readings)
    key = next(k for k in arrays if k.endswith(measured.PROBES))
    if "drop" in harm:
        del arrays[key]
        del arrays[key.replace(measured.PROBES, measured.READINGS)]
    if "add" in harm:
        arrays[harm["add"]] = np.ones((2, 2))
    if "cut" in harm:
        arrays[key] = arrays[key][:, 1:]
    if "nan" in harm:
        arrays[key] = np.full_like(arrays[key], np.nan)
    if "empty" in harm:
        arrays[key] = arrays[key][:0]
    file = saved(tmp_path / "die.npz", arrays)
    with pytest.raises(InputError, match=message):
        calibrate(plain, tmp_path / "x.pfm", choices=replace(SHORT, measured=file))
    assert not artifact.is_artifact(tmp_path / "x.pfm")


def test_least_squares_recovers_a_matrix_from_noisy_readings() -> None:
    rng = np.random.default_rng(1)
    wanted, bias = rng.standard_normal((12, 5)), rng.standard_normal(5)
    real, constant = wanted + 0.1 * rng.standard_normal(wanted.shape), bias + 0.3
    probes = rng.standard_normal((4000, 12))
    readings = probes @ real + constant + 0.05 * rng.standard_normal((4000, 5))
    meant = Plant(wanted, bias, wanted, bias)
    found = measured.effective((probes, readings), meant)
    sd = 0.05 / np.sqrt(4000)
    assert np.abs(found.matrix - real).max() < 5 * sd
    assert np.abs(found.constant - constant).max() < 5 * sd
    for one in (probes[:1], np.repeat(probes[:1], 5, axis=0)):  # tell of an offset and no more
        told = measured.effective((one, one @ wanted + bias + 0.3), meant)
        np.testing.assert_allclose(told.matrix, wanted, atol=1e-12)
        np.testing.assert_allclose(told.constant, bias + 0.3)
    few = measured.effective((probes[:3], readings[:3]), meant)  # too few: as meant elsewhere
    assert np.abs(few.matrix - real).max() < np.abs(wanted).max()


def test_graphs_that_take_no_free_batch_are_refused(tmp_path: Path) -> None:
    for name, takes in (("gpt2__t_static", "samples at once"), ("llama__t_kv", "1 tokens a call")):
        path = Path(__file__).resolve().parents[2] / "shared" / "zoo" / f"{name}.onnx"
        if not path.is_file():
            pytest.skip("needs the zoo beside the repository")
        made = compile_model(
            path, tmp_path / f"{name}.pfm", target="crossbar_gaussian10", settings=QUICK
        )
        assert made.path is not None
        with pytest.raises(UsageError, match=takes):
            calibrate(made.path, tmp_path / f"{name}-3.pfm", choices=SHORT)


# -- drift ---------------------------------------------------------------------------------------


def test_distillation_goes_on_from_the_present_correction_if_that_is_best(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began with paths fitted afresh, and what was learned before was lost."""
    first = trained(plain, tmp_path / "first.pfm", steps=12)
    assert first.notes["kept"] == "distilled"
    starts: list[float] = []
    run = train.Training.run

    def watched(self: train.Training, tell: Any) -> Any:
        starts.append(self.judge(True)["loss"])
        return run(self, tell)

    monkeypatch.setattr(train.Training, "run", watched)
    again = trained(tmp_path / "first.pfm", tmp_path / "second.pfm", steps=2)
    held = {name: found["loss"] for name, found in again.notes["held_out"].items()}
    del held["distilled"]
    assert min(held, key=lambda name: held[name]) == "before"
    assert starts == [pytest.approx(held["before"], rel=1e-6)]


def test_an_aged_die_is_calibrated_again(tiny: Path, tmp_path: Path) -> None:
    made = compile_model(tiny, tmp_path / "p.pfm", target="crossbar_pcm", settings=QUICK)
    assert made.path is not None
    first = calibrate(made.path, tmp_path / "one.pfm", choices=SHORT)
    later = replace(SHORT, age_s=3.15e7, only_gain=True)
    again = calibrate(tmp_path / "one.pfm", tmp_path / "two.pfm", choices=later)
    held = again.notes["held_out"]
    assert set(held) == {"before", "gain refitted"}
    assert again.notes["ranks"] == first.notes["ranks"]
    one, two = sides_of(tmp_path / "one.pfm"), sides_of(tmp_path / "two.pfm")
    if again.notes["kept"] != "before":
        assert held["gain refitted"]["loss"] < held["before"]["loss"]
        assert all(np.array_equal(one[n].down, two[n].down) for n in one)
    whole = replace(SHORT, age_s=3.15e7)
    third = calibrate(tmp_path / "one.pfm", tmp_path / "three.pfm", choices=whole)
    assert set(third.notes["held_out"]) == {"before", "gain refitted", "reconstructed"}
    assert third.notes["parameters"] == first.notes["parameters"]
    assert third.manifest["config"]["calibration"]["age_s"] == 3.15e7


# -- the command line, and what is refused --------------------------------------------------------


def test_the_command(here: Callable[..., Any], plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).integers(0, 128, 9000)
    text.write_text(" ".join(f"w{i}" for i in words))
    out = tmp_path / "c.pfm"
    asked = ("calibrate", plain, "--die", 5, "-o", out, "--steps", 1, "--text", text)
    done = here(*asked, "--json").json()
    assert set(done["held_out"]) == {"before", "reconstructed", "distilled"}
    assert done["die"] == 5
    assert "kept:" in here(*asked).out
    told = here("eval", out, "--dies", "5,6", "--documents", 2, "--length", 8)
    assert told.code == 0
    assert told.err.count("warning: calibrated for die 5, used with die 6") == 1
    assert "warning" not in here("eval", out, "--dies", 5, "--documents", 2, "--length", 8).err
    npz = tmp_path / "ids.npz"
    model = ir.load(plain / "model.onnx")
    name = next(str(v.name) for v in model.graph.inputs if "ids" in str(v.name))
    saved(npz, {name: np.ones((1, 4), np.int64)})
    assert "warning: calibrated for die 5" in here("run", out, "--input", npz).err
    assert (
        "warning: calibrated at age"
        in here("run", out, "--input", npz, "--die", 5, "--age", "1day").err
    )


def test_bad_input_is_refused(
    here: Callable[..., Any], plain: Path, artifacts: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.pfm"
    here("calibrate", artifacts["rom"], "-o", out).refused(2, "nothing to correct")
    here("calibrate", plain, "-o", plain).refused(2, "another name")
    here("calibrate", tiny, "-o", out).refused(2, "")
    here("calibrate", plain, "-o", out, "--measured", tmp_path / "no.npz").refused(2, "no such")
    here("calibrate", plain, "-o", out, "--text", tmp_path / "no.txt").refused(2, "no such file")
    here("calibrate", plain, "-o", out, "--age", "soon").refused(2, "cannot read the age")
    harmed = tmp_path / "die.npz"
    harmed.write_bytes(b"PK nothing")
    here("calibrate", plain, "-o", out, "--measured", harmed).refused(3, "not an .npz file")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    answer = here("calibrate", plain, "-o", out, "--text", short)
    answer.refused(2, "windows")
    bare = shutil.copytree(plain, tmp_path / "moved" / "bare.pfm")
    answer = here("calibrate", bare, "-o", out)
    answer.refused(2, "--model")
    assert json.loads((plain / "pfm.json").read_text())["config"]["target"]
