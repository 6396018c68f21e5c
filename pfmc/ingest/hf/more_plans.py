"""More decoders of Llama's kind: mixtures of experts, side-by-side blocks, other norms."""

from __future__ import annotations

from dataclasses import replace

from pfmc.ingest.hf.blocks import activation
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.experts import Experts
from pfmc.ingest.hf.plans import (
    FULL,
    SLIDING,
    Plan,
    base_plan,
    kinds_of,
    llama,
    mistral,
    qwen3,
    window_of,
    windows_of,
)
from pfmc.ingest.hf.rope import rope

MOST_EXPERTS = 4096


def _count(c: Config, *keys: str) -> tuple[int, int]:
    """How many experts there are, and how many a token uses."""
    count = c.integer(*keys, high=MOST_EXPERTS)
    return count, c.integer("num_experts_per_tok", default=min(2, count), high=count)


# -- mixtures of experts -------------------------------------------------------------------------


def mixtral(c: Config) -> Plan:
    """Mixtral: every layer has experts."""
    plan = mistral(c) if "sliding_window" in c.body else base_plan(c, eps=1e-5, kv_heads=8)
    count, chosen = _count(c, "num_local_experts", "num_experts")
    layers = frozenset(range(plan.layers))
    return replace(plan, experts=Experts(count, chosen, plan.inner, layers))


def qwen2_moe(c: Config) -> Plan:
    """Qwen1.5-MoE and Qwen2-MoE: one more expert that all tokens use."""
    c.demand("use_sliding_window", None, False)
    plan = replace(base_plan(c), qkv_bias=c.flag("qkv_bias", True))
    shared = c.integer("shared_expert_intermediate_size", default=5632)
    return replace(plan, experts=replace(_qwen(c, plan.layers, False), shared=shared))


def qwen3_moe(c: Config) -> Plan:
    """Qwen3-MoE: norms on the heads of q and k."""
    c.demand("use_sliding_window", None, False)
    return replace(qwen3(c), experts=_qwen(c, c.layers("num_hidden_layers"), False))


def _qwen(c: Config, layers: int, normed: bool) -> Experts:
    count, chosen = _count(c, "num_experts", "num_local_experts")
    step = c.integer("decoder_sparse_step", default=1)
    plain = c.body.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(type(n) is int for n in plain):
        raise c.refuse("mlp_only_layers", "is no list of layers")
    mixed = frozenset(i for i in range(layers) if (i + 1) % step == 0 and i not in plain)
    scores = "normed" if c.flag("norm_topk_prob", normed) else "softmax"
    inner = c.integer("moe_intermediate_size")
    return Experts(count, chosen, inner, mixed, scores=scores)


