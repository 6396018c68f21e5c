"""Reads emitted ROM images back and checks them, bit for bit, against the stored codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pfmc.errors import CorruptError, FileError
from pfmc.targets.base import Check, StoredLinear
from pfmc.targets.rom import images
from pfmc.targets.rom.lower import MULTIPLIER_BITS, image_stem, layout, scale_path


def read_codes(stored: StoredLinear, hardware: Path) -> images.Codes:
    """The codes int8 ``[in, out]`` as the ROM image files below `hardware` hold them.

    Raises:
        FileError: an image is missing. CorruptError: an image has another size or other signs.
    """
    held = layout(stored.tensors)
    tile_outputs, width = held.cols, held.form.word_bytes(held.cols)
    columns = -(-stored.outputs // tile_outputs) * tile_outputs
    codes = np.zeros((stored.inputs, columns), np.int8)
    binary = hardware / f"{image_stem(stored.name)}.bin"
    whole = binary.read_bytes() if binary.is_file() else None
    if whole is not None and len(whole) != stored.inputs * (columns // tile_outputs) * width:
        raise CorruptError(
            "a ROM image has the wrong size", where=binary.name, mend="compile again"
        )
    for row, col, rows, offset in _places(stored):
        if whole is not None:
            words = np.frombuffer(whole, np.uint8, rows * width, offset).reshape(rows, width)
        else:
            words = _text_words(stored, hardware, row, col, rows, width)
        codes[row : row + rows, col : col + tile_outputs] = images.decode(
            words, held.form, tile_outputs
        )
    return codes


def _places(stored: StoredLinear) -> list[tuple[int, int, int, int]]:
    columns = [stored.tiles[k] for k in ("row0", "col0", "rows", "image_offset_bytes")]
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(*columns, strict=True)]


def _text_words(
    stored: StoredLinear, hardware: Path, row: int, col: int, rows: int, width: int
) -> images.Bytes:
    held = layout(stored.tensors)
    name = f"tile_{row // held.rows}_{col // held.cols}.hex"
    path = hardware / image_stem(stored.name) / name
    try:
        return images.read_text(path.read_bytes(), rows, width)
    except OSError as error:
        raise FileError(
            f"a ROM image cannot be read: {error.strerror}", where=f"{stored.name}: {name}",
            mend="compile again",
        ) from error  # fmt: skip


def integer_product(
    stored: StoredLinear, hardware: Path, x_codes: npt.NDArray[np.int8]
) -> npt.NDArray[np.int32]:
    """``x_codes[N, in] @ codes`` as int32 ``[N, out]``, computed from the ROM image files.

    Exact: float64 holds every partial sum, and int32 every result up to 133,000 inputs at 8 by 8
    bits.
    """
    codes = read_codes(stored, hardware)[:, : stored.outputs]
    product = x_codes.astype(np.float64) @ codes.astype(np.float64)  # exact below 2**53
    return product.astype(np.int32)


def verify(stored: StoredLinear, hardware: Path) -> list[Check]:
    """ROM images against the stored codes, and requantisers against the scales."""
    image = read_codes(stored, hardware)
    codes = stored.tensors["codes"].astype(np.int8, copy=False)
    differing = np.bitwise_xor(image[:, : stored.outputs], codes).view(np.uint8)
    wrong = int(np.bitwise_count(differing).sum())
    form = layout(stored.tensors).form
    beyond = int(np.count_nonzero(image[:, stored.outputs :] != images.nothing(form)))
    blocks = [] if form.scales == "free" else [_scales(stored, hardware)]
    return [
        Check("ROM image bits that differ from the codes", wrong, 0.0, "bit"),
        Check("codes that are not zero beyond the outputs", beyond, 0.0), *blocks,
        Check(
            "requantiser against scale, relative", _scale_error(stored),
            2.0**-(MULTIPLIER_BITS - 1),
        ),
        Check("matrix places not covered once by tiles", _uncovered(stored), 0.0),
    ]  # fmt: skip


def _scales(stored: StoredLinear, hardware: Path) -> Check:
    """The image of block scales against the scales, bit for bit."""
    form, scale = layout(stored.tensors).form, stored.tensors["scale"]
    binary = hardware / scale_path(stored.name, True)
    if binary.is_file():
        held = np.frombuffer(binary.read_bytes(), np.uint8)
        if held.size != scale.size:
            raise CorruptError("a scale image has the wrong size", where=binary.name)
    else:
        text = (hardware / scale_path(stored.name, False)).read_bytes()
        held = images.read_text(text, *scale.shape)
    found = form.scale_of_bytes(held.reshape(scale.shape))
    return Check("block scales that differ from their image", int((found != scale).sum()), 0.0)


def _scale_error(stored: StoredLinear) -> float:
    exact = stored.tensors["scale"].astype(np.float64) * (stored.input_scale or 1.0)
    multiplier = stored.tensors["multiplier"].astype(np.float64)
    built = np.ldexp(multiplier, -stored.tensors["shift"].astype(np.int32))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.abs(built - exact) / exact
    return float(np.max(np.where(exact == 0, np.abs(built), relative), initial=0.0))


def _uncovered(stored: StoredLinear) -> float:
    t = {k: np.asarray(stored.tiles[k], np.int64) for k in ("row0", "col0", "rows", "cols")}
    seen = np.zeros((stored.inputs, stored.outputs), np.int8)
    for r, c, h, w in zip(t["row0"], t["col0"], t["rows"], t["cols"], strict=True):
        seen[r : r + h, c : c + w] += 1
    return float(np.count_nonzero(seen != 1))
