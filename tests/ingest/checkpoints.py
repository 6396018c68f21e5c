"""Tiny random checkpoints of every family, made by transformers, and its own forward as truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0], "partial_rotary_factor": 0.75,
}  # fmt: skip

DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama_base": ("LlamaModel", "LlamaConfig", _GROUPED),
    "llama_bias_tied": ("LlamaForCausalLM", "LlamaConfig", {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12,
    }),
    "llama_linear": ("LlamaForCausalLM", "LlamaConfig", {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    }),
    "llama_llama3": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama_yarn": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 5}),
    "mistral_plain": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen2_window": ("Qwen2ForCausalLM", "Qwen2Config", {
        **_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "phi3_long": ("Phi3ForCausalLM", "Phi3Config", {
        "rope_parameters": _LONG, "original_max_position_embeddings": 64,
    }),
    "phi3_longer": ("Phi3ForCausalLM", "Phi3Config", {
        "rope_parameters": _LONG, "original_max_position_embeddings": 6,
    }),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {
        **_GROUPED, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 0.2, "final_logit_softcapping": 1.5,
    }),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **_GROUPED, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_base": ("GPT2Model", "GPT2Config", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"rotary_pct": 0.25}),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt_350m": ("OPTForCausalLM", "OPTConfig", {
        "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False,
    }),
    "llama_dynamic": ("LlamaForCausalLM", "LlamaConfig", {
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        "max_position_embeddings": 8,
    }),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, **_EXPERTS}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **_GROUPED, **_EXPERTS, "moe_intermediate_size": 24, "num_experts": 4,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    }),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **_GROUPED, **_EXPERTS, "moe_intermediate_size": 24, "head_dim": 16, "num_experts": 4,
        "norm_topk_prob": True, "decoder_sparse_step": 2,
    }),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {
        **_GROUPED, **_EXPERTS, "head_dim": 16, "sliding_window": 4, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention",
        ],
    }),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**_GROUPED, "use_qkv_bias": True}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_GROUPED, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**_GROUPED, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {
        **_GROUPED, "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    }),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**_GROUPED, "sliding_window": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", {"qk_layernorm": True}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {}),
    "falcon_groups": ("FalconForCausalLM", "FalconConfig", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
    }),
    "falcon_serial": ("FalconForCausalLM", "FalconConfig", {
        "parallel_attn": False, "multi_query": False,
    }),
}  # fmt: skip
"""Name -> architecture, configuration class and what is set besides `_SMALL`."""

_DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", {}),
    "bert_words": ("BertForMaskedLM", "BertConfig", {"hidden_act": "gelu_new"}),
    "bert_classes": ("BertForSequenceClassification", "BertConfig", {"num_labels": 3}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL),
    "distilbert_words": ("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
    "distilbert_classes": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    "roberta": ("RobertaModel", "RobertaConfig", {"pad_token_id": 1, "type_vocab_size": 1}),
    "roberta_words": ("RobertaForMaskedLM", "RobertaConfig", {"pad_token_id": 1}),
    "roberta_classes": (
        "RobertaForSequenceClassification", "RobertaConfig", {"pad_token_id": 1},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {"local_attention": 6}),
    "modernbert_words": ("ModernBertForMaskedLM", "ModernBertConfig", {
        "local_attention": 4, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
    }),
    "vit": ("ViTModel", "ViTConfig", {"image_size": 24, "patch_size": 8}),
    "vit_classes": ("ViTForImageClassification", "ViTConfig", {"image_size": 24, "patch_size": 8}),
    "electra": ("ElectraModel", "ElectraConfig", {"embedding_size": 16}),
    "xlm_roberta_words": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {"pad_token_id": 1}),
    "mpnet": ("MPNetModel", "MPNetConfig", {"pad_token_id": 1}),
    "deit": ("DeiTModel", "DeiTConfig", {"image_size": 24, "patch_size": 8}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"image_size": 24, "patch_size": 8}),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {
        "image_size": 24, "patch_size": 8, "projection_dim": 16,
    }),
    "clip_text": ("CLIPTextModelWithProjection", "CLIPTextConfig", {
        "projection_dim": 16, "eos_token_id": 5,
    }),
}  # fmt: skip
"""The same for encoders."""

_T5 = {"d_model": 32, "d_kv": 6, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_TWO_SIDES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 48,
}  # fmt: skip
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        **_T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    }),
    "t5_untied": ("T5ForConditionalGeneration", "T5Config", {
        **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_TWO_SIDES, "scale_embedding": True}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        **_TWO_SIDES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
    }),
}  # fmt: skip
"""The same for encoder-decoders."""


def make(case: tuple[str, str, dict[str, Any]], folder: Path, **saving: Any) -> Any:
    """Saves a random model of `case` in `folder` as transformers does and returns it."""
    import torch
    import transformers

    name, kind, extra = case
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**{**_SMALL, **extra})
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too must matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **saving)
    return model


def truth(model: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers' own forward gives."""
    import torch

    given = {k: torch.from_numpy(v) for k, v in feeds.items()}
    with torch.no_grad():
        found = model(**given)
    return {k: v.numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}


class Runner:
    """A built graph in ONNX Runtime (optimisation BASIC)."""

    def __init__(self, model: ir.Model) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        data = ir.to_proto(model).SerializeToString()
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.sizes = {i.name: i.shape for i in self.session.get_inputs()}

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run; a KV memory that is not given is empty."""
        batch = len(next(iter(feeds.values())))
        empty = {
            name: np.zeros((batch, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.sizes.items()
            if name.startswith("past_key_values")
        }
        names = [o.name for o in self.session.get_outputs()]
        wanted = {k: v for k, v in feeds.items() if k in self.sizes}
        return dict(zip(names, self.session.run(None, {**empty, **wanted}), strict=True))

    def in_steps(self, ids: np.ndarray, *cuts: int) -> dict[str, np.ndarray]:
        """The outputs of runs over ``ids[:, a:b]`` one after another, joined along positions."""
        held: dict[str, np.ndarray] = {}
        parts = []
        for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            found = self({"input_ids": ids[:, start:end], **held})
            held = {
                k.replace("present", "past_key_values"): v
                for k, v in found.items()
                if k.startswith("present")
            }
            parts.append({k: v for k, v in found.items() if not k.startswith("present")})
        return {k: np.concatenate([p[k] for p in parts], axis=1) for k in parts[0]}
