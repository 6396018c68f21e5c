"""Constants as they are stored: views through lazy ones, samples, digests, pages given back."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfmc.ir import stored

SMAPS = Path("/proc/self/smaps")
MEGABYTES = 8


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """A mapped file of 8 MB as [2048, 2048] float16."""
    path = tmp_path / "mapped.data"
    numbers = np.tile(np.arange(1024, dtype=np.float16), 1 << 12)
    path.write_bytes(numbers.tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, np.float16).reshape(2048, 2048)


def resident() -> float:
    """Megabytes of the mapped file in memory."""
    if not SMAPS.exists():
        pytest.skip("this system does not tell which pages are resident")
    found = re.search(r"mapped\.data\n(?:.*\n)*?Rss:\s+(\d+) kB", SMAPS.read_text())
    assert found is not None
    return int(found[1]) / 1024


def test_what_was_read_is_given_back(mapped: np.ndarray) -> None:
    mapped.max()
    assert resident() > MEGABYTES / 2
    stored.release(mapped[:1024])
    half = resident()
    assert half < MEGABYTES * 0.6
    stored.release(mapped.T)
    assert resident() < 1
    assert mapped[0, 5] == 5  # it is read again when needed


def test_a_sample_reads_little_and_a_digest_keeps_little(mapped: np.ndarray) -> None:
    for array in (mapped, mapped.T):
        assert stored.sample(array)[0] == "float16"
        assert resident() < 1
        wanted = hashlib.sha256(array.tobytes()).digest()
        stored.release(array)
        assert stored.digest(array) == wanted
        assert resident() < 1


def test_memory_of_ours_is_left_alone() -> None:
    own = np.ones((1024, 1024), np.float32)
    stored.release(own)
    assert own.all()


@given(st.lists(st.integers(0, 5), max_size=3))
def test_samples_and_digests_of_any_shape(shape: list[int]) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    assert stored.sample(array) == stored.sample(array.copy())
    assert stored.digest(array) == hashlib.sha256(array.tobytes()).digest()
    if array.size:
        other = array.copy()
        other.reshape(-1)[-1] += 1
        assert stored.sample(other) != stored.sample(array)


def test_a_remembered_view_goes_before_the_lazy_tensor() -> None:
    half = np.arange(6, dtype=np.float16).reshape(2, 3)

    def read() -> ir.TensorProtocol:
        raise AssertionError("nobody needs the wide copy")

    value = ir.Value(name="w", const_value=ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([3, 2])))
    stored.remember(value, lambda: half.T)
    assert np.shares_memory(stored.numbers(value), half)
    assert stored.source(value)().dtype == np.float16
    plain = ir.Value(name="v", const_value=ir.Tensor(half))
    assert stored.numbers(plain) is half
    assert stored.source(plain)() is half
