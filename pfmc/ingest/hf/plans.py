"""Decoders of Llama's kind in numbers: what each family's configuration asks for.

They differ in data only: biases, norms, windows, rotary tables, packed products, caps, experts.
Each family is one function from its configuration to a `Plan`; `decoders.build` writes the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pfmc.errors import did_you_mean
from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.experts import Experts
from pfmc.ingest.hf.rope import Rope, rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Plan:
    """A decoder of Llama's kind in numbers.

    Attributes:
        layers, hidden, inner, vocabulary: counts and widths.
        heads, kv_heads, width: of attention; `width` is of one head.
        eps: of the norms; activation: of the gate.
        ropes, windows: for each layer; None is no rotation, a window of 0 is none.
        scale: factor on the scores; softcap: on the scores, 0 for none.
        qkv_bias, out_bias, mlp_bias: which products have a bias.
        scale_plus: what is added to a norm's stored scale.
        fused: whether gate and up are one product.
        embedding_scale: factor on the embedding; logit_softcap: on the logits, 0 for none.
        tied: whether the head is the embedding table.
        norm: ``rms``, ``layer``, ``scale`` (LayerNorm without a shift) or ``bare`` (nor a scale).
        head_norms: of queries and keys: none, one for every ``head``, one for ``each``, or one
            over the ``whole`` width.
        norms: where a block is normed: ``before`` it, ``behind`` it, or ``both``.
        parallel: whether both blocks read the same state, and ``one`` norm or ``two``.
        gated: whether the feed-forward block has a gate.
        head_bias: whether the head has a bias.
        residual: factor on what a block adds; logit_scale: on the logits.
        experts: the mixture, or None; sinks: whether each head has one.
        packed: how q, k and v lie in one product: not at all, one after the other (``rows``), or
            by groups of heads that share keys (``groups``).
        names: today's names of modules where a family has its own.
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
    ropes: tuple[Rope | None, ...]
    windows: tuple[int, ...]
    scale: float
    softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: str = ""
    scale_plus: float = 0.0
    norms: str = "before"
    fused: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    tied: bool = False
    norm: str = "rms"
    parallel: str = ""
    gated: bool = True
    head_bias: bool = False
    residual: float = 1.0
    logit_scale: float = 1.0
    experts: Experts | None = None
    sinks: bool = False
    packed: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, module: str) -> str:
        """What the family calls a module that Llama calls `module`."""
        return self.names.get(module, module)


def base_plan(
    c: Config, *, eps: float = 1e-6, theta: float = 10000.0, kv_heads: int | None = None,
    width: int | None = None, tied: bool = False, act: str = "silu", part: float = 1.0,
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
        eps=c.real("rms_norm_eps", "layer_norm_eps", "norm_epsilon", default=eps, low=1e-30),
        activation=blocks.activation(c, "hidden_act", "hidden_activation", default=act),
        ropes=(rope(c, own, theta=theta, part=part),) * layers,
        windows=(0,) * layers,
        scale=own**-0.5,
        tied=c.flag("tie_word_embeddings", tied),
    )


def window_of(c: Config, default: int | None = None) -> int:
    """The sliding window; 0 if there is none or no text the model can hold is longer than it."""
    window = c.integer("sliding_window", default=default or 0, low=0)
    return window if window < c.integer("max_position_embeddings", default=1 << 24) else 0


def kinds_of(c: Config, layers: int, kinds: Sequence[str]) -> tuple[str, ...]:
    """``layer_types`` if it is there, else `kinds`."""
    found = c.texts("layer_types", layers) or tuple(kinds)
    strange = sorted(set(found) - {FULL, SLIDING})
    if strange:
        mend = did_you_mean(strange[0], (FULL, SLIDING))
        raise c.refuse("layer_types", f"holds {strange[0]!r}", mend)
    return found


def windows_of(kinds: Sequence[str], window: int) -> tuple[int, ...]:
    """The window of each layer: `window` for sliding ones, else 0."""
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


# -- the families --------------------------------------------------------------------------------


