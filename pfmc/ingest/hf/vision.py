"""Transformers with norms before each block, over patches of an image or CLIP's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import INT, Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import BATCH, SEQUENCE, Graph, dims, width
from pfmc.ingest.hf.heads import Head
from pfmc.ir.vocabulary import SYNTHETIC


@dataclass(frozen=True)
class Block:
    """The layers of one model.

    Attributes:
        layer: the module of a layer, ``{}`` being its number; norms: its two norms.
        attention: its attention; out: the product behind it.
        heads, inner, eps, kind: sizes, epsilon and activation.
        bias: whether q, k and v have one; scales: parameters that scale what each block adds.
        causal: whether attention looks back only.
    """

    layer: str
    heads: int
    inner: int
    eps: float
    kind: str
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    attention: str = "attention"
    out: str = "o_proj"
    bias: bool = True
    scales: Sequence[str] = field(default=())
    causal: bool = False


def _layers(frame: Frame, x: ir.Value, count: int, b: Block) -> ir.Value:
    for i in range(count):
        x = _layer(frame, x, f"{frame.g.root}{b.layer.format(i)}", b)
    return x


def _layer(frame: Frame, x: ir.Value, at: str, b: Block) -> ir.Value:
    g, own, hidden = frame.g, f"{at}.{b.attention}", width(x)
    y = blocks.layer_norm(g, x, f"{at}.{b.norms[0]}", b.eps)
    parts = (g.linear(y, f"{own}.{n}_proj", hidden, bias=b.bias) for n in "qkv")
    q, k, v = (frame.forward(frame.heads(p, b.heads, own), own) for p in parts)
    y = frame.attend(q, k, v, own, width(q) ** -0.5, causal=b.causal)
    y = g.linear(y, f"{own}.{b.out}", hidden, bias=True)
    x = blocks.add(g, x, _scaled(g, y, at, b, 0), at)
    y = blocks.layer_norm(g, x, f"{at}.{b.norms[1]}", b.eps)
    y = g.linear(y, f"{at}.mlp.fc1", b.inner, bias=True)
    y = blocks.ACTIVATIONS[b.kind](g, y, f"{at}.mlp")
    y = g.linear(y, f"{at}.mlp.fc2", hidden, bias=True)
    return blocks.add(g, x, _scaled(g, y, at, b, 1), at)


def _scaled(g: Graph, x: ir.Value, at: str, b: Block, which: int) -> ir.Value:
    if not b.scales:
        return x
    own = f"{at}.{b.scales[which]}"
    return g.op("Mul", [x, g.parameter(own, (width(x),))], dims(x), own)


def _block(c: Config, hidden: int, layer: str, eps: float, **names: object) -> Block:
    """The usual keys."""
    heads, _ = blocks.split(c, hidden, "num_attention_heads")
    kind = blocks.activation(c, "hidden_act", default="gelu")
    inner = c.integer("intermediate_size", default=4 * hidden)
    return Block(layer, heads, inner, eps, kind, **names)  # type: ignore[arg-type]


# -- ViT, DeiT and DINOv2 ------------------------------------------------------------------------


def vit(g: Graph, c: Config, head: Head) -> None:
    """ViT: patches, a class token, norms before each block; images of one size."""
    _vit(g, c, head, ("cls_token",))


def deit(g: Graph, c: Config, head: Head) -> None:
    """DeiT: ViT with a second token, learned from a teacher."""
    _vit(g, c, head, ("cls_token", "distillation_token"))


def _vit(g: Graph, c: Config, head: Head, tokens: tuple[str, ...]) -> None:
    hidden, count = c.integer("hidden_size"), c.layers("num_hidden_layers")
    eps = c.real("layer_norm_eps", default=1e-12, low=1e-30)
    x, frame = _patches(g, c, hidden, tokens)
    x = _layers(frame, x, count, _block(c, hidden, "layers.{}", eps, bias=c.flag("qkv_bias", True)))
    head(g, c, blocks.layer_norm(g, x, f"{g.root}layernorm", eps), frame)


def dinov2(g: Graph, c: Config, head: Head) -> None:
    """DINOv2: ViT with learned scales on what each block adds."""
    c.demand("use_swiglu_ffn", None, False)
    hidden, count = c.integer("hidden_size"), c.layers("num_hidden_layers")
    inner = hidden * c.integer("mlp_ratio", default=4)
    c = Config({**c.body, "intermediate_size": inner}, c.where)
    eps = c.real("layer_norm_eps", default=1e-6, low=1e-30)
    x, frame = _patches(g, c, hidden, ("cls_token",))
    x = _layers(frame, x, count, _block(
        c, hidden, "encoder.layer.{}", eps, norms=("norm1", "norm2"), bias=c.flag("qkv_bias", True),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ))  # fmt: skip
    head(g, c, blocks.layer_norm(g, x, f"{g.root}layernorm", eps), frame)


def first_token(g: Graph, c: Config, x: ir.Value, frame: Frame) -> None:
    """DINOv2 without a head: the hidden state, and that of the class token."""
    g.output(x, "last_hidden_state")
    zero = g.constant(np.asarray(0, np.int64), "pfmc/from")
    shape = (dims(x)[0], width(x))
    g.output(g.op("Gather", [x, zero], shape, "pooler", axis=1), "pooler_output")


def _patches(g: Graph, c: Config, wide: int, tokens: Sequence[str]) -> tuple[ir.Value, Frame]:
    """The embedded image ``[batch, tokens + patches, wide]``."""
    at = f"{g.root}embeddings"
    x, frame, count = _cut(g, c, wide, f"{at}.patch_embeddings.projection", bias=True)
    made = [g.parameter(f"{at}.{name}", (1, 1, wide)) for name in tokens]
    x = _with_tokens(frame, x, made, count, at)
    places = g.parameter(f"{at}.position_embeddings", (1, count + len(tokens), wide))
    return blocks.add(g, x, places, at), frame


def _cut(g: Graph, c: Config, wide: int, own: str, *, bias: bool) -> tuple[ir.Value, Frame, int]:
    """The image's patches ``[batch, patches, wide]``, its frame, and how many they are."""
    size, step = c.integer("image_size", default=224), c.integer("patch_size", default=16)
    channels, at = c.integer("num_channels", default=3), own.rpartition(".")[0]
    if size % step:
        raise c.refuse("patch_size", f"does not divide the image size {size}")
    image = g.input("pixel_values", (BATCH, channels, size, size))
    side, frame = size // step, Frame(g, image)
    inputs = [image, g.parameter(f"{own}.weight", (wide, channels, step, step))]
    if bias:
        inputs.append(g.parameter(f"{own}.bias", (wide,)))
    x = g.op(
        "Conv", inputs, (BATCH, wide, side, side), own, name=own,
        kernel_shape=(step, step), strides=(step, step),
    )  # fmt: skip
    flat = g.integers(0, wide, side * side)
    x = g.op("Reshape", [x, flat], (BATCH, wide, side * side), at)
    # the module's own output where it hands out patches; CLIP's is the image-shaped convolution
    name = at if at.endswith(".patch_embeddings") else f"{SYNTHETIC}{at}.patches"
    x = g.op("Transpose", [x], (BATCH, side * side, wide), at, name=name, perm=(0, 2, 1))
    return x, frame, side * side


