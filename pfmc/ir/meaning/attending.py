"""Attention (opset 23 to 25) and RotaryEmbedding (opset 23), as onnx's reference defines them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.meaning.attributes import Array, Arrays, Maker, Run, attribute, describe, integer, real


@dataclass(frozen=True)
class _Settings:
    """The attributes of one Attention node."""

    causal: bool
    scale: float | None
    softcap: float
    q_heads: int
    kv_heads: int
    left: int
    right: int
    mode: int
    outputs: int
    precision: ir.DataType | None


def _settings(node: ir.Node) -> _Settings:
    scale, precision = attribute(node, "scale"), attribute(node, "softmax_precision")
    return _Settings(
        causal=integer(node, "is_causal", 0) == 1,
        scale=None if scale is None else float(scale),
        softcap=real(node, "softcap", 0.0),
        q_heads=integer(node, "q_num_heads", 0),
        kv_heads=integer(node, "kv_num_heads", 0),
        left=integer(node, "left_window_size", -1),
        right=integer(node, "right_window_size", -1),
        mode=integer(node, "qk_matmul_output_mode", 0),
        outputs=max((i + 1 for i, v in enumerate(node.outputs) if v.name), default=1),
        precision=ir.DataType(precision) if precision else None,
    )


def _heads(x: Array, heads: int, xp: Arrays) -> Array:
    """``[B, S, heads * D]`` as ``[B, heads, S, D]``."""
    batch, positions, width = x.shape
    return xp.permute_dims(xp.reshape(x, [batch, positions, heads, width // heads]), (0, 2, 1, 3))


def _allowed(
    s: _Settings, rows: int, columns: int, past: int, filled: Array | None, like: Array, xp: Arrays
) -> Array | None:
    """Which keys each query may see by the causal, window and length rules; None if all."""
    plain = not s.causal or (rows == 1 and filled is None and past + 1 >= columns)
    if plain and s.left < 0 and s.right < 0 and filled is None:
        return None
    key = xp.reshape(xp.arange(columns, like), [1, 1, 1, columns])
    query = xp.reshape(xp.arange(rows, like), [1, 1, rows, 1])
    length = None if filled is None else xp.reshape(filled, [-1, 1, 1, 1])
    query = query + (past if length is None else length - rows)
    allowed = key == key if length is None else key < length
    allowed = allowed & (key <= query) if s.causal else allowed & (query == query)
    if s.left >= 0:
        allowed = allowed & (query - key <= s.left)
    if s.right >= 0:
        allowed = allowed & (key - query <= s.right)
    return allowed


def _widen(mask: Array, columns: int, xp: Arrays) -> Array:
    """`mask` padded on its last axis so that it covers `columns` keys (the new ones hidden)."""
    missing = columns - mask.shape[-1]
    if missing <= 0 or mask.shape[-1] == 1:
        return mask
    hidden = 0 if xp.is_bool(mask) else -math.inf
    return xp.pad(mask, [*[(0, 0)] * (len(mask.shape) - 1), (0, missing)], "constant", hidden)


def _combine(mask: Array | None, allowed: Array | None, q: Array, xp: Arrays) -> Array | None:
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    if xp.is_bool(mask):
        return mask & allowed
    return xp.where(allowed, mask, xp.full((), -math.inf, q.dtype, q))


def _explicit(
    q: Array, k: Array, v: Array, bias: Array | None, scale: float, s: _Settings, xp: Arrays
) -> tuple[Array, Array]:
    """The formula itself: the output and what `qk_matmul_output_mode` asks for."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = xp.repeat(k, groups, 1), xp.repeat(v, groups, 1)
    root = math.sqrt(scale)
    scores = xp.matmul(q * root, xp.permute_dims(k, (0, 1, 3, 2)) * root)
    shown = scores
    if s.softcap > 0:
        scores = xp.tanh(scores / s.softcap) * s.softcap
        shown = scores if s.mode == 1 else shown
    blind = None
    if bias is not None:
        hidden, zero = (xp.full((), value, q.dtype, q) for value in (-math.inf, 0.0))
        bias = xp.where(bias, zero, hidden) if xp.is_bool(bias) else bias
        scores = scores + bias
        blind = xp.max(bias, (-1,), True) == -math.inf
        # a query that may see nothing yields zero, not NaN
        scores = xp.where(blind, zero, scores)
    shown = scores if s.mode == 2 else shown
    scores = scores if s.precision is None else xp.astype(scores, xp.dtype(s.precision))
    weights = xp.astype(xp.softmax(scores, -1), q.dtype)
    if blind is not None:
        weights = xp.where(blind, xp.full((), 0.0, q.dtype, q), weights)
        shown = xp.where(blind, xp.full((), -math.inf, q.dtype, q), shown) if s.mode == 2 else shown
    shown = weights if s.mode == 3 else shown
    return xp.astype(xp.matmul(weights, v), q.dtype), xp.astype(shown, q.dtype)


