"""What correcting one die reaches.

``python -m benchmarks.calibrate_figures --out docs/calibrate.csv``

Every row is measured on text that the float model writes itself under another seed than the one it
is calibrated on. A row that the file holds already is not measured again, so a killed run resumes.
The base is what `pfmc compile` makes and, with ``--distilled FOLDER``, what the rows in that folder
of ``python -m benchmarks.distil_figures --folder FOLDER`` were distilled to.
``--drift docs/calibrate_drift.csv`` measures one die over its age instead.
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
import csv
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.distil_figures import BARD, ROWS, STORIES, Subject
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


@dataclass(frozen=True)
class Case:
    """A model on a technology at an age; `row`: of `distil_figures` that distils for it."""

    model: Subject
    technology: str
    age: str
    row: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """How rows of it begin."""
        return self.model.name, self.technology, self.age


CASES = (
    Case(STORIES, "crossbar_gaussian10", "0s", "noise10"),
    Case(STORIES, "crossbar_gaussian5", "0s", "noise5"),
    Case(STORIES, "crossbar", "1day", "pcm_soft"),
    Case(BARD, "crossbar_gaussian10", "0s", "bard10"),
    Case(BARD, "crossbar", "1day"),
)
AGES = ("1s", "1h", "1day", "30day", "1year")
COLUMNS = (
    "model", "technology", "age", "base", "procedure", "share_of_weights", "excess_before",
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
    key: tuple[str, ...], share: float, before: Measured, after: Measured, cpu_s: float
) -> Row:
    numbers = (
        share, before.excess, after.excess, 1 - after.excess / before.excess, before.ratio,
        after.ratio, after.low, after.high,
    )  # fmt: skip
    values = (*key, *(f"{v:.4f}" for v in numbers), f"{cpu_s:.0f}")
    return dict(zip(COLUMNS, values, strict=True))


def _compiled(case: Case, folder: Path, distilled: Path | None) -> Path:
    """What a compile makes, of a distilled model with its row's settings where one is given."""
    out = folder / f"{case.model.name}-{case.technology}.pfm"
    settings = () if distilled is None else ROWS[case.row].settings
    compile_model(
        case.model.path, out, target=case.technology, settings=settings, distilled=distilled,
        force=True,
    )  # fmt: skip
    return out


def _bases(case: Case, folder: Path | None) -> Iterator[tuple[str, Path | None]]:
    yield "quantised", None
    if folder is not None and case.row and (folder / f"{case.row}.distilled").is_dir():
        yield "noise-distilled", folder / f"{case.row}.distilled"


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


def figures(book: Book, folder: Path, asked: argparse.Namespace) -> None:
    """One corrected die of each case and base, by closed forms and distilled."""
    for case in CASES:
        for base, distilled in _bases(case, asked.distilled):
            key = (*case.key, base)
            if asked.only not in " ".join(key) or book.has(*key, "distilled"):
                continue
            plain, age_s = _compiled(case, folder, distilled), seconds_of(case.age)
            text = _written(plain)
            before = Measured.of(plain, age_s, text)
            for name, steps in (("closed forms", 0), ("distilled", None)):
                course = replace(COURSE, seconds=asked.seconds, steps=steps)
                choices = Choices(DIE, age_s, course=course, force=True)
                out = folder / "corrected.pfm"
                done = calibrate(plain, out, choices=choices)
                share, after = done.notes["share_of_weights"], Measured.of(out, age_s, text)
                book.add(_row((*key, name), share, before, after, done.cpu_s))


def _procedures(seconds: float) -> Iterator[tuple[str, Choices]]:
    still = replace(COURSE, steps=0)
    yield "gain refitted", Choices(DIE, course=still, only_gain=True, force=True)
    yield "refitted", Choices(DIE, course=replace(COURSE, seconds=seconds), force=True)


def drift(book: Book, folder: Path, asked: argparse.Namespace) -> None:
    """A die calibrated one second after writing, later as it is and calibrated again."""
    for model in (STORIES, BARD):
        if asked.only not in model.name:
            continue
        plain = _compiled(Case(model, "crossbar", ""), folder, None)
        first, text = folder / f"{model.name}-first.pfm", _written(plain)
        start = Choices(DIE, 1.0, course=replace(COURSE, seconds=asked.seconds), force=True)
        share = calibrate(plain, first, choices=start).notes["share_of_weights"]
        for age in AGES:
            key, age_s = (model.name, "crossbar", age, "quantised"), seconds_of(age)
            if book.has(*key, "refitted"):
                continue
            before = Measured.of(plain, age_s, text)
            stays = Measured.of(first, age_s, text)
            book.add(_row((*key, "calibrated at 1 s"), share, before, stays, 0))
            for name, choices in _procedures(asked.seconds):
                out = folder / "again.pfm"
                done = calibrate(first, out, choices=replace(choices, age_s=age_s))
                after = Measured.of(out, age_s, text)
                book.add(_row((*key, name), share, before, after, done.cpu_s))


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drift", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds a calibration")
    parser.add_argument("--distilled", type=Path, help="folder of distil_figures")
    parser.add_argument("--only", default="", help="part of a model's or technology's name")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pfmc-calibrate-") as folder:
        if asked.out:
            figures(Book(asked.out), Path(folder), asked)
        if asked.drift:
            drift(Book(asked.drift), Path(folder), asked)


if __name__ == "__main__":
    main()
