"""Decoders with LayerNorm: GPT-2, GPT-NeoX (Pythia) and OPT."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import Graph, dims, width
from pfmc.ingest.hf.rope import Rope, rope


def _finish(g: Graph, c: Config, x: ir.Value, head: str, table: str, *, tied: bool) -> None:
    """The output: logits of module `head`, or the hidden state if it is empty."""
    if not head:
        g.output(x, "last_hidden_state")
        return
    weight = f"{table}.weight" if c.flag("tie_word_embeddings", tied) else ""
    vocabulary = c.integer("vocab_size")
    g.output(g.linear(x, head, vocabulary, bias=False, weight=weight), "logits")


# -- GPT-2 ---------------------------------------------------------------------------------------


def gpt2(g: Graph, c: Config, *, head: str) -> None:
    """GPT-2: learned positions, one product for q, k and v, weights stored ``[in, out]``."""
    c.demand("add_cross_attention", False, None)
    c.demand("scale_attn_weights", True, default=True)
    layers, hidden = c.layers("n_layer", "num_hidden_layers"), c.integer("n_embd", "hidden_size")
    heads, own = blocks.split(c, hidden, "n_head", "num_attention_heads")
    inner = c.integer("n_inner", default=4 * hidden)
    eps = c.real("layer_norm_epsilon", default=1e-5, low=1e-30)
    kind = blocks.activation(c, "activation_function", default="gelu_new")
    by_layer = c.flag("scale_attn_by_inverse_layer_idx", False)
    frame = Frame.decoder(g, layers, heads, own)
    x = blocks.embed(g, frame.ids, f"{g.root}wte", c.integer("vocab_size"), hidden)
    longest = c.integer("n_positions", "max_position_embeddings", default=1024)
    places = blocks.embed(g, frame.positions, f"{g.root}wpe", longest, hidden)
    x = blocks.add(g, x, places, f"{g.root}wpe")
    for i in range(layers):
        at = f"{g.root}h.{i}"
        y = blocks.layer_norm(g, x, f"{at}.ln_1", eps)
        y = g.linear(y, f"{at}.attn.c_attn", 3 * hidden, bias=True, turned=False)
        parts = blocks.halves(g, y, f"{at}.attn", hidden, hidden, hidden)
        q, k, v = (frame.forward(frame.heads(p, heads, f"{at}.attn"), f"{at}.attn") for p in parts)
        scale = own**-0.5 / (i + 1 if by_layer else 1)
        y = frame.attend(q, k, v, f"{at}.attn", scale, layer=i)
        y = g.linear(y, f"{at}.attn.c_proj", hidden, bias=True, turned=False)
        x = blocks.add(g, x, y, at)
        y = blocks.layer_norm(g, x, f"{at}.ln_2", eps)
        y = g.linear(y, f"{at}.mlp.c_fc", inner, bias=True, turned=False)
        y = blocks.ACTIVATIONS[kind](g, y, f"{at}.mlp.act")
        y = g.linear(y, f"{at}.mlp.c_proj", hidden, bias=True, turned=False)
        x = blocks.add(g, x, y, at)
    x = blocks.layer_norm(g, x, f"{g.root}ln_f", eps)
    _finish(g, c, x, head, f"{g.root}wte", tied=True)


# -- GPT-NeoX ------------------------------------------------------------------------------------


def gpt_neox(g: Graph, c: Config, *, head: str) -> None:
    """GPT-NeoX: attention and feed-forward side by side, heads that are rotated in part."""
    layers, hidden = c.layers("num_hidden_layers"), c.integer("hidden_size")
    heads, own = blocks.split(c, hidden, "num_attention_heads")
    eps = c.real("layer_norm_eps", default=1e-5, low=1e-30)
    turn, parallel = rope(c, own, part=0.25), c.flag("use_parallel_residual", True)
    frame = Frame.decoder(g, layers, heads, own)
    x = blocks.embed(g, frame.ids, f"{g.root}embed_in", c.integer("vocab_size"), hidden)
    for i in range(layers):
        at = f"{g.root}layers.{i}"
        y = blocks.layer_norm(g, x, f"{at}.input_layernorm", eps)
        y = _neox_attention(frame, c, y, f"{at}.attention", heads, turn, i)
        if not parallel:
            x = blocks.add(g, x, y, at)
        z = blocks.layer_norm(g, x, f"{at}.post_attention_layernorm", eps)
        z = _neox_mlp(g, c, z, f"{at}.mlp")
        x = blocks.add(g, x, blocks.add(g, z, y, at) if parallel else z, at)
    x = blocks.layer_norm(g, x, f"{g.root}final_layer_norm", eps)
    _finish(g, c, x, head, f"{g.root}embed_in", tied=False)


def _neox_attention(
    frame: Frame, c: Config, x: ir.Value, at: str, heads: int, turn: Rope, i: int
) -> ir.Value:
    """q, k and v come out of one product, mingled head by head."""
    g, bias = frame.g, c.flag("attention_bias", True)
    hidden = width(x)
    y = g.linear(x, f"{at}.query_key_value", 3 * hidden, bias=bias)
    y = frame.forward(frame.heads(y, heads, at), at)
    own = hidden // heads
    q, k, v = blocks.halves(g, y, at, own, own, own)
    q, k = frame.turned(q, turn, at), frame.turned(k, turn, at)
    y = frame.attend(q, k, v, at, own**-0.5, layer=i)
    return g.linear(y, f"{at}.dense", hidden, bias=bias)


def _neox_mlp(g: Graph, c: Config, x: ir.Value, at: str) -> ir.Value:
    hidden = width(x)
    y = g.linear(x, f"{at}.dense_h_to_4h", c.integer("intermediate_size"), bias=True)
    kind = blocks.activation(c, "hidden_act", default="gelu")
    y = blocks.ACTIVATIONS[kind](g, y, f"{at}.act")
    return g.linear(y, f"{at}.dense_4h_to_h", hidden, bias=True)


# -- OPT -----------------------------------------------------------------------------------------

_OFFSET = 2  # OPT's table of positions has two rows in front that no token uses


def opt(g: Graph, c: Config, *, head: str) -> None:
    """OPT: learned positions from row 2 on, norms before (or, in 350m, behind) each block."""
    c.demand("layer_norm_elementwise_affine", True, default=True)
    layers, hidden = c.layers("num_hidden_layers"), c.integer("hidden_size")
    heads, own = blocks.split(c, hidden, "num_attention_heads")
    narrow = c.integer("word_embed_proj_dim", default=hidden)
    before = c.flag("do_layer_norm_before", True)
    frame = Frame.decoder(g, layers, heads, own)
    x = blocks.embed(g, frame.ids, f"{g.root}embed_tokens", c.integer("vocab_size"), narrow)
    if narrow != hidden:
        x = g.linear(x, f"{g.root}project_in", hidden, bias=False)
    x = blocks.add(g, x, _opt_positions(frame, c, hidden), f"{g.root}embed_positions")
    for i in range(layers):
        x = _opt_layer(frame, c, x, f"{g.root}layers.{i}", heads, i)
    if before and not c.flag("_remove_final_layer_norm", False):
        x = blocks.layer_norm(g, x, f"{g.root}final_layer_norm", 1e-5)
    if narrow != hidden:
        x = g.linear(x, f"{g.root}project_out", narrow, bias=False)
    _finish(g, c, x, head, f"{g.root}embed_tokens", tied=True)


def _opt_positions(frame: Frame, c: Config, hidden: int) -> ir.Value:
    g, at = frame.g, f"{frame.g.root}embed_positions"
    shift = g.constant(np.asarray(_OFFSET, np.int64), "pfmc/offset")
    places = g.op("Add", [frame.positions, shift], dims(frame.positions), at, kind=blocks.INT)
    rows = c.integer("max_position_embeddings", default=2048) + _OFFSET
    return blocks.embed(g, places, at, rows, hidden)


def _opt_layer(frame: Frame, c: Config, x: ir.Value, at: str, heads: int, i: int) -> ir.Value:
    g, bias, before = frame.g, c.flag("enable_bias", True), c.flag("do_layer_norm_before", True)
    own, hidden = f"{at}.self_attn", width(x)

    def normed(value: ir.Value, name: str, here: bool) -> ir.Value:
        return blocks.layer_norm(g, value, f"{at}.{name}", 1e-5) if here else value

    y = normed(x, "self_attn_layer_norm", before)
    parts = (g.linear(y, f"{own}.{n}_proj", hidden, bias=bias) for n in "qkv")
    q, k, v = (frame.forward(frame.heads(p, heads, own), own) for p in parts)
    y = frame.attend(q, k, v, own, (hidden // heads) ** -0.5, layer=i)
    x = blocks.add(g, x, g.linear(y, f"{own}.out_proj", hidden, bias=bias), at)
    x = normed(x, "self_attn_layer_norm", not before)
    y = g.linear(
        normed(x, "final_layer_norm", before), f"{at}.fc1", c.integer("ffn_dim"), bias=bias
    )
    kind = blocks.activation(c, "activation_function", default="relu")
    y = blocks.ACTIVATIONS[kind](g, y, f"{at}.activation_fn")
    x = blocks.add(g, x, g.linear(y, f"{at}.fc2", hidden, bias=bias), at)
    return normed(x, "final_layer_norm", not before)
