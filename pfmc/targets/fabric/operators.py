"""What one operator of the canonical graph asks of the fabric, per element: data, not code."""

from __future__ import annotations

from typing import Final

Row = tuple[str, dict[str, float]]
"""Kind of the operation, and its work per element."""

_SUMS = """
Add Sub Neg Abs Max Min Sum Clip Relu Where Round Floor Ceil Sign PRelu LeakyRelu ThresholdedRelu
ScatterElements ScatterND Trilu Mod OneHot
"""
_TABLES = """
Gelu Swish Sigmoid Tan Tanh Erf Exp Log Sqrt Reciprocal Pow Softplus Softsign Elu Selu Celu Mish
"""
_REDUCTIONS = """
ReduceSum ReduceMean ReduceMax ReduceMin ArgMax ArgMin TopK GlobalAveragePool GlobalMaxPool
AveragePool MaxPool CumSum
"""

PER_OUTPUT: Final[dict[str, Row]] = {
    # sums and comparisons
    **{op: ("elementwise", {"adds": 1.0}) for op in _SUMS.split()},
    # products; a quotient is a reciprocal table and a product
    "Mul": ("elementwise", {"muls": 1.0}),
    "Mean": ("elementwise", {"adds": 1.0, "muls": 1.0}),
    "Div": ("elementwise", {"muls": 1.0, "table_reads": 1.0}),
    "HardSwish": ("elementwise", {"muls": 1.0, "adds": 1.0}),
    "HardSigmoid": ("elementwise", {"muls": 1.0, "adds": 1.0}),
    # functions of one number: 256-entry tables
    **{op: ("elementwise", {"table_reads": 1.0}) for op in _TABLES.split()},
    "SwiGLU": ("elementwise", {"table_reads": 1.0, "muls": 1.0}),
    "Rotary": ("rotary", {"muls": 2.0, "adds": 1.0}),
    "RotaryEmbedding": ("rotary", {"muls": 2.0, "adds": 1.0}),
    # x -> |x| peak, reciprocal, product, rounding; static: product and rounding
    "QuantiseToken": ("requantise", {"muls": 1.0, "adds": 2.0}),
    "Quantise": ("requantise", {"muls": 1.0, "adds": 1.0}),
    # square and sum, scale, weight (and centre)
    "RMSNormalization": ("norm", {"muls": 3.0, "adds": 1.0}),
    "LayerNormalization": ("norm", {"muls": 3.0, "adds": 4.0}),
    "GroupNormalization": ("norm", {"muls": 3.0, "adds": 4.0}),
    "InstanceNormalization": ("norm", {"muls": 3.0, "adds": 4.0}),
    "BatchNormalization": ("norm", {"muls": 1.0, "adds": 1.0}),
    "LpNormalization": ("norm", {"muls": 2.0, "adds": 1.0}),
    # running maximum, exponential, sum, one product by the reciprocal of the sum
    "Softmax": ("softmax", {"exps": 1.0, "adds": 2.0, "muls": 1.0}),
    "LogSoftmax": ("softmax", {"exps": 1.0, "adds": 3.0}),
    "Cos": ("table", {"table_reads": 1.0}),
    "Sin": ("table", {"table_reads": 1.0}),
}
"""Operators whose work grows with the elements of their first output."""

PER_INPUT: Final[dict[str, Row]] = {
    **{op: ("elementwise", {"adds": 1.0}) for op in _REDUCTIONS.split()},
    "ReduceSumSquare": ("elementwise", {"adds": 1.0, "muls": 1.0}),
    "ReduceL2": ("elementwise", {"adds": 1.0, "muls": 1.0}),
    "ReduceL1": ("elementwise", {"adds": 2.0}),  # magnitude and sum
    "ReduceProd": ("elementwise", {"muls": 1.0}),
    # running maximum, exponential and sum
    "ReduceLogSumExp": ("elementwise", {"exps": 1.0, "adds": 2.0}),
}
"""Operators whose work grows with the elements of their first input."""

AT_LAST: Final[dict[str, dict[str, float]]] = {
    "ReduceL2": {"roots": 1.0},
    "ReduceLogSumExp": {"table_reads": 1.0, "adds": 1.0},  # logarithm, and the maximum again
}
"""What a reduction does to each of its results besides."""

VARIADIC: Final = frozenset({"Sum", "Mean", "Max", "Min"})
"""Operators of any number of inputs: one addition or comparison for each but the first."""

_WIRING = """
Reshape Transpose Unsqueeze Squeeze Flatten Expand Identity Concat Split Slice Pad Tile Dropout
Cast CastLike Shape Size Constant ConstantOfShape Range DepthToSpace SpaceToDepth
"""
_CONTROL = """
Add Sub Mul Div Mod Neg Abs Max Min Clip Sign Equal Greater Less GreaterOrEqual LessOrEqual And Or
Not Xor Where Gather GatherND GatherElements NonZero CumSum ReduceSum ReduceProd ReduceMax
ReduceMin ArgMax ArgMin TopK Trilu OneHot ScatterND ScatterElements IsNaN IsInf Floor Ceil
BitwiseAnd BitwiseOr BitShift EyeLike Bernoulli RandomUniform Unique
"""

WIRING: Final = frozenset(_WIRING.split())
"""Operators that only move values, or do nothing at all in hardware."""

CONTROL: Final = frozenset(_CONTROL.split())
"""Operators that are control when every output is an integer or a flag."""
