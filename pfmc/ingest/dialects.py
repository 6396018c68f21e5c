"""Lowers com.microsoft operators (onnxruntime-genai exports, fused models) to standard ones.

What becomes of each operator stands in docs/dialects.md, which is made of the tables here and in
`pfmc.ingest.dialects_refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir

from pfmc.ingest import dialects_experts as experts
from pfmc.ingest import dialects_group as group
from pfmc.ingest import dialects_heads as heads
from pfmc.ingest import dialects_integers as integers
from pfmc.ingest import dialects_norms as norms
from pfmc.ingest import dialects_plain as plain
from pfmc.ingest import dialects_products as products
from pfmc.ingest import dialects_rotary as rotary
from pfmc.ingest.dialects_packed import PackedWeight, unpack
from pfmc.ingest.dialects_refused import REASONS
from pfmc.ingest.lowering import Lowering
from pfmc.ingest.rewrite import Builder
from pfmc.ir import vocabulary

CONTRIB: Final = "com.microsoft"
Lower = Callable[[Lowering], None]

_FOREIGN: dict[str, Lower] = {
    "Attention": heads.fused_attention,
    "BiasGelu": norms.gelu("none"),
    "BranchwiseRMSNorm": norms.branchwise_rms_norm,
    "DecoderMaskedMultiHeadAttention": heads.decoder_attention,
    "DequantizeLinear": integers.dequantise_linear,
    "DynamicQuantizeMatMul": integers.dynamic_quantise_mat_mul,
    "EmbedLayerNormalization": norms.embed_layer_norm,
    "EngramGate": norms.engram_gate,
    "ExpandDims": plain.expand_dims,
    "FastGelu": norms.gelu("tanh"),
    "FusedConv": products.fused_conv,
    "FusedGemm": products.fused_gemm,
    "FusedMatMul": products.fused_mat_mul,
    "GatedAdd": norms.gated_add,
    "GatedRMSNorm": norms.gated_rms_norm,
    "GatherBlockQuantized": products.gather_block_quantised,
    "GatherND": plain.renamed("GatherND"),
    "Gelu": norms.gelu("none"),
    "GroupQueryAttention": group.group_query_attention,
    "HyperConnectionPostMix": norms.post_mix,
    "HyperConnectionPreMix": norms.pre_mix,
    "LinearAttentionGate": norms.linear_attention_gate,
    "MRotaryEmbedding": rotary.multimodal_rotary_embedding,
    "MatMulBnb4": products.mat_mul_bnb4,
    "MatMulInteger16": integers.mat_mul_integer_16,
    "MatMulIntegerToFloat": integers.integer_to_float,
    "MatMulNBits": products.mat_mul_n_bits,
    "MoE": experts.mixture,
    "MultiHeadAttention": heads.multi_head_attention,
    "Pad": plain.pad,
    "QAttention": integers.quantised_attention,
    "QEmbedLayerNormalization": integers.quantised_embed,
    "QGemm": integers.linear_gemm,
    "QLinearAdd": integers.two_operands("Add"),
    "QLinearConcat": integers.linear_concat,
    "QLinearLeakyRelu": integers.one_operand("LeakyRelu"),
    "QLinearMul": integers.two_operands("Mul"),
    "QLinearSigmoid": integers.one_operand("Sigmoid"),
    "QLinearSoftmax": integers.one_operand("Softmax"),
    "QLinearWhere": integers.linear_where,
    "QMoE": experts.quantised_mixture,
    "QuantizeLinear": integers.quantise_linear,
    "QuickGelu": norms.quick_gelu,
    "Range": plain.count_up,
    "RotaryEmbedding": rotary.rotary_embedding,
    "SampleOp": plain.echo,
    "ScaledSiLU": norms.scaled_silu,
    "SimplifiedLayerNormalization": norms.rms_norm,
    "SkipLayerNormalization": norms.skip_layer_norm,
    "SkipSimplifiedLayerNormalization": norms.skip_rms_norm,
    "TransposeMatMul": products.fused_mat_mul,
    "Trilu": plain.renamed("Trilu"),
    "UnfoldTensor": plain.unfold,
}
LOWERINGS: Final[dict[tuple[str, str], Lower]] = {
    ("", "SimplifiedLayerNormalization"): norms.rms_norm,
    **{(CONTRIB, name): lower for name, lower in _FOREIGN.items()},
}
"""Operator outside the standard -> its lowering; the guard accepts exactly these."""

STANDARD: Final[dict[tuple[str, str], Lower]] = {
    ("", "DequantizeLinear"): integers.dequantise_linear,
    ("", "DynamicQuantizeLinear"): integers.dynamic_quantise_linear,
    ("", "MatMulInteger"): integers.mat_mul_integer,
    ("", "QLinearMatMul"): integers.linear_mat_mul,
    ("", "QuantizeLinear"): integers.quantise_linear,
}
"""Standard operators of integer arithmetic -> what they become where they touch activations."""

_KNOWN: Final = {**LOWERINGS, **STANDARD}


def lower(model: ir.Model) -> None:
    """Replaces every dialect node of `model` by standard operators and ``pfmc::Rotary``."""
    graph = model.graph
    found = [n for n in graph if (n.domain, n.op_type) in _KNOWN]
    if not found:
        return
    builder = Builder(graph)
    shared: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
    for node in found:
        builder.at(node)
        lower_node(Lowering(node, builder, shared))
    graph.opset_imports.pop(CONTRIB, None)
    vocabulary.install(model)


def lower_node(low: Lowering) -> None:
    """Lowers the node of `low`, whose inputs and attributes no schema has checked.

    Raises:
        InputError: it cannot be lowered, or arithmetic on what it holds failed.
    """
    try:
        _KNOWN[low.node.domain, low.node.op_type](low)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = f"its inputs and attributes do not fit each other: {error}"
        raise low.refuse(why, "export the model again") from error
    except MemoryError as error:
        raise low.refuse("what it holds is far too large", "export the model again") from error


__all__ = ["LOWERINGS", "REASONS", "STANDARD", "PackedWeight", "lower", "lower_node", "unpack"]
