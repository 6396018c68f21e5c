"""Weights that com.microsoft operators hold packed, as functions that unpack them when asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Floats = npt.NDArray[np.floating]
BITS = (2, 4, 8)


class PackedWeight:
    """The weight of a MatMulNBits as a function that unpacks it to ``[inputs, outputs]`` floats.

    ``w[k, n] = (q[n, k] - zero[n, k // block]) * scale[n, k // block]``; low bits first; measured
    bit-exact against ONNX Runtime 1.31.

    Args:
        codes: uint8 ``[outputs, blocks, block * bits / 8]``.
        scales: ``[outputs * blocks]``, its type is the result's.
        zeros: uint8, packed per row, or floats ``[outputs * blocks]``, or None for mid-range.
        groups: the block of each input (g_idx), or None for consecutive ones.
    """

    def __init__(
        self,
        codes: ir.TensorProtocol,
        scales: ir.TensorProtocol,
        zeros: ir.TensorProtocol | None,
        *,
        inputs: int,
        outputs: int,
        bits: int,
        block: int,
        groups: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.codes, self.scales, self.zeros, self.groups = codes, scales, zeros, groups
        self.inputs, self.outputs, self.bits, self.block = inputs, outputs, bits, block
        self.blocks = -(-inputs // block)
        self.dtype = scales.dtype

    def __call__(self) -> ir.TensorProtocol:
        """The dequantised weight; nothing is kept."""
        scales = self.scales.numpy().reshape(self.outputs, self.blocks)
        codes = unpack(self.codes.numpy().reshape(self.outputs, -1), self.bits)
        codes = codes[:, : self.inputs].astype(scales.dtype)
        of = self.groups if self.groups is not None else np.arange(self.inputs) // self.block
        zeros = self._zero_points().astype(scales.dtype)
        full = (codes - (zeros[:, of] if zeros.ndim else zeros)) * scales[:, of]
        return ir.Tensor(np.ascontiguousarray(full.T), dtype=self.dtype)

    def _zero_points(self) -> np.ndarray:
        if self.zeros is None:
            return np.array(1 << (self.bits - 1))
        zeros = self.zeros.numpy()
        if zeros.dtype == np.uint8:
            zeros = unpack(zeros.reshape(self.outputs, -1), self.bits)[:, : self.blocks]
        return zeros.reshape(self.outputs, self.blocks)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """``uint8[rows, n]`` of `bits`-bit numbers, low bits first, to ``uint8[rows, 8 n / bits]``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(len(packed), -1)


@dataclass(frozen=True)
class PackedStack:
    """The weights of the experts of a QMoE: ``[experts, rows, columns]`` floats when called.

    Args:
        codes: uint8 ``[experts, rows, columns * bits / 8]``.
        scales: ``[experts, rows]``, or ``[experts, rows, columns / block]``.
        zeros: packed uint8 ``[experts, rows * bits / 8]``, or for blocks ``[experts, rows,
            columns / block * bits / 8]``; None for mid-range.
        shape: experts, rows, columns.
        bits: of a code: 2, 4 or 8.
        block: codes with one scale, along the columns; 0 for a whole row.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    shape: tuple[int, int, int]
    bits: int
    block: int

    def __call__(self) -> ir.TensorProtocol:
        """The dequantised stack; nothing is kept."""
        experts, rows, columns = self.shape
        scales = self.scales.numpy().reshape(experts, rows, -1)
        blocks = scales.shape[-1]
        codes = unpack(self.codes.numpy().reshape(experts * rows, -1), self.bits)
        codes = codes.reshape(experts, rows, blocks, columns // blocks).astype(scales.dtype)
        full = (codes - self._zero_points(blocks).astype(scales.dtype)) * scales[..., None]
        return ir.Tensor(np.ascontiguousarray(full.reshape(self.shape)), dtype=self.scales.dtype)

    def _zero_points(self, blocks: int) -> np.ndarray:
        experts, rows, _ = self.shape
        if self.zeros is None:
            return np.array(1 << (self.bits - 1))
        packed = self.zeros.numpy()
        lines = experts * rows if self.block else experts
        zeros = unpack(packed.reshape(lines, -1), self.bits)
        zeros = zeros[:, : blocks if self.block else rows]
        return zeros.reshape(experts, rows, blocks if self.block else 1, 1)


FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
"""Magnitudes of the first eight codes of bitsandbytes' FP4; the others are their negatives."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen levels of NF4: quantiles of the normal distribution (Dettmers 2023, appendix E)."""


@dataclass(frozen=True)
class TableWeight:
    """The weight of a MatMulBnb4: ``[inputs, outputs]`` floats when called.

    Args:
        codes: uint8 ``[ceil(outputs * inputs / 2)]``, the high half first, rows of outputs.
        peaks: ``[ceil(outputs * inputs / block)]``, the factor of each block.
        inputs, outputs: of the product.
        block: consecutive codes with one factor.
        normal: whether the levels are NF4, else FP4.
    """

    codes: ir.TensorProtocol
    peaks: ir.TensorProtocol
    inputs: int
    outputs: int
    block: int
    normal: bool

    def __call__(self) -> ir.TensorProtocol:
        """The dequantised weight; nothing is kept."""
        peaks = self.peaks.numpy().reshape(-1)
        half = np.asarray(FP4)
        levels = np.asarray(NF4) if self.normal else np.concatenate([half, -half])
        packed = self.codes.numpy().reshape(-1)
        count = self.inputs * self.outputs
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]
        full = levels.astype(np.float32)[codes] * np.repeat(peaks, min(self.block, count))[:count]
        matrix = full.astype(peaks.dtype).reshape(self.outputs, self.inputs)
        return ir.Tensor(np.ascontiguousarray(matrix.T), dtype=self.peaks.dtype)


@dataclass(frozen=True)
class PackedTable:
    """The table of a GatherBlockQuantized as floats when called.

    Args:
        codes: uint8 packed along the last axis, or int4 or uint4.
        scales: as many as blocks along `axis`.
        zeros: of the type of the codes (packed if those are), or None.
        shape: of the table.
        axis: the axis that is cut into blocks.
        bits: of a packed code.
        block: codes with one scale.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    shape: tuple[int, ...]
    axis: int
    bits: int
    block: int

    def __call__(self) -> ir.TensorProtocol:
        """The dequantised table; nothing is kept."""
        scales = self.scales.numpy()
        codes = self._numbers(self.codes, self.shape[-1])
        full = codes.astype(scales.dtype) - self._zero_points(scales)
        return ir.Tensor(full * self._spread(scales), dtype=self.scales.dtype)

    def _numbers(self, tensor: ir.TensorProtocol, width: int) -> np.ndarray:
        array = tensor.numpy()
        if tensor.dtype != ir.DataType.UINT8:
            return array.astype(np.int64)
        lines = unpack(array.reshape(-1, array.shape[-1]), self.bits)
        return lines[:, :width].reshape(*array.shape[:-1], width)

    def _zero_points(self, scales: np.ndarray) -> np.ndarray:
        if self.zeros is None:
            middle = 1 << (self.bits - 1) if self.codes.dtype == ir.DataType.UINT8 else 0
            return np.asarray(middle, scales.dtype)
        zeros = self._numbers(self.zeros, scales.shape[-1])
        return self._spread(zeros.astype(scales.dtype))

    def _spread(self, array: np.ndarray) -> np.ndarray:
        """One number for each code of its block."""
        length = self.shape[self.axis]
        wide = np.repeat(array, min(self.block, length), axis=self.axis)
        return np.take(wide, np.arange(length), axis=self.axis)
