"""Calibration: runs the float model on data and keeps what the quantiser needs of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pfmc.distill.drive import detect
from pfmc.distill.feeds import (
    BATCH,
    Array,
    Feeds,
    batches,
    batches_of_file,
    is_ids,
    mask_of,
    text_feeds,
)
from pfmc.distill.generate import Decoder
from pfmc.distill.shapes import longest
from pfmc.distill.student import Student
from pfmc.distill.text import Tokenizer, load_tokenizer, self_generated, windows_of_file
from pfmc.errors import InputError, UsageError
from pfmc.hardware import LayerStatistics

Progress = Callable[[str], None]

PROBABILITIES = (
    *(i / 20 for i in range(1, 19)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998,
    0.9999, 0.99995, 0.99998, 0.99999, 0.999999, 1.0,
)  # fmt: skip
"""Quantiles of |x| that are kept."""

_SHIFT = 18  # the top 13 bits of a float32 magnitude: 32 bins an octave, equal within an octave
_BINS = 0x7F800000 >> _SHIFT  # up to infinity
_SHORTEST = 2

MOMENT_WIDEST = 4096
"""Inputs wider than this get no second moments (the matrix would be over 128 MiB)."""
MOMENT_BYTES = 2 << 30
"""Memory that all second moments may take together; inputs met after that get none."""
_ASIDE = 1_000_003  # added to the seed of data that must differ from calibration's


class Plan(Protocol):
    """The part of a recipe that calibration reads (`pfmc.passes.recipe.Calibration`)."""

    @property
    def source(self) -> str:
        """``self`` or ``none``."""
        ...

    @property
    def sequences(self) -> int:
        """Sequences or images."""
        ...

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        ...


def _silent(_: str) -> None:
    """No progress shown."""


# -- gathering -----------------------------------------------------------------------------------


@dataclass
class InputSums:
    """What was seen of one input tensor: sums that add up over batches."""

    histogram: npt.NDArray[np.int64]
    power: npt.NDArray[np.float64]
    peak: float
    rows: int

    @classmethod
    def of(cls, x: Array) -> InputSums:
        """Of ``x[rows, in]`` float32."""
        magnitude = np.abs(x)
        bins = (magnitude.view(np.int32) >> _SHIFT).reshape(-1)
        return cls(
            np.bincount(bins, minlength=_BINS).astype(np.int64),
            np.square(x, dtype=np.float64).sum(axis=0),
            float(magnitude.max(initial=0.0)),
            len(x),
        )

    def plus(self, other: InputSums) -> InputSums:
        """Both together."""
        return InputSums(
            self.histogram + other.histogram, self.power + other.power,
            max(self.peak, other.peak), self.rows + other.rows,
        )  # fmt: skip

    def quantiles(self) -> dict[float, float]:
        """Probability -> |x|: exact to a bin (1/32 octave), interpolated inside it."""
        edges = np.arange(_BINS + 1, dtype=np.int32) << _SHIFT
        values = edges.view(np.float32).astype(np.float64)
        below = np.concatenate([[0], np.cumsum(self.histogram)])
        found = {}
        for chance in PROBABILITIES:
            rank = chance * below[-1]
            index = min(int(np.searchsorted(below, rank, side="left")) - 1, _BINS - 1)
            index = max(index, 0)
            inside = (rank - below[index]) / max(1, self.histogram[index])
            low, high = values[index], min(values[index + 1], self.peak)
            found[chance] = float(min(low + inside * max(high - low, 0.0), self.peak))
        return found


@dataclass
class LayerSums:
    """What was seen of one fixed linear."""

    inputs: InputSums
    output_peak: npt.NDArray[np.float32]
    output_square: npt.NDArray[np.float64]

    def statistics(self, moment: npt.NDArray[np.float64] | None) -> LayerStatistics:
        """The sums as statistics; `moment` is the sum of x xᵀ."""
        rows = max(1, self.inputs.rows)
        return LayerStatistics(
            input_peak=self.inputs.peak,
            input_quantiles=self.inputs.quantiles(),
            input_power=self.inputs.power / rows,
            output_peak=self.output_peak,
            output_rms=np.sqrt(self.output_square / rows).astype(np.float32),
            samples=self.inputs.rows,
            input_moment=moment,
        )


@dataclass
class Gatherer:
    """Listens to a student (``student.observe = gatherer``) and adds up what it hears.

    Attributes:
        student: what it listens to.
        moments: whether it also adds up x xᵀ of each input (``8 in²`` bytes; see `MOMENT_BYTES`).
        layers: the sums so far.
        real: which positions ``[B, S]`` are no padding; None counts all.
    """

    student: Student
    moments: bool = False
    real: Tensor | None = None
    layers: dict[str, LayerSums] = field(default_factory=dict)
    _last: tuple[Tensor, InputSums, str] | None = None
    _owners: dict[str, str] = field(default_factory=dict)
    _products: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor, y: Tensor) -> None:
        """Adds one call of layer `name`: x ``[..., in]``, y ``[..., out]`` with bias."""
        inputs = self._inputs(x, name)
        bias = getattr(self.student.linears[name], "bias", None)
        product = y if bias is None else y - bias
        rows = self._rows(product)
        peak = np.abs(rows).max(axis=0, initial=0.0).astype(np.float32)
        square = np.square(rows, dtype=np.float64).sum(axis=0)
        known = self.layers.get(name)
        if known is not None:
            inputs = known.inputs.plus(inputs)
            peak, square = np.maximum(known.output_peak, peak), known.output_square + square
        self.layers[name] = LayerSums(inputs, peak, square)
        assert self._last is not None
        self._owners[name] = self._last[2]

    def _inputs(self, x: Tensor, name: str) -> InputSums:
        """Of `x`; linears that share their input share the work."""
        if self._last is None or self._last[0] is not x:
            rows = self._rows(x)
            if not np.isfinite(rows).all():
                raise InputError(
                    "calibration met NaN or infinity", where=f"input of {name}",
                    mend="the float model overflows on this data; give other data",
                )  # fmt: skip
            self._last = (x, InputSums.of(rows), name)
            if self.moments:
                self._multiply(name, rows)
        return self._last[1]

    def _rows(self, x: Tensor) -> Array:
        """The positions of ``x[..., D]`` that count, float32 ``[rows, D]``."""
        x = real_part(x, self.real)
        rows = x.detach().reshape(-1, x.shape[-1]).float().cpu().contiguous().numpy()
        return np.asarray(rows)

    def _multiply(self, name: str, rows: Array) -> None:
        """Adds ``rows.T @ rows`` to the product of the input that layer `name` reads first."""
        width = rows.shape[1]
        held = self._products.get(name)
        if held is None:
            taken = sum(p.nbytes for p in self._products.values())
            if width > MOMENT_WIDEST or taken + 8 * width**2 > MOMENT_BYTES:
                return
            held = self._products[name] = np.zeros((width, width))
        wide = rows.astype(np.float64)
        held += wide.T @ wide

    def statistics(self) -> dict[str, LayerStatistics]:
        """The statistics of every layer heard, in graph order."""
        order = [n for n in self.student.linears if n in self.layers]
        means = {
            owner: product / max(1, self.layers[owner].inputs.rows)
            for owner, product in self._products.items()
        }
        return {name: self.layers[name].statistics(means.get(self._owners[name])) for name in order}


def calibrate(
    model: ir.Model, batches: Iterable[Mapping[str, Array]], progress: Progress = _silent,
    moments: bool = False,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Runs a CANONICAL float model on `batches` and gathers the statistics of each fixed linear.

    Args:
        model: at stage CANONICAL.
        batches: graph inputs by name, one mapping a run.
        progress: takes a line a batch.
        moments: whether second moments of the inputs are taken too.

    Raises:
        UsageError: a batch lacks an input or names an unknown one.
    """
    student = Student(model).eval()
    gatherer = Gatherer(student, moments)
    student.observe = gatherer
    for number, feeds in enumerate(batches, 1):
        progress(f"calibrate: batch {number}")
        gatherer.real = real_rows(feeds)
        with torch.inference_mode():
            student(**feeds)
    return gatherer.statistics()


