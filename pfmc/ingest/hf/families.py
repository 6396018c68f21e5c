"""The architectures that can be built from a checkpoint, by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pfmc.errors import InputError, did_you_mean
from pfmc.ingest.hf import (
    decoders,
    encoders,
    heads,
    modernbert,
    more_plans,
    older,
    plans,
    seq2seq,
    vision,
)
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import Graph
from pfmc.ingest.hf.heads import Head
from pfmc.ingest.hf.plans import Plan

_Table = dict[str, "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """How one architecture is built.

    Attributes:
        model_type: what ``config.json`` must say besides.
        root: what the parameter names of its base model begin with.
        other: what they begin with in files saved with, or without, a head.
        build: writes its graph.
        unused: parts of names of tensors that may stay unread: buffers and other heads.
        spelt: pairs of today's and an older spelling of parts of parameter names.
    """

    model_type: str
    root: str
    other: str
    build: Callable[[Graph, Config], None]
    unused: tuple[str, ...] = ()
    spelt: tuple[tuple[str, str], ...] = ()


# -- decoders ------------------------------------------------------------------------------------


def _plain(plan: Callable[[Config], Plan], head: bool) -> Callable[[Graph, Config], None]:
    return lambda g, c: decoders.build(g, plan(c), head=head)


def _both(
    causal: str, base: str, kind: str, plan: Callable[[Config], Plan], *, root: str = "model.",
    spelt: tuple[tuple[str, str], ...] = (),
) -> _Table:  # fmt: skip
    """A decoder of Llama's kind with its head, and without."""
    unused = ("rotary_emb.inv_freq", "lm_head.", ".attn.bias", ".attn.masked_bias")
    return {
        causal: Architecture(kind, root, "", _plain(plan, True), unused, spelt),
        base: Architecture(kind, "", root, _plain(plan, False), unused, spelt),
    }


def _simple(name: str, kind: str, plan: Callable[[Config], Plan], **options: Any) -> _Table:
    """The same under the usual names."""
    return _both(f"{name}ForCausalLM", f"{name}Model", kind, plan, **options)


_MIXTRAL_SPELT = (
    (".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."),
    (".down_proj.", ".w2."),
)  # fmt: skip


def _older(
    causal: str, base: str, kind: str, root: str, build: Callable[..., None], head: str
) -> _Table:
    """A decoder with LayerNorm with its head, and without."""
    unused = (
        "lm_head.weight", "embed_out.weight", ".attn.bias", ".attn.masked_bias",
        ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq",
    )  # fmt: skip
    inner = root.partition(".")[2]  # OPT's base model has a root of its own
    spelt = (("lm_head.", "embed_out."),) if kind == "gpt_neox" else ()
    return {
        causal: Architecture(kind, root, inner, partial(build, head=head), unused, spelt),
        base: Architecture(kind, inner, root, partial(build, head=""), unused),
    }


# -- encoders ------------------------------------------------------------------------------------

