"""Calibration: runs the float model on data and keeps what the quantiser needs of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pfmc.distill.drive import detect
from pfmc.distill.generate import Decoder
from pfmc.distill.student import Student
from pfmc.distill.text import load_tokenizer, self_generated, windows_of_file
from pfmc.errors import FileError, InputError, UsageError, did_you_mean
from pfmc.hardware import LayerStatistics

Progress = Callable[[str], None]
Array = npt.NDArray[Any]
Feeds = dict[str, Array]

PROBABILITIES = (
    *(i / 20 for i in range(1, 19)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998,
    0.9999, 0.99995, 0.99998, 0.99999, 0.999999, 1.0,
)  # fmt: skip
"""Quantiles of |x| that are kept."""

_SHIFT = 18  # the top 13 bits of a float32 magnitude: 32 bins an octave, equal within an octave
_BINS = 0x7F800000 >> _SHIFT  # up to infinity
_BATCH = 8
_SHORTEST = 2


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
class _Inputs:
    """What was seen of one input tensor: sums that add up over batches."""

    histogram: npt.NDArray[np.int64]
    power: npt.NDArray[np.float64]
    peak: float
    rows: int

    @classmethod
    def of(cls, x: Array) -> _Inputs:
        """Of ``x[rows, in]`` float32."""
        magnitude = np.abs(x)
        bins = (magnitude.view(np.int32) >> _SHIFT).reshape(-1)
        return cls(
            np.bincount(bins, minlength=_BINS).astype(np.int64),
            np.square(x, dtype=np.float64).sum(axis=0),
            float(magnitude.max(initial=0.0)),
            len(x),
        )

    def plus(self, other: _Inputs) -> _Inputs:
        """Both together."""
        return _Inputs(
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
class _Layer:
    """What was seen of one fixed linear."""

    inputs: _Inputs
    output_peak: npt.NDArray[np.float32]
    output_square: npt.NDArray[np.float64]

    def statistics(self) -> LayerStatistics:
        """The sums as statistics."""
        rows = max(1, self.inputs.rows)
        return LayerStatistics(
            input_peak=self.inputs.peak,
            input_quantiles=self.inputs.quantiles(),
            input_power=self.inputs.power / rows,
            output_peak=self.output_peak,
            output_rms=np.sqrt(self.output_square / rows).astype(np.float32),
            samples=self.inputs.rows,
        )


@dataclass
class Gatherer:
    """Listens to a student (``student.observe = gatherer``) and adds up what it hears."""

    student: Student
    layers: dict[str, _Layer] = field(default_factory=dict)
    _last: tuple[Tensor, _Inputs] | None = None

    def __call__(self, name: str, x: Tensor, y: Tensor) -> None:
        """Adds one call of layer `name`: x ``[..., in]``, y ``[..., out]`` with bias."""
        inputs = self._inputs(x, name)
        bias = getattr(self.student.linears[name], "bias", None)
        product = y if bias is None else y - bias
        rows = product.detach().reshape(-1, product.shape[-1]).float().cpu().numpy()
        peak = np.abs(rows).max(axis=0, initial=0.0).astype(np.float32)
        square = np.square(rows, dtype=np.float64).sum(axis=0)
        known = self.layers.get(name)
        if known is not None:
            inputs = known.inputs.plus(inputs)
            peak, square = np.maximum(known.output_peak, peak), known.output_square + square
        self.layers[name] = _Layer(inputs, peak, square)

    def _inputs(self, x: Tensor, name: str) -> _Inputs:
        """Of `x`; linears that share their input share the work."""
        if self._last is None or self._last[0] is not x:
            rows = x.detach().reshape(-1, x.shape[-1]).float().cpu().contiguous().numpy()
            if not np.isfinite(rows).all():
                raise InputError(
                    "calibration met NaN or infinity", where=f"input of {name}",
                    mend="the float model overflows on this data; give other data",
                )  # fmt: skip
            self._last = (x, _Inputs.of(rows))
        return self._last[1]

    def statistics(self) -> dict[str, LayerStatistics]:
        """The statistics of every layer heard, in graph order."""
        order = [n for n in self.student.linears if n in self.layers]
        return {name: self.layers[name].statistics() for name in order}


def calibrate(
    model: ir.Model, batches: Iterable[Mapping[str, Array]], progress: Progress = _silent
) -> dict[str, LayerStatistics]:
    """Runs a CANONICAL float model on `batches` and gathers the statistics of each fixed linear.

    Args:
        model: at stage CANONICAL.
        batches: graph inputs by name, one mapping a run.
        progress: takes a line a batch.

    Raises:
        UsageError: a batch lacks an input or names an unknown one.
    """
    student = Student(model).eval()
    gatherer = Gatherer(student)
    student.observe = gatherer
    for number, feeds in enumerate(batches, 1):
        progress(f"calibrate: batch {number}")
        with torch.inference_mode():
            student(**feeds)
    return gatherer.statistics()


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

    Raises:
        UsageError: `text` without a tokenizer, or inputs that are not the model's.
    """
    if plan.source == "none":
        return {}
    if inputs is not None:
        progress(f"calibrate: on {inputs.name}")
        return calibrate(model, batches_of_file(model, inputs, plan.sequences), progress)
    student = Student(model).eval()
    decoder = _decoder(student, tokenizer)
    if decoder is None:
        return _without_text(model, plan, tokenizer, text, seed, progress)
    length = fitting_length(decoder, plan.length)
    if text is not None:
        ids = _windows(text, tokenizer, length, plan.sequences)
        progress(f"calibrate: on {len(ids)} windows of {text.name}")
    elif is_causal(decoder):
        progress(f"calibrate: on {plan.sequences} sequences that the model writes itself")
        ids = self_generated(decoder, plan.sequences, length, seed)
    else:
        return _without_text(model, plan, tokenizer, text, seed, progress)
    student.observe = gatherer = Gatherer(student)
    for start in range(0, len(ids), _BATCH):
        decoder.logits(ids[start : start + _BATCH])
    return gatherer.statistics()


