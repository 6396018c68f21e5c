"""Lays a fixed linear out in ROM banks beside multiply-accumulate lanes.

A tile is `tile_inputs` words of `tile_outputs` codes; each cycle one word is read and every lane
adds one product. Outputs leave through a requantiser: a 31-bit multiplier and a shift per output
(with 31 bits the result equals ONNX Runtime's QDQ; see research notes, requantisation).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pfmc.errors import InfeasibleError
from pfmc.hardware import FixedLinear, TiledLinear
from pfmc.targets.rom import images
from pfmc.technology import Technology

MULTIPLIER_BITS = 31
ACCUMULATOR_GUARD_BITS = 1


def lower(linear: FixedLinear, technology: Technology) -> TiledLinear:
    """The tiles, requantisers and ROM images of one fixed linear.

    Tensors, beside the codes and scales that the artifact keeps for every target: ``multiplier``
    int32 and ``shift`` int8 ``[groups, out]`` with
    ``scale * input_scale ≈ multiplier * 2**-shift`` (`input_scale` 1 where every position is
    scaled afresh); ``format`` int32: bits, tile inputs, tile outputs, group.

    Raises:
        InfeasibleError: the codes are wider than the technology's.
    """
    rows, cols = (technology.integer(f"array.tile_{side}") for side in ("inputs", "outputs"))
    matrix = linear.matrix
    _demand_width(linear, technology)
    codes = np.ascontiguousarray(matrix.codes)
    blocks = images.layer_words(codes, matrix.bits, rows, cols)
    multiplier, shift = requantiser(matrix.scale, linear.input_scale)
    binary = codes.size > technology.number("array.binary_above")
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "multiplier": multiplier,
        "shift": shift,
        "format": np.array([matrix.bits, rows, cols, matrix.group], np.int32),
    }
    tiles = tile_table(codes, matrix.bits, rows, cols)
    counts = work(linear.inputs, linear.outputs, matrix.bits, linear.input_bits, rows, cols)
    zero = float(1.0 - np.count_nonzero(codes) / codes.size)
    return TiledLinear(
        linear.name, linear.inputs, linear.outputs, tiles, tensors,
        files(linear.name, blocks, binary), counts, {"zero_fraction": zero},
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
    codes: images.Codes, bits: int, tile_inputs: int, tile_outputs: int
) -> dict[str, npt.NDArray[np.generic]]:
    """The tile table: place, bank, words, byte offset in a binary image, fraction of zeros."""
    inputs, outputs = codes.shape
    starts = np.arange(0, inputs, tile_inputs), np.arange(0, outputs, tile_outputs)
    row0, col0 = (g.ravel().astype(np.int32) for g in np.meshgrid(*starts, indexing="ij"))
    rows = np.minimum(inputs - row0, tile_inputs).astype(np.int32)
    cols = np.minimum(outputs - col0, tile_outputs).astype(np.int32)
    used = nonzero_codes(codes, tile_inputs, tile_outputs).ravel()
    sizes = rows.astype(np.int64) * (tile_outputs * bits // 8)
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


def accumulator_bits(inputs: int, bits: int, input_bits: int) -> int:
    """Width that holds any sum of `inputs` products."""
    most = inputs * ((1 << (bits - 1)) - 1) * ((1 << (input_bits - 1)) - 1)
    return most.bit_length() + ACCUMULATOR_GUARD_BITS


def work(
    inputs: int, outputs: int, bits: int, input_bits: int, tile_inputs: int, tile_outputs: int
) -> dict[str, float]:
    """What cost and netlist need of a layer of this shape; per position where it is work."""
    tile_rows, tile_cols = math.ceil(inputs / tile_inputs), math.ceil(outputs / tile_outputs)
    return {
        "macs": float(inputs * outputs),
        "tiles": float(tile_rows * tile_cols),
        "lanes": float(tile_rows * tile_cols * tile_outputs),
        "weight_bits": float(bits),
        "input_bits": float(input_bits),
        "accumulator_bits": float(accumulator_bits(inputs, bits, input_bits)),
        "stored_bits": float(inputs * outputs * bits),
        "rom_bits": float(inputs * tile_cols * tile_outputs * bits),
        "joins": float((tile_rows - 1) * outputs),
        "join_adders": float((tile_rows - 1) * tile_cols),
        "requantisers": float(tile_cols),
        "requantised": float(outputs),
        "cycles": float(min(inputs, tile_inputs) + min(outputs, tile_outputs)),
        "input_values": float(inputs),
    }
