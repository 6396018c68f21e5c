"""The array library of the operators' meanings for torch tensors, with torch's fast kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from pfmc.errors import InputError
from pfmc.ir.meaning import Array, Arrays, register

_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}
_WORKING = frozenset({torch.float32, torch.float16, torch.bfloat16})


class _Straight(torch.autograd.Function):
    """Fake quantisation whose gradient passes straight through inside the clipping range.

    Bengio, Leonard and Courville 2013, arXiv:1308.3432; with zero gradient where it clips.
    """

    @staticmethod
    def forward(ctx: Any, x: Array, scale: Array, top: float) -> Array:
        ratio = x / scale
        ctx.save_for_backward(ratio.abs() <= top)
        return ratio.round_().clamp_(-top, top) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Array) -> tuple[Array, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def to_torch(value: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A torch copy of `value`; bfloat16 is kept, 4-bit and 2-bit codes widen to 8 bits."""
    value = np.asarray(value)
    name = value.dtype.name
    if name == "bfloat16":
        made = torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    elif name in ("int4", "int2"):
        made = torch.from_numpy(value.astype(np.int8))
    elif name in ("uint4", "uint2"):
        made = torch.from_numpy(value.astype(np.uint8))
    elif name.startswith("float") and name not in ("float16", "float32", "float64"):
        made = torch.from_numpy(value.astype(np.float32))
    else:
        made = torch.from_numpy(np.array(value, order="C"))
    return made if dtype is None else made.to(dtype)


