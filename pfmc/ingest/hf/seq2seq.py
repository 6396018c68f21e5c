"""Encoder-decoders: T5, BART and Whisper, one graph from the source and the target to the scores.

The decoder reads a whole target (teacher forcing) and keeps no memory between calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks, relative
from pfmc.ingest.hf.blocks import BOOL, INT, LOWEST, Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import BATCH, SEQUENCE, Dims, Graph, dims, width

TARGET = "target"


@dataclass(frozen=True)
class Sides:
    """What both halves of a model share.

    Attributes:
        frame: of the encoder, with its mask if it has one.
        target: the decoder's tokens ``[B, target]``.
    """

    frame: Frame
    target: ir.Value

    def across(self) -> ir.Value | None:
        """The encoder's padding as an additive mask ``[B, 1, target, S]``; None without one."""
        if self.frame.shown is None:
            return None
        return padding(self.frame, self.frame.size(self.target, 1), TARGET)


def padding(frame: Frame, rows: ir.Value, name: str) -> ir.Value:
    """What hides the encoder's padding from `rows` queries, ``[B, 1, rows, S]``."""
    g, shown = frame.g, frame.shown
    assert shown is not None
    flags = g.op("Cast", [shown], dims(shown), "", kind=BOOL, to=int(BOOL))
    narrow: Dims = (BATCH, 1, 1, SEQUENCE)
    flags = g.op("Unsqueeze", [flags, g.integers(1, 2)], narrow, "", kind=BOOL)
    low = g.op("Where", [flags, g.number(0.0, "zero"), g.number(LOWEST, "lowest")], narrow, "")
    parts = [g.integers(1), g.integers(1), rows, g.integers(1)]
    wanted = g.op("Concat", parts, (4,), "", kind=INT, axis=0)
    return g.op("Expand", [low, wanted], (BATCH, 1, name, SEQUENCE), "")


def _heads(frame: Frame, x: ir.Value, count: int, at: str) -> ir.Value:
    return frame.forward(frame.heads(x, count, at), at)


# -- T5 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _T5:
    hidden: int
    wide: int
    heads: int
    inner: int
    eps: float
    kind: str
    gated: bool


def _t5_sizes(c: Config) -> _T5:
    words = c.text("feed_forward_proj", default="relu").split("-")
    gated, kind = words[0] == "gated", words[-1]
    if gated and kind == "gelu":
        kind = "gelu_new"
    if kind not in blocks.ACTIVATIONS or len(words) > 2:
        raise c.refuse("feed_forward_proj", "is not supported")
    return _T5(
        c.integer("d_model"), c.integer("d_kv", default=64), c.integer("num_heads", default=8),
        c.integer("d_ff"), c.real("layer_norm_epsilon", default=1e-6, low=1e-30), kind, gated,
    )  # fmt: skip


def t5_encoder(g: Graph, c: Config) -> None:
    """T5's encoder by itself."""
    frame = Frame.encoder(g)
    g.output(_t5_encoder(frame, c, _t5_sizes(c)), "last_hidden_state")


def t5(g: Graph, c: Config) -> None:
    """T5, Flan-T5 and mT5: RMS norms before each block, no biases, distances in the scores."""
    s, frame = _t5_sizes(c), Frame.encoder(g)
    sides = Sides(frame, g.input("decoder_input_ids", (BATCH, TARGET), INT))
    memory = _t5_encoder(frame, c, s)
    x = blocks.embed(g, sides.target, f"{g.root}shared", c.integer("vocab_size"), s.hidden)
    bias = _t5_bias(frame, sides.target, c, s, "decoder", both=False)
    across = sides.across()
    for i in range(c.layers("num_decoder_layers", "num_layers")):
        at = f"{g.root}decoder.block.{i}.layer"
        x = _t5_attention(frame, x, x, f"{at}.0", "SelfAttention", s, bias, causal=True)
        x = _t5_attention(frame, x, memory, f"{at}.1", "EncDecAttention", s, across)
        x = _t5_feed(g, x, f"{at}.2", s)
    x = blocks.rms_norm(g, x, f"{g.root}decoder.final_layer_norm", s.eps)
    tied = c.flag("tie_word_embeddings", True)
    scaled = c.flag("scale_decoder_outputs", tied)
    x = blocks.scaled(g, x, s.hidden**-0.5 if scaled else 1.0, f"{g.root}decoder")
    weight = f"{g.root}shared.weight" if tied else ""
    logits = g.linear(x, "lm_head", c.integer("vocab_size"), bias=False, weight=weight)
    g.output(logits, "logits")


def _t5_encoder(frame: Frame, c: Config, s: _T5) -> ir.Value:
    g = frame.g
    x = blocks.embed(g, frame.ids, f"{g.root}shared", c.integer("vocab_size"), s.hidden)
    bias = _t5_bias(frame, frame.ids, c, s, "encoder", both=True)
    hidden = padding(frame, frame.size(frame.ids, 1), SEQUENCE)
    mask = g.op("Add", [bias, hidden], (BATCH, s.heads, SEQUENCE, SEQUENCE), f"{g.root}encoder")
    for i in range(c.layers("num_layers")):
        at = f"{g.root}encoder.block.{i}.layer"
        x = _t5_attention(frame, x, x, f"{at}.0", "SelfAttention", s, mask)
        x = _t5_feed(g, x, f"{at}.1", s)
    return blocks.rms_norm(g, x, f"{g.root}encoder.final_layer_norm", s.eps)