_OTHER_HEADS = (
    "embeddings.position_ids", "pooler.", "cls.", "lm_head.", "vocab_", "classifier",
    "mask_token",
)  # fmt: skip
_VIT_SPELT = (
    ("layers.", "encoder.layer."), (".attention.o_proj.", ".attention.output.dense."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
)  # fmt: skip


def _headed(
    build: Callable[[Graph, Config, Head], None], head: Head
) -> Callable[[Graph, Config], None]:
    return lambda g, c: build(g, c, head)


def _encoder(
    name: str, kind: str, root: str, build: Callable[[Graph, Config, Head], None],
    behind: dict[str, Head], spelt: tuple[tuple[str, str], ...] = (),
) -> _Table:  # fmt: skip
    """An encoder without a head and with each head of `behind`."""
    table = {
        f"{name}{suffix}": Architecture(kind, root, "", _headed(build, head), _OTHER_HEADS, spelt)
        for suffix, head in behind.items()
    }
    plain = Architecture(kind, "", root, _headed(build, heads.hidden), _OTHER_HEADS, spelt)
    return {f"{name}Model": plain, **table}


def _clip(name: str, kind: str, root: str, build: Callable[..., None]) -> _Table:
    """One side of CLIP, by itself or with its projection into the common space."""
    unused = ("position_ids", "projection.weight")
    return {
        name: Architecture(kind, root, "", partial(build, projected=False), unused),
        f"{name}WithProjection": Architecture(
            kind, root, "", partial(build, projected=True), unused[:1]
        ),
    }


_SHARED_TABLES = ("embed_tokens.weight", "lm_head.weight", "proj_out.weight")
_SEQ2SEQ = {
    "T5ForConditionalGeneration": Architecture("t5", "", "", seq2seq.t5, _SHARED_TABLES),
    "T5EncoderModel": Architecture("t5", "", "", seq2seq.t5_encoder, (*_SHARED_TABLES, "decoder.")),
    "MT5ForConditionalGeneration": Architecture("mt5", "", "", seq2seq.t5, _SHARED_TABLES),
    "BartForConditionalGeneration": Architecture(
        "bart", "model.", "", seq2seq.bart, _SHARED_TABLES
    ),
    "WhisperForConditionalGeneration": Architecture(
        "whisper", "model.", "", seq2seq.whisper, ("proj_out.weight",)
    ),
}

_WORDS, _CLASSES = "ForMaskedLM", "ForSequenceClassification"

ARCHITECTURES: dict[str, Architecture] = {
    **_both("LlamaForCausalLM", "LlamaModel", "llama", plans.llama),
    **_both("MistralForCausalLM", "MistralModel", "mistral", plans.mistral),
    **_both("Qwen2ForCausalLM", "Qwen2Model", "qwen2", plans.qwen2),
    **_both("Qwen3ForCausalLM", "Qwen3Model", "qwen3", plans.qwen3),
    **_both("Phi3ForCausalLM", "Phi3Model", "phi3", plans.phi3),
    **_both("GemmaForCausalLM", "GemmaModel", "gemma", plans.gemma),
    **_both("Gemma2ForCausalLM", "Gemma2Model", "gemma2", plans.gemma2),
    **_both("Gemma3ForCausalLM", "Gemma3TextModel", "gemma3_text", plans.gemma3),
    **_simple("Mixtral", "mixtral", more_plans.mixtral, spelt=_MIXTRAL_SPELT),
    **_simple("Qwen2Moe", "qwen2_moe", more_plans.qwen2_moe),
    **_simple("Qwen3Moe", "qwen3_moe", more_plans.qwen3_moe),
    **_simple("GptOss", "gpt_oss", more_plans.gpt_oss),
    **_simple("StableLm", "stablelm", more_plans.stablelm),
    **_simple("Cohere", "cohere", more_plans.cohere),
    **_simple("Cohere2", "cohere2", more_plans.cohere2),
    **_simple("Olmo", "olmo", more_plans.olmo),
    **_simple("Olmo2", "olmo2", more_plans.olmo2),
    **_simple("Granite", "granite", more_plans.granite),
    **_simple("Starcoder2", "starcoder2", more_plans.starcoder2),
    **_simple("Phi", "phi", more_plans.phi),
    **_simple("GPTJ", "gptj", more_plans.gptj, root="transformer."),
    **_simple("Falcon", "falcon", more_plans.falcon, root="transformer."),
    **_older("GPT2LMHeadModel", "GPT2Model", "gpt2", "transformer.", older.gpt2, "lm_head"),
    **_older(
        "GPTNeoXForCausalLM", "GPTNeoXModel", "gpt_neox", "gpt_neox.", older.gpt_neox, "lm_head"
    ),
    **_older("OPTForCausalLM", "OPTModel", "opt", "model.decoder.", older.opt, "lm_head"),
    **_SEQ2SEQ,
    **_encoder("Bert", "bert", "bert.", encoders.bert, {
        _WORDS: heads.BERT_WORDS, _CLASSES: heads.BERT_CLASSES,
    }),
    **_encoder("Roberta", "roberta", "roberta.", encoders.roberta, {
        _WORDS: heads.ROBERTA_WORDS, _CLASSES: heads.ROBERTA_CLASSES,
    }),
    **_encoder("XLMRoberta", "xlm-roberta", "roberta.", encoders.roberta, {
        _WORDS: heads.ROBERTA_WORDS, _CLASSES: heads.ROBERTA_CLASSES,
    }),
    **_encoder("Electra", "electra", "electra.", encoders.bert, {}),
    **_encoder("MPNet", "mpnet", "mpnet.", encoders.mpnet, {_WORDS: heads.ROBERTA_WORDS}),
    **_encoder("DistilBert", "distilbert", "distilbert.", encoders.distilbert, {
        _WORDS: heads.DISTILBERT_WORDS, _CLASSES: heads.DISTILBERT_CLASSES,
    }),
    **_encoder("ModernBert", "modernbert", "model.", modernbert.modernbert, {
        _WORDS: heads.MODERNBERT_WORDS,
    }),
    **_encoder("ViT", "vit", "vit.", vision.vit, {
        "ForImageClassification": heads.image_classes,
    }, _VIT_SPELT),
    **_encoder("DeiT", "deit", "deit.", vision.deit, {
        "ForImageClassification": heads.image_classes,
    }, _VIT_SPELT),
    "Dinov2Model": Architecture(
        "dinov2", "", "dinov2.", _headed(vision.dinov2, vision.first_token), _OTHER_HEADS,
        _VIT_SPELT[1:5],
    ),
    **_clip("CLIPVisionModel", "clip_vision_model", "vision_model.", vision.clip_vision),
    **_clip("CLIPTextModel", "clip_text_model", "text_model.", vision.clip_text),
}  # fmt: skip
"""Architecture -> how it is built."""


_SUPPORTED = (
    "Model types that are built from a checkpoint: "
    + ", ".join(sorted({a.model_type for a in ARCHITECTURES.values()}))
    + ". Or export the model as ONNX and compile that file"
)


def architecture(config: Config) -> tuple[str, Architecture]:
    """The architecture that `config` names.

    Raises:
        InputError: it is unknown, quantised, or of another model type than its name says.
    """
    named = config.body.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise config.refuse(
            "architectures", "does not name the model's class", "add it, for example "
            '"architectures": ["LlamaForCausalLM"]',
        )  # fmt: skip
    name = named[0]
    if name not in ARCHITECTURES:
        raise InputError(
            f"There is no builder for {name[:100]!r}",
            where=config.where,
            mend=" ".join(filter(None, [did_you_mean(name, ARCHITECTURES), _SUPPORTED])),
        )
    found = ARCHITECTURES[name]
    if config.text("model_type") != found.model_type:
        raise config.refuse("model_type", f"does not belong to {name}")
    if config.body.get("quantization_config") is not None:
        raise config.refuse(
            "quantization_config", "means packed weights, which are not read",
            "take the unquantised checkpoint; the compiler quantises by itself",
        )  # fmt: skip
    return name, found
