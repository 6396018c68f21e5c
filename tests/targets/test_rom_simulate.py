"""The simulated layer against exact int64 numpy, against its own ROM images, and its gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc import technology
from pfmc.errors import CorruptError, FileError
from pfmc.hardware import FixedLinear, QuantisedMatrix, TiledLinear
from pfmc.targets.base import Die, StoredLinear
from pfmc.targets.rom import RomTarget
from pfmc.targets.rom.lower import lower
from pfmc.targets.rom.simulate import RomLinear
from pfmc.targets.rom.verify import read_codes

TECH = technology.load("rom")
TARGET = RomTarget()


def case(
    rows: int, cols: int, bits: int, seed: int, group: int = 0, static: float | None = None
) -> tuple[FixedLinear, TiledLinear, StoredLinear]:
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    codes = rng.integers(-top, top + 1, (rows, cols), np.int8)
    group = group or rows
    scale = rng.uniform(1e-3, 1e-1, (-(-rows // group), cols)).astype(np.float32)
    bias = rng.normal(size=cols).astype(np.float32)
    linear = FixedLinear("m.l", QuantisedMatrix(codes, bits, scale, group), bias, 8, static)
    tiled = lower(linear, TECH)
    return linear, tiled, stored_of(linear, tiled)


def stored_of(linear: FixedLinear, tiled: TiledLinear) -> StoredLinear:
    """The layer as an artifact gives it back: its own tensors, codes and scales."""
    tensors = {**tiled.tensors, "codes": linear.matrix.codes, "scale": linear.matrix.scale}
    return StoredLinear(
        linear.name, linear.inputs, linear.outputs, tiled.tiles, tensors, linear.bias, 8,
        linear.input_scale,
    )  # fmt: skip


def write(tiled: TiledLinear, folder: Path) -> Path:
    for name, data in tiled.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


sizes = st.tuples(st.integers(1, 2500), st.integers(1, 40), st.integers(2, 8), st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_products_equal_int64(size: tuple[int, int, int, int]) -> None:
    rows, cols, bits, seed = size
    linear, _, stored = case(rows, cols, bits, seed)
    x = np.random.default_rng(seed).integers(-127, 128, (3, rows), np.int64)
    module = TARGET.layer(stored, TECH, Die())
    assert isinstance(module, RomLinear)
    got = module.integers(torch.from_numpy(x.astype(np.float32)))[0].numpy().astype(np.int64)
    np.testing.assert_array_equal(got, x @ linear.matrix.codes.astype(np.int64))


def test_extreme_codes_are_exact() -> None:
    rows = 4096
    codes = np.full((rows, 8), 127, np.int8)
    scale = np.ones((1, 8), np.float32)
    linear = FixedLinear("m.l", QuantisedMatrix(codes, 8, scale, rows), None, 8, None)
    module = RomLinear(stored_of(linear, lower(linear, TECH)))
    x = torch.full((1, rows), 127.0)
    x[0, 0] = 126.0
    assert module.integers(x)[0][0, 0].item() == 127 * (127 * rows - 1)


@pytest.mark.parametrize("static", [None, 0.02])
def test_forward_is_scaled_integers(static: float | None) -> None:
    linear, _, stored = case(300, 70, 4, 1, static=static)
    x = np.random.default_rng(5).normal(size=(2, 3, 300)).astype(np.float32)
    y = RomLinear(stored)(torch.from_numpy(x)).numpy()
    step = np.float32(static) if static else np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.clip(np.round(x / step), -127, 127)
    exact = codes.astype(np.int64) @ linear.matrix.codes.astype(np.int64)
    want = exact * linear.matrix.scale[0].astype(np.float64) * step + stored.bias
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_groups_have_their_own_scales() -> None:
    linear, _, stored = case(300, 9, 4, 2, group=128)
    x = np.random.default_rng(5).normal(size=(4, 300)).astype(np.float32)
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.round(x / step)
    want = codes @ linear.matrix.weights().astype(np.float64) * step + stored.bias
    np.testing.assert_allclose(
        RomLinear(stored)(torch.from_numpy(x)).numpy(), want, rtol=1e-4, atol=1e-4
    )


def test_quantising_twice_changes_nothing() -> None:
    _, _, stored = case(64, 32, 4, 3)
    module = RomLinear(stored)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    codes, step = module.quantise(x)
    again, _ = module.quantise(codes * step)
    assert torch.equal(codes, again)


def test_gradient_goes_straight_through() -> None:
    linear, _, stored = case(32, 16, 4, 4, static=10.0)
    x = torch.randn(3, 32, requires_grad=True)
    RomLinear(stored)(x).sum().backward()
    want = torch.from_numpy(linear.matrix.weights()).sum(1).expand(3, 32)
    torch.testing.assert_close(x.grad, want)


@settings(max_examples=15, deadline=None)
@given(sizes)
def test_images_hold_the_product(
    tmp_path_factory: pytest.TempPathFactory, size: tuple[int, int, int, int]
) -> None:
    rows, cols, bits, seed = size
    linear, tiled, stored = case(rows, cols, bits, seed)
    hardware = write(tiled, tmp_path_factory.mktemp("rom"))
    x = np.random.default_rng(seed).integers(-127, 128, (4, rows), np.int8)
    product = TARGET.integer_product(stored, hardware, x)
    assert product.dtype == np.int32
    np.testing.assert_array_equal(
        product, x.astype(np.int64) @ linear.matrix.codes.astype(np.int64)
    )
    assert all(check.passed for check in TARGET.verify(stored, hardware, TECH))


def test_binary_images_are_read_back(tmp_path: Path) -> None:
    linear, tiled, stored = case(1100, 1000, 5, 0)
    assert list(tiled.files) == ["rom/m.l.bin"]
    codes = read_codes(stored, write(tiled, tmp_path))
    np.testing.assert_array_equal(codes[:, :1000], linear.matrix.codes)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    _, tiled, stored = case(300, 70, 4, 7)
    path = write(tiled, tmp_path) / "rom/m.l/tile_1_0.hex"
    raw = bytearray(path.read_bytes())
    raw[5] = ord("0123456789abcdef"[int(chr(raw[5]), 16) ^ 1])
    path.write_bytes(raw)
    failed = [c for c in TARGET.verify(stored, tmp_path, TECH) if not c.passed]
    assert [(c.value, c.unit) for c in failed] == [(1, "bit")]
    path.write_bytes(raw[:-1])
    with pytest.raises(CorruptError):
        TARGET.verify(stored, tmp_path, TECH)
    path.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        TARGET.verify(stored, tmp_path, TECH)


def test_a_wrong_multiplier_is_found(tmp_path: Path) -> None:
    _, tiled, stored = case(64, 8, 4, 8)
    hardware = write(tiled, tmp_path)
    stored.tensors["multiplier"][0, 3] += 2
    failed = [c.name for c in TARGET.verify(stored, hardware, TECH) if not c.passed]
    assert failed == ["requantiser against scale, relative"]
