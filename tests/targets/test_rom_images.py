"""ROM images: packing against Python integers, text against `$readmemh`'s meaning, round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.errors import CorruptError
from pfmc.targets.rom import images


def codes_of(bits: int, rows: int, cols: int, seed: int) -> np.ndarray:
    top = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-top, top, (rows, cols), np.int8)


shapes = st.tuples(st.integers(2, 8), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))


@given(shapes)
def test_pack_is_the_integer_word(case: tuple[int, int, int, int]) -> None:
    bits, rows, eights, seed = case
    codes = codes_of(bits, rows, 8 * eights, seed)
    packed = images.pack(codes, bits)
    for row, word in zip(codes, packed, strict=True):
        expected = sum((int(c) % 2**bits) << (bits * k) for k, c in enumerate(row))
        assert int.from_bytes(word.tobytes(), "little") == expected
    np.testing.assert_array_equal(images.unpack(packed, bits), codes)


@given(shapes)
def test_text_is_readmemh(case: tuple[int, int, int, int]) -> None:
    bits, rows, eights, seed = case
    words = images.pack(codes_of(bits, rows, 8 * eights, seed), bits)
    text = images.text(words)
    lines = text.decode().splitlines()
    assert [int(line, 16) for line in lines] == [
        int.from_bytes(w.tobytes(), "little") for w in words
    ]
    np.testing.assert_array_equal(images.read_text(text, *words.shape), words)


def test_damaged_text_is_refused() -> None:
    text = images.text(images.pack(codes_of(4, 3, 16, 0), 4))
    with pytest.raises(CorruptError, match="instead of"):
        images.read_text(text[:-1], 3, 8)
    with pytest.raises(CorruptError, match="not a digit"):
        images.read_text(b"x" + text[1:], 3, 8)
