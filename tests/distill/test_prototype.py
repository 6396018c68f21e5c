"""Every training rule on a prototype: loss, its own gradient, determinism, the die, refusals."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfmc import distillation, distilled, simulate
from pfmc.compile import Options, compile_model
from pfmc.distill import checkpoint, rules, train
from pfmc.distill.rule import Step
from pfmc.distill.rules.base import Part
from pfmc.distill.rules.method import method
from pfmc.distill.rules.prototype import Faced, Prototype, TwinNetwork, written
from pfmc.distill.rules.slopes import following
from pfmc.distill.trainee import IDEAL
from pfmc.distillation import Choices, Distillation, distil_model
from pfmc.errors import UsageError
from pfmc.passes.records import linear_records
from pfmc.targets.base import Die

DAY = 86400.0
LESSON = (
    "calibration.sequences=2", "calibration.length=16", "distill.sequences=128",
    "distill.held_out=16", "distill.length=16", "distill.batch=16", "distill.micro=8",
    "distill.judge_every=4", "distill.lr=3e-4", "distill.warmup=0.2",
)  # fmt: skip
WAVES = ("adjoint", "echo")
SMALL = {
    "spsa": ("probes=1",), "evolution": ("pairs=1",), "equilibrium": ("steps=2",),
    "adjoint": ("layers=*.0.*.k_proj", "planes=16", "fit=30"),
    "echo": ("layers=*.0.*.k_proj", "planes=16", "fit=30"),
}  # fmt: skip


def distil(
    model: Path, out: Path, rule: str, *, steps: int = 4, die: int | None = 0,
    target: str = "", settings: tuple[str, ...] = (), more: tuple[str, ...] = (),
) -> Distillation:  # fmt: skip
    target = target or ("optical" if rule in WAVES else "crossbar_pcm")
    age = DAY if die is not None and target.startswith("crossbar") else 0.0
    chosen = method(rule, more or (SMALL.get(rule, ()) if die is not None else ()), die, age)
    options = Options(target=target, settings=(*LESSON, *settings))
    return distil_model(model, out, options=options, choices=Choices(steps, method=chosen))


def history(folder: Path) -> list[float]:
    """The held-out loss at every judgement."""
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


# -- every rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(rules.RULES))
def test_a_step_follows_the_gradient_of_its_rule(tiny: Path, tmp_path: Path, name: str) -> None:
    """Adam's first step is the rate times the sign of the gradient, of these parameters alone."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    call, step_of = Prototype.__call__, train.Training.advance

    def spy(self: Prototype, step: Step) -> float:
        loss = call(self, step)
        assert math.isfinite(loss)
        for layer, group in written(step.trainee).items():
            for key, p in group.items():
                assert p.grad is not None
                seen[f"{layer}.{key}"] = {"slope": p.grad.clone(), "before": p.detach().clone()}
        seen["frozen"] = frozen(step)
        return loss

    def frozen(step: Step) -> dict[str, torch.Tensor]:
        parameters = step.trainee.student.named_parameters()
        return {n: p.detach().clone() for n, p in parameters if not p.requires_grad}

    def advance(training: train.Training) -> float:
        loss = step_of(training)
        after = dict(training.trainee.student.named_parameters())
        assert all(torch.equal(after[n], p) for n, p in seen.pop("frozen").items())
        moved = 0
        for layer, group in written(training.trainee).items():
            for key, p in group.items():
                row = seen[f"{layer}.{key}"]
                told = row["slope"].abs() > 1e-8
                moved += int(told.sum())
                step = (p.detach() - row["before"])[told]
                rate = training.course.lr if key == "weight" else training.course.fabric_lr
                want = -rate * row["slope"][told].sign()
                np.testing.assert_allclose(step, want, rtol=0.05, atol=1e-6)
        assert moved > 100
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prototype, "__call__", spy)
        patch.setattr(train.Training, "advance", advance)
        settings = ("distill.warmup=0", "distill.clip_sigmas=0", "distill.gradient_norm=0")
        done = distil(tiny, tmp_path / "d", name, steps=1, settings=settings)
    told = done.manifest["request"]["rule"]
    assert (told["name"], told["part"], told["die"]["seed"]) == (name, "prototype", 0)
    assert done.manifest["start"]["loss"] > 0


