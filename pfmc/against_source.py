"""Level 3 of the ladder: an artifact against the truth of its untouched source, end to end.

Where there is an adapter, the source is a copy with it merged (`pfmc.with_adapter`).

The truth of an ONNX file is ONNX Runtime's (`pfmc.oracle`), that of a checkpoint transformers' own
forward (`pfmc.distill.reference`). Language models are judged by perplexity, KL divergence and
top-1 agreement, everything else by cosine and rank correlation, and each fixed linear by its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import ingest
from pfmc.against_experts import expert_rows
from pfmc.artifact import sha256_file
from pfmc.distill import calibrate, drive, measure
from pfmc.distill.drive import Drive
from pfmc.distill.feeds import batches_of_file, mask_of
from pfmc.distill.generate import Decoder
from pfmc.distill.reference import Reference
from pfmc.distill.student import Student
from pfmc.distill.text import self_generated, windows_of_file
from pfmc.errors import UsageError
from pfmc.ir import provenance, vocabulary
from pfmc.oracle import Oracle
from pfmc.simulate import Machine
from pfmc.verification import Row

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

CHECKPOINT = "config.json"
"""Stands for a checkpoint as source, whose truth is transformers' own forward."""
_BATCH = 8


def find_source(machine: Machine, given: Path | None) -> Path:
    """The ONNX file, or ``config.json``, that the artifact was compiled from, proved by digests.

    Raises:
        UsageError: it is not where it was, or is another file.
    """
    wanted: dict[str, str] = machine.manifest["config"]["inputs"]
    remembered = machine.path / "provenance" / "source.txt"
    path = given
    if path is None and remembered.is_file():
        path = machine.path / remembered.read_text(encoding="utf-8").strip()
    if path is not None and path.is_dir():
        path = path / CHECKPOINT
    if path is None or not path.is_file():
        raise UsageError(
            "the input file is not where it was", where=str(path or ""),
            mend=f"give it with --model ({', '.join(wanted)})",
        )  # fmt: skip
    proved = {path: tuple(wanted.values())}
    if path.name == CHECKPOINT:
        proved = {path.parent / name: (digest,) for name, digest in wanted.items()}
    for file, digests in proved.items():
        if not file.is_file() or sha256_file(file) not in digests:
            raise UsageError(
                "this is not the file the artifact was compiled from", where=str(file),
                mend="give the right one with --model",
            )  # fmt: skip
    return path


def judge_of(source: Path) -> str:
    """Who gives the truth about `source`."""
    return "transformers" if source.name == CHECKPOINT else "ONNX Runtime"


def truth_of(source: Path, observe: Sequence[str] = ()) -> Oracle | Reference:
    """What runs the untouched source: ONNX Runtime a file, transformers a checkpoint."""
    if source.name == CHECKPOINT:
        return Reference(source.parent, observe=observe)
    return Oracle(source, observe=observe)


@dataclass(frozen=True)
class Plan:
    """What is measured on, the thresholds, and who gives the truth, in words."""

    text: Path | None
    inputs: Path | None
    windows: int
    length: int
    seed: int
    thresholds: Mapping[str, float | None]
    judge: str = "the source"

    @staticmethod
    def of(
        machine: Machine, text: Path | None, inputs: Path | None, windows: int | None,
        length: int | None, seed: int,
    ) -> Plan:  # fmt: skip
        """What the user asked for, else what the artifact's recipe says."""
        held: dict[str, Any] = dict(machine.manifest["config"]["recipe"]["verify"])
        many, long = held.pop("windows"), held.pop("length")
        return Plan(text, inputs, windows or many, length or long, seed, held)


def end_to_end(
    machine: Machine, source: Path, plan: Plan, progress: Progress
) -> list[Row]:
    """Errors of every layer and of the whole model, measured as `plan` says."""
    loaded = ingest.load(source)
    model, lead = loaded.model, drive_of(loaded.model)
    progress("making inputs")
    batches = batches_of(machine, model, lead, plan)
    progress(f"layers against {plan.judge}")
    hidden = loaded.merged  # inside a branch, where nobody can look
    rows = [] if hidden else _layers(
        machine, model, lead, source, batches[0], plan.thresholds
    )
    progress(f"the whole model against {plan.judge}")
    if lead is not None:
        return rows + _language(machine, lead, source, batches, plan)
    return rows + _encoder(machine, source, batches, plan.thresholds)