def real_rows(feeds: Mapping[str, Array]) -> Tensor | None:
    """Where a batch's mask ``[B, S]`` says that there are tokens."""
    mask = mask_of(feeds)
    return None if mask is None else torch.from_numpy(mask != 0)


def real_part(x: Tensor, real: Tensor | None) -> Tensor:
    """The positions of ``x[..., D]`` where `real` ``[B, S]`` holds; all where it is None.

    Graphs may lay positions one behind the other, ``[B * S, D]``; of other shapes all are taken.
    """
    if real is not None and x.shape[:-1] == real.shape:
        return x[real]
    if real is not None and x.dim() == 2 and len(x) == real.numel():
        return x[real.reshape(-1)]
    return x


# -- choosing the data ---------------------------------------------------------------------------


def statistics_of(
    model: ir.Model,
    plan: Plan,
    *,
    tokenizer: Path | None = None,
    text: Path | None = None,
    inputs: Path | None = None,
    seed: int = 0,
    progress: Progress = _silent,
    moments: bool = False,
) -> dict[str, LayerStatistics]:
    """Calibrates on the user's data, else on data made from `seed`; empty if the plan says none.

    Without data, a causal language model writes its own text; other text models get random tokens,
    a quarter of the sequences padded; everything else gets normal noise.

    Args:
        model: at stage CANONICAL.
        plan: how much.
        tokenizer: ``tokenizer.json``, needed for `text`, and for the token that opens own text.
        text: a text file.
        inputs: an ``.npz`` file of graph inputs by name, samples along the first axis.
        seed: of made-up data.
        progress: takes a line at a time; says where the data came from.
        moments: whether second moments of the inputs are taken too.

    Raises:
        UsageError: `text` without a tokenizer, or inputs that are not the model's.
    """
    if plan.source == "none":
        return {}
    if inputs is not None:
        progress(f"calibrate: on {inputs.name}")
        return calibrate(model, batches_of_file(model, inputs, plan.sequences), progress, moments)
    student = Student(model).eval()
    decoder = _decoder(student, tokenizer)
    if decoder is None:
        return _without_text(model, plan, tokenizer, text, seed, progress, moments)
    length = fitting_length(decoder, plan.length)
    if text is not None:
        ids = _windows(text, tokenizer, length, plan.sequences)
        progress(f"calibrate: on {len(ids)} windows of {text.name}")
    elif is_causal(decoder):
        progress(f"calibrate: on {plan.sequences} sequences that the model writes itself")
        ids = self_generated(decoder, plan.sequences, length, seed)
    else:
        return _without_text(model, plan, tokenizer, text, seed, progress, moments)
    student.observe = gatherer = Gatherer(student, moments)
    if decoder.drive.memories:
        for start in range(0, len(ids), BATCH):
            decoder.logits(ids[start : start + BATCH])
        return gatherer.statistics()
    for feeds in text_feeds(decoder.drive, ids):
        held = feeds[decoder.drive.ids].shape
        gatherer.real = torch.arange(held[1]).expand(held) < ids.shape[1]  # the rest is padding
        with torch.inference_mode():
            student(**feeds)
    return gatherer.statistics()


