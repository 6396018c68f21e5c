"""Lays a fixed linear out in ROM banks beside multiply-accumulate lanes.

A tile is `tile_inputs` words of `tile_outputs` codes; each cycle one word is read and every lane
adds one product. Outputs leave through a requantiser: a 31-bit multiplier and a shift per output
(with 31 bits the result equals ONNX Runtime's QDQ; see research notes, requantisation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pfmc import formats
from pfmc.errors import InfeasibleError
from pfmc.formats import Format
from pfmc.hardware import FixedLinear, QuantisedMatrix, TiledLinear
from pfmc.targets.rom import images
from pfmc.technology import Technology

MULTIPLIER_BITS = 31
ACCUMULATOR_GUARD_BITS = 1
RESCALE_MULTIPLIERS = {"free": 4.0, "e4m3": 0.5, "power": 0.0}
"""16 by 16 bit multipliers that rescale a sum: 32 by 32 bits, 4 by 32 bits, a shift."""


@dataclass(frozen=True)
class Layout:
    """How a stored layer's words are cut: format, tile inputs, tile outputs, group of scales."""

    form: Format
    rows: int
    cols: int
    group: int


def layout(tensors: Mapping[str, npt.NDArray[np.generic]]) -> Layout:
    """The layout of a stored layer; one stored before there were formats holds ``int``."""
    bits, rows, cols, group, *kind = (int(n) for n in tensors["format"])
    form = formats.of(formats.NAMES[kind[0]] if kind else "int", bits)
    if "scale_unit" in tensors:
        form = replace(form, unit=float(tensors["scale_unit"][0]))
    return Layout(form, rows, cols, group)


def format_of(matrix: QuantisedMatrix) -> Format:
    """The number format of a matrix's codes."""
    return replace(formats.of(matrix.format, matrix.bits), unit=matrix.unit)


def lower(linear: FixedLinear, technology: Technology) -> TiledLinear:
    """The tiles, requantisers and ROM images of one fixed linear.

    Tensors, beside the codes and scales that the artifact keeps for every target: ``multiplier``
    int32 and ``shift`` int8 ``[groups, out]`` with
    ``scale * input_scale ≈ multiplier * 2**-shift`` (`input_scale` 1 where every position is
    scaled afresh); ``format`` int32: bits, tile inputs, tile outputs, group, place in
    `formats.NAMES`; ``scale_unit`` float32 where block scales are multiples of one of the matrix.

    Raises:
        InfeasibleError: the codes are wider than the technology's.
    """
    rows, cols = (technology.integer(f"array.tile_{side}") for side in ("inputs", "outputs"))
    matrix = linear.matrix
    _demand_width(linear, technology)
    codes = np.ascontiguousarray(matrix.codes)
    form = format_of(matrix)
    blocks = images.layer_words(codes, form, rows, cols)
    multiplier, shift = requantiser(matrix.scale, linear.input_scale)
    binary = codes.size > technology.number("array.binary_above")
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "multiplier": multiplier,
        "shift": shift,
        "format": np.array(
            [matrix.bits, rows, cols, matrix.group, formats.NAMES.index(matrix.format)], np.int32
        ),
    }
    if form.scales == "e4m3":
        tensors["scale_unit"] = np.array([form.unit], np.float32)
    tiles = tile_table(codes, form, rows, cols)
    counts = work(linear.inputs, linear.outputs, form, linear.input_bits, rows, cols, matrix.group)
    zero = float(1.0 - np.count_nonzero(codes) / codes.size)
    return TiledLinear(
        linear.name, linear.inputs, linear.outputs, tiles, tensors,
        {**files(linear.name, blocks, binary), **scale_files(linear.name, matrix, binary)},
        counts,
        {"zero_fraction": zero, "stored_bits_per_weight": counts["stored_bits"] / codes.size},
    )  # fmt: skip


def _demand_width(linear: FixedLinear, technology: Technology) -> None:
    low, high = (technology.integer(f"array.weight_bits_{end}") for end in ("min", "max"))
    if not low <= linear.matrix.bits <= high:
        raise InfeasibleError(
            f"codes of {linear.matrix.bits} bits, the ROM holds {low} to {high}",
            where=linear.name, mend=f"quantise to {min(max(linear.matrix.bits, low), high)} bits",
        )  # fmt: skip