def _t5_bias(frame: Frame, ids: ir.Value, c: Config, s: _T5, side: str, *, both: bool) -> ir.Value:
    table = f"{frame.g.root}{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
    count = c.integer("relative_attention_num_buckets", default=32, low=4, high=1 << 16)
    far = c.integer("relative_attention_max_distance", default=128, low=count, high=1 << 20)
    return relative.bias(frame, ids, table, s.heads, count, far, both=both)


def _t5_attention(
    frame: Frame, x: ir.Value, memory: ir.Value, at: str, name: str, s: _T5,
    mask: ir.Value | None, *, causal: bool = False,
) -> ir.Value:  # fmt: skip
    g, own, wide = frame.g, f"{at}.{name}", s.heads * s.wide
    y = blocks.rms_norm(g, x, f"{at}.layer_norm", s.eps)
    source = y if memory is x else memory
    q = g.linear(y, f"{own}.q", wide, bias=False)
    k, v = (g.linear(source, f"{own}.{n}", wide, bias=False) for n in "kv")
    q, k, v = (_heads(frame, p, s.heads, own) for p in (q, k, v))
    y = frame.attend(q, k, v, own, 1.0, mask=mask, causal=causal)
    return blocks.add(g, x, g.linear(y, f"{own}.o", s.hidden, bias=False), at)


def _t5_feed(g: Graph, x: ir.Value, at: str, s: _T5) -> ir.Value:
    y, own = blocks.rms_norm(g, x, f"{at}.layer_norm", s.eps), f"{at}.DenseReluDense"
    if s.gated:
        gate, up = (g.linear(y, f"{own}.{n}", s.inner, bias=False) for n in ("wi_0", "wi_1"))
        y = blocks.gated(g, gate, up, s.kind, own)
    else:
        y = blocks.ACTIVATIONS[s.kind](g, g.linear(y, f"{own}.wi", s.inner, bias=False), own)
    return blocks.add(g, x, g.linear(y, f"{own}.wo", s.hidden, bias=False), at)


# -- BART and Whisper ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Half:
    """The encoder or the decoder of a model of BART's kind."""

    at: str
    layers: int
    heads: int
    inner: int
    kind: str
    before: bool
    key_bias: bool


def _half(g: Graph, c: Config, side: str, *, before: bool, key_bias: bool) -> _Half:
    heads, _ = blocks.split(c, c.integer("d_model"), f"{side}_attention_heads")
    kind = blocks.activation(c, "activation_function", default="gelu")
    layers, inner = c.layers(f"{side}_layers"), c.integer(f"{side}_ffn_dim")
    return _Half(f"{g.root}{side}", layers, heads, inner, kind, before, key_bias)


def bart(g: Graph, c: Config) -> None:
    """BART: learned positions from row 2 on, norms behind each block."""
    frame = Frame.encoder(g)
    sides = Sides(frame, g.input("decoder_input_ids", (BATCH, TARGET), INT))
    first, second = (_half(g, c, n, before=False, key_bias=True) for n in ("encoder", "decoder"))
    x = _bart_embedding(frame, c, frame.ids, first.at)
    memory = _encoder(frame, x, first)
    y = _bart_embedding(frame, c, sides.target, second.at)
    x = _decoder(sides, y, memory, second)
    x = g.linear(x, "lm_head", c.integer("vocab_size"), bias=False, weight=f"{g.root}shared.weight")
    words = g.parameter("final_logits_bias", (1, c.integer("vocab_size")))
    g.output(g.op("Add", [x, words], dims(x), "lm_head"), "logits")


def _bart_embedding(frame: Frame, c: Config, ids: ir.Value, at: str) -> ir.Value:
    g, hidden = frame.g, c.integer("d_model")
    x = blocks.embed(g, ids, f"{g.root}shared", c.integer("vocab_size"), hidden)
    x = blocks.scaled(g, x, math.sqrt(hidden) if c.flag("scale_embedding", False) else 1.0, at)
    rows = c.integer("max_position_embeddings", default=1024) + 2
    places = blocks.embed(g, _places(frame, ids, 2), f"{at}.embed_positions", rows, hidden)
    x = blocks.add(g, x, places, at)
    return blocks.layer_norm(g, x, f"{at}.layernorm_embedding", 1e-5)


def _places(frame: Frame, ids: ir.Value, first: int) -> ir.Value:
    """``first, first + 1, …``, one for each token."""
    g, name = frame.g, dims(ids)[1]
    end = g.op("Add", [frame.size(ids, 1), g.integers(first)], (1,), "", kind=INT)
    end = g.op("Squeeze", [end, g.integers(0)], (), "", kind=INT)
    start, step = (g.constant(np.asarray(i, np.int64), f"pfmc/number_{i}") for i in (first, 1))
    return g.op("Range", [start, end, step], (name,), "", kind=INT)


