"""Decoders of Llama's kind: Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma, Gemma 2 and Gemma 3.

They differ in data only: biases, norms, windows, rotary tables, fused products, soft caps. Each
family is one function from its configuration to a `Plan`; `build` writes the graph of any plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from pfmc.errors import did_you_mean
from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import Graph, dims
from pfmc.ingest.hf.rope import Rope, rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Plan:
    """A decoder of Llama's kind in numbers.

    Attributes:
        layers, hidden, inner, vocabulary: counts and widths.
        heads, kv_heads, width: of attention; `width` is of one head.
        eps: of the norms; activation: of the gate.
        ropes, windows: for each layer; a window of 0 is none.
        scale: factor on the scores; softcap: on the scores, 0 for none.
        qkv_bias, out_bias, mlp_bias: which products have a bias.
        head_norms: whether queries and keys are normed head by head.
        scale_plus: what is added to a norm's stored scale.
        four_norms: whether both blocks are normed behind as well.
        fused: whether q, k, v are one product, and gate and up one.
        embedding_scale: factor on the embedding; logit_softcap: on the logits, 0 for none.
        tied: whether the head is the embedding table.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    width: int
    eps: float
    activation: str
    ropes: tuple[Rope, ...]
    windows: tuple[int, ...]
    scale: float
    softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    scale_plus: float = 0.0
    four_norms: bool = False
    fused: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    tied: bool = False


