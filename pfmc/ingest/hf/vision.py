"""Vision transformers: ViT."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import BATCH, Graph
from pfmc.ingest.hf.heads import Head


def vit(g: Graph, c: Config, head: Head) -> None:
    """ViT: patches, a class token, norms before each block; images of one size."""
    hidden, layers = c.integer("hidden_size"), c.layers("num_hidden_layers")
    heads, wide = blocks.split(c, hidden, "num_attention_heads")
    eps = c.real("layer_norm_eps", default=1e-12, low=1e-30)
    x, frame = _patches(g, c, hidden)
    for i in range(layers):
        at = f"{g.root}layers.{i}"
        own = f"{at}.attention"
        y = blocks.layer_norm(g, x, f"{at}.layernorm_before", eps)
        bias = c.flag("qkv_bias", True)
        parts = (g.linear(y, f"{own}.{n}_proj", hidden, bias=bias) for n in "qkv")
        q, k, v = (frame.forward(frame.heads(p, heads, own), own) for p in parts)
        y = frame.attend(q, k, v, own, wide**-0.5)
        x = blocks.add(g, x, g.linear(y, f"{own}.o_proj", hidden, bias=True), at)
        y = blocks.layer_norm(g, x, f"{at}.layernorm_after", eps)
        y = g.linear(y, f"{at}.mlp.fc1", c.integer("intermediate_size"), bias=True)
        kind = blocks.activation(c, "hidden_act", default="gelu")
        y = blocks.ACTIVATIONS[kind](g, y, f"{at}.mlp")
        x = blocks.add(g, x, g.linear(y, f"{at}.mlp.fc2", hidden, bias=True), at)
    head(g, c, blocks.layer_norm(g, x, f"{g.root}layernorm", eps), frame)


def _patches(g: Graph, c: Config, wide: int) -> tuple[ir.Value, Frame]:
    """The embedded image ``[batch, patches + 1, wide]``."""
    size, step = c.integer("image_size", default=224), c.integer("patch_size", default=16)
    channels, at = c.integer("num_channels", default=3), f"{g.root}embeddings"
    if size % step:
        raise c.refuse("patch_size", f"does not divide the image size {size}")
    image = g.input("pixel_values", (BATCH, channels, size, size))
    side, frame = size // step, Frame(g, image)
    own = f"{at}.patch_embeddings.projection"
    kernel = g.parameter(f"{own}.weight", (wide, channels, step, step))
    bias = g.parameter(f"{own}.bias", (wide,))
    x = g.op(
        "Conv", [image, kernel, bias], (BATCH, wide, side, side), own, name=own,
        kernel_shape=(step, step), strides=(step, step),
    )  # fmt: skip
    flat = g.integers(0, wide, side * side)
    x = g.op("Reshape", [x, flat], (BATCH, wide, side * side), at)
    x = g.op(
        "Transpose", [x], (BATCH, side * side, wide), at, name=f"{at}.patch_embeddings",
        perm=(0, 2, 1),
    )  # fmt: skip
    wanted = g.op(
        "Concat", [frame.size(image, 0), g.integers(1), g.integers(1)], (3,), at,
        kind=blocks.INT, axis=0,
    )  # fmt: skip
    token = g.parameter(f"{at}.cls_token", (1, 1, wide))
    token = g.op("Expand", [token, wanted], (BATCH, 1, wide), at)
    x = g.op("Concat", [token, x], (BATCH, side * side + 1, wide), at, axis=1)
    places = g.parameter(f"{at}.position_embeddings", (1, side * side + 1, wide))
    return blocks.add(g, x, places, at), frame
