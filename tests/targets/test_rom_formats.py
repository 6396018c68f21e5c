"""Every number format in ROM: images bit for bit, exact products, area by the bits stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pfmc import formats, layer_rounding, technology
from pfmc.hardware import FixedLinear, Workload
from pfmc.targets.base import StoredLinear
from pfmc.targets.rom import RomTarget
from pfmc.targets.rom.lower import lower
from pfmc.targets.rom.simulate import RomLinear
from pfmc.targets.rom.verify import read_codes, verify

TECH = technology.load("rom")
TARGET = RomTarget()
NAMES = ["int 2", "int 3", "int 5", "int 6", "int 8", "midrise 2", "midrise 3", "midrise 4",
         "ternary 2", "mxint8 8", "mxfp4 4", "nvfp4 4"]  # fmt: skip


def made(name: str, rows: int = 300, cols: int = 70, group: int = 0) -> FixedLinear:
    form = formats.of(name.split()[0], int(name.split()[1]))
    weight = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    matrix = layer_rounding.round_layer(weight, form, group, "clip")
    return FixedLinear("m.l", matrix, None, 8, 0.02)


def stored(linear: FixedLinear, folder: Path) -> StoredLinear:
    tiled = lower(linear, TECH)
    for name, data in tiled.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    held = {**tiled.tensors, "codes": linear.matrix.codes, "scale": linear.matrix.scale}
    return StoredLinear(
        "m.l", linear.inputs, linear.outputs, tiled.tiles, held, None, 8, linear.input_scale
    )


def field_of(name: str, word: int, place: int) -> int:
    """The code at `place` of a word, by the format's definition in whole numbers."""
    kind, bits = name.split()[0], int(name.split()[1])
    if kind == "ternary":
        return (word >> (8 * (place // 5)) & 255) // 3 ** (place % 5) % 3 - 1
    raw = word >> (bits * place) & ((1 << bits) - 1)
    if kind in ("mxfp4", "nvfp4"):
        exponent, fraction = raw >> 1 & 3, raw & 1
        twice = fraction if exponent == 0 else (2 + fraction) << (exponent - 1)
        return -twice if raw & 8 else twice
    number = raw - (1 << bits) if raw >> (bits - 1) else raw
    return 2 * number + 1 if kind == "midrise" else number


@pytest.mark.parametrize("name", NAMES)
def test_images_hold_the_codes_bit_for_bit(tmp_path: Path, name: str) -> None:
    linear = made(name)
    held = stored(linear, tmp_path)
    assert [c for c in verify(held, tmp_path) if not c.passed] == []
    np.testing.assert_array_equal(read_codes(held, tmp_path)[:, :70], linear.matrix.codes)
    lines = (tmp_path / "rom/m.l/tile_1_1.hex").read_text().splitlines()
    for row in (0, 43):
        word = int(lines[row], 16)
        found = [field_of(name, word, place) for place in range(6)]
        assert found == linear.matrix.codes[256 + row, 64:70].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [0, 37])
def test_the_simulated_layer_is_exact(tmp_path: Path, name: str, group: int) -> None:
    linear = made(name, 90, 20, group)
    layer = RomLinear(stored(linear, tmp_path))
    x = np.random.default_rng(1).standard_normal((5, 90)).astype(np.float32)
    codes = np.clip(np.rint(x / np.float32(0.02)), -127, 127).astype(np.int64)
    size = linear.matrix.group
    truth = np.zeros((5, 20))
    for index, start in enumerate(range(0, 90, size)):
        part = slice(start, start + size)
        whole = codes[:, part] @ linear.matrix.codes[part].astype(np.int64)
        truth += whole * linear.matrix.scale[index].astype(np.float64)
        found = layer.integers(torch.from_numpy(codes.astype(np.float32)))[index]
        np.testing.assert_array_equal(found.numpy().astype(np.int64), whole)
    y = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, truth * np.float32(0.02), rtol=1e-5, atol=1e-5)


def test_area_and_memory_follow_the_bits_stored() -> None:
    area, memory = {}, {}
    for name in ("int 8", "int 4", "int 3", "int 2", "ternary 2", "mxfp4 4", "nvfp4 4"):
        summary = lower(made(name, 512, 128), TECH).summary()
        report = TARGET.cost([summary], [], TECH, Workload("decode", 64, users=1))
        area[name] = report["area__total"].typical
        memory[name] = report["memory__weights"].typical / (512 * 128)
    assert memory["int 4"] == 4
    assert memory["mxfp4 4"] == 4.25
    assert memory["nvfp4 4"] == 4.5
    assert memory["ternary 2"] == 8 * 13 / 64  # five in a byte, 13 bytes for 64 outputs
    order = ["ternary 2", "int 2", "int 3", "int 4", "mxfp4 4", "nvfp4 4", "int 8"]
    assert sorted(area, key=area.__getitem__) == order


def test_a_damaged_scale_image_is_seen(tmp_path: Path) -> None:
    held = stored(made("mxfp4 4"), tmp_path)
    path = tmp_path / "rom/m.l/scales.hex"
    text = bytearray(path.read_bytes())
    text[0] = ord("1") if text[0] != ord("1") else ord("2")
    path.write_bytes(bytes(text))
    wrong = [c for c in verify(held, tmp_path) if not c.passed]
    assert [c.value for c in wrong] == [1.0]