def _attention(node: ir.Node, xp: Arrays) -> Run:
    s = _settings(node)

    def run(
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        filled: Array | None = None,
    ) -> tuple[Array, ...]:
        flat = len(q.shape) == 3
        if flat:
            if not (s.q_heads and s.kv_heads):
                raise InputError("3-D Attention without head counts", where=describe(node))
            q, k, v = (
                _heads(x, n, xp) for x, n in ((q, s.q_heads), (k, s.kv_heads), (v, s.kv_heads))
            )
        past = 0
        if past_key is not None:
            past = past_key.shape[2]
            k, v = xp.concat([past_key, k], 2), xp.concat([past_value, v], 2)
        y, shown = _attend(q, k, v, mask, past, filled, s, xp)
        if flat:
            y = xp.permute_dims(y, (0, 2, 1, 3))
            y = xp.reshape(y, [*y.shape[:2], -1])
        return (y, k, v, shown)[: s.outputs]

    return run


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    past: int,
    filled: Array | None,
    s: _Settings,
    xp: Arrays,
) -> tuple[Array, Array]:
    scale = 1 / math.sqrt(q.shape[-1]) if s.scale is None else s.scale
    rows, columns = q.shape[2], k.shape[2]
    mask = None if mask is None else _widen(mask, columns, xp)
    simple = s.softcap == 0 and s.outputs < 4 and s.precision is None
    lean = mask is None and past == 0 and filled is None and s.left < 0 and s.right < 0
    if simple and lean and (not s.causal or rows == columns):
        y = xp.attention(q, k, v, None, s.causal and rows > 1, scale)
        if y is not None:
            return y, None
    bias = _combine(mask, _allowed(s, rows, columns, past, filled, q, xp), q, xp)
    y = xp.attention(q, k, v, bias, False, scale) if simple else None
    return _explicit(q, k, v, bias, scale, s, xp) if y is None else (y, None)


def _rotary_embedding(node: ir.Node, xp: Arrays) -> Run:
    interleaved, heads = bool(integer(node, "interleaved", 0)), integer(node, "num_heads", 0)
    partial = integer(node, "rotary_embedding_dim", 0)

    def run(x: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
        flat = len(x.shape) == 3
        shape = x.shape
        x = _heads(x, heads, xp) if flat else x
        width = partial or x.shape[-1]
        if positions is not None:
            positions = xp.index(positions, cos)
            cos, sin = cos[positions], sin[positions]
        cos, sin = (xp.reshape(t, [t.shape[0], 1, *t.shape[1:]]) for t in (cos, sin))
        turned = _turn(x[..., :width], cos, sin, interleaved, xp)
        y = xp.concat([turned, x[..., width:]], -1) if width < x.shape[-1] else turned
        return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), list(shape)) if flat else y

    return run


def _turn(x: Array, cos: Array, sin: Array, interleaved: bool, xp: Arrays) -> Array:
    if not interleaved:
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return xp.concat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    pairs = [xp.reshape(t, [*t.shape, 1]) for t in (a * cos - b * sin, b * cos + a * sin)]
    return xp.reshape(xp.concat(pairs, -1), list(x.shape))


ATTENDING: dict[tuple[str, str], Maker] = {
    ("", "Attention"): _attention,
    ("", "RotaryEmbedding"): _rotary_embedding,
}