def llama(c: Config) -> Plan:
    """Llama 1 to 3, TinyLlama and what shares their layout."""
    bias = c.flag("attention_bias", False)
    plan = replace(base_plan(c), mlp_bias=c.flag("mlp_bias", False))
    return replace(plan, qkv_bias=bias, out_bias=bias)


def mistral(c: Config) -> Plan:
    """Mistral: one sliding window for all layers, or none."""
    plan = base_plan(c, kv_heads=8)
    missing = 4096 if "sliding_window" not in c.body else None
    return replace(plan, windows=(window_of(c, missing),) * plan.layers)


def qwen2(c: Config) -> Plan:
    """Qwen2 and Qwen2.5: biases on q, k and v."""
    return replace(windowed_above(c, base_plan(c, kv_heads=None)), qkv_bias=True)


def qwen3(c: Config) -> Plan:
    """Qwen3: norms on the heads of q and k."""
    bias = c.flag("attention_bias", False)
    plan = windowed_above(c, base_plan(c, width=128))
    return replace(plan, head_norms="head", qkv_bias=bias, out_bias=bias)


def windowed_above(c: Config, plan: Plan) -> Plan:
    """The layers from ``max_window_layers`` on have a window, if ``use_sliding_window`` is set."""
    if not c.flag("use_sliding_window", False):
        return plan
    first = c.integer("max_window_layers", default=28, low=0)
    kinds = [SLIDING if i >= first else FULL for i in range(plan.layers)]
    windows = windows_of(kinds_of(c, plan.layers, kinds), window_of(c, 4096))
    return replace(plan, windows=windows)


def phi3(c: Config) -> Plan:
    """Phi-3 and Phi-4-mini: fused products, longrope, heads that are rotated in part."""
    plan = base_plan(c, eps=1e-5)
    return replace(plan, fused=True, packed="rows", windows=(window_of(c),) * plan.layers)


def gemma(c: Config) -> Plan:
    """Gemma 1."""
    plan = _gemma(c, c, width=256)
    return replace(plan, scale=plan.width**-0.5)


def gemma2(c: Config) -> Plan:
    """Gemma 2: every second layer has a window; soft caps on scores and logits."""
    plan = _gemma(c, c, width=256)
    kinds = kinds_of(c, plan.layers, [FULL if i % 2 else SLIDING for i in range(plan.layers)])
    return replace(
        plan,
        norms="both",
        windows=windows_of(kinds, window_of(c, 4096)),
        scale=c.real("query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        softcap=_cap(c, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(c, "final_logit_softcapping", 30.0),
    )


def gemma3(c: Config) -> Plan:
    """Gemma 3 (text): five layers with a window for one without; a rotary table for each kind."""
    pattern = c.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    plan = _gemma(c, Config({k: v for k, v in c.body.items() if "rope" not in k}, c.where), 256)
    built = [SLIDING if (i + 1) % pattern else FULL for i in range(plan.layers)]
    kinds = kinds_of(c, plan.layers, built)
    wide = rope(c, plan.width, theta=1e6, key=FULL)
    base = c.real("rope_local_base_freq", default=1e4)
    outer = {k: v for k, v in c.body.items() if k not in ("rope_theta", "rope_scaling")}
    near = rope(Config(outer, c.where), plan.width, theta=base, key=SLIDING)
    return replace(
        plan,
        norms="both",
        head_norms="head",
        windows=windows_of(kinds, window_of(c, 4096)),
        ropes=tuple(near if kind == SLIDING else wide for kind in kinds),
        scale=c.real("query_pre_attn_scalar", default=256, low=1e-6) ** -0.5,
        softcap=_cap(c, "attn_logit_softcapping", 0.0),
        logit_softcap=_cap(c, "final_logit_softcapping", 0.0),
    )


def _gemma(c: Config, ropes: Config, width: int) -> Plan:
    """What the Gemmas share: scaled embedding, tied head, norms that store their scale less one."""
    c.demand("use_bidirectional_attention", None, False)
    plan = replace(base_plan(ropes, width=width, tied=True), scale_plus=1.0)
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