def gpt_oss(c: Config) -> Plan:
    """GPT-OSS: sinks, windows in every second layer, experts in stacks with clamped gates."""
    yarn = {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    missing = c.body.get("rope_parameters") is None and c.body.get("rope_scaling") is None
    if missing:
        c = Config({**c.body, "rope_scaling": yarn}, c.where)
    plan = base_plan(c, eps=1e-5, theta=150000.0, kv_heads=8, width=64)
    built = [FULL if i % 2 else SLIDING for i in range(plan.layers)]
    kinds = kinds_of(c, plan.layers, built)
    count, chosen = _count(c, "num_local_experts", "num_experts")
    mixture = Experts(
        count, chosen, plan.inner, frozenset(range(plan.layers)), router="router", scores="chosen",
        clamp=c.real("swiglu_limit", default=7.0, low=1e-6),
        slope=c.real("swiglu_alpha", default=1.702, low=1e-6),
    )  # fmt: skip
    bias = c.flag("attention_bias", True)
    return replace(
        plan, windows=windows_of(kinds, window_of(c, 128)), experts=mixture, sinks=True,
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip


# -- dense ones ----------------------------------------------------------------------------------


def stablelm(c: Config) -> Plan:
    """StableLM 2: LayerNorm, heads that are rotated in part."""
    c.demand("qk_layernorm", None, False)
    plan = base_plan(c, eps=1e-5, part=0.25)
    side = "one" if c.flag("use_parallel_residual", False) else ""
    return replace(plan, norm="layer", qkv_bias=c.flag("use_qkv_bias", False), parallel=side)


def cohere(c: Config) -> Plan:
    """Command R: both blocks side by side, neighbours rotated together, a scale on the logits."""
    plan = base_plan(c, eps=1e-5, theta=500000.0, tied=True)
    bias = c.flag("attention_bias", False)
    turned = tuple(r and replace(r, near=True) for r in plan.ropes)
    return replace(
        plan, norm="scale", parallel="one", qkv_bias=bias, out_bias=bias, ropes=turned,
        head_norms="each" if c.flag("use_qk_norm", False) else "",
        logit_scale=c.real("logit_scale", default=0.0625),
    )  # fmt: skip


def cohere2(c: Config) -> Plan:
    """Command R7B: three layers with a window and rotation for one with neither."""
    plan = cohere(Config({**c.body, "use_qk_norm": False}, c.where))
    every = c.integer("sliding_window_pattern", "_sliding_window_pattern", default=4)
    built = [SLIDING if (i + 1) % every else FULL for i in range(plan.layers)]
    kinds = kinds_of(c, plan.layers, built)
    ropes = tuple(r if k == SLIDING else None for r, k in zip(plan.ropes, kinds, strict=True))
    return replace(plan, ropes=ropes, windows=windows_of(kinds, window_of(c, 4096)))


def olmo(c: Config) -> Plan:
    """OLMo: norms that hold nothing."""
    c.demand("clip_qkv", None)
    bias = c.flag("attention_bias", False)
    plan = replace(base_plan(c), norm="bare", eps=1e-5)
    return replace(plan, qkv_bias=bias, out_bias=bias)


def olmo2(c: Config) -> Plan:
    """OLMo 2: norms behind each block, and over all heads of q and of k together."""
    bias = c.flag("attention_bias", False)
    plan = replace(base_plan(c, eps=1e-5), norms="behind", head_norms="whole")
    return replace(plan, qkv_bias=bias, out_bias=bias)


def granite(c: Config) -> Plan:
    """Granite 3: Llama with factors on embedding, scores, what a block adds, and logits."""
    plan = llama(c)
    return replace(
        plan,
        embedding_scale=c.real("embedding_multiplier", default=1.0, low=1e-9),
        scale=c.real("attention_multiplier", default=1.0, low=1e-9),
        residual=c.real("residual_multiplier", default=1.0, low=1e-9),
        logit_scale=1.0 / c.real("logits_scaling", default=1.0, low=1e-9),
    )


def starcoder2(c: Config) -> Plan:
    """StarCoder 2: LayerNorm, biases, a feed-forward block without a gate."""
    plan = base_plan(c, eps=1e-5, kv_heads=2, tied=True, act="gelu_pytorch_tanh")
    bias = c.flag("use_bias", True)
    return replace(
        plan, norm="layer", gated=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        windows=(window_of(c),) * plan.layers,
        names={"up_proj": "c_fc", "down_proj": "c_proj"},
    )  # fmt: skip


def phi(c: Config) -> Plan:
    """Phi-1, 1.5 and 2: both blocks side by side, biases everywhere, the head's too."""
    plan = base_plan(c, eps=1e-5, part=0.5, act="gelu_new")
    return replace(
        plan, norm="layer", gated=False, parallel="one", qkv_bias=True, out_bias=True,
        mlp_bias=True, head_bias=True,
        head_norms="head" if c.flag("qk_layernorm", False) else "",
        names={
            "norm": "final_layernorm", "o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2",
            "q_norm": "q_layernorm", "k_norm": "k_layernorm",
        },
    )  # fmt: skip


def gptj(c: Config) -> Plan:
    """GPT-J: both blocks side by side, neighbours rotated together."""
    hidden = c.integer("n_embd", "hidden_size")
    named = {
        "num_hidden_layers": c.layers("n_layer", "num_hidden_layers"), "hidden_size": hidden,
        "num_attention_heads": c.integer("n_head", "num_attention_heads"),
        "intermediate_size": c.integer("n_inner", default=4 * hidden),
        "max_position_embeddings": c.integer("n_positions", default=2048),
        "layer_norm_eps": c.real("layer_norm_epsilon", default=1e-5, low=1e-30),
        "hidden_act": activation(c, "activation_function", default="gelu_new"),
    }  # fmt: skip
    own = Config({**c.body, **named}, c.where)
    plan = base_plan(own)
    turned = c.integer("rotary_dim", default=64)
    if turned > plan.width or turned % 2:
        raise c.refuse("rotary_dim", f"fits no head of width {plan.width}")
    turn = replace(rope(own, turned), near=True)
    return replace(
        plan, norm="layer", gated=False, parallel="one", mlp_bias=True, head_bias=True,
        ropes=(turn,) * plan.layers,
        names={
            "embed_tokens": "wte", "layers": "h", "input_layernorm": "ln_1", "norm": "ln_f",
            "self_attn": "attn", "o_proj": "out_proj", "up_proj": "fc_in", "down_proj": "fc_out",
        },
    )  # fmt: skip


def falcon(c: Config) -> Plan:
    """Falcon: q, k and v in one product; one key and value for all heads, or for a group."""
    c.demand("alibi", None, False)
    hidden = c.integer("hidden_size")
    heads, new = c.integer("num_attention_heads"), c.flag("new_decoder_architecture", False)
    one = c.flag("multi_query", True) and not new
    few = c.integer("num_kv_heads", default=heads) if new else 1 if one else heads
    named = {
        "num_key_value_heads": few, "intermediate_size": c.integer(
            "ffn_hidden_size", default=4 * hidden
        ),
        "layer_norm_eps": c.real("layer_norm_epsilon", default=1e-5, low=1e-30),
        "hidden_act": activation(c, "activation", default="gelu"),
    }  # fmt: skip
    plan = base_plan(Config({**c.body, **named}, c.where), tied=True)
    norms = c.integer("num_ln_in_parallel_attn", default=2 if new else 1)
    side = ("two" if norms == 2 and new else "one") if c.flag("parallel_attn", True) else ""
    bias = c.flag("bias", False)
    names = {
        "embed_tokens": "word_embeddings", "layers": "h", "norm": "ln_f",
        "self_attn": "self_attention", "qkv_proj": "query_key_value", "o_proj": "dense",
        "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h",
    }  # fmt: skip
    if side == "two":
        names |= {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    return replace(
        plan, norm="layer", gated=False, parallel=side, qkv_bias=bias, out_bias=bias,
        mlp_bias=bias, packed="rows" if one else "groups", names=names,
    )  # fmt: skip
