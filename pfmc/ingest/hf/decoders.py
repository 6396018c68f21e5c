"""Writes the graph of a decoder of Llama's kind, whatever its `Plan`."""

from __future__ import annotations

import onnx_ir as ir

from pfmc.ingest.hf import blocks, experts
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.graph import Graph, dims, width
from pfmc.ingest.hf.plans import Plan


def build(g: Graph, plan: Plan, *, head: bool) -> None:
    """Writes the decoder of `plan`, with its head or without."""
    frame = Frame.decoder(g, plan.layers, plan.kv_heads, plan.width)
    table = f"{g.root}{plan.name('embed_tokens')}"
    x = blocks.embed(g, frame.ids, table, plan.vocabulary, plan.hidden)
    x = blocks.scaled(g, x, plan.embedding_scale, table)
    for i in range(plan.layers):
        x = _layer(frame, x, plan, i)
    x = _norm(g, x, f"{g.root}{plan.name('norm')}", plan)
    if not head:
        g.output(x, "last_hidden_state")
        return
    weight = f"{table}.weight" if plan.tied else ""
    y = g.linear(x, "lm_head", plan.vocabulary, bias=plan.head_bias, weight=weight)
    g.output(_capped(g, blocks.scaled(g, y, plan.logit_scale, "lm_head"), plan), "logits")


def _norm(g: Graph, x: ir.Value, at: str, plan: Plan) -> ir.Value:
    if plan.norm == "rms":
        return blocks.rms_norm(g, x, at, plan.eps, plus=plan.scale_plus)
    if plan.norm == "bare":
        return blocks.bare_norm(g, x, at, plan.eps)
    return blocks.layer_norm(g, x, at, plan.eps, bias=plan.norm == "layer")


def _capped(g: Graph, y: ir.Value, plan: Plan) -> ir.Value:
    """``cap * tanh(y / cap)``."""
    cap = plan.logit_softcap
    if not cap:
        return y
    limit = g.number(cap, f"cap_{cap:g}")
    shrunk = g.op("Div", [y, limit], dims(y), "lm_head")
    return g.op("Mul", [g.op("Tanh", [shrunk], dims(y), "lm_head"), limit], dims(y), "lm_head")


# -- a layer -------------------------------------------------------------------------------------


def _layer(frame: Frame, x: ir.Value, plan: Plan, i: int) -> ir.Value:
    g, at = frame.g, f"{frame.g.root}{plan.name('layers')}.{i}"
    if plan.parallel:
        return _side_by_side(frame, x, plan, i, at)
    before, behind = plan.norms != "behind", plan.norms != "before"
    y = _norm(g, x, f"{at}.{plan.name('input_layernorm')}", plan) if before else x
    y = _attention(frame, y, f"{at}.{plan.name('self_attn')}", plan, i)
    if behind:
        y = _norm(g, y, f"{at}.post_attention_layernorm", plan)
    x = blocks.add(g, x, blocks.scaled(g, y, plan.residual, at), at)
    second = "pre_feedforward_layernorm" if behind else "post_attention_layernorm"
    y = _norm(g, x, f"{at}.{second}", plan) if before else x
    y = _feed(g, y, f"{at}.mlp", plan, i)
    if behind:
        y = _norm(g, y, f"{at}.post_feedforward_layernorm", plan)
    return blocks.add(g, x, blocks.scaled(g, y, plan.residual, at), at)


def _side_by_side(frame: Frame, x: ir.Value, plan: Plan, i: int, at: str) -> ir.Value:
    """Attention and feed-forward of the same state."""
    g = frame.g
    y = z = _norm(g, x, f"{at}.{plan.name('input_layernorm')}", plan)
    if plan.parallel == "two":
        z = _norm(g, x, f"{at}.{plan.name('post_attention_layernorm')}", plan)
    y = _attention(frame, y, f"{at}.{plan.name('self_attn')}", plan, i)
    z = _feed(g, z, f"{at}.mlp", plan, i)
    return blocks.add(g, x, blocks.add(g, y, z, at), at)


