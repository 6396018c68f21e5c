"""The array library under the operators: the calls they need, in numpy; torch brings its own.

`Arrays` is numpy. `pfmc.distill.tensors` subclasses it for torch and calls `register`, so that this
room never imports torch. Names follow the array API standard where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from pfmc.errors import InternalError

Array: TypeAlias = Any
"""A numpy array, or what a registered library calls an array (``torch.Tensor``)."""


def _erf(x: Array) -> Array:
    from scipy.special import erf

    wide = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    return np.asarray(erf(wide)).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(x.dtype)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _einsum(equation: str, *inputs: Array) -> Array:
    if inputs[0].dtype.kind == "V":  # numpy's einsum does not know bfloat16
        wide = [x.astype(np.float32) for x in inputs]
        return np.asarray(np.einsum(equation, *wide)).astype(inputs[0].dtype)
    return np.einsum(equation, *inputs)


def integers(x: Array) -> list[int]:
    """The elements of the small integer array `x` (any rank) as Python integers."""
    listed = x.reshape(-1).tolist()
    return [int(item) for item in listed] if listed and not isinstance(listed[0], int) else listed


def _extreme(kind: np.dtype[Any], sign: int) -> Any:
    """The greatest (`sign` 1) or least (-1) number of a type."""
    if kind.kind == "b":
        return sign > 0
    if kind.kind in "iu":
        return np.iinfo(kind).max if sign > 0 else np.iinfo(kind).min
    return kind.type(sign * math.inf)


class Arrays:
    """The calls the operators make, on numpy arrays."""

    name = "numpy"

    sqrt: Callable[..., Array] = staticmethod(np.sqrt)
    exp: Callable[..., Array] = staticmethod(np.exp)
    log: Callable[..., Array] = staticmethod(np.log)
    sin: Callable[..., Array] = staticmethod(np.sin)
    cos: Callable[..., Array] = staticmethod(np.cos)
    tan: Callable[..., Array] = staticmethod(np.tan)
    tanh: Callable[..., Array] = staticmethod(np.tanh)
    erf: Callable[..., Array] = staticmethod(_erf)
    abs: Callable[..., Array] = staticmethod(np.abs)
    sign: Callable[..., Array] = staticmethod(np.sign)
    floor: Callable[..., Array] = staticmethod(np.floor)
    ceil: Callable[..., Array] = staticmethod(np.ceil)
    round: Callable[..., Array] = staticmethod(np.round)
    isnan: Callable[..., Array] = staticmethod(np.isnan)
    isinf: Callable[..., Array] = staticmethod(np.isinf)
    logical_not: Callable[..., Array] = staticmethod(np.logical_not)
    minimum: Callable[..., Array] = staticmethod(np.minimum)
    maximum: Callable[..., Array] = staticmethod(np.maximum)
    where: Callable[..., Array] = staticmethod(np.where)
    matmul: Callable[..., Array] = staticmethod(np.matmul)
    einsum: Callable[..., Array] = staticmethod(_einsum)
    pow: Callable[..., Array] = staticmethod(np.power)
    remainder: Callable[..., Array] = staticmethod(np.mod)
    fmod: Callable[..., Array] = staticmethod(np.fmod)
    sigmoid: Callable[..., Array] = staticmethod(_sigmoid)
    silu: Callable[..., Array] = staticmethod(_silu)

    # -- types and making ---------------------------------------------------------------------

    def dtype(self, kind: ir.DataType) -> Any:
        """This library's name of the ONNX type `kind`."""
        return kind.numpy()

    def astype(self, x: Array, dtype: Any) -> Array:
        """`x` with the elements converted to `dtype` (a type of this library); may share memory."""
        return x.astype(dtype, copy=False)

    def asarray(self, value: np.ndarray) -> Array:
        """`value` as an array of this library."""
        return value

    def is_float(self, x: Array) -> bool:
        """Whether `x` holds floating-point numbers."""
        return x.dtype.kind not in "iub"

    def is_bool(self, x: Array) -> bool:
        """Whether `x` holds booleans."""
        return bool(x.dtype == np.bool_)

    def arange(self, stop: int, like: Array) -> Array:
        """``0 .. stop - 1`` as int64 where `like` lives."""
        return np.arange(stop, dtype=np.int64)

    def full(self, shape: Sequence[int], value: float, dtype: Any, like: Array) -> Array:
        """An array filled with `value`, where `like` lives."""
        return np.full(shape, value, dtype=dtype)

    # -- shape --------------------------------------------------------------------------------

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """`x` with another shape; one dimension may be -1."""
        return x.reshape(shape)

    def permute_dims(self, x: Array, axes: Sequence[int]) -> Array:
        """`x` with its axes in the order `axes`."""
        return x.transpose(axes)

    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array:
        """`x` repeated to `shape`."""
        return np.broadcast_to(x, shape)

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """`arrays` laid end to end along `axis`."""
        return np.concatenate(arrays, axis=axis)

    def split(self, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        """`x` cut along `axis` into parts of `sizes`."""
        return np.split(x, np.cumsum(sizes)[:-1], axis=axis)

    def tile(self, x: Array, repeats: Sequence[int]) -> Array:
        """`x` repeated as a whole."""
        return np.tile(x, repeats)

    def repeat(self, x: Array, times: int, axis: int) -> Array:
        """Each slice of `x` along `axis` repeated `times` times in place."""
        return np.repeat(x, times, axis=axis)

    def triangle(self, x: Array, diagonal: int, upper: bool) -> Array:
        """The upper or lower triangle of the last two axes; zero elsewhere."""
        return np.triu(x, diagonal) if upper else np.tril(x, diagonal)

    def pad(self, x: Array, widths: Sequence[tuple[int, int]], mode: str, value: float) -> Array:
        """`x` padded (by a negative width: cut) on each axis: constant, edge, reflect or wrap."""
        cut = tuple(
            slice(max(0, -a), n + min(0, b)) for n, (a, b) in zip(x.shape, widths, strict=True)
        )
        grow = [(max(0, a), max(0, b)) for a, b in widths]
        if mode == "constant":
            return np.pad(x[cut], grow, constant_values=value)
        return np.pad(x[cut], grow, mode=mode)  # type: ignore[call-overload]

    # -- indexing -----------------------------------------------------------------------------

    def index(self, indices: Array, like: Array) -> Array:
        """`indices` in the form that ``like[indices]`` takes."""
        return indices

    def take_along(self, x: Array, indices: Array, axis: int) -> Array:
        """ONNX GatherElements: `indices` may be smaller than `x` on the other axes."""
        indices = self.where(indices < 0, indices + x.shape[axis], indices)
        if x.shape != indices.shape:
            cut = [slice(None) if d == axis else slice(n) for d, n in enumerate(indices.shape)]
            x = x[tuple(cut)]
        return np.take_along_axis(x, indices, axis=axis)

    def put(self, x: Array, place: tuple[Array, ...], updates: Array, how: str) -> Array:
        """A copy of `x`, ``x[place]`` combined with `updates`; `how` none, add, mul, min, max."""
        made = np.array(x)
        combine = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
        if how == "none":
            made[place] = updates
        else:
            combine[how].at(made, place, updates)
        return made

    def cumsum(self, x: Array, axis: int) -> Array:
        """Running sums along `axis`, in the type of `x`."""
        return np.cumsum(x, axis=axis, dtype=x.dtype)

    def flip(self, x: Array, axis: int) -> Array:
        """`x` backwards along `axis`."""
        return np.flip(x, axis)

    def argsort(self, x: Array, axis: int, descending: bool) -> Array:
        """Stable order along `axis`; among equals the lower index first."""
        if not descending:
            return np.argsort(x, axis=axis, kind="stable")
        last = x.shape[axis] - 1
        return last - np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)

    def argmax(self, x: Array, axis: int) -> Array:
        """Index of the first greatest element along `axis`, int64."""
        return np.argmax(x, axis=axis).astype(np.int64)

    def nonzero(self, x: Array) -> Array:
        """Indices of the non-zero elements, ``[rank, count]`` int64."""
        return np.stack(np.nonzero(np.atleast_1d(x))).astype(np.int64)

    # -- reductions ---------------------------------------------------------------------------

    def sum(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Sum over `axis`, in the type of `x`."""
        return np.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype)

    def mean(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Mean over `axis`, in the type of `x`."""
        return np.mean(x, axis=axis, keepdims=keepdims, dtype=x.dtype)

    def max(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Greatest element over `axis`; of none it is the least of the type."""
        if x.size == 0:
            return np.max(x, axis=axis, keepdims=keepdims, initial=_extreme(x.dtype, -1))
        return np.max(x, axis=axis, keepdims=keepdims)

    def min(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Least element over `axis`; of none it is the greatest of the type."""
        if x.size == 0:
            return np.min(x, axis=axis, keepdims=keepdims, initial=_extreme(x.dtype, 1))
        return np.min(x, axis=axis, keepdims=keepdims)

    def prod(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Product over `axis`, in the type of `x`."""
        return np.prod(x, axis=axis, keepdims=keepdims, dtype=x.dtype)

    # -- numbers ------------------------------------------------------------------------------

    def divide_integers(self, a: Array, b: Array) -> Array:
        """Integer division rounding towards zero, as ONNX Div asks."""
        quotient = np.floor_divide(a, b)
        inexact = (quotient * b != a) & ((a < 0) != (b < 0))
        return (quotient + inexact).astype(quotient.dtype)

    def quantise(self, x: Array, scale: Array, top: float) -> Array:
        """``clip(round(x / scale), -top, top) * scale``; round half to even."""
        limit = np.asarray(top, dtype=x.dtype)
        return np.clip(np.round(x / scale), -limit, limit) * scale

    def linear(self, x: Array, weight: Array, bias: Array) -> Array:
        """``x @ weight + bias`` with weight ``[in, out]``."""
        return np.matmul(x, weight) + bias

    # -- neural: one formula here, a fast kernel elsewhere ------------------------------------

    def gelu(self, x: Array, tanh: bool) -> Array:
        """Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
        one = x.dtype.type(1)
        if tanh:
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
            return (0.5 * x * (one + self.tanh(inner))).astype(x.dtype)
        return (0.5 * x * (one + self.erf(x * math.sqrt(0.5)))).astype(x.dtype)

    def softmax(self, x: Array, axis: int) -> Array:
        """``exp(x) / sum(exp(x))`` along `axis`, shifted by the maximum."""
        raised = np.exp(x - np.max(x, axis=axis, keepdims=True))
        return raised / np.sum(raised, axis=axis, keepdims=True)

    def log_softmax(self, x: Array, axis: int) -> Array:
        """The logarithm of `softmax`."""
        shifted = x - np.max(x, axis=axis, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))

    def layer_norm(
        self, x: Array, scale: Array, bias: Array | None, rank: int, epsilon: float
    ) -> Array:
        """LayerNormalization over the last `rank` axes (arXiv:1607.06450)."""
        axes = tuple(range(x.ndim - rank, x.ndim))
        centred = x - np.mean(x, axis=axes, keepdims=True)
        variance = np.mean(centred * centred, axis=axes, keepdims=True)
        y = centred / np.sqrt(variance + x.dtype.type(epsilon)) * scale
        return y if bias is None else y + bias

    def rms_norm(self, x: Array, scale: Array, rank: int, epsilon: float) -> Array:
        """RMSNormalization over the last `rank` axes (arXiv:1910.07467)."""
        axes = tuple(range(x.ndim - rank, x.ndim))
        square = np.mean(x * x, axis=axes, keepdims=True)
        return x / np.sqrt(square + x.dtype.type(epsilon)) * scale

    def attention(
        self, q: Array, k: Array, v: Array, bias: Array | None, causal: bool, scale: float
    ) -> Array | None:
        """A fast kernel for plain attention, or None: then the operator's own formula runs.

        Args:
            q: ``[B, Hq, S, D]``; k ``[B, Hkv, T, D]``; v ``[B, Hkv, T, Dv]``.
            bias: boolean (True: attend) or additive mask, broadcastable to ``[B, Hq, S, T]``.
            causal: query i sees keys 0..i (no past).
            scale: factor on the scores.
        """
        return None

    def convolve(
        self,
        x: Array,
        weight: Array,
        stride: Sequence[int],
        dilation: Sequence[int],
        group: int,
    ) -> Array:
        """Convolution of the already padded ``x[N, C, *D]`` with ``weight[M, C/group, *K]``."""
        rank = len(stride)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        axes = tuple(range(2, 2 + rank))
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        pick = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
        windows = windows[(*pick, *(slice(None, None, d) for d in dilation))]
        n, _, *sides = windows.shape[: 2 + rank]
        windows = windows.reshape(n, group, weight.shape[1], *windows.shape[2:])
        kernel = weight.reshape(group, -1, *weight.shape[1:])
        i = "abcdef"[:rank]
        j = "uvwxyz"[:rank]
        y = np.einsum(f"ngc{i}{j},gmc{j}->ngm{i}", windows, kernel, optimize=True)
        return np.ascontiguousarray(y).reshape(n, weight.shape[0], *sides)


NUMPY = Arrays()
_registered: dict[type, Arrays] = {np.ndarray: NUMPY}


def register(kind: type, arrays: Arrays) -> None:
    """Makes `arrays` the library for values of type `kind`."""
    _registered[kind] = arrays


def arrays_of(values: Sequence[Array | None]) -> Arrays:
    """The library for `values`: numpy unless one of them belongs to another."""
    for value in values:
        if value is None or isinstance(value, (np.ndarray, np.generic)):
            continue
        for kind, arrays in _registered.items():
            if isinstance(value, kind):
                return arrays
        raise InternalError(
            f"no array library is registered for {type(value).__name__}",
            mend="import pfmc.distill before giving torch tensors to an operator",
        )
    return NUMPY
