"""Runs passes one after another and owns what every pass shares: checks, times, counts, crashes."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pfmc.errors import InternalError, PfmcError, UsageError, did_you_mean
from pfmc.ir import check, text
from pfmc.ir.record import Record
from pfmc.ir.vocabulary import Stage
from pfmc.passes import instruments
from pfmc.passes.base import Context, Declined, Pass, PassResult
from pfmc.passes.instruments import Dump, Instrument, label


@dataclass(frozen=True)
class Settings:
    """How a pipeline is watched.

    Attributes:
        verify_each: whether the graph is checked after each pass.
        dump: folder for the graph after each pass, or None.
        stop_after: pass name (its first run) or label (``03_fold``) after which to stop, or None.
        reproducer: folder that a crash is written to; None makes one in the temporary folder.
        keep_weights: whether a crash reproducer holds the real weights.
        instruments: further watchers.
    """

    verify_each: bool = True
    dump: Path | None = None
    stop_after: str | None = None
    reproducer: Path | None = None
    keep_weights: bool = False
    instruments: tuple[Instrument, ...] = ()


DEFAULT = Settings()


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        label: ``01_fold``.
        name: of the pass.
        changed, declined, notes: see `PassResult`.
        before, after: operator -> count.
        cpu_s: CPU seconds of the pass; check_s: of the checks after it.
    """

    label: str
    name: str
    changed: int
    declined: tuple[Declined, ...]
    notes: dict[str, float | int | str]
    before: dict[str, int]
    after: dict[str, int]
    cpu_s: float
    check_s: float

    def difference(self) -> dict[str, int]:
        """Operator -> how many more there are after the pass; unchanged ones left out."""
        names = sorted({*self.before, *self.after})
        delta = {n: self.after.get(n, 0) - self.before.get(n, 0) for n in names}
        return {n: d for n, d in delta.items() if d}

    def report(self) -> dict[str, Any]:
        """The step as plain data without times, for the manifest and ``--json``."""
        return {
            "pass": self.name,
            "changed": self.changed,
            "operators": self.difference(),
            "declined": [{"where": d.where, "reason": d.reason} for d in self.declined],
            "notes": dict(self.notes),
        }


@dataclass(frozen=True)
class Outcome:
    """A model after a pipeline.

    Attributes:
        model: what came out; steps: what each pass did; stopped: whether `stop_after` was met.
    """

    model: ir.Model
    steps: tuple[Step, ...]
    stopped: bool = False

    def timing_s(self) -> dict[str, float]:
        """CPU seconds by label."""
        return {s.label: s.cpu_s for s in self.steps}

    def reasons(self) -> dict[str, str]:
        """Where -> why the last pass to decline it did so."""
        return {d.where: d.reason for s in self.steps for d in s.declined}


def run(
    model: ir.Model,
    passes: Iterable[Pass],
    context: Context | None = None,
    settings: Settings = DEFAULT,
) -> Outcome:
    """Runs `passes` over `model`, which they may change.

    Args:
        model: at the stage that the first pass needs.
        passes: in order.
        context: what the passes may ask; takes progress lines.
        settings: how it is watched.

    Raises:
        InternalError: a pass crashed or broke the graph; the message names the reproducer.
        InputError: the model is not at the stage that a pass needs.
        UsageError: `stop_after` names no pass.
    """
    context, steps = context or Context(), list(passes)
    last = _last(steps, settings.stop_after)
    watchers = [*settings.instruments, *([Dump(settings.dump)] if settings.dump else [])]
    with no_garbage_collection():
        flow = _Flow(model, Record(model), steps, context, settings, watchers)
        for index in range(last + 1):
            flow.step(index)
    return Outcome(flow.model, tuple(flow.done), settings.stop_after is not None)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's cycle collector off: each of its runs would walk the whole graph.

    A graph is all cycles and hardly any of them die; with the collector on, time grows faster
    than the number of nodes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def canonicalise(
    model: ir.Model,
    passes: Iterable[Pass],
    context: Context | None = None,
    settings: Settings = DEFAULT,
) -> Outcome:
    """`run`, and the result is CANONICAL unless it was stopped before.

    Raises:
        InputError: something was left that no hardware of ours holds; names the node and, where a
            pass declined it, the reason.
    """
    with no_garbage_collection():
        outcome = run(model, passes, context, settings)
        if not outcome.stopped:
            check.require_stage(outcome.model, Stage.CANONICAL, outcome.reasons())
    return outcome


def _last(steps: Sequence[Pass], stop_after: str | None) -> int:
    """The index of the last pass to run."""
    if stop_after is None:
        return len(steps) - 1
    labels = {label(i + 1, p): i for i, p in enumerate(steps)}
    for i in reversed(range(len(steps))):
        labels[steps[i].name] = i  # the first run of that name remains
    if stop_after not in labels:
        raise UsageError(
            f"no pass is called {stop_after!r}", where="--stop-after",
            mend=did_you_mean(stop_after, labels),
        )  # fmt: skip
    return labels[stop_after]