def _attention(frame: Frame, x: ir.Value, at: str, plan: Plan, i: int) -> ir.Value:
    g = frame.g
    q, k, v = _projected(frame, x, at, plan)
    if plan.head_norms in ("head", "each"):
        q, k = (
            _head_norm(g, q, f"{at}.{plan.name('q_norm')}", plan),
            _head_norm(g, k, f"{at}.{plan.name('k_norm')}", plan),
        )
    q, k, v = (frame.forward(y, at) for y in (q, k, v))
    turn = plan.ropes[i]
    if turn is not None:
        q, k = frame.turned(q, turn, at), frame.turned(k, turn, at)
    if plan.sinks:
        sinks = g.parameter(f"{at}.sinks", (plan.heads,))
        y = frame.attend_with_sinks(
            q, k, v, at, plan.scale, layer=i, window=plan.windows[i], sinks=sinks
        )
    else:
        y = frame.attend(
            q, k, v, at, plan.scale, layer=i, window=plan.windows[i], softcap=plan.softcap
        )
    return g.linear(y, f"{at}.{plan.name('o_proj')}", plan.hidden, bias=plan.out_bias)


def _head_norm(g: Graph, x: ir.Value, at: str, plan: Plan) -> ir.Value:
    """A norm of each head's numbers; ``each`` head may have a scale of its own."""
    if plan.head_norms == "head":
        return _norm(g, x, at, plan)
    heads, own = dims(x)[2], width(x)
    assert isinstance(heads, int)
    y = blocks.bare_norm(g, x, at, plan.eps)
    return g.op("Mul", [y, g.parameter(f"{at}.weight", (heads, own))], dims(x), at)


def _projected(
    frame: Frame, x: ir.Value, at: str, plan: Plan
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values ``[B, S, heads, D]``."""
    g, many, few = frame.g, plan.heads * plan.width, plan.kv_heads * plan.width
    if plan.packed:
        y = g.linear(x, f"{at}.{plan.name('qkv_proj')}", many + 2 * few, bias=plan.qkv_bias)
        if plan.packed == "groups":
            return _ungrouped(frame, y, at, plan)
        q, k, v = blocks.halves(g, y, at, many, few, few)
    else:
        q, k, v = (
            g.linear(x, f"{at}.{name}_proj", wide, bias=plan.qkv_bias)
            for name, wide in (("q", many), ("k", few), ("v", few))
        )
    if plan.head_norms == "whole":
        q, k = _norm(g, q, f"{at}.q_norm", plan), _norm(g, k, f"{at}.k_norm", plan)
    sizes = (plan.heads, plan.kv_heads, plan.kv_heads)
    q, k, v = (frame.heads(y, n, at) for y, n in zip((q, k, v), sizes, strict=True))
    return q, k, v


def _ungrouped(
    frame: Frame, y: ir.Value, at: str, plan: Plan
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values of one product, each group of heads followed by its own key."""
    g, own = frame.g, plan.width
    share = plan.heads // plan.kv_heads * own
    q, k, v = blocks.halves(g, frame.heads(y, plan.kv_heads, at), at, share, own, own)
    if share != own:
        shape = (*dims(q)[:2], plan.heads, own)
        q = g.op("Reshape", [q, g.integers(0, 0, plan.heads, own)], shape, at)
    return q, k, v


def _feed(g: Graph, x: ir.Value, at: str, plan: Plan, i: int) -> ir.Value:
    if plan.experts is not None and i in plan.experts.layers:
        return experts.block(g, x, at, plan.experts, plan.activation)
    return _mlp(g, x, at, plan)


def _mlp(g: Graph, x: ir.Value, at: str, plan: Plan) -> ir.Value:
    if not plan.gated:
        y = g.linear(x, f"{at}.{plan.name('up_proj')}", plan.inner, bias=plan.mlp_bias)
        y = blocks.ACTIVATIONS[plan.activation](g, y, f"{at}.act")
        return g.linear(y, f"{at}.{plan.name('down_proj')}", plan.hidden, bias=plan.mlp_bias)
    if plan.fused:
        both = g.linear(x, f"{at}.gate_up_proj", 2 * plan.inner, bias=False)
        gate, up = blocks.halves(g, both, at, plan.inner, plan.inner)
    else:
        gate, up = (
            g.linear(x, f"{at}.{name}_proj", plan.inner, bias=plan.mlp_bias)
            for name in ("gate", "up")
        )
    y = blocks.gated(g, gate, up, plan.activation, at)
    return g.linear(y, f"{at}.down_proj", plan.hidden, bias=plan.mlp_bias)