def requantiser(
    scale: npt.NDArray[np.float32], input_scale: float | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """The 31-bit multiplier and the shift of each output; zero scales get a zero multiplier."""
    exact = scale.astype(np.float64) * (1.0 if input_scale is None else input_scale)
    mantissa, exponent = np.frexp(exact)
    multiplier = np.round(mantissa * 2.0**MULTIPLIER_BITS)
    full = multiplier == 2.0**MULTIPLIER_BITS
    multiplier = np.where(full, multiplier / 2, multiplier)
    shift = MULTIPLIER_BITS - exponent - full
    return multiplier.astype(np.int32), np.clip(shift, -128, 127).astype(np.int8)


def tile_table(
    codes: images.Codes, form: Format, tile_inputs: int, tile_outputs: int
) -> dict[str, npt.NDArray[np.generic]]:
    """The tile table: place, bank, words, byte offset in a binary image, fraction of zeros."""
    inputs, outputs = codes.shape
    starts = np.arange(0, inputs, tile_inputs), np.arange(0, outputs, tile_outputs)
    row0, col0 = (g.ravel().astype(np.int32) for g in np.meshgrid(*starts, indexing="ij"))
    rows = np.minimum(inputs - row0, tile_inputs).astype(np.int32)
    cols = np.minimum(outputs - col0, tile_outputs).astype(np.int32)
    used = nonzero_codes(codes, tile_inputs, tile_outputs).ravel()
    sizes = rows.astype(np.int64) * form.word_bytes(tile_outputs)
    return {
        "row0": row0, "col0": col0, "rows": rows, "cols": cols,
        "bank": np.arange(row0.size, dtype=np.int32), "words": rows,
        "image_offset_bytes": np.cumsum(sizes) - sizes,
        "zero_fraction": (1.0 - used / (rows * cols)).astype(np.float32),
    }  # fmt: skip


def nonzero_codes(
    codes: images.Codes, tile_inputs: int, tile_outputs: int
) -> npt.NDArray[np.int64]:
    """How many codes of each tile are not zero, ``[row tiles, column tiles]``.

    Rows are summed in bytes, 255 at most at a time, which is ten times as fast as wide sums.
    """
    flags = (codes != 0).view(np.uint8)
    starts = range(0, codes.shape[0], tile_inputs)
    by_row = np.zeros((len(starts), codes.shape[1]), np.int64)
    for index, first in enumerate(starts):
        last = min(first + tile_inputs, codes.shape[0])
        for part in range(first, last, 255):
            by_row[index] += flags[part : min(part + 255, last)].sum(axis=0, dtype=np.uint8)
    return np.add.reduceat(by_row, np.arange(0, codes.shape[1], tile_outputs), axis=1)


def image_stem(layer: str) -> str:
    """Path of a layer's images below ``hardware/``, without what follows."""
    return "rom/" + layer.replace("/", "~")


def files(layer: str, blocks: list[images.Bytes], binary: bool) -> dict[str, bytes]:
    """ROM images: a text file a tile, or one binary file for a large layer."""
    stem = image_stem(layer)
    if binary:
        return {f"{stem}.bin": b"".join(b.tobytes() for b in blocks)}
    return {
        f"{stem}/tile_{r}_{c}.hex": images.text(block[c])
        for r, block in enumerate(blocks)
        for c in range(block.shape[0])
    }


def scale_files(layer: str, matrix: QuantisedMatrix, binary: bool) -> dict[str, bytes]:
    """Images of block scales, a byte each: a word a group, output 0 in the lowest byte."""
    form = format_of(matrix)
    if form.scales == "free":
        return {}
    held = form.scale_bytes(matrix.scale)
    path = scale_path(layer, binary)
    return {path: held.tobytes() if binary else images.text(held)}


def scale_path(layer: str, binary: bool) -> str:
    """Path of a layer's scale image below ``hardware/``."""
    return image_stem(layer) + (".scales.bin" if binary else "/scales.hex")


def accumulator_bits(inputs: int, top: int, input_bits: int) -> int:
    """Width that holds any sum of `inputs` products of codes up to `top`."""
    most = inputs * top * ((1 << (input_bits - 1)) - 1)
    return most.bit_length() + ACCUMULATOR_GUARD_BITS


def work(
    inputs: int, outputs: int, form: Format, input_bits: int, tile_inputs: int, tile_outputs: int,
    group: int = 0,
) -> dict[str, float]:  # fmt: skip
    """What cost and netlist need of a layer of this shape; per position where it is work.

    ``weight_bits`` is the width that a multiplier sees, ``word_bits`` a ROM word's. Scales of more
    than one group are stored beside the codes, and each group's sum is rescaled on its way to the
    output's. Codes ``2 c + 1`` cost one more sum, that of the inputs, for all outputs of a tile.
    """
    tile_rows, tile_cols = math.ceil(inputs / tile_inputs), math.ceil(outputs / tile_outputs)
    word_bits = 8 * form.word_bytes(tile_outputs)
    groups = math.ceil(inputs / (group or inputs))
    scales = groups * form.scale_bits if groups > 1 or form.scales != "free" else 0
    shared = tile_rows * tile_cols if form.name == "midrise" else 0
    bits = inputs * word_bits / tile_outputs
    return {
        "macs": float(inputs * outputs),
        "tiles": float(tile_rows * tile_cols),
        "lanes": float(tile_rows * tile_cols * tile_outputs),
        "weight_bits": float(form.multiplier_bits),
        "word_bits": float(word_bits),
        "format": float(formats.NAMES.index(form.name)),
        "input_bits": float(input_bits),
        "accumulator_bits": float(accumulator_bits(inputs, form.top, input_bits)),
        "stored_bits": float(outputs * (bits + scales)),
        "rom_bits": float(tile_cols * (inputs * word_bits + tile_outputs * scales)),
        "joins": float((tile_rows - 1) * outputs + (inputs * tile_cols if shared else 0)),
        "join_adders": float((tile_rows - 1) * tile_cols + shared),
        "rescales": float((groups - 1) * outputs),
        "rescale_multipliers": RESCALE_MULTIPLIERS[form.scales],
        "requantisers": float(tile_cols),
        "requantised": float(outputs),
        "cycles": float(min(inputs, tile_inputs) + min(outputs, tile_outputs)),
        "input_values": float(inputs),
    }