@pytest.mark.parametrize("name", ["physics-aware", "reciprocal", "equilibrium", "echo"])
def test_the_die_follows_the_teacher_better(tiny: Path, tmp_path: Path, name: str) -> None:
    more = ("layers=*.k_proj", "planes=32", "fit=150") if name in WAVES else ()
    rate = ("distill.fabric_lr=3e-3",) if name in WAVES else ()
    done = distil(tiny, tmp_path / "d", name, steps=8, more=more, settings=rate)
    assert done.manifest["best"]["loss"] < 0.95 * done.manifest["start"]["loss"]
    assert history(tmp_path / "d")[-1] < history(tmp_path / "d")[0]


@pytest.mark.parametrize("name", ["in-silico", "noise-aware"])
def test_masks_are_trained_through_the_model(tiny: Path, tmp_path: Path, name: str) -> None:
    done = distil(tiny, tmp_path / "d", name, die=None, target="crossbar", steps=4)
    told = done.manifest["request"]["rule"]
    assert (told["name"], told["part"], told["die"]) == (name, "masks", None)
    plain = distil_model(
        tiny, tmp_path / "plain", options=Options(target="crossbar", settings=LESSON),
        choices=Choices(4),
    )  # fmt: skip
    same = history(tmp_path / "d") == history(tmp_path / "plain")
    assert same == (name == "noise-aware")  # which is what the loop does anyway
    assert plain.manifest["request"]["rule"] == "backpropagation"


def test_more_draws_are_averaged(tiny: Path, tmp_path: Path) -> None:
    distil(tiny, tmp_path / "one", "noise-aware", die=None, target="crossbar_pcm", steps=2)
    distil(
        tiny, tmp_path / "three", "noise-aware", die=None, target="crossbar_pcm", steps=2,
        more=("draws=3",),
    )  # fmt: skip
    assert history(tmp_path / "one") != history(tmp_path / "three")


# -- the die ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["crossbar_pcm", "optical"])
def test_the_trained_prototype_is_the_die_that_runs(
    tiny: Path, tmp_path: Path, target: str
) -> None:
    """One seed names one die: in training, and in the artifact that is run afterwards."""
    folder, place = tmp_path / "d.distilled", tmp_path / "d.pfm"
    age = DAY if target != "optical" else 0.0
    seen: dict[str, torch.Tensor] = {}
    finish = distillation.Run._finish

    def spy(run: Any, training: train.Training) -> Any:
        made = finish(run, training)
        feeds = training.lesson.feeds(range(4), True)
        training.trainee.student.eval()
        for seed in (5, 6):
            training.trainee.face(Die(seed, age, False), True, readings=0)
            with torch.no_grad():
                seen[str(seed)] = training.trainee.student(**feeds)["logits"]
            training.trainee.forget()
        seen["ids"] = torch.as_tensor(feeds["input_ids"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation.Run, "_finish", spy)
        done = distil(tiny, folder, "physics-aware", die=5, target=target, steps=8)
    assert done.manifest["kept"] == "the distilled"
    compile_model(tiny, place, target=target, settings=LESSON, distilled=folder)
    machine = simulate.open_machine(place, Die(5, age, False))
    ours = machine.decoder().logits(seen["ids"].numpy())
    truth, other = seen["5"].numpy(), seen["6"].numpy()
    off = np.abs(ours - truth) / truth.std()
    assert np.median(off) < 2e-3  # codes at the edge between two may fall to either side
    assert np.quantile(off, 0.99) < 0.1
    assert np.median(np.abs(ours - other)) > 10 * np.median(np.abs(ours - truth))


def test_a_network_leaves_the_student_as_it_was(tiny: Path, tmp_path: Path) -> None:
    """Also after a call that fails; its layers answer on its own die whatever was faced last."""
    seen: list[bool] = []

    def spy(self: Prototype, step: Step) -> float:
        trainee = step.trainee
        before = dict(trainee.student.linears)
        ideal = TwinNetwork(trainee, lambda _: (IDEAL, False, None))
        noisy = TwinNetwork(trainee, lambda k: (Die(k, DAY), True, k))
        assert step.lesson is not None
        feeds = step.lesson.feeds(step.rows[0])
        with torch.no_grad():
            first, _, again = ideal(**feeds), noisy(**feeds), ideal(**feeds)
        assert torch.equal(first["logits"], again["logits"])
        with pytest.raises(UsageError):
            ideal(nothing=feeds)
        assert trainee.student.linears == before
        name = next(iter(before))
        assert isinstance(ideal.replace(name, before[name]), Faced)
        assert set(following(trainee.student.model)) == {
            f"model.layers.{k}.mlp.gate_proj" for k in range(2)
        }
        seen.append(True)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prototype, "__call__", spy)
        distil(tiny, tmp_path / "d", "physics-aware", steps=1)
    assert seen == [True]


