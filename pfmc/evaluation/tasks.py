"""The tasks: text for language models, sentence pairs for embedders, labelled images, plain arrays.

A task is prepared once against the untouched source and then measured on each die: `measure` gives
arrays over documents, `figures` turns those of all dies into numbers with intervals.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pfmc.against_source import cosine, machine_feeds, token_scores
from pfmc.distill.drive import Drive
from pfmc.distill.feeds import mask_of
from pfmc.distill.measure import Comparison, log_softmax
from pfmc.distill.text import Tokenizer
from pfmc.errors import InputError, UsageError
from pfmc.evaluation.figures import Figure, difference_figure, mean_figure, rank_figure
from pfmc.simulate import Machine

Array = npt.NDArray[Any]
Measured = dict[str, Array]
"""Metric -> float64 ``[documents]``."""


class Source(Protocol):
    """The untouched source as it runs: ONNX Runtime's session or transformers' forward."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name."""
        ...


class Task(Protocol):
    """Something a part can be good or bad at.

    Attributes:
        name: for the report; identity: everything that decides the documents, for resuming.
    """

    name: str
    identity: str

    def prepare(self, source: Source) -> None:
        """Runs the untouched source once on every document."""
        ...

    def measure(self, machine: Machine) -> Measured:
        """What one die does on every document."""
        ...

    def figures(self, per_die: Sequence[Measured]) -> list[Figure]:
        """The numbers over dies and documents."""
        ...


# -- text ------------------------------------------------------------------------------------------


class Language:
    """Perplexity, KL divergence and top-1 agreement on windows of text.

    Args:
        lead: how the source is driven; batches: its graph inputs; identity: of the text.
    """

    name = "text"

    def __init__(self, lead: Drive, batches: Sequence[Mapping[str, Array]], identity: str) -> None:
        self.lead, self.batches, self.identity = lead, batches, identity
        self.scores: list[Array] = []

    def prepare(self, source: Any) -> None:
        """Keeps the source's token scores."""
        self.scores = [token_scores(source, self.lead, feeds) for feeds in self.batches]

    def measure(self, machine: Machine) -> Measured:
        """Means over each window: losses in nats a token, KL, agreement."""
        decoder, seen = machine.decoder(), Comparison()
        for feeds, scores in zip(self.batches, self.scores, strict=True):
            ids = feeds[self.lead.ids]
            seen.add(scores, decoder.logits(ids), ids)
        names = ("kl", "top1", "teacher", "student")
        gathered = (seen.divergences, seen.agreements, seen.teacher_losses, seen.student_losses)
        return {
            name: np.concatenate(parts).mean(axis=1).astype(np.float64)
            for name, parts in zip(names, gathered, strict=True)
        }

    def figures(self, per_die: Sequence[Measured]) -> list[Figure]:
        """Ratio, excess, KL, agreement and both perplexities."""
        excess = [d["student"] - d["teacher"] for d in per_die]
        return [
            mean_figure("perplexity ratio", excess, better="lower", through=_exp),
            mean_figure("excess", excess, "nats a token", "lower"),
            mean_figure("KL divergence", [d["kl"] for d in per_die], "nats a token", "lower"),
            mean_figure("top-1 agreement", [d["top1"] for d in per_die], "", "higher", _share),
            mean_figure("perplexity", [d["student"] for d in per_die], "a token", "lower", _exp),
            mean_figure(
                "perplexity of the source", [d["teacher"] for d in per_die[:1]], "a token",
                through=_exp,
            ),
        ]  # fmt: skip


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _share(value: float) -> float:
    """A share or a cosine: the end of an interval lies inside, too."""
    return max(-1.0, min(1.0, value))


# -- sentence pairs --------------------------------------------------------------------------------

