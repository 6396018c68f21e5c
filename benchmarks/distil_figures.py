"""Distils, compiles and measures the figures of docs/distill.md, one row after the other, as CSV.

    python -m benchmarks.distil_figures [ROW …] [--folder DIR] [--seconds S] [--dies N]
    python -m benchmarks.distil_figures --list

Each row is `pfmc distill`, `pfmc compile --distilled` and, before and after, the simulated artifact
against ONNX Runtime on the untouched file: 32 windows of 128 tokens that the teacher wrote from
another seed than the ones it taught with, on dies that training never saw. Rows are merged into
docs/distil_figures.csv as they are finished; distilled folders are kept in `--folder` and reused.
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy import BATCH, ROOT, SHARED, Subject, Truth, truth_of
from pfmc import simulate
from pfmc.compile import Options, compile_model
from pfmc.distill import measure
from pfmc.distillation import Choices, Distillation, distil_model
from pfmc.targets.base import Die

OUT = ROOT / "docs" / "distil_figures.csv"
STORIES = Subject("stories260K", SHARED / "data/stories260K/model.onnx")
BARD = Subject("bard", ROOT / "models/bard/model.onnx")
DAY = 86400.0
COLUMNS = (
    "row", "model", "target", "settings", "age_s", "dies", "before", "before_low", "before_high",
    "after", "after_low", "after_high", "worst_die", "die_sd", "goal", "recovered", "kl", "top1",
    "steps", "cpu_s",
)  # fmt: skip

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One figure: a model on a target with settings, and the perplexity ratio to reach."""

    subject: Subject
    target: str
    settings: tuple[str, ...]
    goal: float
    age_s: float = 0.0


def weights(bits: int, lr: float, *more: str) -> tuple[str, ...]:
    """Digital weights of so many bits, the head at 8."""
    return (f"quantise.weight_bits={bits}", f"distill.lr={lr}", "distill.sequences=2048", *more)


def analog(lr: float, *more: str, clip: float) -> tuple[str, ...]:
    """Noisy weights, clipped at so many deviations: noise is relative to the largest."""
    return (f"distill.lr={lr}", f"distill.clip_sigmas={clip:g}", "distill.sequences=2048", *more)


STATIC = ("quantise.inputs=static",)
AGED = f"distill.age_s={DAY:g}"
ROWS = {
    "w4": Row(STORIES, "rom", weights(4, 4e-4), 1.035),
    "w3": Row(STORIES, "rom", weights(3, 7e-4), 1.12),
    "w2": Row(STORIES, "rom", weights(2, 1e-3, "distill.scale_lr=2e-3"), 1.55),
    "w4a8": Row(STORIES, "rom", weights(4, 4e-4, *STATIC), 1.055),
    "w3a8": Row(STORIES, "rom", weights(3, 7e-4, *STATIC), 1.14),
    "w2a8": Row(STORIES, "rom", weights(2, 1e-3, "distill.scale_lr=2e-3", *STATIC), 1.57),
    "bard4": Row(BARD, "rom", weights(4, 3e-4), 1.01),
    "bard3": Row(BARD, "rom", weights(3, 5e-4), 1.02),
    "bard2": Row(BARD, "rom", weights(2, 7e-4), 1.05),
    "noise5": Row(STORIES, "crossbar_gaussian5", analog(1.5e-3, clip=1.8), 1.20),
    "noise10": Row(STORIES, "crossbar_gaussian10", analog(1.5e-3, clip=1.6), 1.70),
    "bard10": Row(BARD, "crossbar_gaussian10", analog(1e-3, clip=1.6), 1.03),
    "pcm": Row(STORIES, "crossbar", analog(1e-3, AGED, clip=1.8), math.nan, DAY),
    "pcm_soft": Row(STORIES, "crossbar", analog(1e-3, AGED, clip=3), math.nan, DAY),
}