def _base(
    c: Config, *, eps: float = 1e-6, theta: float = 10000.0, kv_heads: int | None = None,
    width: int | None = None, tied: bool = False,
) -> Plan:  # fmt: skip
    """What all families of this kind read alike; the keywords are the family's defaults."""
    layers, hidden = c.layers("num_hidden_layers"), c.integer("hidden_size")
    heads = c.integer("num_attention_heads")
    own = c.integer("head_dim", default=width or max(1, hidden // heads))
    shared = c.integer("num_key_value_heads", default=kv_heads or heads)
    if heads % shared:
        raise c.refuse("num_key_value_heads", f"does not divide the {heads} heads")
    if own % 2:
        raise c.refuse("head_dim", f"gives heads of odd width {own}")
    return Plan(
        layers=layers,
        hidden=hidden,
        inner=c.integer("intermediate_size"),
        vocabulary=c.integer("vocab_size"),
        heads=heads,
        kv_heads=shared,
        width=own,
        eps=c.real("rms_norm_eps", default=eps, low=1e-30),
        activation=blocks.activation(c, "hidden_act", "hidden_activation", default="silu"),
        ropes=(rope(c, own, theta=theta),) * layers,
        windows=(0,) * layers,
        scale=own**-0.5,
        tied=c.flag("tie_word_embeddings", tied),
    )


def _window(c: Config, default: int | None = None) -> int:
    """The sliding window; 0 if there is none or no text the model can hold is longer than it."""
    window = c.integer("sliding_window", default=default or 0, low=0)
    return window if window < c.integer("max_position_embeddings", default=1 << 24) else 0


def _kinds(c: Config, layers: int, kinds: Sequence[str]) -> tuple[str, ...]:
    """``layer_types`` if it is there, else `kinds`."""
    found = c.texts("layer_types", layers) or tuple(kinds)
    strange = sorted(set(found) - {FULL, SLIDING})
    if strange:
        mend = did_you_mean(strange[0], (FULL, SLIDING))
        raise c.refuse("layer_types", f"holds {strange[0]!r}", mend)
    return found


def _windows(kinds: Sequence[str], window: int) -> tuple[int, ...]:
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


# -- the families --------------------------------------------------------------------------------


def llama(c: Config) -> Plan:
    """Llama 1 to 3, TinyLlama and what shares their layout."""
    bias = c.flag("attention_bias", False)
    plan = replace(_base(c), mlp_bias=c.flag("mlp_bias", False))
    return replace(plan, qkv_bias=bias, out_bias=bias)


def mistral(c: Config) -> Plan:
    """Mistral: one sliding window for all layers, or none."""
    plan = _base(c, kv_heads=8)
    missing = 4096 if "sliding_window" not in c.body else None
    return replace(plan, windows=(_window(c, missing),) * plan.layers)


def qwen2(c: Config) -> Plan:
    """Qwen2 and Qwen2.5: biases on q, k and v."""
    return replace(_windowed_above(c, _base(c, kv_heads=None)), qkv_bias=True)


def qwen3(c: Config) -> Plan:
    """Qwen3: norms on the heads of q and k."""
    bias = c.flag("attention_bias", False)
    plan = _windowed_above(c, _base(c, width=128))
    return replace(plan, head_norms=True, qkv_bias=bias, out_bias=bias)


def _windowed_above(c: Config, plan: Plan) -> Plan:
    """The layers from ``max_window_layers`` on have a window, if ``use_sliding_window`` is set."""
    if not c.flag("use_sliding_window", False):
        return plan
    first = c.integer("max_window_layers", default=28, low=0)
    kinds = [SLIDING if i >= first else FULL for i in range(plan.layers)]
    windows = _windows(_kinds(c, plan.layers, kinds), _window(c, 4096))
    return replace(plan, windows=windows)


def phi3(c: Config) -> Plan:
    """Phi-3 and Phi-4-mini: fused products, longrope, heads that are rotated in part."""
    plan = _base(c, eps=1e-5)
    return replace(plan, fused=True, windows=(_window(c),) * plan.layers)


def gemma(c: Config) -> Plan:
    """Gemma 1."""
    plan = _gemma(c, c, width=256)
    return replace(plan, scale=plan.width**-0.5)


def gemma2(c: Config) -> Plan:
    """Gemma 2: every second layer has a window; soft caps on scores and logits."""
    plan = _gemma(c, c, width=256)
    kinds = _kinds(c, plan.layers, [FULL if i % 2 else SLIDING for i in range(plan.layers)])
    return replace(
        plan,
        four_norms=True,
        windows=_windows(kinds, _window(c, 4096)),
        scale=c.real("query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        softcap=_cap(c, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(c, "final_logit_softcapping", 30.0),
    )


def gemma3(c: Config) -> Plan:
    """Gemma 3 (text): five layers with a window for one without; a rotary table for each kind."""
    pattern = c.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    plan = _gemma(c, Config({k: v for k, v in c.body.items() if "rope" not in k}, c.where), 256)
    built = [SLIDING if (i + 1) % pattern else FULL for i in range(plan.layers)]
    kinds = _kinds(c, plan.layers, built)
    wide = rope(c, plan.width, theta=1e6, key=FULL)
    base = c.real("rope_local_base_freq", default=1e4)
    outer = {k: v for k, v in c.body.items() if k not in ("rope_theta", "rope_scaling")}
    near = rope(Config(outer, c.where), plan.width, theta=base, key=SLIDING)
    return replace(
        plan,
        four_norms=True,
        head_norms=True,
        windows=_windows(kinds, _window(c, 4096)),
        ropes=tuple(near if kind == SLIDING else wide for kind in kinds),
        scale=c.real("query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        softcap=_cap(c, "attn_logit_softcapping", 0.0),
        logit_softcap=_cap(c, "final_logit_softcapping", 0.0),
    )


def _gemma(c: Config, ropes: Config, width: int) -> Plan:
    """What the Gemmas share: scaled embedding, tied head, norms that store their scale less one."""
    c.demand("use_bidirectional_attention", None, False)
    plan = replace(_base(ropes, width=width, tied=True), scale_plus=1.0)
    first = c.body.get("model_type") == "gemma"
    key = "hidden_act" if first else "hidden_activation"
    kind = blocks.activation(c, key, default="gelu_pytorch_tanh")
    if first and kind == "gelu":  # what the first files say and do not mean
        kind = "gelu_pytorch_tanh"
    bias = c.flag("attention_bias", False)
    return replace(
        plan,
        activation=kind,
        embedding_scale=math.sqrt(plan.hidden),
        qkv_bias=bias,
        out_bias=bias,
    )


def _cap(c: Config, key: str, missing: float) -> float:
    """A soft cap; 0 if it is null."""
    return c.real(key, default=0.0 if key in c.body else missing)


# -- the graph -----------------------------------------------------------------------------------


def build(g: Graph, c: Config, plan: Plan, *, head: bool) -> None:
    """Writes the decoder of `plan`, with its head or without."""
    frame = Frame.decoder(g, plan.layers, plan.kv_heads, plan.width)
    table = f"{g.root}embed_tokens"
    x = blocks.embed(g, frame.ids, table, plan.vocabulary, plan.hidden)
    x = blocks.scaled(g, x, plan.embedding_scale, table)
    for i in range(plan.layers):
        x = _layer(frame, x, plan, i)
    x = _norm(g, x, f"{g.root}norm", plan)
    if not head:
        g.output(x, "last_hidden_state")
        return
    weight = f"{table}.weight" if plan.tied else ""
    y = g.linear(x, "lm_head", plan.vocabulary, bias=False, weight=weight)
    g.output(_capped(g, y, plan.logit_softcap), "logits")


def _norm(g: Graph, x: ir.Value, at: str, plan: Plan) -> ir.Value:
    return blocks.rms_norm(g, x, at, plan.eps, plus=plan.scale_plus)


def _capped(g: Graph, y: ir.Value, cap: float) -> ir.Value:
    """``cap * tanh(y / cap)``."""
    if not cap:
        return y
    limit = g.number(cap, f"cap_{cap:g}")
    shrunk = g.op("Div", [y, limit], dims(y), "lm_head")
    return g.op("Mul", [g.op("Tanh", [shrunk], dims(y), "lm_head"), limit], dims(y), "lm_head")


def _layer(frame: Frame, x: ir.Value, plan: Plan, i: int) -> ir.Value:
    g, at = frame.g, f"{frame.g.root}layers.{i}"
    y = _norm(g, x, f"{at}.input_layernorm", plan)
    y = _attention(frame, y, f"{at}.self_attn", plan, i)
    if plan.four_norms:
        y = _norm(g, y, f"{at}.post_attention_layernorm", plan)
    x = blocks.add(g, x, y, at)
    before = "pre_feedforward_layernorm" if plan.four_norms else "post_attention_layernorm"
    y = _mlp(g, _norm(g, x, f"{at}.{before}", plan), f"{at}.mlp", plan)
    if plan.four_norms:
        y = _norm(g, y, f"{at}.post_feedforward_layernorm", plan)
    return blocks.add(g, x, y, at)


def _attention(frame: Frame, x: ir.Value, at: str, plan: Plan, i: int) -> ir.Value:
    g, many, few = frame.g, plan.heads * plan.width, plan.kv_heads * plan.width
    if plan.fused:
        y = g.linear(x, f"{at}.qkv_proj", many + 2 * few, bias=plan.qkv_bias)
        q, k, v = blocks.halves(g, y, at, many, few, few)
    else:
        q, k, v = (
            g.linear(x, f"{at}.{name}_proj", width, bias=plan.qkv_bias)
            for name, width in (("q", many), ("k", few), ("v", few))
        )
    q, k = (frame.heads(y, n, at) for y, n in ((q, plan.heads), (k, plan.kv_heads)))
    if plan.head_norms:
        q, k = _norm(g, q, f"{at}.q_norm", plan), _norm(g, k, f"{at}.k_norm", plan)
    q, k = (frame.turned(frame.forward(y, at), plan.ropes[i], at) for y in (q, k))
    v = frame.forward(frame.heads(v, plan.kv_heads, at), at)
    y = frame.attend(q, k, v, at, plan.scale, layer=i, window=plan.windows[i], softcap=plan.softcap)
    return g.linear(y, f"{at}.o_proj", plan.hidden, bias=plan.out_bias)


def _mlp(g: Graph, x: ir.Value, at: str, plan: Plan) -> ir.Value:
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