# -- bytes and resuming ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["physics-aware", "spsa", "echo"])
def test_an_interrupted_prototype_ends_in_the_same_bytes(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    run = train.Training.run

    def stopping(training: train.Training, tell: Any) -> Any:
        for state in run(training, tell):
            if state.step == 3:
                signal.raise_signal(signal.SIGINT)
            yield state

    distil(tiny, tmp_path / "whole", name, steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(tiny, tmp_path / "broken", name, steps=5)
    assert (tmp_path / "broken" / checkpoint.FILE).is_file()
    distil(tiny, tmp_path / "broken", name, steps=5)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert distil(tiny, tmp_path / "whole", name, steps=5).ready
    with pytest.raises(UsageError, match="another model, recipe or course"):
        distil(tiny, tmp_path / "whole", name, steps=5, die=1)


# -- stacks ----------------------------------------------------------------------------------------


def test_stacks_become_the_layers_weights(tiny: Path, tmp_path: Path) -> None:
    more = ("layers=*.k_proj", "planes=32", "fit=150")
    done = distil(tiny, tmp_path / "d", "adjoint", steps=8, more=more)
    stacks = done.manifest["stacks"]
    assert list(stacks) == [f"model.layers.{k}.self_attn.k_proj" for k in range(2)]
    assert all(s["modes"] == 64 and s["planes"] == 32 for s in stacks.values())
    assert all(0 < s["fit_error"] < 0.6 and 0 < s["die_error"] < 0.4 for s in stacks.values())
    assert done.manifest["kept"] == "the distilled"
    made = distilled.read(tmp_path / "d")
    plain = compile_model(tiny, tmp_path / "plain.pfm", target="optical", settings=LESSON)
    assert plain.model is not None
    for record in linear_records(plain.model):
        changed = np.mean(record.matrix.codes != made.records[record.name].matrix.codes)
        assert (changed > 0.1) == (record.name in stacks)


# -- the command line, and what is refused ---------------------------------------------------------


def test_the_command_line(tiny: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    settings = [x for s in LESSON for x in ("--set", s)]
    args = ("distill", tiny, "-t", "crossbar_pcm", "-o", tmp_path / "d", *settings, "--steps", "1")
    wanted = ("--rule", "spsa", "--rule-set", "probes=1", "--die", "3", "--age", "1day")
    here(*args, *wanted, "--json").json()
    told = json.loads((tmp_path / "d" / distilled.MANIFEST).read_bytes())["request"]["rule"]
    assert told == {
        "name": "spsa", "options": {"probes": 1, "radius": 1e-3}, "part": "prototype",
        "die": {"seed": 3, "age_s": DAY},
    }  # fmt: skip
    here(*args, "--rule", "spsaa", "--die", "3").refused(2, "spsaa", "did you mean 'spsa'")
    here(*args, "--rule", "spsa").refused(2, "cannot train masks", "prototype")


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (("phisics-aware", (), 0), "did you mean 'physics-aware'"),
        (("physics-aware",), "cannot train masks: it needs a device in the loop"),
        (("adjoint",), "cannot train masks"),
        (("spsa", ("probe=3",), 0), "did you mean 'probes'"),
        (("physics-aware", ("probes=3",), 0), "it has none"),
        (("spsa", ("probes=many",), 0), "probes of the rule spsa is an integer"),
        (("spsa", ("probes=0",), 0), "must be above 0"),
        (("spsa", ("probes",), 0), "cannot read 'probes'"),
        (("augmented-feedback", ("g=tan",), 0), "no slope 'tan'"),
        ((None, ("probes=3",)), "options of no rule"),
        (("in-silico", (), None, DAY), "an age is one die's"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(asked: tuple[Any, ...], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        method(*asked)
    assert what in str(caught.value)


def test_a_die_alone_is_trained_physics_aware() -> None:
    chosen = method(None, (), 2)
    assert chosen is not None
    assert (chosen.rule.name, chosen.part) == ("physics-aware", Part.PROTOTYPE)
    assert method(None) is None


def test_what_the_target_cannot_be_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be rewritten"):
        distil(tiny, tmp_path / "a", "physics-aware", target="rom")
    with pytest.raises(UsageError, match="needs reciprocal phase masks"):
        distil(tiny, tmp_path / "b", "adjoint", target="crossbar")
    with pytest.raises(UsageError, match="no layer fits"):
        distil(tiny, tmp_path / "c", "echo", more=("layers=nothing",))
