"""The architectures that can be built from a checkpoint, by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pfmc.errors import InputError, did_you_mean
from pfmc.ingest.hf import decoders, encoders, heads, modernbert, older, vision
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.decoders import Plan
from pfmc.ingest.hf.graph import Graph
from pfmc.ingest.hf.heads import Head

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
    return lambda g, c: decoders.build(g, c, plan(c), head=head)


def _both(causal: str, base: str, kind: str, plan: Callable[[Config], Plan]) -> _Table:
    """A decoder of Llama's kind with its head, and without."""
    unused = ("rotary_emb.inv_freq", "lm_head.weight")
    return {
        causal: Architecture(kind, "model.", "", _plain(plan, True), unused),
        base: Architecture(kind, "", "model.", _plain(plan, False), unused),
    }


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


_WORDS, _CLASSES = "ForMaskedLM", "ForSequenceClassification"

ARCHITECTURES: dict[str, Architecture] = {
    **_both("LlamaForCausalLM", "LlamaModel", "llama", decoders.llama),
    **_both("MistralForCausalLM", "MistralModel", "mistral", decoders.mistral),
    **_both("Qwen2ForCausalLM", "Qwen2Model", "qwen2", decoders.qwen2),
    **_both("Qwen3ForCausalLM", "Qwen3Model", "qwen3", decoders.qwen3),
    **_both("Phi3ForCausalLM", "Phi3Model", "phi3", decoders.phi3),
    **_both("GemmaForCausalLM", "GemmaModel", "gemma", decoders.gemma),
    **_both("Gemma2ForCausalLM", "Gemma2Model", "gemma2", decoders.gemma2),
    **_both("Gemma3ForCausalLM", "Gemma3TextModel", "gemma3_text", decoders.gemma3),
    **_older("GPT2LMHeadModel", "GPT2Model", "gpt2", "transformer.", older.gpt2, "lm_head"),
    **_older(
        "GPTNeoXForCausalLM", "GPTNeoXModel", "gpt_neox", "gpt_neox.", older.gpt_neox, "lm_head"
    ),
    **_older("OPTForCausalLM", "OPTModel", "opt", "model.decoder.", older.opt, "lm_head"),
    **_encoder("Bert", "bert", "bert.", encoders.bert, {
        _WORDS: heads.BERT_WORDS, _CLASSES: heads.BERT_CLASSES,
    }),
    **_encoder("Roberta", "roberta", "roberta.", encoders.roberta, {
        _WORDS: heads.ROBERTA_WORDS, _CLASSES: heads.ROBERTA_CLASSES,
    }),
    **_encoder("DistilBert", "distilbert", "distilbert.", encoders.distilbert, {
        _WORDS: heads.DISTILBERT_WORDS, _CLASSES: heads.DISTILBERT_CLASSES,
    }),
    **_encoder("ModernBert", "modernbert", "model.", modernbert.modernbert, {
        _WORDS: heads.MODERNBERT_WORDS,
    }),
    **_encoder("ViT", "vit", "vit.", vision.vit, {
        "ForImageClassification": heads.image_classes,
    }, _VIT_SPELT),
}  # fmt: skip
"""Architecture -> how it is built."""


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
            mend=did_you_mean(name, ARCHITECTURES)
            + " Or export the model as ONNX and compile that file",
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
