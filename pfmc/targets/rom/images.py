"""Writes and reads ROM images: weight codes as words, one word an input, vectorised.

A word holds the codes of one tile's outputs, output 0 in the lowest bits: ``int`` and ``mxint8``
in two's complement, ``midrise`` codes ``2 c + 1`` as c in two's complement, e2m1 as sign, exponent
and fraction, ``ternary`` as bytes of five digits to the base 3, least first, each one more than
its code.
Text images (`$readmemh`) have one word a line, most significant digit first. Binary images hold
all tiles of a layer in table order, each word in little-endian bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pfmc.errors import CorruptError
from pfmc.formats import E2M1, Format

Codes = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]

_TRITS, _BASE = 5, 3
_SIGN = 8  # of an e2m1 code
_DIGITS = np.frombuffer("".join(f"{b:02x}" for b in range(256)).encode(), np.uint8).reshape(256, 2)
_VALUES = np.full(256, 255, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def pack(codes: Codes, bits: int) -> Bytes:
    """Packs codes ``[..., n]`` of `bits` bits into bytes ``[..., n * bits / 8]``; n % 8 == 0."""
    raw = codes.view(np.uint8)
    if bits == 8:
        return np.ascontiguousarray(raw)
    if bits == 4:
        pairs = np.ascontiguousarray(raw).view("<u2")
        return ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)).astype(np.uint8)
    return _pack_eights(raw, bits)


def _pack_eights(raw: Bytes, bits: int) -> Bytes:
    """Any width: eight codes make one 64-bit word of which `bits` bytes are kept."""
    word = np.ascontiguousarray(raw).view("<u8")
    packed = np.zeros_like(word)
    for k in range(8):
        mask = np.uint64(((1 << bits) - 1) << (bits * k))
        packed |= (word >> np.uint64((8 - bits) * k)) & mask
    kept = packed.view(np.uint8).reshape(*packed.shape, 8)[..., :bits]
    return np.ascontiguousarray(kept).reshape(*raw.shape[:-1], -1)


def unpack(packed: Bytes, bits: int) -> Codes:
    """The inverse of `pack`: bytes ``[..., n * bits / 8]`` to codes ``[..., n]``."""
    groups = packed.reshape(*packed.shape[:-1], -1, bits)
    wide = np.zeros((*groups.shape[:-1], 8), np.uint8)
    wide[..., :bits] = groups
    word = wide.view("<u8")[..., 0]
    codes = np.empty((*word.shape, 8), np.uint8)
    for k in range(8):
        codes[..., k] = (word >> np.uint64(k * bits)) & np.uint64((1 << bits) - 1)
    sign = np.uint8(1 << (bits - 1))
    return ((codes ^ sign) - sign).view(np.int8).reshape(*packed.shape[:-1], -1)


def text(words: Bytes) -> bytes:
    """Words ``[rows, bytes]`` as `$readmemh` text: one word a line, highest digit first."""
    lines = np.empty((words.shape[0], 2 * words.shape[1] + 1), np.uint8)
    lines[:, :-1] = _DIGITS[words[:, ::-1]].reshape(words.shape[0], -1)
    lines[:, -1] = ord("\n")
    return lines.tobytes()


def read_text(data: bytes, rows: int, width: int) -> Bytes:
    """The inverse of `text`: `rows` words of `width` bytes.

    Raises:
        CorruptError: the text has another size, or something that is not a digit.
    """
    raw = np.frombuffer(data, np.uint8)
    if raw.size != rows * (2 * width + 1):
        raise CorruptError(
            f"a ROM image has {raw.size} bytes instead of {rows * (2 * width + 1)}",
            mend="compile again",
        )
    lines = raw.reshape(rows, 2 * width + 1)
    digits = _VALUES[lines[:, :-1]]
    if (digits == 255).any() or (lines[:, -1] != ord("\n")).any():
        raise CorruptError("a ROM image holds something that is not a digit", mend="compile again")
    pairs = digits.reshape(rows, width, 2)
    words = ((pairs[..., 0] << 4) | pairs[..., 1])[:, ::-1]
    return np.ascontiguousarray(words, dtype=np.uint8)


# -- formats ---------------------------------------------------------------------------------------


def encode(codes: Codes, form: Format) -> Bytes:
    """Codes ``[..., n]`` of `form` as words ``[..., bytes]``; n % 8 == 0, but any n if ternary."""
    if form.name == "ternary":
        return _pack_trits(codes)
    if form.name == "midrise":
        return pack(np.ascontiguousarray((codes - 1) >> 1, dtype=np.int8), form.bits)
    if form.top == E2M1[-1]:
        place = np.searchsorted(E2M1, np.abs(codes)).astype(np.int8)
        return pack(place | np.where(codes < 0, np.int8(_SIGN), np.int8(0)), form.bits)
    return pack(codes, form.bits)


def decode(words: Bytes, form: Format, count: int) -> Codes:
    """The inverse of `encode`: words ``[..., bytes]`` to codes ``[..., count]``.

    Raises:
        CorruptError: a byte that holds no five ternary digits.
    """
    if form.name == "ternary":
        return _unpack_trits(words, count)
    fields = unpack(words, form.bits)
    if form.name == "midrise":
        return np.asarray(2 * fields + 1, np.int8)
    if form.top == E2M1[-1]:
        size = E2M1[fields & (_SIGN - 1)]
        return np.asarray(np.where(fields & _SIGN, -size, size), np.int8)
    return fields


def nothing(form: Format) -> int:
    """The code that outputs beyond the last have: 0, or 1 where there is no zero."""
    return 1 if form.name == "midrise" else 0


def _pack_trits(codes: Codes) -> Bytes:
    missing = -codes.shape[-1] % _TRITS
    wide = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]) + 1
    digits = wide.reshape(*wide.shape[:-1], -1, _TRITS).astype(np.uint8)
    weights = _BASE ** np.arange(_TRITS, dtype=np.uint8)
    return np.asarray((digits * weights).sum(axis=-1, dtype=np.uint8))


def _unpack_trits(words: Bytes, count: int) -> Codes:
    if words.size and int(words.max()) >= _BASE**_TRITS:
        raise CorruptError("a ROM image holds no five ternary digits", mend="compile again")
    weights = _BASE ** np.arange(_TRITS, dtype=np.uint8)
    digits = (words[..., None] // weights) % _BASE
    return digits.reshape(*words.shape[:-1], -1)[..., :count].astype(np.int8) - np.int8(1)


def padded(codes: Codes, tile_outputs: int, fill: int = 0) -> Codes:
    """Codes with columns of `fill` added up to whole tiles."""
    missing = -codes.shape[1] % tile_outputs
    return np.pad(codes, ((0, 0), (0, missing)), constant_values=fill) if missing else codes


def layer_words(codes: Codes, form: Format, tile_inputs: int, tile_outputs: int) -> list[Bytes]:
    """The words of a layer, one array ``[column tiles, rows, bytes]`` per row of tiles."""
    whole = padded(codes, tile_outputs, nothing(form))
    tiled = np.ascontiguousarray(whole).reshape(whole.shape[0], -1, tile_outputs)
    packed = encode(tiled, form)
    return [
        packed[row : row + tile_inputs].transpose(1, 0, 2)
        for row in range(0, packed.shape[0], tile_inputs)
    ]