def feeds_of(
    model: ir.Model,
    plan: Plan,
    *,
    tokenizer: Path | None = None,
    text: Path | None = None,
    inputs: Path | None = None,
    seed: int = 0,
    progress: Progress = _silent,
) -> list[Feeds]:
    """The data that `statistics_of` would calibrate on, as graph inputs; see there.

    With `inputs`, or with `text` of a language model, the model is not run, so no weight is read.

    Raises:
        UsageError: as there, and of a graph that takes one token a call: a sequence is many calls.
    """
    if inputs is not None:
        progress(f"calibrate: on {inputs.name}")
        return list(batches_of_file(model, inputs, plan.sequences))
    try:
        lead = detect(model)
    except UsageError:  # an encoder or a vision model: driven by its inputs' types instead
        lead = None
    if lead is not None and lead.memories and lead.length == 1:
        raise UsageError(
            "the graph takes one token a call, and this rounding needs whole sequences at once",
            mend="export it with a free length, or ask for search=compensate, prefix=float, no "
            "scaling and no budget",
        )  # fmt: skip
    if text is not None:
        length = plan.length if lead is None or lead.length is None else lead.length
        length = longest(model, min(plan.length, length))
        ids = _windows(text, tokenizer, length, plan.sequences)
        progress(f"calibrate: on {len(ids)} windows of {text.name}")
        if lead is not None:
            return list(text_feeds(lead, ids))
        return list(batches(model, plan.sequences, ids.shape[1], seed, ids))
    decoder = None if lead is None else _decoder(Student(model).eval(), tokenizer)
    if lead is not None and decoder is not None and is_causal(decoder):
        progress(f"calibrate: on {plan.sequences} sequences that the model writes itself")
        length = fitting_length(decoder, plan.length)
        return list(text_feeds(lead, self_generated(decoder, plan.sequences, length, seed)))
    progress("calibrate: on " + _kind(model))
    return made_up(model, plan.sequences, plan.length, seed)


def _windows(text: Path, tokenizer: Path | None, length: int, count: int) -> Array:
    if tokenizer is None:
        raise _no_tokenizer(text)
    return windows_of_file(text, load_tokenizer(tokenizer), length, count)


def _decoder(student: Student, tokenizer: Path | None) -> Decoder | None:
    """The student as a language model; None if it has no token scores, or inputs unknown there."""
    try:
        detect(student.model)
    except UsageError:  # an encoder or a vision model: driven by its inputs' types instead
        return None
    return Decoder(student, load_tokenizer(tokenizer) if tokenizer is not None else None)


