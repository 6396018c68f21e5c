"""Inputs for running a model: from files, from tokens, or made up from the graph inputs' types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc.distill.drive import Drive
from pfmc.distill.shapes import image_side
from pfmc.errors import FileError, InputError, UsageError, did_you_mean

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

BATCH = 8
"""Sequences or images a run, where the graph leaves it free."""
LABELS = "labels"
"""Array of an ``.npz`` file that holds the classes of its samples."""


def text_feeds(drive: Drive, ids: Array) -> Iterator[Feeds]:
    """The graph inputs of a language model for tokens ``ids[N, S]``, with an empty KV memory."""
    ids = ids[:, : drive.length or ids.shape[1]]
    rows = drive.batch or BATCH
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        if drive.batch and len(part) < rows:
            part = np.concatenate([part, np.repeat(part[-1:], rows - len(part), axis=0)])
        yield text_feed(drive, part)


def text_feed(drive: Drive, ids: Array) -> Feeds:
    """The graph inputs of one call on tokens ``ids[B, S]``, padded to a fixed length."""
    real = ids.shape[1]
    padded = np.zeros((len(ids), drive.length or real), np.int64)
    padded[:, :real] = ids
    feeds: Feeds = {drive.ids: padded}
    seen = np.tile(np.arange(padded.shape[1]) < real, (len(ids), 1))
    if drive.mask:
        feeds[drive.mask] = seen.astype(np.float32 if drive.mask_float else np.int64)
    if drive.positions:
        feeds[drive.positions] = np.tile(np.arange(padded.shape[1]), (len(ids), 1))
    if drive.types:
        feeds[drive.types] = np.zeros_like(padded)
    for memory in drive.memories:
        feeds[memory.past] = np.zeros((len(ids), memory.heads, 0, memory.width), np.float32)
    return feeds


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
    step = size or min(BATCH, count)
    fixed = next((d for v in values if is_ids(v) for d in _dims(v)[1:] if isinstance(d, int)), 0)
    shared, side = _shared(values), image_side(model)
    for start in range(0, count, step):
        rows = np.arange(start, start + step)
        real = np.where(rows % 4 == 3, (fixed or length) * 3 // 4, fixed or length)
        part = None if ids is None else ids[rows % len(ids)][:, : fixed or length]
        yield {
            str(v.name): _feed(
                v, rng, step, fixed or length, real, part, vocabulary_of(v), shared, side
            )
            for v in values
        }


def _feed(
    value: ir.Value, rng: np.random.Generator, rows: int, length: int, real: Array,
    ids: Array | None, vocabulary: int, shared: frozenset[str], side: int,
) -> Array:  # fmt: skip
    name, kind = str(value.name).lower(), value.dtype or ir.DataType.FLOAT
    shape = tuple(
        length if axis and v in shared else _size(v, axis, value, rows, length, side)
        for axis, v in enumerate(_dims(value))
    )
    if "mask" in name:
        seen = np.arange(shape[-1]) < real[:, None]
        return np.broadcast_to(seen.reshape(rows, *([1] * (len(shape) - 2)), -1), shape).astype(
            kind.numpy()
        )
    if is_ids(value):
        tokens = rng.integers(0, vocabulary, shape)
        return (tokens if ids is None or ids.shape != shape else ids).astype(kind.numpy())
    if "position" in name and kind.is_integer():
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(kind.numpy())
    if kind.is_floating_point() and 0 not in shape:
        return rng.standard_normal(shape, dtype=np.float32).astype(kind.numpy())
    return np.zeros(shape, kind.numpy())


def _shared(values: Sequence[ir.Value]) -> frozenset[str]:
    """Names that a KV memory shares with another input: the memory of a cross-attention."""
    past, others = set[str](), set[str]()
    for value in values:
        names = {d for d in _dims(value)[1:] if isinstance(d, str)}
        (past if "past" in str(value.name) else others).update(names)
    return frozenset(past & others)


def _dims(value: ir.Value) -> list[int | str | None]:
    """Sizes of a graph input; a number as text counts as fixed."""
    sizes = [d if isinstance(d, int) else d.value for d in value.shape or ()]
    return [int(d) if isinstance(d, str) and d.isdecimal() else d for d in sizes]


def _size(
    dim: int | str | None, axis: int, value: ir.Value, rows: int, length: int, side: int = 0
) -> int:
    if isinstance(dim, int):
        return dim
    if axis == 0:
        return rows
    if "past" in str(value.name):
        return 0
    rank = len(_dims(value))
    if rank == 4:  # an image of free size
        return 3 if axis == 1 else side
    sound = rank == 2 and value.dtype is not None and value.dtype.is_floating_point()
    return max(length, 4096) if sound and "mask" not in str(value.name) else length


def is_ids(value: ir.Value) -> bool:
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
                    return int(table.const_value.shape.numpy()[0])
            elif node.op_type in ("Cast", "Identity", "Reshape") and position == 0:
                pending.append(node.outputs[0])
    return 2


def batches_of_file(model: ir.Model, path: Path, count: int) -> Iterator[Feeds]:
    """The graph inputs in an ``.npz`` file, in batches; at most `count` samples.

    An array `LABELS` may stand beside them (see `labels_of_file`).

    Raises:
        UsageError: an input is missing, unknown, of another shape than the graph's, holds tokens
            that there are not, or has another number of samples; or they fill no batch.
        FileError: the file cannot be read.
    """
    arrays = _read_npz(path)
    values = {str(v.name): v for v in model.graph.inputs}
    if LABELS not in values:
        arrays.pop(LABELS, None)
    for name in arrays:
        if name not in values:
            raise UsageError(
                f"the model has no input {name!r}", where=path.name, mend=did_you_mean(name, values)
            )
    missing = [n for n in values if n not in arrays and "past" not in n]
    if missing:
        raise UsageError(f"the input {missing[0]!r} is missing", where=path.name)
    for name, array in arrays.items():
        _refuse_array(values[name], array, path)
    samples = min(len(a) for a in arrays.values())
    if any(len(a) != samples for a in arrays.values()):
        raise UsageError("the inputs differ in their number of samples", where=path.name)
    fixed = next((d for v in values.values() if isinstance(d := _dims(v)[0], int)), 0)
    if samples < max(fixed, 1):
        raise UsageError(
            f"{samples} samples, and one run of the model takes {max(fixed, 1)}", where=path.name,
            mend="give more samples",
        )  # fmt: skip
    step, count = fixed or BATCH, max(count, fixed)
    for start in range(0, min(samples, count) - (fixed - 1 if fixed else 0), step):
        part = {n: a[start : min(start + step, count)] for n, a in arrays.items()}
        rows = len(next(iter(part.values())))
        empty = {n: _empty(v, rows) for n, v in values.items() if n not in part}
        yield {**part, **empty}


def _refuse_array(value: ir.Value, array: Array, path: Path) -> None:
    """Refuses an array that is no batch of graph input `value`."""
    where, sizes = f"{path.name}: {value.name}", _dims(value)
    pairs = list(zip(sizes, array.shape, strict=False))[1:]
    wrong = any(isinstance(d, int) and d != n for d, n in pairs)
    if wrong or array.ndim != len(sizes) or array.ndim == 0:
        asked = [str(d or "?") for d in sizes]
        raise UsageError(
            f"an array of shape {list(array.shape)} for an input [{', '.join(asked)}]", where=where,
            mend="give samples along the first axis",
        )  # fmt: skip
    known = vocabulary_of(value) if is_ids(value) else 0
    if known > 2 and array.size and (array.min() < 0 or array.max() >= known):
        raise UsageError(
            f"tokens from {array.min()} to {array.max()}, and the model knows {known}", where=where,
            mend="use the model's own tokenizer",
        )  # fmt: skip


def mask_of(feeds: Mapping[str, Array]) -> Array | None:
    """The mask ``[B, S]`` among graph inputs that says where there are tokens, or None."""
    return next((v for k, v in feeds.items() if "mask" in k and v.ndim == 2), None)


def labels_of_file(path: Path) -> npt.NDArray[np.int64] | None:
    """The array `LABELS` of an ``.npz`` file: classes ``[N]``; None if there is none.

    Raises:
        FileError: the file cannot be read.
        InputError: the labels are not one whole number a sample.
    """
    arrays = _read_npz(path)
    labels = arrays.pop(LABELS, None)
    if labels is None:
        return None
    samples = next((len(a) for a in arrays.values() if a.ndim), 0)
    if labels.shape != (samples,) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise InputError(
            f"labels are {labels.dtype} of shape {list(labels.shape)} for {samples} samples",
            where=str(path), mend="give one class a sample, counted from 0",
        )  # fmt: skip
    return labels.astype(np.int64)


def _empty(value: ir.Value, rows: int) -> Array:
    shape = [_size(d, axis, value, rows, 0) for axis, d in enumerate(_dims(value))]
    return np.zeros(shape, np.float32)


def _read_npz(path: Path) -> Feeds:
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be read as .npz: {error}", where=str(path)) from error
