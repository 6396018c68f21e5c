"""Distilling whole models: quality, bytes, resuming, the compile that follows, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

from pfmc import distillation, distilled, simulate
from pfmc.compile import Options, compile_model, prepare
from pfmc.distill import checkpoint, train
from pfmc.distill.student import Student
from pfmc.distill.trainee import build
from pfmc.distillation import Choices, Distillation, distil_model
from pfmc.errors import CorruptError, FileError, InputError, UsageError
from pfmc.hardware import LayerStatistics
from pfmc.passes.records import linear_record, linear_records, quantised_linears
from pfmc.targets.base import Die

ROOT = Path(__file__).resolve().parent.parent
BARD = ROOT / "models" / "bard" / "model.onnx"
SHORT = (
    "calibration.sequences=2", "calibration.length=16", "distill.sequences=24",
    "distill.held_out=4", "distill.length=16", "distill.batch=4", "distill.judge_every=4",
    "distill.lr=1e-3",
)  # fmt: skip
THREE = (*SHORT, "quantise.weight_bits=3", "quantise.search=clip")


def distil(model: Path, out: Path, target: str = "rom", **more: Any) -> Distillation:
    settings = more.pop("settings", THREE if target == "rom" else SHORT)
    choices = Choices(more.pop("steps", 12), **more.pop("choices", {}))
    options = Options(target=target, settings=settings, **more)
    return distil_model(model, out, options=options, choices=choices)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def rom(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama distilled at three bits; read only."""
    folder = tmp_path_factory.mktemp("distilled") / "rom.distilled"
    distil(tiny, folder, steps=24)
    return folder


BRIEF = (
    "calibration.sequences=2", "calibration.length=16", "distill.sequences=48",
    "distill.held_out=8", "distill.length=24", "distill.batch=4", "distill.judge_every=6",
    "distill.dies=1", "distill.warmup=0.2",
)  # fmt: skip


# -- quality, and the road to an artifact ----------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "settings", "share"),
    [
        ("rom", ("quantise.weight_bits=2", "quantise.search=plain"), 0.75),
        ("crossbar", ("quantise.weight_bits=2", "quantise.search=plain"), 0.75),
    ],
)
def test_a_distilled_model_follows_its_teacher_better(
    tmp_path: Path, target: str, settings: tuple[str, ...], share: float
) -> None:
    done = distil(BARD, tmp_path / "d", target, settings=(*BRIEF, *settings), steps=18)
    assert done.manifest["best"]["loss"] < share * done.manifest["start"]["loss"]
    history = (tmp_path / "d" / "history.csv").read_text()
    assert history.startswith("step,train,loss,excess\n0.0,0.0,")
    made = distilled.read(tmp_path / "d")
    assert all((r.output_range is None) == (target == "rom") for r in made.records.values())
    assert all(r.statistics is not None for r in made.records.values())
    assert set(made.fabric) >= {"model.norm.weight"}


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_products_in_bfloat16_teach_nearly_the_same(
    tiny: Path, tmp_path: Path, target: str
) -> None:
    """8 bits of mantissa: the first steps' losses agree to a few of them."""
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = (*(THREE if target == "rom" else SHORT), f"distill.precision={precision}")
        distil(tiny, tmp_path / precision, target, settings=settings, steps=8)
        lines = (tmp_path / precision / "history.csv").read_text().splitlines()[1:]
        losses[precision] = np.array([[float(v) for v in line.split(",")[1:3]] for line in lines])
        weights = distilled.read(tmp_path / precision).records
        assert all(np.isfinite(r.matrix.scale).all() for r in weights.values())
    np.testing.assert_allclose(losses["bf16"][1:], losses["fp32"][1:], rtol=0.25)
    assert not np.array_equal(losses["bf16"], losses["fp32"])


