"""Why operators of com.microsoft are refused: every one that has no lowering, with its reason."""

from __future__ import annotations

from typing import Final

_NO_KERNEL = "ONNX Runtime's CPU provider has no kernel for it, so no lowering could be checked"
_PACKED = f"sequences packed without padding; {_NO_KERNEL}"
_SEARCH = "a search loop around a model: compile the model inside it"
_RECURRENT = "a recurrence over positions, not a transformer's product"
_TRAINING = "an operator of training"
_HOST = "text, hashes or search on the host, before the model"
_SHAPES = "the shape of its output depends on the data"
_PICTURES = "pooling, cropping or resampling of pictures, outside of fixed linears"
_BLOBS = "its weight is a blob in an order that ONNX Runtime does not document"

REASONS: Final[dict[str, str]] = {
    "AttnLSTM": _RECURRENT,
    "BeamSearch": _SEARCH,
    "BiasAdd": _NO_KERNEL,
    "BiasDropout": _TRAINING,
    "BiasSoftmax": _NO_KERNEL,
    "BiasSplitGelu": _NO_KERNEL,
    "BifurcationDetector": _HOST,
    "BitmaskBiasDropout": _TRAINING,
    "BitmaskDropout": _TRAINING,
    "CDist": "distances between all pairs of rows, not a transformer's product",
    "CausalConvWithState": _RECURRENT,
    "ComplexMul": _NO_KERNEL,
    "ComplexMulConj": _NO_KERNEL,
    "ConvTransposeWithDynamicPads": _PICTURES,
    "CropAndResize": _PICTURES,
    "DecoderAttention": _NO_KERNEL,
    "DecoderMaskedSelfAttention": _NO_KERNEL,
    "DequantizeBFP": _NO_KERNEL,
    "DequantizeWithOrder": _NO_KERNEL,
    "DynamicQuantizeLSTM": _RECURRENT,
    "DynamicSparseAttention": _NO_KERNEL,
    "DynamicTimeWarping": _HOST,
    "EPContext": "a blob compiled for one device; export the model it was made from",
    "FusedMatMulActivation": _NO_KERNEL,
    "GatedDeltaNet": f"{_RECURRENT}; {_NO_KERNEL}",
    "GatedRelativePositionBias": _NO_KERNEL,
    "GemmFastGelu": _NO_KERNEL,
    "GemmFloat8": _NO_KERNEL,
    "GemmaRotaryEmbedding": _NO_KERNEL,
    "GreedySearch": _SEARCH,
    "GridSample": _PICTURES,
    "GroupNorm": _NO_KERNEL,
    "Inverse": "the inverse of a matrix made at run time",
    "Irfft": _NO_KERNEL,
    "IsAllFinite": _TRAINING,
    "LinearAttention": _RECURRENT,
    "LongformerAttention": _NO_KERNEL,
    "MatMulBlockQuantizedFp4Weight": _NO_KERNEL,
    "MatMulBlockQuantizedFp8Weight": _NO_KERNEL,
    "MatMulFpQ4": _BLOBS,
    "MatMulNBitsMlp": _NO_KERNEL,
    "MatMulNBitsQkv": _NO_KERNEL,
    "MaxpoolWithMask": _PICTURES,
    "MulInteger": _NO_KERNEL,
    "MurmurHash3": _HOST,
    "NGramHashMapping": _HOST,
    "NGramRepeatBlock": _HOST,
    "NhwcConv": _NO_KERNEL,
    "NhwcFusedConv": _NO_KERNEL,
    "NhwcMaxPool": _PICTURES,
    "PackedAttention": _PACKED,
    "PackedMultiHeadAttention": _PACKED,
    "PackedSparseAttentionIndexer": _PACKED,
    "PagedAttention": _NO_KERNEL,
    "QLinearAveragePool": _PICTURES,
    "QLinearConv": "an integer convolution: quantise with QDQ, or export in floats",
    "QLinearGlobalAveragePool": _PICTURES,
    "QLinearReduceMean": _NO_KERNEL,
    "QOrderedAttention": _NO_KERNEL,
    "QOrderedGelu": _NO_KERNEL,
    "QOrderedLayerNormalization": _NO_KERNEL,
    "QOrderedLongformerAttention": _NO_KERNEL,
    "QOrderedMatMul": _NO_KERNEL,
    "QuantizeBFP": _NO_KERNEL,
    "QuantizeWithOrder": _NO_KERNEL,
    "ReduceSumInteger": _NO_KERNEL,
    "RelativePositionBias": _NO_KERNEL,
    "RemovePadding": _PACKED,
    "RestorePadding": _PACKED,
    "Rfft": _NO_KERNEL,
    "Sampling": _SEARCH,
    "SkipGroupNorm": _NO_KERNEL,
    "Snpe": "a blob compiled for one device; export the model it was made from",
    "SparseAttention": "attention by a table of blocks; export with dense attention",
    "SparseAttentionIndexer": _NO_KERNEL,
    "SparsePagedAttention": _NO_KERNEL,
    "SparseToDenseMatMul": "its operand is a sparse tensor",
    "Tokenizer": _HOST,
    "TorchEmbedding": _TRAINING,
    "Unique": _SHAPES,
    "VarlenCausalConvWithState": _RECURRENT,
    "VarlenNGramHashMapping": _HOST,
    "WhisperBeamSearch": _SEARCH,
    "WordConvEmbedding": _HOST,
}
"""Operator of com.microsoft -> why it is refused."""


def reason(domain: str, op_type: str) -> str:
    """Why an operator outside the standard is refused; empty if nothing more is known."""
    return REASONS.get(op_type, "") if domain == "com.microsoft" else ""
