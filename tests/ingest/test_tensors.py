"""Tensor checks against brute force: sizes of packed types, finite numbers, masks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfmc.errors import InputError
from pfmc.ingest import tensors

onnx = pytest.importorskip("onnx")


@given(st.sampled_from(sorted(tensors.DTYPES.values())), st.lists(st.integers(0, 9), max_size=4))
def test_nbytes_is_what_onnx_ir_writes(kind: ir.DataType, dims: list[int]) -> None:
    array = np.zeros(dims, dtype=kind.numpy())
    elements = tensors.check_dims(dims, "here")
    assert tensors.nbytes(kind, elements) == len(ir.Tensor(array, dtype=kind).tobytes())


@given(st.sampled_from(sorted(tensors.DTYPES.values())), st.booleans())
def test_what_onnx_writes_is_accepted(kind: ir.DataType, raw: bool) -> None:
    if kind.bitwidth in (2, 6):  # make_tensor has no typed field for them in every release
        raw = True
    if raw:
        data = ir.Tensor(np.ones((3, 5), kind.numpy()), dtype=kind).tobytes()
        proto = onnx.TensorProto(data_type=int(kind), dims=[3, 5], raw_data=data)
    else:
        proto = onnx.helper.make_tensor("t", int(kind), [3, 5], [1] * 15)
    assert tensors.check_tensor(proto, "here") == tensors.nbytes(kind, 15)


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_offender_is_named(kind: type, bad: float) -> None:
    array = np.ones((3, 4, 5), dtype=kind)
    tensors.check_finite("w", array)
    array[1, 2, 3] = array[2, 0, 0] = bad
    with pytest.raises(InputError, match=r"tensor 'w', index \[1, 2, 3\]"):
        tensors.check_finite("w", array)


@given(hnp.arrays(np.float16, hnp.array_shapes(max_dims=3), elements=st.floats(width=16)))
def test_float16_bits_agree_with_numpy(array: np.ndarray) -> None:
    mask = array.size == 1 or bool(np.all((array == 0) | (array == -np.inf)))
    sound = bool(np.isfinite(array).all()) or (mask and not bool(np.isnan(array).any()))
    if sound:
        tensors.check_finite("w", array)
    else:
        with pytest.raises(InputError):
            tensors.check_finite("w", array)


def test_offender_in_a_later_piece_of_a_strided_view() -> None:
    base = np.zeros((3 << 21, 2), np.float32)
    base[5_000_000, 0] = np.nan
    with pytest.raises(InputError, match=r"index \[0, 5000000\]"):
        tensors.check_finite("w", base.T)


def test_masks_and_fill_values_pass() -> None:
    tensors.check_finite("fill", np.array(-np.inf, np.float32))
    tensors.check_finite("mask", np.triu(np.full((4, 4), -np.inf, np.float32), 1))
    tensors.check_finite("ids", np.arange(4))
    with pytest.raises(InputError):
        tensors.check_finite("fill", np.array([np.nan], np.float32))
    with pytest.raises(InputError):
        tensors.check_finite("bias", np.array([1.0, -np.inf], np.float32))


@given(st.lists(st.integers(-5, 1 << 62), max_size=20))
def test_dims_are_refused_or_counted_exactly(dims: list[int]) -> None:
    product = 1
    for dim in dims:
        product *= dim
    allowed = len(dims) <= tensors.MAX_RANK and all(d >= 0 for d in dims)
    if allowed and product <= tensors.MAX_ELEMENTS:
        assert tensors.check_dims(dims, "here") == product
    else:
        with pytest.raises(InputError):
            tensors.check_dims(dims, "here")