def test_an_artifact_has_the_distilled_layers(tiny: Path, rom: Path, tmp_path: Path) -> None:
    made = distilled.read(rom)
    done = compile_model(tiny, tmp_path / "a.pfm", target="rom", settings=THREE, distilled=rom)
    assert done.model is not None
    for record in linear_records(done.model):
        want = made.records[record.name]
        np.testing.assert_array_equal(record.matrix.codes, want.matrix.codes)
        np.testing.assert_array_equal(record.matrix.scale, want.matrix.scale)
        bits = 8 if record.name == "lm_head" else 3
        assert (record.matrix.bits, record.matrix.choice) == (bits, "distilled")
        bias = np.zeros(record.outputs) if want.bias is None else want.bias
        np.testing.assert_array_equal(0 if record.bias is None else record.bias, bias)
    assert done.report["passes"]["distilled"]["kept"] == "the distilled"


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_the_trained_model_is_the_simulated_one(tiny: Path, tmp_path: Path, target: str) -> None:
    """What training judged by is what the artifact computes, on the ideal die."""
    noise = ("distill.noise=false",)
    settings = (*(THREE if target == "rom" else SHORT), *noise)
    folder, place = tmp_path / "d.distilled", tmp_path / "d.pfm"
    seen: dict[str, torch.Tensor] = {}
    finish = distillation.Run._finish

    def spy(run: Any, training: train.Training) -> Any:
        made = finish(run, training)
        training.trainee.face(Die(None, 0.0, False))
        feeds = training.lesson.feeds(range(4), True)
        training.trainee.student.eval()
        with torch.no_grad():
            seen.update(training.trainee.student(**feeds))
        seen["ids"] = torch.as_tensor(feeds["input_ids"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation.Run, "_finish", spy)
        distil(tiny, folder, target, settings=settings, steps=10)
    compile_model(tiny, place, target=target, settings=settings, distilled=folder)
    machine = simulate.open_machine(place, Die(None, 0.0, False))
    ours = machine.decoder().logits(seen["ids"].numpy())
    truth = seen["logits"].numpy()
    off = np.abs(ours - truth) / truth.std()
    assert np.median(off) < 2e-3  # codes at the edge between two may fall to either side
    assert np.quantile(off, 0.99) < 0.1


@pytest.mark.parametrize(
    ("name", "figure"),
    [("bert__t_dyn", "cosine "), ("vit__t_dyn", "loss"), ("gpt2__t_static", "excess")],
)
def test_other_kinds_of_models_learn_too(tmp_path: Path, name: str, figure: str) -> None:
    """Encoders by their vectors, vision models by their scores, on made-up inputs."""
    model = ROOT.parent / "shared" / "zoo" / f"{name}.onnx"
    if not model.is_file():
        pytest.skip("the zoo of tiny models is absent")
    done = distil(model, tmp_path / "d", settings=(*THREE, "quantise.weight_bits=2"), steps=16)
    best, start = done.manifest["best"], done.manifest["start"]
    assert any(k.startswith(figure) for k in best)
    assert best["loss"] < start["loss"]
    compile_model(
        model, tmp_path / "a.pfm", target="rom", distilled=tmp_path / "d",
        settings=(*THREE, "quantise.weight_bits=2"),
    )  # fmt: skip


def test_inputs_of_the_user_are_learned_from(tmp_path: Path) -> None:
    model = ROOT.parent / "shared" / "zoo" / "vit__t_dyn.onnx"
    if not model.is_file():
        pytest.skip("the zoo of tiny models is absent")
    rng = np.random.default_rng(0)
    (value,) = onnx_ir.load(model).graph.inputs
    shape = [20, *(int(d) for d in list(value.shape)[1:])]
    np.savez(tmp_path / "x.npz", **{value.name: rng.standard_normal(shape).astype(np.float32)})
    done = distil(model, tmp_path / "d", inputs=tmp_path / "x.npz", steps=4)
    assert done.manifest["request"]["data"]["inputs"] is not None
    np.savez(tmp_path / "y.npz", **{value.name: np.zeros((4, *shape[1:]), np.float32)})
    with pytest.raises(UsageError, match="4 samples; a step needs 4"):
        distil(model, tmp_path / "e", inputs=tmp_path / "y.npz")


def test_what_is_won_without_converters_is_judged_with_them(tiny: Path, tmp_path: Path) -> None:
    """However late output converters begin to count, the last state has seen them."""
    settings = (*SHORT, "quantise.weight_bits=2", "distill.converters_from=1")
    done = distil(tiny, tmp_path / "d", "crossbar", settings=settings, steps=12)
    assert (done.manifest["kept"], done.manifest["best_step"]) == ("the distilled", 12)


def test_the_start_is_kept_where_nothing_is_won(tiny: Path, tmp_path: Path) -> None:
    settings = (*THREE, "distill.lr=0", "distill.scale_lr=30", "distill.fabric_lr=0")
    done = distil(tiny, tmp_path / "d", settings=settings, steps=4)
    assert (done.manifest["kept"], done.manifest["best_step"]) == ("the start", 0)
    assert done.manifest["best"] == done.manifest["start"]
    plain = compile_model(tiny, tmp_path / "a.pfm", target="rom", settings=settings)
    kept = compile_model(
        tiny, tmp_path / "b.pfm", target="rom", settings=settings, distilled=tmp_path / "d"
    )
    assert plain.model is not None
    assert kept.model is not None
    pairs = zip(linear_records(plain.model), linear_records(kept.model), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.matrix.codes, b.matrix.codes)


def test_compile_distils_first(tiny: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    settings = [x for s in THREE for x in ("--set", s)]
    out = tmp_path / "a.pfm"
    args = ("compile", tiny, "-t", "rom", "-o", out, *settings, "--json")
    done = here(*args, "--distill", "6").json()
    assert done["report"]["passes"]["distilled"]["steps"] == 6
    assert (tmp_path / "a.distilled" / "distilled.json").is_file()
    here(*args, "--distill", "many").refused(2, "cannot read 'many'", "300s")
    here(*args, "--distill", "6", "--distilled", tmp_path).refused(2, "either")


# -- bytes and resuming ----------------------------------------------------------------------------


def interrupt_after(step: int) -> Any:
    """A loop that is told to stop after `step`, as by a signal."""
    run = train.Training.run

    def stopping(training: train.Training, tell: Any) -> Any:
        for state in run(training, tell):
            if state.step == step:
                signal.raise_signal(signal.SIGINT)
            yield state

    return stopping


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_an_interrupted_run_ends_in_the_same_bytes(tiny: Path, tmp_path: Path, target: str) -> None:
    distil(tiny, tmp_path / "whole", target)
    for step in (3, 11):  # before and after converters begin to count
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Training, "run", interrupt_after(step))
            with pytest.raises(KeyboardInterrupt):
                distil(tiny, tmp_path / "broken", target)
        assert (tmp_path / "broken" / checkpoint.FILE).is_file()
        assert not (tmp_path / "broken" / distilled.MANIFEST).is_file()
    distil(tiny, tmp_path / "broken", target)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_ctrl_c_ends_with_130_and_the_same_command_resumes(
    tiny: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    settings = [x for s in THREE for x in ("--set", s)]
    args = ("distill", tiny, "-t", "rom", "-o", tmp_path / "d", *settings, "--json")
    process = start(*args, "--steps", "100000")
    while not (tmp_path / "d" / "corpus.safetensors").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "resumes" in err


def test_finished_is_finished_and_another_is_refused(tiny: Path, rom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rom, folder)
    again = distil(tiny, folder, steps=24)
    assert again.ready
    with pytest.raises(UsageError, match="another model, recipe or course"):
        distil(tiny, folder, steps=25)
    with pytest.raises(UsageError, match="another model, recipe or course"):
        distil(tiny, folder, steps=24, settings=(*THREE, "calibration.sequences=3"))
    assert not distil(tiny, folder, steps=4, choices={"force": True}).ready


def test_seconds_become_steps(tiny: Path, tmp_path: Path) -> None:
    options = Options(target="rom", settings=THREE)
    done = distil_model(tiny, tmp_path / "d", options=options, choices=Choices(seconds=0.1))
    assert done.manifest["steps"] >= 1


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_timing_steps_takes_them_back(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Seconds that give 8 steps end in the bytes of 8 steps; timed are whole steps."""
    settings = (*(THREE if target == "rom" else SHORT), "distill.clip_sigmas=2")
    asked = distil(tiny, tmp_path / "asked", target, settings=settings, steps=8)
    advanced: list[int] = []
    advance, plan = train.Training.advance, train.steps_for

    def counted(training: train.Training) -> float:
        advanced.append(training.step)
        return advance(training)

    def planned(training: train.Training, seconds: float) -> int:
        assert plan(training, seconds) >= 1
        return 8

    monkeypatch.setattr(train.Training, "advance", counted)
    monkeypatch.setattr(distillation, "steps_for", planned)
    timed = distil(tiny, tmp_path / "timed", target, settings=settings, steps=None)
    assert advanced[-8:] == list(range(8))
    assert len(advanced) > 8
    assert timed.manifest["best"] == asked.manifest["best"]
    told = [(tmp_path / name / distilled.HISTORY).read_text() for name in ("asked", "timed")]
    assert told[0] == told[1]
    held = [files(tmp_path / name) for name in ("asked", "timed")]
    layers = [{k: v for k, v in each.items() if k.endswith(".safetensors")} for each in held]
    assert layers[0] == layers[1] != {}


def test_a_training_that_gave_up_is_not_carried_on(tiny: Path, tmp_path: Path) -> None:
    more = "distill.judge_every=1", "distill.patience=2", "distill.lr=0", "distill.scale_lr=3"
    settings = (*THREE, *more, "distill.fabric_lr=0")
    whole = distil(tiny, tmp_path / "whole", settings=settings)
    last = whole.manifest["steps"]
    assert last < 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "run", interrupt_after(last))
        with pytest.raises(KeyboardInterrupt):
            distil(tiny, tmp_path / "broken", settings=settings)
    assert distil(tiny, tmp_path / "broken", settings=settings).manifest["steps"] == last


def test_padding_is_no_statistic(tmp_path: Path) -> None:
    model = ROOT.parent / "shared" / "zoo" / "bert__t_dyn.onnx"
    if not model.is_file():
        pytest.skip("the zoo of tiny models is absent")
    ids = np.random.default_rng(0).integers(3, 100, (24, 20))
    mask = (np.arange(20) < np.arange(1, 25)[:, None] % 19 + 1).astype(np.int64)
    held = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
    np.savez(tmp_path / "x.npz", **held)
    settings = (*SHORT, "quantise.weight_bits=2", "distill.micro=5", "quantise.search=plain")
    done = distil(
        model, tmp_path / "d", "crossbar", settings=settings, inputs=tmp_path / "x.npz", steps=12
    )
    assert done.manifest["kept"] == "the distilled"
    first = next(iter(distilled.read(tmp_path / "d").records.values()))
    assert first.statistics is not None
    assert first.statistics.samples == mask[:20].sum()


def test_errors_of_experts_are_not_compared(tmp_path: Path) -> None:
    """Two routers that differ send an expert different rows."""
    model = ROOT.parent / "shared" / "zoo" / "mixtral__h_dyn.onnx"
    if not model.is_file():
        pytest.skip("the zoo of tiny models is absent")
    settings = (*THREE, "quantise.weight_bits=2", "distill.hidden=1")
    assert distil(model, tmp_path / "d", settings=settings, steps=4).manifest["steps"] == 4


def test_an_expert_without_rows_keeps_its_statistics(tiny: Path) -> None:
    options = Options(target="rom", settings=THREE)
    model = prepare(tiny, options)
    float_model, copy = Student(model.teacher), model.model
    records = {str(n.name): linear_record(n, None) for n in quantised_linears(copy)}
    known = LayerStatistics(1.0, {}, np.ones(1), np.ones(1), np.ones(1), 7)
    records = {n: replace(r, statistics=known) for n, r in records.items()}
    weights: Any = {n: m.weight for n, m in float_model.linears.items()}
    trainee = build(copy, records, weights, lambda r: model.target.twin(r, model.tech))
    empty = dict.fromkeys(records, replace(known, samples=0))
    state = {n: p.detach() for n, p in trainee.student.named_parameters()}
    assert all(r.statistics is known for r in trainee.settle(state, empty).values())


@pytest.mark.parametrize("seconds", [0.0, float("inf"), float("nan")])
def test_an_endless_time_is_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="no amount of training"):
        Choices(seconds=seconds)


def test_a_device_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch cannot run on 'banana'"):
        distil(tmp_path / "absent.onnx", tmp_path / "d", choices={"device": "banana"})


@pytest.mark.parametrize(
    ("room", "every", "what"),
    [(1000, 0.0, "corpus"), (20_000, 0.0, "checkpoint"), (8000, 1e9, "layers")],
)
def test_a_full_disk_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, every: float, what: str
) -> None:
    """No file may grow beyond `room`; what was saved before stays."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(distillation, "SAVE_EVERY_S", every)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(FileError, match="cannot (be written|write)") as caught:
            distil(tiny, tmp_path / "d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert what in caught.value.where
    assert not list((tmp_path / "d").glob("*.part"))
    assert distil(tiny, tmp_path / "d").manifest["steps"] == 12


def test_a_short_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(" ".join(f"w{i % 100}" for i in range(50)))
    with pytest.raises(UsageError, match="windows of 16 tokens; a step needs 4") as caught:
        distil(tiny, tmp_path / "d", text=text)
    assert "longer text" in caught.value.mend


def test_a_tokenizer_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    body = json.loads((tiny.parent / "tokenizer.json").read_text())
    body["model"]["vocab"] |= {f"more{i}": 128 + i for i in range(8)}
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(body))
    with pytest.raises(InputError, match="136 tokens, the model only 128"):
        distil(tiny, tmp_path / "d", tokenizer=other)


def test_a_loss_that_is_no_number_is_said(tiny: Path, tmp_path: Path) -> None:
    settings = (*THREE, "distill.scale_lr=1e30", "distill.gradient_norm=0")
    with pytest.raises(InputError, match="the loss is") as caught:
        distil(tiny, tmp_path / "d", settings=settings)
    assert "learning rate" in caught.value.mend


def test_a_checkpoint_of_another_run_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "run", interrupt_after(2))
        with pytest.raises(KeyboardInterrupt):
            distil(tiny, tmp_path / "d")
    with pytest.raises(UsageError, match="checkpoint here is of another model"):
        distil(tiny, tmp_path / "d", steps=13)
    (tmp_path / "d" / checkpoint.FILE).write_bytes(b"cut off")
    with pytest.raises(CorruptError, match="cannot be read"):
        distil(tiny, tmp_path / "d")
    assert distil(tiny, tmp_path / "d", steps=3, choices={"force": True}).manifest["steps"] == 3


def test_layers_for_another_recipe_or_target_are_refused(
    tiny: Path, rom: Path, tmp_path: Path
) -> None:
    for target, settings, what in (
        ("rom", SHORT, "another recipe"), ("rom_n7", THREE, "another target"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=what):
            compile_model(tiny, tmp_path / "a", target=target, settings=settings, distilled=rom)
    with pytest.raises(UsageError, match="no finished distillation"):
        compile_model(tiny, tmp_path / "a", target="rom", distilled=tmp_path)


def test_a_changed_layer_is_refused(tiny: Path, rom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rom, folder)
    layer = next((folder / "layers").iterdir())
    layer.write_bytes(layer.read_bytes() + b"x")
    with pytest.raises(CorruptError, match="missing or was changed"):
        compile_model(tiny, tmp_path / "a", target="rom", settings=THREE, distilled=folder)
