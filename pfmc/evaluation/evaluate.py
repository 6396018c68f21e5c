"""Prepares the task, measures every die, and gathers the figures; a killed run resumes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import ingest, simulate
from pfmc.against_source import Plan, batches_of, drive_of, find_source, truth_of
from pfmc.distill.feeds import batches_of_file, labels_of_file
from pfmc.errors import FileError, InputError, UsageError, did_you_mean
from pfmc.evaluation.figures import Figure
from pfmc.evaluation.tasks import Embedding, Labelled, Language, Measured, Task, read_pairs
from pfmc.simulate import Machine
from pfmc.targets.base import Die
from pfmc.with_adapter import merged_source

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
_COLUMNS = ("key", "metric", "document", "value")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        title: one line; task: its name; documents: how many; dies: which seeds.
        figures: the numbers.
    """

    title: str
    task: str
    documents: int
    dies: tuple[int | None, ...]
    age_s: float
    figures: tuple[Figure, ...] = field(default=())

    def __getitem__(self, name: str) -> Figure:
        return next(f for f in self.figures if f.name == name)

    def json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "schema_version": 1, "title": self.title, "task": self.task,
            "documents": self.documents, "dies": list(self.dies), "age_s": self.age_s,
            "figures": [f.json() for f in self.figures],
        }  # fmt: skip


def _silent(_: str) -> None:
    """No progress shown."""


def evaluate(
    path: str | Path, *, model: Path | None = None, adapter: Path | None = None,
    text: Path | None = None, pairs: Path | None = None, inputs: Path | None = None,
    output: str | None = None, documents: int | None = None, length: int | None = None,
    seed: int = 1, dies: Sequence[int | None] = (0,), age_s: float = 0.0,
    save: Path | None = None, progress: Progress = _silent,
) -> Evaluation:  # fmt: skip
    """Measures an artifact on a task, on each of `dies`.

    Args:
        path: the artifact; model, adapter: what it was compiled from, if it moved.
        text: a text file, or a folder of them; a language model's own text by default.
        pairs: sentence pairs with people's scores, see `pfmc.evaluation.tasks.read_pairs`.
        inputs: an ``.npz`` file of graph inputs; with an array ``labels``, accuracy is measured.
        output: which output is judged; the first with more than one number by default.
        documents: windows, pairs or inputs at most; length: tokens of each.
        seed: of self-written text.
        dies: seeds; None is the ideal die. age_s: time since writing in seconds.
        save: a CSV file of every document's numbers; what stands in it is not measured again.
        progress: takes a line at a time.

    Raises:
        UsageError: two tasks at once, or a task that the model cannot do.
        InputError: a file that is no text, no pairs or no arrays.
    """
    if sum(x is not None for x in (text, pairs, inputs)) > 1:
        raise UsageError("give one of a text, sentence pairs and inputs, not several")
    if not dies:
        raise UsageError("no die was named", mend="--dies 0")
    machine = simulate.describe_machine(Path(path), Die(dies[0], age_s, dies[0] is not None))
    source = find_source(machine, model)
    plan = Plan.of(machine, _readable(text), inputs, documents, length, seed)
    with merged_source(machine, source, adapter) as truth:
        task = _task(machine, ingest.load(truth).model, plan, pairs, output, documents)
        book = _Book(save, f"{machine.manifest.tree} {task.identity} {age_s}")
        progress("running the untouched source")
        with truth_of(truth) as running:
            task.prepare(running)
    per_die = [
        book.once(die, partial(_one, Path(path), task, die, age_s, progress)) for die in dies
    ]
    count = len(next(iter(per_die[0].values())))
    title = f"{Path(path).name}, {task.name}, {count} documents, {len(dies)} die(s)"
    return Evaluation(title, task.name, count, tuple(dies), age_s, tuple(task.figures(per_die)))


def _one(path: Path, task: Task, die: int | None, age_s: float, progress: Progress) -> Measured:
    progress("the ideal die" if die is None else f"die {die}")
    return task.measure(simulate.open_machine(path, Die(die, age_s, die is not None)))


def _readable(text: Path | None) -> Path | None:
    if text is not None and not text.exists():
        raise FileError("there is no such text", where=str(text))
    return text


# -- which task ------------------------------------------------------------------------------------