BATCH = 16


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs: ``sentences[2 i]``, ``sentences[2 i + 1]`` have similarity ``scores[i]``."""

    sentences: tuple[str, ...]
    scores: Array


def read_pairs(path: Path, count: int | None = None) -> Pairs:
    """Pairs from a tab-separated file: STS-B's own columns, or ``score, sentence, sentence``.

    Args:
        path: the file; count: at most so many, spread evenly; None for all.

    Raises:
        InputError: no text, or a line that is neither, named by its number.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            rows = [_pair(row, path, number) for number, row in enumerate(table, 1)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"this is no UTF-8 table: {error}", where=str(path)) from error
    if not rows:
        raise InputError("there are no pairs in this file", where=str(path))
    if count is not None and count < len(rows):
        rows = [rows[i * len(rows) // count] for i in range(count)]
    return Pairs(tuple(s for r in rows for s in r[1:]), np.array([r[0] for r in rows]))


def _pair(row: list[str], path: Path, number: int) -> tuple[float, str, str]:
    chosen = (row[4], row[5], row[6]) if len(row) >= 7 else tuple(row)
    try:
        score, one, other = chosen
        if not math.isfinite(float(score)):
            raise ValueError(score)
        return float(score), one, other
    except ValueError as error:
        raise InputError(
            "a line is no pair of sentences", where=f"{path}, line {number}",
            mend="write score, sentence, sentence with tabs between, or STS-B's seven columns",
        ) from error  # fmt: skip


class Embedding:
    """Cosine to the source's embedding, and Spearman's rho of the pairs' cosines with people's.

    Embeddings are the mean of the token vectors that the mask leaves, or the output itself if it
    has one vector a sentence; then normalised.

    Args:
        pairs: the sentences; tokenizer: of the model; longest: tokens of a sentence at most.
        inputs: names of the source's graph inputs; output: which output is the embedding.
    """

    name = "sentence pairs"

    def __init__(
        self, pairs: Pairs, tokenizer: Tokenizer, longest: int, inputs: Sequence[str],
        output: str, identity: str,
    ) -> None:  # fmt: skip
        self.pairs, self.output, self.identity = pairs, output, identity
        lines = tokenizer.encode_lines(pairs.sentences, longest)
        if not all(lines):
            number = next(i for i, line in enumerate(lines) if not line) // 2 + 1
            raise InputError("a sentence has no tokens", where=f"pair {number}")
        order = np.argsort([len(line) for line in lines], kind="stable")
        self.back = np.argsort(order)
        self.batches = [
            padded([lines[i] for i in order[start : start + BATCH]], inputs)
            for start in range(0, len(order), BATCH)
        ]
        self.truth = np.zeros(0)

    def prepare(self, source: Source) -> None:
        """Keeps the source's embeddings."""
        self.truth = self._embed(source.run)

    def of_source(self) -> Measured:
        """What the source itself would get."""
        return self._judged(self.truth)

    def measure(self, machine: Machine) -> Measured:
        """Cosine of each sentence's embedding to the source's; similarity of each pair."""
        ours = self._embed(lambda feeds: machine.run(machine_feeds(machine, None, feeds)))
        return self._judged(ours)

    def _judged(self, ours: Array) -> Measured:
        return {"cosine": cosine(ours, self.truth), "similarity": _similar(ours)}

    def _embed(self, run: Any) -> Array:
        parts = [pooled(run(feeds)[self.output], mask_of(feeds)) for feeds in self.batches]
        return np.asarray(np.concatenate(parts)[self.back])

    def figures(self, per_die: Sequence[Measured]) -> list[Figure]:
        """Cosine, its first percentile, rho and rho less the source's."""
        cosines = [d["cosine"] for d in per_die]
        similar, scores = [d["similarity"] for d in per_die], self.pairs.scores
        low = tuple(float(np.percentile(c, 1)) for c in cosines)
        return [
            mean_figure("cosine to the source's embedding", cosines, "", "higher", _share),
            Figure("1st percentile of cosine", float(np.mean(low)), dies=low, better="higher"),
            rank_figure("Spearman's rho", similar, scores),
            rank_figure("Spearman's rho of the source", [_similar(self.truth)], scores),
            difference_figure("Spearman's rho less the source's", similar, _similar(self.truth),
                              scores),
        ]  # fmt: skip


def _similar(embedded: Array) -> Array:
    return cosine(embedded[0::2], embedded[1::2])


def padded(lines: Sequence[Sequence[int]], inputs: Sequence[str]) -> dict[str, Array]:
    """Token lists as graph inputs, int64 ``[lines, longest]``: ids, mask, types and positions.

    Inputs are known by their names; ``token_type_ids`` and ``position_ids`` are no token ids.

    Raises:
        UsageError: an input is none of those.
    """
    ids = np.zeros((len(lines), max(map(len, lines))), np.int64)
    mask = np.zeros_like(ids)
    for row, line in enumerate(lines):
        ids[row, : len(line)] = line
        mask[row, : len(line)] = 1
    types, positions = np.zeros_like(ids), np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    known = {"mask": mask, "type": types, "segment": types, "position": positions, "ids": ids}
    feeds = {n: next((v for k, v in known.items() if k in n), None) for n in inputs}
    missing = [n for n, v in feeds.items() if v is None]
    if missing:
        raise UsageError(f"sentences do not tell what the input {missing[0]!r} is")
    return {n: v for n, v in feeds.items() if v is not None}


def pooled(vectors: Array, mask: Array | None) -> Array:
    """Unit vectors ``[B, D]`` of an output ``[B, S, D]`` (mean over unmasked) or ``[B, D]``."""
    vectors = vectors.astype(np.float64)
    if vectors.ndim == 3:
        weights = np.ones(vectors.shape[:2]) if mask is None else mask.astype(np.float64)
        vectors = (vectors * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-300))


# -- labelled arrays -------------------------------------------------------------------------------


class Labelled:
    """Accuracy on labelled inputs, images say; without labels, agreement with the source alone.

    Of an output ``[N, S, D]`` every position is judged by itself, those that the mask hides are
    left out, and a sample's number is the mean over the others.

    Args:
        batches: graph inputs; labels: classes ``[N]`` or None; output: the class scores.
    """

    name = "images"

    def __init__(
        self, batches: Sequence[Mapping[str, Array]], labels: Array | None, output: str,
        identity: str,
    ) -> None:  # fmt: skip
        self.batches, self.output, self.identity = batches, output, identity
        self.labels = labels
        self.scores = np.zeros(0)
        masks = [m for feeds in batches if (m := mask_of(feeds)) is not None]
        self.mask = np.concatenate(masks) if masks else None

    def prepare(self, source: Source) -> None:
        """Keeps the source's class scores."""
        self.scores = np.concatenate([source.run(f)[self.output] for f in self.batches])
        if self.labels is not None and self.scores.ndim != 2:
            raise UsageError(
                f"labels need one row of class scores a sample, not {list(self.scores.shape)}",
                where=self.output, mend="choose the output of class scores with --output",
            )  # fmt: skip
        if self.labels is not None and self.labels.max() >= self.scores.shape[-1]:
            raise UsageError(
                f"a label is {self.labels.max()}, but the model knows "
                f"{self.scores.shape[-1]} classes"
            )

    def measure(self, machine: Machine) -> Measured:
        """Right or wrong, same choice as the source or not, KL divergence, cosine."""
        runs = (machine.run(machine_feeds(machine, None, f)) for f in self.batches)
        ours = np.concatenate([r[self.output] for r in runs])
        truth, ours = _positions(self.scores), _positions(ours)
        p, q = log_softmax(truth), log_softmax(ours)
        same = cosine(*(s.reshape(-1, s.shape[-1]) for s in (ours, truth)))
        found = {
            "agree": self._mean(p.argmax(-1) == q.argmax(-1)),
            "kl": self._mean((np.exp(p) * (p - q)).sum(-1)),
            "cosine": self._mean(same.reshape(truth.shape[:-1])),
        }
        if self.labels is not None:
            found["right"] = (q[:, 0].argmax(-1) == self.labels).astype(np.float64)
            found["source_right"] = (p[:, 0].argmax(-1) == self.labels).astype(np.float64)
        return found

    def _mean(self, values: Array) -> Array:
        """The mean ``[N]`` over the positions ``[N, S]`` of each sample that count."""
        if self.mask is None or self.mask.shape != values.shape:
            return np.asarray(values.mean(axis=1), np.float64)
        counts = self.mask.astype(np.float64)
        return np.asarray((values * counts).sum(axis=1) / np.maximum(counts.sum(axis=1), 1.0))

    def figures(self, per_die: Sequence[Measured]) -> list[Figure]:
        """Accuracy of both, agreement, KL and cosine."""
        wanted = [
            ("accuracy", "right", "", "higher"),
            ("accuracy of the source", "source_right", "", ""),
            ("top-1 agreement", "agree", "", "higher"),
            ("KL divergence", "kl", "nats", "lower"),
            ("cosine of the outputs", "cosine", "", "higher"),
        ]
        return [
            mean_figure(
                name, [d[key] for d in per_die], unit, better, float if unit else _share
            )
            for name, key, unit, better in wanted if key in per_die[0]
        ]  # fmt: skip


def _positions(scores: Array) -> Array:
    """``[N, S, D]`` as it is, anything else as one position ``[N, 1, D]``."""
    return scores if scores.ndim == 3 else scores.reshape(len(scores), 1, -1)