def _windows(text: Path, tokenizer: Path | None, length: int, count: int) -> Array:
    if tokenizer is None:
        raise UsageError(
            "calibrating on text needs a tokenizer", where=str(text),
            mend="put tokenizer.json beside the model or give --tokenizer",
        )  # fmt: skip
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
    progress: Progress,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Of a model that writes no text: from the text given, random tokens or noise."""
    length = plan.length
    while True:
        ids = None if text is None else _windows(text, tokenizer, length, plan.sequences)
        progress("calibrate: on " + (f"{len(ids)} windows" if ids is not None else _kind(model)))
        try:
            return calibrate(model, batches(model, plan.sequences, length, seed, ids), progress)
        except (IndexError, RuntimeError) as error:  # longer than the model's position table
            if length // 2 < _SHORTEST:
                raise UsageError(f"the model does not run on calibration data: {error}") from error
            length //= 2


def _kind(model: ir.Model) -> str:
    if any(_is_ids(v) for v in model.graph.inputs):
        return "random tokens: give --text for real ones"
    return "normal noise: give --inputs data.npz for real data"


# -- batches -------------------------------------------------------------------------------------


def batches(
    model: ir.Model, count: int, length: int, seed: int, ids: Array | None = None
) -> Iterator[Feeds]:
    """Made-up inputs for a model that is no language model, in batches of up to 8.

    Token ids are random (or rows of `ids`), every fourth sequence is padded in its last quarter,
    masks say so, images and sounds are normal noise, everything else is zero.

    Args:
        model: its graph inputs say what is wanted.
        count: sequences or images.
        length: positions where the graph leaves them free.
        seed: of the random numbers.
        ids: tokens ``[count, length]``.
    """
    rng = np.random.default_rng(seed)
    values = model.graph.inputs
    size = next((d for d in (_dims(v)[0] for v in values if _dims(v)) if isinstance(d, int)), 0)
    step = size or min(_BATCH, count)
    fixed = next((d for v in values if _is_ids(v) for d in _dims(v)[1:] if isinstance(d, int)), 0)
    for start in range(0, count, step):
        rows = np.arange(start, start + step)
        real = np.where(rows % 4 == 3, (fixed or length) * 3 // 4, fixed or length)
        part = None if ids is None else ids[rows % len(ids)][:, : fixed or length]
        yield {
            str(v.name): _feed(v, rng, step, fixed or length, real, part, vocabulary_of(v))
            for v in values
        }


def _feed(
    value: ir.Value, rng: np.random.Generator, rows: int, length: int, real: Array,
    ids: Array | None, vocabulary: int,
) -> Array:  # fmt: skip
    name, kind = str(value.name).lower(), value.dtype or ir.DataType.FLOAT
    shape = tuple(_size(v, axis, value, rows, length) for axis, v in enumerate(_dims(value)))
    if "mask" in name:
        seen = np.arange(shape[-1]) < real[:, None]
        return np.broadcast_to(seen.reshape(rows, *([1] * (len(shape) - 2)), -1), shape).astype(
            kind.numpy()
        )
    if _is_ids(value):
        tokens = rng.integers(0, vocabulary, shape)
        return (tokens if ids is None or ids.shape != shape else ids).astype(kind.numpy())
    if "position" in name and kind.is_integer():
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(kind.numpy())
    if kind.is_floating_point() and 0 not in shape:
        return rng.standard_normal(shape, dtype=np.float32).astype(kind.numpy())
    return np.zeros(shape, kind.numpy())


def _dims(value: ir.Value) -> list[int | str | None]:
    """Sizes of a graph input; a number as text counts as fixed."""
    sizes = [d if isinstance(d, int) else d.value for d in value.shape or ()]
    return [int(d) if isinstance(d, str) and d.isdecimal() else d for d in sizes]


def _size(dim: int | str | None, axis: int, value: ir.Value, rows: int, length: int) -> int:
    if isinstance(dim, int):
        return dim
    if axis == 0:
        return rows
    if "past" in str(value.name):
        return 0
    rank = len(_dims(value))
    if rank == 4:  # an image of free size
        return 3 if axis == 1 else 224
    return length if value.dtype is None or not value.dtype.is_floating_point() else max(length, 4096)


def _is_ids(value: ir.Value) -> bool:
    """Whether a graph input holds token ids."""
    name = str(value.name).lower()
    others = ("mask", "position", "type", "past")
    if value.dtype is None or not value.dtype.is_integer() or any(w in name for w in others):
        return False
    return len(_dims(value)) == 2


def vocabulary_of(ids: ir.Value) -> int:
    """Rows of the table that token ids index, looking through casts and reshapes; else 2."""
    pending = [ids]
    for value in pending:
        for node, position in value.uses():
            table = node.inputs[0]
            if node.op_type == "Gather" and position == 1 and table is not None:
                if table.const_value is not None:
                    return int(table.const_value.shape[0])
            elif node.op_type in ("Cast", "Identity", "Reshape") and position == 0:
                pending.append(node.outputs[0])
    return 2


def batches_of_file(model: ir.Model, path: Path, count: int) -> Iterator[Feeds]:
    """The graph inputs in an ``.npz`` file, in batches; at most `count` samples.

    Raises:
        UsageError: an input is missing, unknown, or has another number of samples.
        FileError: the file cannot be read.
    """
    arrays = _read_npz(path)
    values = {str(v.name): v for v in model.graph.inputs}
    for name in arrays:
        if name not in values:
            raise UsageError(
                f"the model has no input {name!r}", where=path.name, mend=did_you_mean(name, values)
            )
    missing = [n for n in values if n not in arrays and "past" not in n]
    if missing:
        raise UsageError(f"the input {missing[0]!r} is missing", where=path.name)
    samples = min(len(a) for a in arrays.values())
    if any(len(a) != samples for a in arrays.values()):
        raise UsageError("the inputs differ in their number of samples", where=path.name)
    fixed = next((d for v in values.values() if isinstance(d := _dims(v)[0], int)), 0)
    step = fixed or _BATCH
    for start in range(0, min(samples, count) - (fixed - 1 if fixed else 0), step):
        part = {n: a[start : min(start + step, count)] for n, a in arrays.items()}
        rows = len(next(iter(part.values())))
        empty = {n: _empty(v, rows) for n, v in values.items() if n not in part}
        yield {**part, **empty}


def _empty(value: ir.Value, rows: int) -> Array:
    shape = [_size(d, axis, value, rows, 0) for axis, d in enumerate(_dims(value))]
    return np.zeros(shape, np.float32)


def _read_npz(path: Path) -> Feeds:
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be read as .npz: {error}", where=str(path)) from error