class TorchArrays(Arrays):
    """The calls the operators make, on torch tensors.

    Args:
        device: where constants are made.
        floating: type that float32, float16 and bfloat16 values take; None keeps them.
    """

    name = "torch"

    sqrt = staticmethod(torch.sqrt)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sin = staticmethod(torch.sin)
    cos = staticmethod(torch.cos)
    tan = staticmethod(torch.tan)
    tanh = staticmethod(torch.tanh)
    erf = staticmethod(torch.erf)
    abs = staticmethod(torch.abs)
    sign = staticmethod(torch.sign)
    floor = staticmethod(torch.floor)
    ceil = staticmethod(torch.ceil)
    round = staticmethod(torch.round)
    isnan = staticmethod(torch.isnan)
    isinf = staticmethod(torch.isinf)
    logical_not = staticmethod(torch.logical_not)
    minimum = staticmethod(torch.minimum)
    maximum = staticmethod(torch.maximum)
    where = staticmethod(torch.where)
    matmul = staticmethod(torch.matmul)
    einsum = staticmethod(torch.einsum)
    pow = staticmethod(torch.pow)
    remainder = staticmethod(torch.remainder)
    fmod = staticmethod(torch.fmod)
    sigmoid = staticmethod(torch.sigmoid)
    silu = staticmethod(functional.silu)

    def __init__(
        self, device: torch.device | str = "cpu", floating: torch.dtype | None = None
    ) -> None:
        self.device = torch.device(device)
        self.floating = floating

    def dtype(self, kind: ir.DataType) -> torch.dtype:
        """The torch type of the ONNX type `kind`."""
        if kind not in _TYPES:
            raise InputError(f"torch has no element type for ONNX {kind}")
        found = _TYPES[kind]
        return self.floating if self.floating is not None and found in _WORKING else found

    def astype(self, x: Array, dtype: Any) -> Array:
        """`x` converted to the torch type `dtype`."""
        return x.to(dtype)

    def asarray(self, value: np.ndarray) -> Array:
        """`value` as a tensor on this library's device, in its floating type."""
        made = to_torch(value)
        if self.floating is not None and made.dtype in _WORKING:
            made = made.to(self.floating)
        return made.to(self.device)

    def is_float(self, x: Array) -> bool:
        """Whether `x` holds floating-point numbers."""
        return bool(x.dtype.is_floating_point)

    def is_bool(self, x: Array) -> bool:
        """Whether `x` holds booleans."""
        return bool(x.dtype == torch.bool)

    def arange(self, stop: int, like: Array) -> Array:
        """``0 .. stop - 1`` as int64 on the device of `like`."""
        return torch.arange(stop, device=like.device)

    def full(self, shape: Sequence[int], value: float, dtype: Any, like: Array) -> Array:
        """A tensor filled with `value` on the device of `like`."""
        return torch.full(tuple(shape), value, dtype=dtype, device=like.device)

    def permute_dims(self, x: Array, axes: Sequence[int]) -> Array:
        """A view of `x` with its axes in the order `axes`."""
        return x.permute(axes)

    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array:
        """A view of `x` repeated to `shape`."""
        return x.expand(tuple(shape))

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """`arrays` laid end to end along `axis`."""
        return torch.cat(tuple(arrays), axis)

    def split(self, x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        """Views of `x` cut along `axis` into parts of `sizes`."""
        return list(torch.split(x, list(sizes), axis))

    def tile(self, x: Array, repeats: Sequence[int]) -> Array:
        """`x` repeated as a whole."""
        return torch.tile(x, tuple(repeats))

    def repeat(self, x: Array, times: int, axis: int) -> Array:
        """Each slice of `x` along `axis` repeated `times` times in place."""
        return torch.repeat_interleave(x, times, axis)

    def triangle(self, x: Array, diagonal: int, upper: bool) -> Array:
        """The upper or lower triangle of the last two axes; zero elsewhere."""
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    def pad(self, x: Array, widths: Sequence[tuple[int, int]], mode: str, value: float) -> Array:
        """`x` padded on each axis; mode constant, edge or reflect."""
        flat = [width for pair in reversed(widths) for width in pair]
        if mode == "constant":
            return functional.pad(x, flat, value=value)
        if mode == "wrap":
            raise InputError("Pad with mode 'wrap' is not supported on torch")
        while len(flat) > 2 and not any(flat[-2:]):
            flat = flat[:-2]
        return functional.pad(x, flat, mode="replicate" if mode == "edge" else mode)

    def index(self, indices: Array, like: Array) -> Array:
        """`indices` as a tensor on the device of `like`."""
        if isinstance(indices, (np.ndarray, np.generic)):
            return torch.as_tensor(np.ascontiguousarray(indices), device=like.device).reshape(
                indices.shape
            )
        return indices

    def take_along(self, x: Array, indices: Array, axis: int) -> Array:
        """ONNX GatherElements."""
        indices = torch.where(indices < 0, indices + x.shape[axis], indices)
        return torch.gather(x, axis, indices.long())

    def put(self, x: Array, place: tuple[Array, ...], updates: Array, how: str) -> Array:
        """A copy of `x` with ``x[place]`` set to, or increased by, `updates`."""
        if how not in ("none", "add"):
            raise InputError(f"Scatter with reduction {how!r} is not supported on torch")
        return x.index_put(place, updates, accumulate=how == "add")

    def cumsum(self, x: Array, axis: int) -> Array:
        """Running sums along `axis`, in the type of `x`."""
        return torch.cumsum(x, axis, dtype=x.dtype)

    def flip(self, x: Array, axis: int) -> Array:
        """`x` backwards along `axis`."""
        return torch.flip(x, (axis,))

    def argsort(self, x: Array, axis: int, descending: bool) -> Array:
        """Stable order along `axis`; among equals the lower index first."""
        return torch.argsort(x, dim=axis, descending=descending, stable=True)

    def argmax(self, x: Array, axis: int) -> Array:
        """Index of the greatest element along `axis`, int64."""
        return torch.argmax(x, axis)

    def nonzero(self, x: Array) -> Array:
        """Indices of the non-zero elements, ``[rank, count]`` int64."""
        return torch.nonzero(x).T

    def sum(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Sum over `axis`, in the type of `x`."""
        return torch.sum(x, axis, keepdim=keepdims, dtype=x.dtype) if axis else x

    def mean(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Mean over `axis`."""
        return torch.mean(x, axis, keepdim=keepdims) if axis else x

    def max(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Greatest element over `axis`."""
        return torch.amax(x, axis, keepdims)

    def min(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Least element over `axis`."""
        return torch.amin(x, axis, keepdims)

    def prod(self, x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
        """Product over `axis`, in the type of `x`."""
        for one in sorted((a % x.ndim for a in axis), reverse=True):
            x = torch.prod(x, one, keepdim=keepdims, dtype=x.dtype)
        return x

    def divide_integers(self, a: Array, b: Array) -> Array:
        """Integer division rounding towards zero."""
        return torch.div(a, b, rounding_mode="trunc")

    def quantise(self, x: Array, scale: Array, top: float) -> Array:
        """``clip(round(x / scale), -top, top) * scale``; the gradient passes straight through."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Straight.apply(x, scale, top)  # type: ignore[no-untyped-call]
        return torch.div(x, scale).round_().clamp_(-top, top).mul_(scale)

    def linear(self, x: Array, weight: Array, bias: Array) -> Array:
        """``x @ weight + bias`` with weight ``[in, out]``."""
        return functional.linear(x, weight.T, bias)

    def gelu(self, x: Array, tanh: bool) -> Array:
        """Gaussian error linear unit."""
        return functional.gelu(x, approximate="tanh" if tanh else "none")

    def softmax(self, x: Array, axis: int) -> Array:
        """``exp(x) / sum(exp(x))`` along `axis`."""
        return torch.softmax(x, axis)

    def log_softmax(self, x: Array, axis: int) -> Array:
        """The logarithm of `softmax`."""
        return torch.log_softmax(x, axis)

    def layer_norm(
        self, x: Array, scale: Array, bias: Array | None, rank: int, epsilon: float
    ) -> Array:
        """LayerNormalization over the last `rank` axes."""
        shape = x.shape[x.ndim - rank :]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return functional.layer_norm(x, shape, scale, bias, epsilon)
        y = functional.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    def rms_norm(self, x: Array, scale: Array, rank: int, epsilon: float) -> Array:
        """RMSNormalization over the last `rank` axes."""
        shape = x.shape[x.ndim - rank :]
        if scale.shape == shape:
            return functional.rms_norm(x, shape, scale, epsilon)
        return functional.rms_norm(x, shape, None, epsilon) * scale

    def attention(
        self, q: Array, k: Array, v: Array, bias: Array | None, causal: bool, scale: float
    ) -> Array | None:
        """torch's fused attention; a query that may see nothing yields zero."""
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(q.dtype)
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def convolve(
        self,
        x: Array,
        weight: Array,
        stride: Sequence[int],
        dilation: Sequence[int],
        group: int,
    ) -> Array:
        """Convolution of the already padded `x`."""
        kernels = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
        run = kernels[len(stride)]
        return run(x, weight, None, list(stride), 0, list(dilation), group)


TORCH = TorchArrays()
register(torch.Tensor, TORCH)