@dataclass(frozen=True)
class Found:
    """Excess nats ``[dies, windows]``, KL and top-1 agreement."""

    excess: Array
    kl: float
    top1: float

    def ratio(self) -> tuple[float, float, float]:
        """Perplexity ratio of the mean over dies, and its 95 % interval over windows."""
        mean = measure.mean_estimate(self.excess.mean(axis=0))
        return math.exp(mean.value), math.exp(mean.low), math.exp(mean.high)

    def by_die(self) -> Array:
        return np.exp(self.excess.mean(axis=1))


def measured(artifact: Path, truth: Truth, dies: int, age_s: float) -> Found:
    """The artifact on dies 0 … `dies` - 1."""
    excess, kl, top1 = [], [], []
    for die in range(dies):
        decoder = simulate.open_machine(artifact, Die(die, age_s)).decoder()
        seen = measure.Comparison()
        for start in range(0, len(truth.ids), BATCH):
            part = slice(start, start + BATCH)
            seen.add(truth.scores[part], decoder.logits(truth.ids[part]), truth.ids[part])
        student, teacher = (
            np.concatenate(v).mean(axis=1) for v in (seen.student_losses, seen.teacher_losses)
        )
        excess.append(student - teacher)
        found = seen.result()
        kl.append(found.kl_mean.value)
        top1.append(found.top1.value)
    return Found(np.stack(excess), float(np.mean(kl)), float(np.mean(top1)))


def both(
    name: str, model: Path, options: Options, folder: Path, seconds: float
) -> tuple[Distillation, Path, Path]:
    """Distils a model; the artifacts of what a compile makes without it and with it."""
    place = folder / f"{name}.distilled"
    done = distil_model(
        model, place, options=options, choices=Choices(seconds=seconds),
        progress=lambda line: print(f"  {line}", flush=True) if "step" in line else None,
    )  # fmt: skip
    made = []
    for state, distilled in (("before", None), ("after", place)):
        made.append(folder / f"{name}-{state}.pfm")
        compile_model(
            model, made[-1], target=options.target, settings=options.settings,
            inputs=options.inputs, force=True, distilled=distilled,
        )  # fmt: skip
    return done, made[0], made[1]


def figure(name: str, row: Row, folder: Path, seconds: float, dies: int) -> dict[str, Any]:
    """Distils, compiles and measures one row."""
    options = Options(target=row.target, settings=row.settings, force=True)
    done, *made = both(name, row.subject.path, options, folder, seconds)
    truth = truth_of(row.subject, None)
    count = 1 if row.target == "rom" else dies
    before, after = (measured(path, truth, count, row.age_s) for path in made)
    recovered = 1 - after.excess.mean() / before.excess.mean()
    named = zip(COLUMNS[6:12], (*before.ratio(), *after.ratio()), strict=True)
    return {
        "row": name, "model": row.subject.name, "target": row.target,
        "settings": " ".join(row.settings), "age_s": f"{row.age_s:g}", "dies": count,
        **{k: f"{v:.4f}" for k, v in named}, "worst_die": f"{after.by_die().max():.4f}",
        "die_sd": f"{after.by_die().std(ddof=1) if count > 1 else 0:.4f}", "goal": row.goal,
        "recovered": f"{recovered:.3f}", "kl": f"{after.kl:.4f}", "top1": f"{after.top1:.4f}",
        "steps": done.manifest["steps"], "cpu_s": f"{done.cpu_s:.0f}" if done.cpu_s else "",
    }  # fmt: skip


def merge(new: dict[str, Any], out: Path, order: list[str]) -> None:
    """Puts a row into the CSV, in the place of an older one of the same name."""
    rows = []
    if out.is_file():
        with out.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["row"] != new["row"]]
    rows = sorted([*rows, new], key=lambda r: order.index(r["row"]) if r["row"] in order else 99)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(new), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--folder", type=Path, default=Path("distil-figures"))
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds a row")
    parser.add_argument("--dies", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{n:<10}{r.target:<20}{' '.join(r.settings)}" for n, r in ROWS.items()))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.rows or ROWS:
        print(name, flush=True)
        row = figure(name, ROWS[name], given.folder, given.seconds, given.dies)
        merge(row, given.out, list(ROWS))
        print(row, flush=True)


if __name__ == "__main__":
    main()
