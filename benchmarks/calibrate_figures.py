"""What correcting one die reaches.

``python -m benchmarks.calibrate_figures --out docs/calibrate.csv``

Every row is measured on text that the float model writes itself under another seed than the one it
is calibrated on. A row that the file holds already is not measured again, so a killed run resumes.
``--drift docs/calibrate_drift.csv`` measures one die over its age instead.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pfmc.against_source import find_source
from pfmc.calibration.calibrate import calibrate
from pfmc.calibration.choices import COURSE, Choices
from pfmc.calibration.die import canonical_source
from pfmc.cli.run import seconds_of
from pfmc.compile import compile_model
from pfmc.distill.corpus import written
from pfmc.distill.generate import Decoder
from pfmc.distill.student import Student
from pfmc.evaluation import evaluate
from pfmc.simulate import describe_machine

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "bard": ROOT / "models" / "bard" / "model.onnx",
    "stories260K": Path(os.environ.get("PFMC_SHARED", ROOT.parent / "shared"))
    / "data" / "stories260K" / "model.onnx",
}  # fmt: skip
FIGURES = (
    ("stories260K", "crossbar_gaussian10", "0s"), ("stories260K", "crossbar_gaussian5", "0s"),
    ("stories260K", "crossbar", "1day"), ("bard", "crossbar_gaussian10", "0s"),
    ("bard", "crossbar", "1day"),
)  # fmt: skip
AGES = ("1s", "1h", "1day", "30day", "1year")
COLUMNS = (
    "model", "technology", "age", "procedure", "share_of_weights", "excess_before",
    "excess_after", "recovered", "ratio_before", "ratio_after", "ratio_low", "ratio_high",
    "cpu_s",
)  # fmt: skip
DOCUMENTS, LENGTH, DIE, SEED = 48, 128, 0, 1
Row = dict[str, str]


@dataclass(frozen=True)
class Book:
    """A CSV file whose rows are measured once."""

    path: Path

    def rows(self) -> list[Row]:
        """What stands in it."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def has(self, *key: str) -> bool:
        """Whether a row begins with `key`."""
        return any(tuple(r.values())[: len(key)] == key for r in self.rows())

    def add(self, row: Row) -> None:
        """Appends a row, and prints it."""
        fresh = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(", ".join(row.values()), flush=True)


@dataclass(frozen=True)
class Measured:
    """Excess in nats a token and perplexity ratio with its 95 % interval over documents."""

    excess: float
    ratio: float
    low: float
    high: float

    @staticmethod
    def of(path: Path, age_s: float, text: Path) -> Measured:
        """Of an artifact on the die."""
        found = evaluate(
            path, text=text, documents=DOCUMENTS, length=LENGTH, dies=(DIE,), age_s=age_s
        )
        ratio = found["perplexity ratio"]
        return Measured(
            found["excess"].value, ratio.value, ratio.low or math.nan, ratio.high or math.nan
        )


def _row(
    key: tuple[str, str, str, str], share: float, before: Measured, after: Measured, cpu_s: float
) -> Row:
    numbers = (
        share, before.excess, after.excess, 1 - after.excess / before.excess, before.ratio,
        after.ratio, after.low, after.high,
    )  # fmt: skip
    values = (*key, *(f"{v:.4f}" for v in numbers), f"{cpu_s:.0f}")
    return dict(zip(COLUMNS, values, strict=True))


def _compiled(model: str, technology: str, folder: Path) -> Path:
    out = folder / f"{model}-{technology}.pfm"
    compile_model(MODELS[model], out, target=technology)
    return out


def _written(plain: Path) -> Path:
    """Text that the float model writes itself, with another seed than calibration's."""
    out = plain.with_suffix(".txt")
    if not out.is_file():
        machine = describe_machine(plain)
        student = Student(canonical_source(machine, find_source(machine, None))).eval()
        assert machine.tokenizer is not None
        ids = written(Decoder(student, machine.tokenizer), DOCUMENTS + 8, LENGTH, SEED)
        out.write_text("\n".join(machine.tokenizer.decode(row.tolist()) for row in ids))
    return out


def figures(book: Book, folder: Path, seconds: float, only: str) -> None:
    """One corrected die of each case, by closed forms and distilled."""
    for model, technology, age in FIGURES:
        if only not in f"{model} {technology}" or book.has(model, technology, age, "distilled"):
            continue
        plain, age_s = _compiled(model, technology, folder), seconds_of(age)
        text = _written(plain)
        before = Measured.of(plain, age_s, text)
        for name, steps in (("closed forms", 0), ("distilled", None)):
            course = replace(COURSE, seconds=seconds, steps=steps)
            choices = Choices(DIE, age_s, course=course, force=True)
            out = folder / "corrected.pfm"
            done = calibrate(plain, out, choices=choices)
            share, after = done.notes["share_of_weights"], Measured.of(out, age_s, text)
            book.add(_row((model, technology, age, name), share, before, after, done.cpu_s))


def _procedures(seconds: float) -> Iterator[tuple[str, Choices]]:
    still = replace(COURSE, steps=0)
    yield "gain refitted", Choices(DIE, course=still, only_gain=True, force=True)
    yield "refitted", Choices(DIE, course=replace(COURSE, seconds=seconds), force=True)


def drift(book: Book, folder: Path, seconds: float, only: str) -> None:
    """A die calibrated one second after writing, later as it is and calibrated again."""
    for model in MODELS:
        if only not in model:
            continue
        plain, first = _compiled(model, "crossbar", folder), folder / f"{model}-first.pfm"
        text = _written(plain)
        start = Choices(DIE, 1.0, course=replace(COURSE, seconds=seconds), force=True)
        share = calibrate(plain, first, choices=start).notes["share_of_weights"]
        for age in AGES:
            age_s = seconds_of(age)
            if book.has(model, "crossbar", age, "refitted"):
                continue
            before = Measured.of(plain, age_s, text)
            stays = Measured.of(first, age_s, text)
            book.add(_row((model, "crossbar", age, "calibrated at 1 s"), share, before, stays, 0))
            for name, choices in _procedures(seconds):
                out = folder / "again.pfm"
                done = calibrate(first, out, choices=replace(choices, age_s=age_s))
                after = Measured.of(out, age_s, text)
                book.add(_row((model, "crossbar", age, name), share, before, after, done.cpu_s))


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drift", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds a calibration")
    parser.add_argument("--only", default="", help="part of a model's or technology's name")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pfmc-calibrate-") as folder:
        if asked.out:
            figures(Book(asked.out), Path(folder), asked.seconds, asked.only)
        if asked.drift:
            drift(Book(asked.drift), Path(folder), asked.seconds, asked.only)


if __name__ == "__main__":
    main()