def whisper(g: Graph, c: Config) -> None:
    """Whisper: two convolutions over the sound's spectrum, norms before each block."""
    hidden, length = c.integer("d_model"), c.integer("max_source_positions", default=1500)
    bins = c.integer("num_mel_bins", default=80)
    sound = g.input("input_features", (BATCH, bins, 2 * length))
    first, second = (_half(g, c, n, before=True, key_bias=False) for n in ("encoder", "decoder"))
    x = _convolved(g, sound, f"{first.at}.conv1", bins, hidden, 2 * length, 1)
    x = _convolved(g, x, f"{first.at}.conv2", hidden, hidden, length, 2)
    x = g.op("Transpose", [x], (BATCH, length, hidden), first.at, perm=(0, 2, 1))
    table = g.parameter(f"{first.at}.embed_positions.weight", (length, hidden))
    x, frame = blocks.add(g, x, table, first.at), Frame(g, sound)
    memory = _encoder(frame, x, first)
    memory = blocks.layer_norm(g, memory, f"{first.at}.layer_norm", 1e-5)
    sides = Sides(frame, g.input("decoder_input_ids", (BATCH, TARGET), INT))
    rows, at = c.integer("max_target_positions", default=448), second.at
    y = blocks.embed(g, sides.target, f"{at}.embed_tokens", c.integer("vocab_size"), hidden)
    y = blocks.scaled(g, y, math.sqrt(hidden) if c.flag("scale_embedding", False) else 1.0, at)
    places = _places(frame, sides.target, 0)
    y = blocks.add(g, y, blocks.embed(g, places, f"{at}.embed_positions", rows, hidden), at)
    x = blocks.layer_norm(g, _decoder(sides, y, memory, second), f"{at}.layer_norm", 1e-5)
    weight = f"{at}.embed_tokens.weight"
    g.output(g.linear(x, "proj_out", c.integer("vocab_size"), bias=False, weight=weight), "logits")


def _convolved(
    g: Graph, x: ir.Value, at: str, channels: int, hidden: int, length: int, stride: int
) -> ir.Value:
    kernel = g.parameter(f"{at}.weight", (hidden, channels, 3))
    bias = g.parameter(f"{at}.bias", (hidden,))
    y = g.op(
        "Conv", [x, kernel, bias], (BATCH, hidden, length), at, name=at, kernel_shape=(3,),
        strides=(stride,), pads=(1, 1),
    )  # fmt: skip
    return g.op("Gelu", [y], dims(y), at)


def _encoder(frame: Frame, x: ir.Value, half: _Half) -> ir.Value:
    for i in range(half.layers):
        at = f"{half.at}.layers.{i}"
        x = _attention(frame, x, x, at, "self_attn", half)
        x = _feed(frame.g, x, at, half)
    return x


def _decoder(sides: Sides, x: ir.Value, memory: ir.Value, half: _Half) -> ir.Value:
    frame, across = sides.frame, sides.across()
    for i in range(half.layers):
        at = f"{half.at}.layers.{i}"
        x = _attention(frame, x, x, at, "self_attn", half, causal=True)
        x = _attention(frame, x, memory, at, "encoder_attn", half, mask=across)
        x = _feed(frame.g, x, at, half)
    return x


def _attention(
    frame: Frame, x: ir.Value, memory: ir.Value, at: str, name: str, half: _Half, *,
    mask: ir.Value | None = None, causal: bool = False,
) -> ir.Value:  # fmt: skip
    g, own, norm, hidden = frame.g, f"{at}.{name}", f"{at}.{name}_layer_norm", width(x)
    y = blocks.layer_norm(g, x, norm, 1e-5) if half.before else x
    source = y if memory is x else memory
    q = g.linear(y, f"{own}.q_proj", hidden, bias=True)
    k = g.linear(source, f"{own}.k_proj", hidden, bias=half.key_bias)
    v = g.linear(source, f"{own}.v_proj", hidden, bias=True)
    q, k, v = (_heads(frame, p, half.heads, own) for p in (q, k, v))
    y = frame.attend(q, k, v, own, width(q) ** -0.5, mask=mask, causal=causal)
    x = blocks.add(g, x, g.linear(y, f"{own}.out_proj", hidden, bias=True), at)
    return x if half.before else blocks.layer_norm(g, x, norm, 1e-5)


def _feed(g: Graph, x: ir.Value, at: str, half: _Half) -> ir.Value:
    norm = f"{at}.final_layer_norm"
    y = blocks.layer_norm(g, x, norm, 1e-5) if half.before else x
    y = blocks.ACTIVATIONS[half.kind](g, g.linear(y, f"{at}.fc1", half.inner, bias=True), at)
    x = blocks.add(g, x, g.linear(y, f"{at}.fc2", width(x), bias=True), at)
    return x if half.before else blocks.layer_norm(g, x, norm, 1e-5)