def _with_tokens(
    frame: Frame, x: ir.Value, tokens: Sequence[ir.Value], count: int, at: str
) -> ir.Value:
    """`x` behind learned tokens, each ``[1, 1, wide]``."""
    g, wide = frame.g, width(x)
    parts = [frame.size(frame.ids, 0), g.integers(1), g.integers(1)]
    wanted = g.op("Concat", parts, (3,), at, kind=INT, axis=0)
    held = [g.op("Expand", [t, wanted], (BATCH, 1, wide), at) for t in tokens]
    return g.op("Concat", [*held, x], (BATCH, count + len(held), wide), at, axis=1)


# -- CLIP ----------------------------------------------------------------------------------------


def _clip(c: Config, *, causal: bool) -> tuple[Block, int, int, float]:
    hidden, eps = c.integer("hidden_size"), c.real("layer_norm_eps", default=1e-5, low=1e-30)
    named = Config({"hidden_act": "quick_gelu", **c.body}, c.where)
    made = _block(
        named, hidden, "encoder.layers.{}", eps, norms=("layer_norm1", "layer_norm2"),
        attention="self_attn", out="out_proj", causal=causal,
    )  # fmt: skip
    return made, hidden, c.layers("num_hidden_layers"), eps


def clip_vision(g: Graph, c: Config, *, projected: bool) -> None:
    """CLIP's image side: a norm before the first layer, and one on the class token."""
    own, hidden, count, eps = _clip(c, causal=False)
    at = f"{g.root}embeddings"
    x, frame, patches = _cut(g, c, hidden, f"{at}.patch_embedding", bias=False)
    token = g.parameter(f"{at}.class_embedding", (hidden,))
    token = g.op("Reshape", [token, g.integers(1, 1, hidden)], (1, 1, hidden), at)
    x = _with_tokens(frame, x, [token], patches, at)
    places = g.parameter(f"{at}.position_embedding.weight", (patches + 1, hidden))
    x = blocks.layer_norm(g, blocks.add(g, x, places, at), f"{g.root}pre_layrnorm", eps)
    x = _layers(frame, x, count, own)
    zero = g.constant(np.asarray(0, np.int64), "pfmc/from")
    pooled = g.op("Gather", [x, zero], (BATCH, hidden), g.root + "pooler", axis=1)
    pooled = blocks.layer_norm(g, pooled, f"{g.root}post_layernorm", eps)
    _clip_outputs(g, c, x, pooled, "visual_projection" if projected else "", "image_embeds")


