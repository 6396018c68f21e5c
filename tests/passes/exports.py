"""Tiny random transformers, exported afresh: architectures that the shared zoo lacks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0}
_PLAIN = {**_TEXT, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_SHORT = {
    "vocab_size": 64, "hidden_size": 32, "use_cache": False, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_GEMMA = {
    **_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "roberta": ("RobertaConfig", "RobertaModel", {**_TEXT, "pad_token_id": 1}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA, "text"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED, "text"),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "use_cache": False}, "text",
    ),
    "modernbert": (
        "ModernBertConfig", "ModernBertModel",
        {**_TEXT, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}, "text",
    ),
    "deberta_v2": (
        "DebertaV2Config", "DebertaV2Model",
        {
            **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "type_vocab_size": 0,
        }, "text",
    ),
    "gptj": (
        "GPTJConfig", "GPTJForCausalLM",
        {
            "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
            "rotary_dim": 4, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
        }, "text",
    ),
    "codegen": (
        "CodeGenConfig", "CodeGenForCausalLM",
        {
            "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
            "rotary_dim": 4, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
        }, "text",
    ),
    "glm": (
        "GlmConfig", "GlmForCausalLM", {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8}, "text",
    ),
    "mpt": (
        "MptConfig", "MptForCausalLM",
        {
            "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
            "use_cache": False,
        }, "text",
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_PLAIN, "num_key_value_heads": 2}, "text"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _PLAIN, "text"),
    "stablelm": (
        "StableLmConfig", "StableLmForCausalLM", {**_PLAIN, "num_key_value_heads": 4}, "text",
    ),
    "falcon": (
        "FalconConfig", "FalconForCausalLM",
        {**_SHORT, "num_hidden_layers": 2, "num_attention_heads": 4}, "text",
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_SHORT, "n_layer": 2, "n_head": 4}, "text"),
    "albert": ("AlbertConfig", "AlbertModel", {**_TEXT, "embedding_size": 16}, "text"),
    "siglip": (
        "SiglipVisionConfig", "SiglipVisionModel",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        }, "image28",
    ),
    "convnext": (
        "ConvNextConfig", "ConvNextModel",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32}, "image32",
    ),
    "segformer": (
        "SegformerConfig", "SegformerModel",
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2],
            "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        }, "image32",
    ),
    "dinov2": (
        "Dinov2Config", "Dinov2Model",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
            "patch_size": 14, "mlp_ratio": 2,
        }, "image28",
    ),
    "swin": (
        "SwinConfig", "SwinModel",
        {
            "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
            "image_size": 32, "patch_size": 4, "num_channels": 3,
        }, "image32",
    ),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        {
            "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16,
            "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1, "use_cache": False,
        }, "mel",
    ),
    "patchtst": (
        "PatchTSTConfig", "PatchTSTForPrediction",
        {
            "num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8,
            "d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48,
            "prediction_length": 4,
        }, "series",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {
            **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
        }, "text",
    ),
}  # fmt: skip


def _inputs(kind: str) -> dict[str, Any]:
    import torch

    if kind == "text":
        ids = torch.randint(3, 60, (2, 7))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind.startswith("image"):
        side = int(kind[5:])
        return {"pixel_values": torch.randn(2, 3, side, side)}
    if kind == "mel":
        return {
            "input_features": torch.randn(2, 8, 32),
            "decoder_input_ids": torch.randint(3, 60, (2, 5)),
        }
    return {"past_values": torch.randn(2, 32, 2)}


def _model(name: str) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    config, cls, options, kind = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    return model, _inputs(kind)


def _dynamo(model: Any, inputs: dict[str, Any], path: Path) -> None:
    import torch

    torch.onnx.export(model, (), str(path), kwargs=inputs, dynamo=True, external_data=False)


def _dynamic(model: Any, inputs: dict[str, Any], path: Path) -> None:
    """The exporter of transformers itself, with dynamic lengths."""
    _transformers(model, inputs, path, dynamic=True)


def _static(model: Any, inputs: dict[str, Any], path: Path) -> None:
    _transformers(model, inputs, path, dynamic=False)


def _transformers(model: Any, inputs: dict[str, Any], path: Path, *, dynamic: bool) -> None:
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=dynamic))
    onnx_ir.save(exported.program, str(path))


MODES: dict[str, Callable[[Any, dict[str, Any], Path], None]] = {
    "t_static": _dynamo, "h_dyn": _dynamic, "h_static": _static,
}  # fmt: skip


def export(name: str, mode: str, folder: Path) -> Path:
    """Exports `name` in `mode` into `folder`, unless it is there already."""
    path = folder / f"{name}__{mode}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MODES[mode](*_model(name), path)
    return path


if __name__ == "__main__":
    for word in sys.argv[2:]:
        print(export(*word.split("__"), Path(sys.argv[1])))