def _task(
    machine: Machine, model: ir.Model, plan: Plan, pairs: Path | None, output: str | None,
    documents: int | None,
) -> Task:  # fmt: skip
    lead = drive_of(model)
    if pairs is not None:
        return _pairs_task(machine, model, plan, pairs, output, documents)
    if lead is not None and plan.inputs is None:
        batches = batches_of(machine, model, lead, plan)
        return Language(lead, batches, _identity("text", *(b[lead.ids] for b in batches)))
    if plan.inputs is None:
        raise UsageError(
            "this is no language model: say what it is measured on",
            mend="give --pairs sentences.tsv, or --input arrays.npz with an array 'labels'",
        )
    labels = labels_of_file(plan.inputs)
    batches = list(batches_of_file(model, plan.inputs, documents or sys.maxsize))
    count = sum(len(next(iter(b.values()))) for b in batches)
    chosen = _output(model, output)
    given = None if labels is None else labels[:count]
    arrays = [v for b in batches for v in b.values()]
    identity = _identity(chosen, *arrays, *([] if given is None else [given]))
    return Labelled(batches, given, chosen, identity)


def _pairs_task(
    machine: Machine, model: ir.Model, plan: Plan, path: Path, output: str | None,
    documents: int | None,
) -> Task:  # fmt: skip
    if machine.tokenizer is None:
        raise UsageError(
            "sentences need a tokenizer", where=str(machine.path),
            mend="compile with --tokenizer tokenizer.json",
        )  # fmt: skip
    chosen = _output(model, output)
    names = [str(v.name) for v in model.graph.inputs]
    found = read_pairs(path, documents)
    text = json.dumps([chosen, plan.length, *found.sentences, *map(float, found.scores)])
    return Embedding(found, machine.tokenizer, plan.length, names, chosen, _identity(text))


def _output(model: ir.Model, asked: str | None) -> str:
    """The output that is judged: the one asked for, else the first of more than one number."""
    names = [str(v.name) for v in model.graph.outputs]
    if asked is not None and asked not in names:
        mend = did_you_mean(asked, names)
        raise UsageError(f"the model has no output {asked!r}", where="--output", mend=mend)
    if asked is not None:
        return asked
    wide = [v for v in model.graph.outputs if v.shape is not None and len(v.shape) >= 2]
    return str((wide or model.graph.outputs)[0].name)


def _identity(*parts: str | Array) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


# -- resuming --------------------------------------------------------------------------------------


class _Book:
    """Every document's numbers in an append-only CSV file; a die that is complete stays."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.known = {} if path is None else _opened(path)

    def once(self, die: int | None, measure: Callable[[], Measured]) -> Measured:
        """What stands in the book for `die`, else what `measure` finds."""
        key = hashlib.sha256(f"{self.identity} {die}".encode()).hexdigest()
        if key not in self.known:
            self.known[key] = measure()
            self._write(key, self.known[key])
        return self.known[key]

    def _write(self, key: str, found: Mapping[str, Array]) -> None:
        if self.path is None:
            return
        fresh = not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(_COLUMNS)
            for metric, values in found.items():
                writer.writerows((key, metric, i, repr(float(v))) for i, v in enumerate(values))
            writer.writerow((key, "complete", len(found), 1.0))


def _opened(path: Path) -> dict[str, Measured]:
    """Complete dies of a book; proves that it can be written, and ends a torn line."""
    try:
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read() not in (b"", b"\n"):
                file.write(b"\n")
    except OSError as error:
        raise FileError(
            f"cannot write: {error.strerror}", where=str(path), mend="give another file with --save"
        ) from error
    return _read(path) if size else {}


def _read(path: Path) -> dict[str, Measured]:
    held: dict[str, dict[str, list[str]]] = {}
    complete: set[str] = set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != _COLUMNS:
            raise InputError("this is no table of `pfmc eval`", where=str(path))
        for row in rows:
            if len(row) != len(_COLUMNS):
                continue  # torn by a kill; the die is measured again
            key, metric, document, value = row
            if metric == "complete":
                complete.add(key)
                continue
            if document == "0":  # from its first document on: an earlier try may have been cut off
                held.setdefault(key, {})[metric] = []
            held.setdefault(key, {}).setdefault(metric, []).append(value)
    return {k: {m: np.array(v, np.float64) for m, v in held[k].items()} for k in complete}
