"""The blocks that families share: norms, activations, positions, masks, attention, KV memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pfmc.errors import did_you_mean
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import BATCH, PAST, SEQUENCE, TOTAL, Dims, Graph, dims, width
from pfmc.ingest.hf.rope import Rope
from pfmc.ir import vocabulary
from pfmc.ir.vocabulary import DOMAIN

KEY_MASK, KEY_WINDOW, KEY_SINK = (
    "pfmc.mask",
    "pfmc.window",
    "pfmc.sink",
)  # as `pfmc.passes.masks` writes them
LOWEST = float(np.finfo(np.float32).min)
INT, BOOL, FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT


# -- elementwise ---------------------------------------------------------------------------------


def add(g: Graph, a: ir.Value, b: ir.Value, at: str) -> ir.Value:
    """``a + b``, of the shape of `a`."""
    return g.op("Add", [a, b], dims(a), at)


def scaled(g: Graph, x: ir.Value, factor: float, at: str) -> ir.Value:
    """``x * factor``; x itself if the factor is one."""
    if factor == 1.0:
        return x
    return g.op("Mul", [x, g.number(factor, f"times_{factor:.9g}")], dims(x), at)


def layer_norm(g: Graph, x: ir.Value, at: str, eps: float, *, bias: bool = True) -> ir.Value:
    """LayerNormalization over the last axis."""
    shape = (width(x),)
    shift = g.parameter(f"{at}.bias", shape) if bias else g.zeros(width(x))
    inputs = [x, g.parameter(f"{at}.weight", shape), shift]
    return g.op("LayerNormalization", inputs, dims(x), at, axis=-1, epsilon=eps)


def bare_norm(g: Graph, x: ir.Value, at: str, eps: float) -> ir.Value:
    """LayerNormalization over the last axis without scale and shift."""
    ones = g.constant(np.ones(width(x), np.float32), f"pfmc/ones_{width(x)}")
    inputs = [x, ones, g.zeros(width(x))]
    return g.op("LayerNormalization", inputs, dims(x), at, axis=-1, epsilon=eps)


def rms_norm(g: Graph, x: ir.Value, at: str, eps: float, *, plus: float = 0.0) -> ir.Value:
    """RMSNormalization over the last axis; `plus` is added to its stored scale."""
    scale = g.parameter(f"{at}.weight", (width(x),), plus=plus)
    return g.op("RMSNormalization", [x, scale], dims(x), at, axis=-1, epsilon=eps)


def _tanh_gelu(g: Graph, x: ir.Value, at: str) -> ir.Value:
    return g.op("Gelu", [x], dims(x), at, approximate="tanh")


def _quick_gelu(g: Graph, x: ir.Value, at: str) -> ir.Value:
    return g.op("Mul", [x, g.op("Sigmoid", [scaled(g, x, 1.702, at)], dims(x), at)], dims(x), at)


def _plain(op_type: str) -> Callable[[Graph, ir.Value, str], ir.Value]:
    return lambda g, x, at: g.op(op_type, [x], dims(x), at)


def _silu(g: Graph, x: ir.Value, at: str) -> ir.Value:
    return g.op("Swish", [x], dims(x), at)


ACTIVATIONS: dict[str, Callable[[Graph, ir.Value, str], ir.Value]] = {
    "gelu": _plain("Gelu"),
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "relu": _plain("Relu"),
    "sigmoid": _plain("Sigmoid"),
    "silu": _silu,
    "swish": _silu,
    "tanh": _plain("Tanh"),
}
"""What ``hidden_act`` may be."""


def activation(config: Config, *keys: str, default: str) -> str:
    """The configured activation, one of `ACTIVATIONS`."""
    name = config.text(*keys, default=default)
    if name not in ACTIVATIONS:
        key, _ = config.get(*keys)
        raise config.refuse(key, "is not supported", did_you_mean(name, ACTIVATIONS))
    return name


def gated(g: Graph, gate: ir.Value, up: ir.Value, kind: str, at: str) -> ir.Value:
    """``activation(gate) * up``."""
    if kind in ("silu", "swish"):
        return g.op(vocabulary.SWIGLU, [gate, up], dims(up), at, domain=DOMAIN)
    return g.op("Mul", [ACTIVATIONS[kind](g, gate, at), up], dims(up), at)


def halves(g: Graph, x: ir.Value, at: str, *sizes: int) -> list[ir.Value]:
    """`x` cut along its last axis into parts of these sizes."""
    shapes = [(*dims(x)[:-1], size) for size in sizes]
    return list(g.ops("Split", [x, g.integers(*sizes)], shapes, at, axis=-1))


# -- positions -----------------------------------------------------------------------------------


def split(c: Config, hidden: int, *keys: str) -> tuple[int, int]:
    """How many heads there are, and how wide each is."""
    heads = c.integer(*keys)
    if hidden % heads:
        raise c.refuse(keys[0], f"does not divide the width {hidden}")
    return heads, hidden // heads


def embed(g: Graph, ids: ir.Value, at: str, rows: int, columns: int) -> ir.Value:
    """Rows of the table of module `at`."""
    table = g.parameter(f"{at}.weight", (rows, columns))
    return g.op("Gather", [table, ids], (*dims(ids), columns), at, axis=0)


@dataclass
class Frame:
    """What the layers of one model share: inputs, positions, masks and rotary tables.

    Attributes:
        g: the graph; ids: its ``input_ids`` ``[batch, sequence]``.
        memory: whether there is a KV memory, for decoders.
        shown: the padding mask input ``[batch, sequence]`` of encoders, or None.
    """

    g: Graph
    ids: ir.Value
    memory: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)
    shown: ir.Value | None = None
    _made: dict[object, ir.Value] = field(default_factory=dict)

    @staticmethod
    def decoder(g: Graph, layers: int, heads: int, wide: int) -> Frame:
        """The frame of a decoder with its KV memory ``[batch, heads, past, wide]``."""
        frame = Frame(g, g.input("input_ids", (BATCH, SEQUENCE), INT))
        shape: Dims = (BATCH, heads, PAST, wide)
        for i in range(layers):
            names = (f"past_key_values.{i}.{kind}" for kind in ("key", "value"))
            key, value = (g.input(name, shape) for name in names)
            frame.memory.append((key, value))
        return frame

    @staticmethod
    def encoder(g: Graph) -> Frame:
        """The frame of an encoder with its padding mask."""
        ids = g.input("input_ids", (BATCH, SEQUENCE), INT)
        return Frame(g, ids, shown=g.input("attention_mask", (BATCH, SEQUENCE), INT))

    def _once(self, key: object, make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def size(self, of: ir.Value, axis: int) -> ir.Value:
        """One dimension as a vector ``[1]``."""
        return self._once((of, axis), lambda: self.g.op(
            "Shape", [of], (1,), "", kind=INT, start=axis, end=axis + 1
        ))  # fmt: skip

    def _scalar(self, vector: ir.Value) -> ir.Value:
        return self._once((vector, "scalar"), lambda: self.g.op(
            "Squeeze", [vector, self.g.integers(0)], (), "", kind=INT
        ))  # fmt: skip

    @property
    def total(self) -> ir.Value:
        """Past and new positions together, a scalar."""
        length = self.size(self.ids, 1)
        if not self.memory:
            return self._scalar(length)
        past = self.size(self.memory[0][0], 2)
        return self._scalar(
            self._once("sum", lambda: self.g.op("Add", [past, length], (1,), "", kind=INT))
        )

    @property
    def positions(self) -> ir.Value:
        """The places of the new tokens in the text: int64 ``[sequence]``."""
        first = self._zero
        if self.memory:
            first = self._scalar(self.size(self.memory[0][0], 2))
        return self._once("positions", lambda: self._range(first, self.total, SEQUENCE))

    @property
    def _zero(self) -> ir.Value:
        return self.g.constant(np.asarray(0, np.int64), "pfmc/from")

    def _range(self, first: ir.Value, end: ir.Value, name: str) -> ir.Value:
        step = self.g.constant(np.asarray(1, np.int64), "pfmc/by")
        return self.g.op("Range", [first, end, step], (name,), "", kind=INT)

    # -- rotary -------------------------------------------------------------------------------

    def turned(self, x: ir.Value, rope: Rope, at: str) -> ir.Value:
        """``x[B, H, S, D]`` rotated by its positions, or the first `rope.width` numbers of it."""
        cos = self._once((rope, "Cos"), lambda: self._table(rope, "Cos"))
        sin = self._once((rope, "Sin"), lambda: self._table(rope, "Sin"))
        near = int(rope.near)
        if rope.width == width(x):
            return self.g.op(
                vocabulary.ROTARY, [x, cos, sin], dims(x), at, domain=DOMAIN, interleaved=near
            )
        left, right = halves(self.g, x, at, rope.width, width(x) - rope.width)
        left = self.g.op(
            vocabulary.ROTARY, [left, cos, sin], dims(left), at, domain=DOMAIN, interleaved=near
        )
        return self.g.op("Concat", [left, right], dims(x), at, axis=-1)

    def _table(self, rope: Rope, op: str) -> ir.Value:
        """Cosine or sine ``[1, 1, sequence, width]``."""
        angles = self._once((rope, "angles"), lambda: self._angles(rope))
        wave = self.g.op(op, [angles], dims(angles), "rotary")
        wave = scaled(self.g, wave, rope.gain, "rotary")
        shape: Dims = (1, 1, *dims(wave))
        return self.g.op("Unsqueeze", [wave, self.g.integers(0, 1)], shape, "rotary")

    def _angles(self, rope: Rope) -> ir.Value:
        g, half = self.g, rope.width // 2
        column = g.op(
            "Unsqueeze", [self.positions, g.integers(1)], (SEQUENCE, 1), "rotary", kind=INT
        )
        column = g.op("Cast", [column], (SEQUENCE, 1), "rotary", to=int(FLOAT))
        product = g.op("Mul", [column, self._frequencies(rope)], (SEQUENCE, half), "rotary")
        whole: Dims = (SEQUENCE, rope.width)
        if not rope.near:
            return g.op("Concat", [product, product], whole, "rotary", axis=-1)
        pairs = g.op("Unsqueeze", [product, g.integers(2)], (SEQUENCE, half, 1), "rotary")
        pairs = g.op("Concat", [pairs, pairs], (SEQUENCE, half, 2), "rotary", axis=-1)
        return g.op("Reshape", [pairs, g.integers(-1, rope.width)], whole, "rotary")

    def _frequencies(self, rope: Rope) -> ir.Value:
        g = self.g
        short = g.constant(np.asarray(rope.frequencies, np.float32), "rotary.inv_freq")
        if rope.stretch:
            return self._stretched(rope, short)
        if not rope.long or rope.long == rope.frequencies:
            return short
        long = g.constant(np.asarray(rope.long, np.float32), "rotary.long_inv_freq")
        limit = g.constant(np.asarray(rope.limit, np.int64), "rotary.limit")
        beyond = g.op("Greater", [self.total, limit], (), "rotary", kind=BOOL)
        return g.op("Where", [beyond, long, short], (len(rope.long),), "rotary")

    def _stretched(self, rope: Rope, short: ir.Value) -> ir.Value:
        """``frequency * base_growth ** (-2 i / (width - 2))``; see `rope._dynamic`."""
        g, one = self.g, self.g.number(1.0, "one")
        length = g.op("Cast", [self.total], (), "rotary", to=int(FLOAT))
        slope = g.number(rope.stretch / rope.limit, f"slope_{rope.stretch / rope.limit:g}")
        less = g.number(rope.stretch - 1.0, f"less_{rope.stretch - 1.0:g}")
        growth = g.op("Sub", [g.op("Mul", [length, slope], (), "rotary"), less], (), "rotary")
        growth = g.op("Max", [growth, one], (), "rotary")
        powers = np.arange(len(rope.frequencies), dtype=np.float32) * (-2.0 / (rope.width - 2))
        shape: Dims = (len(rope.frequencies),)
        held = g.constant(powers.astype(np.float32), "rotary.powers")
        return g.op("Mul", [short, g.op("Pow", [growth, held], shape, "rotary")], shape, "rotary")

    # -- masks --------------------------------------------------------------------------------

    def mask(self, window: int, *, both: bool = False) -> ir.Value | None:
        """What is added to the scores, ``[1 or batch, 1, sequence, total]``, or None.

        Args:
            window: keys nearer than this are seen; 0 for all.
            both: whether the window reaches to both sides.
        """
        if self.shown is None and not window:
            return None
        return self._once(("mask", window, both), lambda: self._make_mask(window, both))

    def _make_mask(self, window: int, both: bool) -> ir.Value:
        g, shown = self.g, None
        if self.shown is not None:
            flags = g.op("Cast", [self.shown], dims(self.shown), "", kind=BOOL, to=int(BOOL))
            shape: Dims = (BATCH, 1, 1, SEQUENCE)
            shown = g.op("Unsqueeze", [flags, g.integers(1, 2)], shape, "", kind=BOOL)
        if window:
            near = self._near(window, both)
            full: Dims = (dims(shown)[0] if shown is not None else 1, 1, *dims(near)[2:])
            if shown is not None:
                near = g.op("And", [shown, near], full, "", kind=BOOL)
            shown = near
        assert shown is not None
        zero, low = g.number(0.0, "zero"), g.number(LOWEST, "lowest")
        bias = g.op("Where", [shown, zero, low], dims(shown), "")
        if window:
            return bias
        parts = [g.integers(1), g.integers(1), self.size(self.ids, 1), g.integers(1)]
        wanted = g.op("Concat", parts, (4,), "", kind=INT, axis=0)
        return g.op("Expand", [bias, wanted], (BATCH, 1, SEQUENCE, SEQUENCE), "")

    def _near(self, window: int, both: bool, *, causal: bool = False) -> ir.Value:
        """``[1, 1, sequence, total]``: whether the key is less than `window` places away.

        With `causal`, whether it also is no later; then a window of 0 is none.
        """
        g, keys = self.g, TOTAL if self.memory else SEQUENCE
        places = self._once("keys", lambda: self._range(self._zero, self.total, keys))
        column = g.op("Unsqueeze", [self.positions, g.integers(1)], (SEQUENCE, 1), "", kind=INT)
        apart = g.op("Sub", [column, places], (SEQUENCE, keys), "", kind=INT)
        if both:
            apart = g.op("Abs", [apart], dims(apart), "", kind=INT)
        tests = []
        if causal:
            tests.append(g.op("GreaterOrEqual", [apart, self._zero], dims(apart), "", kind=BOOL))
        if window:
            limit = g.constant(np.asarray(window, np.int64), f"pfmc/window_{window}")
            tests.append(g.op("Less", [apart, limit], dims(apart), "", kind=BOOL))
        near = tests[0]
        if len(tests) == 2:
            near = g.op("And", tests, dims(apart), "", kind=BOOL)
        shape: Dims = (1, 1, *dims(near))
        return g.op("Unsqueeze", [near, g.integers(0, 1)], shape, "", kind=BOOL)

    # -- attention ----------------------------------------------------------------------------

    def heads(self, x: ir.Value, count: int, at: str) -> ir.Value:
        """``[B, S, heads * D]`` as ``[B, S, heads, D]``."""
        own = width(x) // count
        shape: Dims = (*dims(x)[:2], count, own)
        return self.g.op("Reshape", [x, self.g.integers(0, 0, count, own)], shape, at)

    def forward(self, x: ir.Value, at: str) -> ir.Value:
        """``[B, S, heads, D]`` as ``[B, heads, S, D]``."""
        batch, length, count, own = dims(x)
        return self.g.op("Transpose", [x], (batch, count, length, own), at, perm=(0, 2, 1, 3))

    def attend_with_sinks(
        self, q: ir.Value, k: ir.Value, v: ir.Value, at: str, scale: float, *,
        layer: int, window: int, sinks: ir.Value,
    ) -> ir.Value:  # fmt: skip
        """Causal attention in which each head has one more key of no value and of a learned score.

        The keys get a row of zeros at their end, whose score stands in the mask (Xiao et al. 2023,
        arXiv:2309.17453, section 3.3; the form of `pfmc.passes.raise_attention`).
        """
        g, joined = self.g, []
        for new, past in zip((k, v), self.memory[layer], strict=True):
            shape: Dims = (*dims(past)[:2], TOTAL, dims(past)[3])
            joined.append(g.op("Concat", [past, new], shape, at, axis=2))
        for kind, value in zip(("key", "value"), joined, strict=True):
            g.remember(value, f"present.{layer}.{kind}")
        ends = g.integers(0, 0, 0, 0, 0, 0, 1, 0)
        padded = [
            g.op("Pad", [x, ends], (*dims(x)[:2], f"{TOTAL} + 1", dims(x)[3]), at) for x in joined
        ]
        mask = self._sunk_mask(window, sinks, at)
        y = g.op("Attention", [q, *padded, mask], dims(q), at, scale=scale, is_causal=0)
        node = y.producer()
        assert node is not None
        node.metadata_props.update({KEY_MASK: "explicit", KEY_SINK: "1"})
        return self._flat(y, at)

    def _sunk_mask(self, window: int, sinks: ir.Value, at: str) -> ir.Value:
        """``[1, heads, sequence, total + 1]``: the causal mask and the sinks' scores."""
        g, heads = self.g, dims(sinks)[0]
        assert isinstance(heads, int)
        near = self._once(("causal", window), lambda: self._near(window, False, causal=True))
        zero, low = g.number(0.0, "zero"), g.number(LOWEST, "lowest")
        bias = g.op("Where", [near, zero, low], dims(near), at)
        one, length = g.integers(1), self.size(self.ids, 1)
        column = g.op("Reshape", [sinks, g.integers(1, heads, 1, 1)], (1, heads, 1, 1), at)
        shape = g.op("Concat", [one, one, length, one], (4,), at, kind=INT, axis=0)
        column = g.op("Expand", [column, shape], (1, heads, SEQUENCE, 1), at)
        parts = [one, g.integers(heads), one, one]
        wanted = g.op("Concat", parts, (4,), at, kind=INT, axis=0)
        bias = g.op("Expand", [bias, wanted], (1, heads, SEQUENCE, TOTAL), at)
        return g.op("Concat", [bias, column], (1, heads, SEQUENCE, f"{TOTAL} + 1"), at, axis=-1)

    def _flat(self, y: ir.Value, at: str) -> ir.Value:
        """``[B, heads, S, D]`` as ``[B, S, heads * D]``."""
        count, own = dims(y)[1], width(y)
        assert isinstance(count, int)
        y = self.forward(y, at)  # the same exchange of axes leads back
        flat = self.g.integers(0, 0, count * own)
        return self.g.op("Reshape", [y, flat], (*dims(y)[:2], count * own), at)

    def attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, at: str, scale: float, *,
        layer: int | None = None, window: int = 0, softcap: float = 0.0,
        mask: ir.Value | None = None, causal: bool = False,
    ) -> ir.Value:  # fmt: skip
        """Attention of ``[B, heads, S, D]``, with `layer`'s memory, as ``[B, S, heads * D]``.

        Args:
            q, k, v: queries, keys and values; at: the module; scale: factor on the scores.
            layer: whose memory is used, in decoders with one; they are causal.
            window, softcap: as in `mask` and in the operator.
            mask: added to the scores in place of the frame's own.
            causal: whether it is causal without a memory.
        """
        given = mask is not None
        if mask is None and not causal:
            mask = self.mask(window, both=layer is None)
        causal = causal or layer is not None
        inputs, shapes = [q, k, v, mask], [dims(q)]
        if layer is not None:
            inputs += self.memory[layer]
            shapes += [(*dims(m)[:2], TOTAL, dims(m)[3]) for m in self.memory[layer]]
        used = inputs[:3] if layer is None and mask is None else inputs
        made = self.g.ops(
            "Attention", used, shapes, at, scale=scale, is_causal=int(causal),
            softcap=softcap,
        )  # fmt: skip
        self._describe(made[0], causal, window, given)
        for kind, value in zip(("key", "value"), made[1:], strict=False):
            self.g.remember(value, f"present.{layer}.{kind}")
        return self._flat(made[0], at)

    def _describe(self, y: ir.Value, causal: bool, window: int, given: bool) -> None:
        node = y.producer()
        assert node is not None
        kind = "explicit" if window or given else "causal" if causal else "padding"
        if kind == "padding" and self.shown is None:
            kind = "none"
        node.metadata_props[KEY_MASK] = kind
        if window:
            node.metadata_props[KEY_WINDOW] = str(window)