def clip_text(g: Graph, c: Config, *, projected: bool) -> None:
    """CLIP's text side: causal, pooled at the end-of-text token; texts are not padded by a mask."""
    own, hidden, count, eps = _clip(c, causal=True)
    ids = g.input("input_ids", (BATCH, SEQUENCE), INT)
    frame, at = Frame(g, ids), f"{g.root}embeddings"
    x = blocks.embed(g, ids, f"{at}.token_embedding", c.integer("vocab_size"), hidden)
    longest = c.integer("max_position_embeddings", default=77)
    places = blocks.embed(g, frame.positions, f"{at}.position_embedding", longest, hidden)
    x = _layers(frame, blocks.add(g, x, places, at), count, own)
    x = blocks.layer_norm(g, x, f"{g.root}final_layer_norm", eps)
    pooled = _at_the_end(g, c, x, ids)
    _clip_outputs(g, c, x, pooled, "text_projection" if projected else "", "text_embeds")


def _at_the_end(g: Graph, c: Config, x: ir.Value, ids: ir.Value) -> ir.Value:
    """The state of the first end-of-text token; of the largest token where the files say 2."""
    at, end = f"{g.root}pooler", c.integer("eos_token_id", default=49407, low=0)
    found = ids
    if end != 2:
        wanted = g.constant(np.asarray(end, np.int64), "pfmc/end_of_text")
        hit = g.op("Equal", [ids, wanted], dims(ids), at, kind=blocks.BOOL)
        found = g.op("Cast", [hit], dims(ids), at, kind=INT, to=int(INT))
    place = g.op("ArgMax", [found], (BATCH, 1), at, kind=INT, axis=1, keepdims=1)
    shape = (BATCH, 1, width(x))
    rows = g.op("Unsqueeze", [place, g.integers(2)], (BATCH, 1, 1), at, kind=INT)
    parts = [g.integers(1), g.integers(1), g.integers(width(x))]
    wide = g.op("Concat", parts, (3,), at, kind=INT, axis=0)
    rows = g.op("Expand", [rows, wide], shape, at, kind=INT)
    state = g.op("GatherElements", [x, rows], shape, at, axis=1)
    return g.op("Squeeze", [state, g.integers(1)], (BATCH, width(x)), at)


def _clip_outputs(
    g: Graph, c: Config, x: ir.Value, pooled: ir.Value, projection: str, name: str
) -> None:
    if projection:
        wide = c.integer("projection_dim", default=512)
        g.output(g.linear(pooled, projection, wide, bias=False), name)
        g.output(x, "last_hidden_state")
        return
    g.output(x, "last_hidden_state")
    g.output(pooled, "pooler_output")