@dataclass
class _Flow:
    """A pipeline under way."""

    model: ir.Model
    origin: Record
    steps: list[Pass]
    context: Context
    settings: Settings
    watchers: list[Instrument]
    done: list[Step] = field(default_factory=list)
    known: check.Snapshot | None = None
    stage: Stage | None = None  # where the model is known to be, as long as nobody touches it

    def step(self, index: int) -> None:
        """Runs one pass under all watchers."""
        step = self.steps[index]
        self.context.progress(f"{index + 1}/{len(self.steps)} {step.name}")
        if step.needs is not self.stage:
            check.require_stage(self.model, step.needs)
        for watcher in self.watchers:
            watcher.before(index, step, self.model)
        try:
            result = self._measured(index, step)
        except Exception as error:
            if isinstance(error, PfmcError) and not isinstance(error, InternalError):
                raise
            raise self._crash(index, error) from error
        self.model = result.model
        for watcher in self.watchers:
            watcher.after(index, step, result)

    def _measured(self, index: int, step: Pass) -> PassResult:
        before = self.done[-1].after if self.done else text.histogram(self.model)
        if self.known is None and self.settings.verify_each:
            self.known = check.snapshot(self.model)
        start = time.process_time()
        result = step.apply(self.model, self.context)
        middle = time.process_time()
        if self.settings.verify_each:
            self.known = check.check(result.model, self.known)
            check.require_stage(result.model, step.gives)
            self.stage = step.gives
            after = text.named_counts(self.known.operators)
        else:
            after = text.histogram(result.model)
        end = time.process_time()
        self.done.append(
            Step(
                label(index + 1, step),
                step.name,
                result.changed,
                result.declined,
                dict(result.notes),
                before,
                after,
                cpu_s=middle - start,
                check_s=end - middle,
            )
        )
        return result

    def _crash(self, index: int, error: Exception) -> InternalError:
        """Writes the reproducer of a crash in pass `index`: earlier passes are run once more."""
        folder = self.settings.reproducer or Path(tempfile.mkdtemp(prefix="pfmc-crash-"))
        model, first = self.origin.model(), index
        quiet = replace(self.context, progress=Context().progress)
        try:
            for step in self.steps[:index]:
                model = step.apply(model, quiet).model
        except Exception:  # the way there fails too: hand out the model from the start
            model, first = self.origin.model(), 0
        instruments.write_reproducer(
            folder, model, self.steps[first : index + 1], self.context, error,
            self.settings.keep_weights,
        )  # fmt: skip
        return InternalError(
            f"pass {self.steps[index].name!r} failed: {_words(error)}",
            where=getattr(error, "where", "") or label(index + 1, self.steps[index]),
            mend=f"this is a bug of pfmc; report it with the folder {folder}",
        )


def _words(error: Exception) -> str:
    if isinstance(error, PfmcError):
        return error.what
    return f"{type(error).__name__}: {error}"


def replay(folder: Path) -> Outcome:
    """Runs the passes of a crash reproducer on its model, without writing another.

    Raises:
        Exception: whatever the pass raises, untouched.
    """
    model, steps, context = instruments.read_reproducer(folder)
    for step in steps:
        before = check.snapshot(model)
        model = step.apply(model, context).model
        check.check(model, before)
    return Outcome(model, ())


# -- explaining ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What one pass did to a graph, in lines.

    Attributes:
        step: counts and reasons.
        removed, added: lines of the graph's text that went and that came.
    """

    step: Step
    removed: tuple[str, ...]
    added: tuple[str, ...]

    def to_text(self, lines: int = 20) -> str:
        """A few readable lines, at most `lines` of each kind."""
        ops = ", ".join(f"{n} {d:+d}" for n, d in self.step.difference().items())
        parts = [f"{self.step.label}: {self.step.changed} changed" + (f" ({ops})" if ops else "")]
        parts += [f"  - {line}" for line in self.removed[:lines]]
        parts += [f"  + {line}" for line in self.added[:lines]]
        hidden = max(0, len(self.removed) - lines) + max(0, len(self.added) - lines)
        parts += [f"  … {hidden} more lines"] if hidden else []
        parts += [f"  declined {d.where}: {d.reason}" for d in self.step.declined]
        return "\n".join(parts) + "\n"


@dataclass
class _Lines:
    """Keeps the graph's text before and after each pass."""

    pairs: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def before(self, index: int, step: Pass, model: ir.Model) -> None:
        """Keeps the text before."""
        self.pairs.append((_node_lines(model), []))

    def after(self, index: int, step: Pass, result: PassResult) -> None:
        """Keeps the text after."""
        self.pairs[-1] = (self.pairs[-1][0], _node_lines(result.model))


def _node_lines(model: ir.Model) -> list[str]:
    return [text.node_text(node) for node in model.graph]


def explain(
    model: ir.Model, passes: Iterable[Pass], context: Context | None = None
) -> list[Explanation]:
    """Runs `passes` over a copy of `model` and says what each changed and declined."""
    lines = _Lines()
    outcome = run(model.clone(), passes, context, Settings(instruments=(lines,)))
    return [_explanation(*pair) for pair in zip(outcome.steps, lines.pairs, strict=True)]


def _explanation(step: Step, pair: tuple[list[str], list[str]]) -> Explanation:
    before, after = pair
    old, new = set(before), set(after)
    return Explanation(
        step, tuple(x for x in before if x not in new), tuple(x for x in after if x not in old)
    )