def fitting_length(decoder: Decoder, length: int) -> int:
    """`length`, halved until the model's position tables and fixed shapes hold it."""
    length = min(length, decoder.drive.length or length) if not decoder.drive.memories else length
    while True:
        try:
            decoder.logits(np.zeros((1, length), np.int64))
        except UsageError:
            if length // 2 < _SHORTEST:
                raise
            length //= 2
        else:
            return length


def is_causal(decoder: Decoder) -> bool:
    """Whether the scores at the first positions stay the same when the last token changes."""
    length = fitting_length(decoder, 6)
    ids = np.arange(length)[None] % decoder.vocabulary
    other = ids.copy()
    other[0, -1] = (ids[0, -1] + 1) % decoder.vocabulary
    first, second = decoder.logits(ids)[:, :-1], decoder.logits(other)[:, :-1]
    return bool(np.allclose(first, second, rtol=1e-3, atol=1e-4))


def _without_text(
    model: ir.Model, plan: Plan, tokenizer: Path | None, text: Path | None, seed: int,
    progress: Progress, moments: bool,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Of a model that writes no text: from the text given, random tokens or noise."""
    length = plan.length
    while True:
        ids = None if text is None else _windows(text, tokenizer, length, plan.sequences)
        progress("calibrate: on " + (f"{len(ids)} windows" if ids is not None else _kind(model)))
        try:
            made = batches(model, plan.sequences, length, seed, ids)
            return calibrate(model, made, progress, moments)
        except (IndexError, RuntimeError, ValueError) as error:  # too long for its tables
            if length // 2 < _SHORTEST:
                raise UsageError(f"the model does not run on calibration data: {error}") from error
            length //= 2


def made_up(model: ir.Model, count: int, length: int, seed: int) -> list[Feeds]:
    """`batches` of a length that the model's position table holds: `length`, halved as needed."""
    student = Student(model).eval()
    while True:
        made = list(batches(model, count, length, seed))
        try:
            with torch.inference_mode():
                student(**made[0])
        except (IndexError, RuntimeError, ValueError) as error:
            if length // 2 < _SHORTEST:
                raise UsageError(f"the model does not run on made-up data: {error}") from error
            length //= 2
        else:
            return made


def _kind(model: ir.Model) -> str:
    if any(is_ids(v) for v in model.graph.inputs):
        return "random tokens: give --text for real ones"
    return "normal noise: give --inputs data.npz for real data"


# -- language models by their graph inputs ---------------------------------------------------------


def probe_batches(
    model: ir.Model,
    tokenizer: Tokenizer | None,
    *,
    text: Path | None = None,
    inputs: Path | None = None,
    count: int,
    length: int,
    seed: int = 0,
    progress: Progress = _silent,
) -> list[Feeds]:
    """Inputs for judging a model: the user's, else made from `seed` but never those of calibration.

    Args:
        model: at any stage; every batch holds all its graph inputs.
        tokenizer: of a language model, if there is one.
        text: a text file; needs a tokenizer.
        inputs: an ``.npz`` file, see `batches_of_file`.
        count: sequences or images.
        length: positions of a sequence.
        seed: of made-up data.
        progress: takes a line; says where the data came from.
    """
    if inputs is not None:
        return list(batches_of_file(model, inputs, count))
    if text is not None and tokenizer is None:
        raise _no_tokenizer(text)
    try:
        drive = detect(model)
    except UsageError:  # an encoder or a vision model
        length = longest(model, length)
        ids = windows_of_file(text, tokenizer, length, count) if text and tokenizer else None
        progress("probe: " + (f"{len(ids)} windows" if ids is not None else _kind(model)))
        return list(batches(model, count, length, seed + _ASIDE, ids))
    decoder = Decoder(Student(model).eval(), tokenizer)
    length = fitting_length(decoder, length)
    if text is not None and tokenizer is not None:
        ids = windows_of_file(text, tokenizer, length, count)
    elif is_causal(decoder):
        ids = self_generated(decoder, count, length, seed + _ASIDE)
    else:
        rng = np.random.default_rng(seed + _ASIDE)
        ids = rng.integers(0, decoder.vocabulary, (count, length))
    progress(f"probe: {len(ids)} sequences of {length}")
    return list(text_feeds(drive, ids))


def _no_tokenizer(text: Path) -> UsageError:
    return UsageError(
        "text needs a tokenizer", where=str(text),
        mend="put tokenizer.json beside the model or give --tokenizer",
    )  # fmt: skip
