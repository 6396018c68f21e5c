"""ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import Graph, width
from pfmc.ingest.hf.heads import Head
from pfmc.ingest.hf.rope import Rope, rope

FULL, SLIDING = "full_attention", "sliding_attention"


def modernbert(g: Graph, c: Config, head: Head) -> None:
    """ModernBERT: norms before each block, rotary positions, windows in two layers of three."""
    frame, hidden = Frame.encoder(g), c.integer("hidden_size")
    heads, own = blocks.split(c, hidden, "num_attention_heads")
    at, ropes = f"{g.root}embeddings", _ropes(c, own)
    x = blocks.embed(g, frame.ids, f"{at}.tok_embeddings", c.integer("vocab_size"), hidden)
    x = _norm(g, c, x, f"{at}.norm")
    for i, kind in enumerate(_kinds(c)):
        at = f"{g.root}layers.{i}"
        y = _norm(g, c, x, f"{at}.attn_norm") if i else x
        x = blocks.add(g, x, _attention(frame, c, y, f"{at}.attn", heads, ropes[kind], kind), at)
        x = blocks.add(g, x, _mlp(g, c, _norm(g, c, x, f"{at}.mlp_norm"), f"{at}.mlp"), at)
    head(g, c, _norm(g, c, x, f"{g.root}final_norm"), frame)


def _kinds(c: Config) -> tuple[str, ...]:
    """Of each layer whether it has a window."""
    layers = c.layers("num_hidden_layers")
    every = c.integer("global_attn_every_n_layers", default=3)
    kinds = c.texts("layer_types", layers) or tuple(
        SLIDING if i % every else FULL for i in range(layers)
    )
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise c.refuse("layer_types", f"holds {strange[0]!r}")
    return kinds


def _ropes(c: Config, own: int) -> dict[str, Rope]:
    """The rotary table of each kind of layer."""
    bases = {FULL: ("global_rope_theta", 160000.0), SLIDING: ("local_rope_theta", 10000.0)}
    return {
        kind: rope(c, own, theta=c.real(key, default=base), key=kind)
        for kind, (key, base) in bases.items()
    }


def _norm(g: Graph, c: Config, x: ir.Value, at: str) -> ir.Value:
    eps = c.real("norm_eps", default=1e-5, low=1e-30)
    return blocks.layer_norm(g, x, at, eps, bias=c.flag("norm_bias", False))


def _attention(
    frame: Frame, c: Config, x: ir.Value, at: str, heads: int, turn: Rope, kind: str
) -> ir.Value:
    g, hidden, bias = frame.g, width(x), c.flag("attention_bias", False)
    y = g.linear(x, f"{at}.Wqkv", 3 * hidden, bias=bias)
    parts = blocks.halves(g, y, at, hidden, hidden, hidden)
    q, k, v = (frame.forward(frame.heads(p, heads, at), at) for p in parts)
    q, k = frame.turned(q, turn, at), frame.turned(k, turn, at)
    reach = c.integer("local_attention", default=128, low=2) // 2 + 1 if kind == SLIDING else 0
    y = frame.attend(q, k, v, at, (hidden // heads) ** -0.5, window=reach)
    return g.linear(y, f"{at}.Wo", hidden, bias=bias)


def _mlp(g: Graph, c: Config, x: ir.Value, at: str) -> ir.Value:
    inner, bias = c.integer("intermediate_size"), c.flag("mlp_bias", False)
    hidden = width(x)
    both = g.linear(x, f"{at}.Wi", 2 * inner, bias=bias)
    gate, up = blocks.halves(g, both, at, inner, inner)
    kind = blocks.activation(c, "hidden_activation", default="gelu")
    return g.linear(blocks.gated(g, gate, up, kind, at), f"{at}.Wo", hidden, bias=bias)