def drive_of(model: ir.Model) -> Drive | None:
    """How the source is driven as a language model; None if it is none."""
    try:
        return drive.detect(model)
    except UsageError:
        return None


def batches_of(
    machine: Machine, model: ir.Model, lead: Drive | None, plan: Plan
) -> list[dict[str, Array]]:
    """What is measured on: the user's arrays or text, else text that the source model writes."""
    if plan.inputs is not None:
        return list(batches_of_file(model, plan.inputs, plan.windows))
    if lead is None:
        return calibrate.made_up(model, plan.windows, plan.length, plan.seed)
    decoder = Decoder(Student(model).eval(), machine.tokenizer)
    length = calibrate.fitting_length(decoder, plan.length)
    if lead.length and not lead.memories:  # fixed: no shorter windows, no longer ones
        length = lead.length
    size = lead.batch or _BATCH
    count = -(-plan.windows // size) * size if lead.batch else plan.windows
    if plan.text is not None:
        ids = _windows(machine, plan.text, length, count)
    else:
        ids = self_generated(decoder, count, length, plan.seed)
    whole = len(ids) - len(ids) % lead.batch if lead.batch else len(ids)
    if not whole:
        raise UsageError(
            f"the model takes {size} windows of {length} tokens at once; there are {len(ids)}",
            mend="give a longer text",
        )
    return [feeds_of(lead, ids[i : i + size]) for i in range(0, whole, size)]


def _windows(machine: Machine, text: Path, length: int, count: int) -> Array:
    if machine.tokenizer is None:
        raise UsageError(
            "measuring on text needs a tokenizer", where=str(machine.path),
            mend="compile with --tokenizer tokenizer.json",
        )  # fmt: skip
    return windows_of_file(text, machine.tokenizer, length, count)


def feeds_of(
    lead: Drive, ids: Array, held: Mapping[str, Array] | None = None, start: int = 0
) -> dict[str, Array]:
    """Every graph input of a language model for tokens ``ids[B, S]``.

    Args:
        lead: how it is driven; ids: the tokens.
        held: its memory after the `start` tokens before them; empty by default.
        start: position of the first token.
    """
    batch, length = ids.shape
    feeds: dict[str, Array] = {lead.ids: ids}
    if lead.mask:
        kind = np.float32 if lead.mask_float else np.int64
        feeds[lead.mask] = np.ones((batch, start + length), kind)
    if lead.positions:
        feeds[lead.positions] = np.tile(np.arange(start, start + length), (batch, 1))
    if lead.types:
        feeds[lead.types] = np.zeros((batch, length), np.int64)
    for memory in lead.memories:
        empty = np.zeros((batch, memory.heads, 0, memory.width), np.float32)
        feeds[memory.past] = (held or {}).get(memory.past, empty)
    return feeds


def _layers(
    machine: Machine, model: ir.Model, lead: Drive | None, source: Path,
    feeds: Mapping[str, Array], thresholds: Mapping[str, float | None],
) -> list[Row]:  # fmt: skip
    """Relative RMS error of each fixed linear's output, inside the simulated model."""
    values = {
        str(n.name): (n.metadata_props[vocabulary.KEY_VALUE], n.metadata_props.get("pfmc.perm"))
        for n in vocabulary.fixed_linears(machine.student.model)
        if vocabulary.KEY_VALUE in n.metadata_props
    }
    if lead is not None and lead.memories and lead.length:
        feeds = feeds_of(lead, feeds[lead.ids][:, : lead.length])
    outputs = {str(v.name) for v in model.graph.outputs}
    observe = sorted({v for v, _ in values.values()} - outputs)
    with truth_of(source, observe=observe) as oracle:
        truth = oracle.run(feeds)
    seen = _outputs(machine, machine_feeds(machine, lead, feeds))
    real = _real_positions(feeds)
    errors = {n: _relative(seen[n], truth[v], perm, real) for n, (v, perm) in values.items()}
    rows = [Row(f"layer {n}", e, unit="relative RMS error") for n, e in errors.items()]
    if errors:
        worst = max(errors, key=lambda n: errors[n])
        limit = thresholds.get("layer_error")
        rows.append(Row(f"worst layer ({worst})", errors[worst], limit, unit="relative RMS error"))
        middle = float(np.median(list(errors.values())))
        rows.append(Row("median layer", middle, unit="relative RMS error"))
    return rows + expert_rows(
        machine, source, lambda graph: _feeds_for(graph, lead, feeds), truth,
        thresholds.get("layer_error"),
    )  # fmt: skip


def _outputs(machine: Machine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The output of every fixed linear, together with its side path's if there is one."""
    beside = {
        provenance.scope(n): str(n.outputs[0].name) for n in machine.student.model.graph
        if n.domain == vocabulary.DOMAIN and n.op_type in (vocabulary.TRIM, vocabulary.SIDE_PATH)
    }  # fmt: skip
    machine = machine.with_outputs(list(beside.values())) if beside else machine
    seen: dict[str, Array] = {}
    student = machine.student
    student.observe = lambda name, _, y: seen.__setitem__(name, y.detach().numpy())
    try:
        results = machine.run(feeds)
    finally:
        student.observe = None
    return seen | {layer: results[name] for layer, name in beside.items()}


def _real_positions(feeds: Mapping[str, Array]) -> Array | None:
    """Which positions are no padding, bool ``[B * S]``; None if all are or there is no mask.

    Nobody reads a position that is wholly hidden, and what stands there is not defined.
    """
    mask = mask_of(feeds)
    return None if mask is None or mask.all() else np.asarray(mask != 0).reshape(-1)


def _relative(ours: Array, truth: Array, perm: str | None, real: Array | None) -> float:
    if perm:
        ours = ours.transpose([int(p) for p in perm.split()])
    ours, truth = ours.reshape(truth.shape).astype(np.float64), truth.astype(np.float64)
    if real is not None and truth.size == real.size * truth.shape[-1]:
        ours, truth = (x.reshape(real.size, -1)[real] for x in (ours, truth))
    power = float(np.sqrt(np.mean(truth**2)))
    return float(np.sqrt(np.mean((ours - truth) ** 2))) / (power or 1.0)


def machine_feeds(
    machine: Machine, lead: Drive | None, feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """`feeds` of the source file as the lowered graph takes them; its KV memory starts empty."""
    return _feeds_for(machine.student.model, lead, feeds)


def _feeds_for(
    model: ir.Model, lead: Drive | None, feeds: Mapping[str, Array]
) -> dict[str, Array]:
    if lead is not None and (own := drive_of(model)) is not None:
        return feeds_of(own, feeds[lead.ids])
    wanted = {str(v.name) for v in model.graph.inputs}
    return {k: v for k, v in feeds.items() if k in wanted}


def token_scores(oracle: Oracle | Reference, lead: Drive, feeds: Mapping[str, Array]) -> Array:
    """Token scores ``[B, S, V]`` of the source; one with a memory may take few positions a call."""
    if not (lead.memories and lead.length):
        return oracle.run(feeds)[lead.logits]
    ids, parts = feeds[lead.ids], []
    held = {m.past: feeds[m.past] for m in lead.memories}
    for start in range(0, ids.shape[1], lead.length):
        results = oracle.run(feeds_of(lead, ids[:, start : start + lead.length], held, start))
        held = {m.past: results[m.present] for m in lead.memories}
        parts.append(results[lead.logits])
    return np.concatenate(parts, axis=1)


def _language(
    machine: Machine, lead: Drive, source: Path, batches: Sequence[Mapping[str, Array]],
    plan: Plan,
) -> list[Row]:  # fmt: skip
    """Perplexity ratio, KL and top-1 agreement over the windows."""
    thresholds = plan.thresholds
    decoder, comparison = machine.decoder(), measure.Comparison()
    with truth_of(source) as oracle:
        for feeds in batches:
            ids = feeds[lead.ids]
            comparison.add(token_scores(oracle, lead, feeds), decoder.logits(ids), ids)
    found = comparison.result()
    teacher_losses, student_losses = (
        np.concatenate(losses).mean(axis=1)
        for losses in (comparison.teacher_losses, comparison.student_losses)
    )
    excess = measure.mean_estimate(student_losses - teacher_losses)
    assert found.perplexity_teacher is not None
    return [
        Row(f"perplexity of {plan.judge}", found.perplexity_teacher.value, unit="a token"),
        _estimate("perplexity ratio", excess, thresholds.get("perplexity_ratio"), math.exp),
        _estimate("excess", excess, None, unit="nats a token"),
        _estimate("KL divergence", found.kl_mean, thresholds.get("kl"), unit="nats a token"),
        _estimate("KL divergence, 99th percentile", found.kl_p99, None, unit="nats"),
        _estimate("top-1 agreement", found.top1, thresholds.get("top1"), relation=">="),
    ]


def _estimate(
    name: str, found: measure.Estimate, limit: float | None,
    through: Callable[[float], float] = float, *, relation: str = "<=", unit: str = "",
) -> Row:  # fmt: skip
    ends = (found.low, found.high)
    low, high = (through(min(v, 700.0)) if math.isfinite(v) else None for v in ends)
    return Row(name, through(found.value), limit, relation, unit, low, high)


def _encoder(
    machine: Machine, source: Path, batches: Sequence[Mapping[str, Array]],
    thresholds: Mapping[str, float | None],
) -> list[Row]:  # fmt: skip
    """Cosine of every floating-point output's vectors, and rank correlation of similarities."""
    pairs: dict[str, _Pair] = {}
    with truth_of(source) as oracle:
        for feeds in batches:
            truth, ours = oracle.run(feeds), machine.run(machine_feeds(machine, None, feeds))
            for name in _shared(truth, ours):
                pairs.setdefault(name, _Pair()).add(truth[name], ours[name], feeds)
    rows: list[Row] = []
    for name, pair in pairs.items():
        cosine = np.concatenate(pair.cosines)
        rows += [
            Row(f"{name}: mean cosine", float(cosine.mean()), thresholds.get("cosine"), ">="),
            Row(f"{name}: 1st percentile of cosine", float(np.percentile(cosine, 1))),
        ]
        if len(pair.truth) >= 4:
            rank = rank_correlation(np.stack(pair.truth), np.stack(pair.ours))
            rows.append(Row(f"{name}: rank correlation", rank, thresholds.get("rank"), ">="))
    return rows


@dataclass
class _Pair:
    """One output of both: cosines by position, and pooled vectors by input."""

    cosines: list[Array] = field(default_factory=list)
    truth: list[Array] = field(default_factory=list)
    ours: list[Array] = field(default_factory=list)

    def add(self, truth: Array, ours: Array, feeds: Mapping[str, Array]) -> None:
        """Adds outputs ``[B, …, D]`` of both; masked positions are left out."""
        mask = mask_of(feeds)
        for i in range(len(truth)):
            a, b = truth[i].reshape(-1, truth.shape[-1]), ours[i].reshape(-1, ours.shape[-1])
            if mask is not None and len(a) == mask.shape[1]:
                a, b = a[mask[i] != 0], b[mask[i] != 0]
            self.cosines.append(cosine(a, b))
            self.truth.append(a.mean(axis=0))
            self.ours.append(b.mean(axis=0))


def _shared(truth: Mapping[str, Array], ours: Mapping[str, Array]) -> Iterator[str]:
    for name, value in truth.items():
        real = value.dtype.kind == "f" and value.size > 0
        if name in ours and real and value.ndim >= 2 and value.shape[-1] > 1:
            yield name


def cosine(a: Array, b: Array) -> Array:
    """Cosine of each row of ``a[N, D]`` with the same row of `b`, float64 ``[N]``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, 1e-300))


def rank_correlation(truth: Array, ours: Array) -> float:
    """Spearman's rho between the pairwise cosine similarities of the rows of both ``[N, D]``."""
    from scipy.stats import spearmanr

    upper = np.triu_indices(len(truth), 1)

    def similarities(x: Array) -> Array:
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
        return np.asarray((unit @ unit.T)[upper])

    return float(spearmanr(similarities(truth), similarities(ours)).statistic)
