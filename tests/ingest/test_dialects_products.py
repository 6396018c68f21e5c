"""Fused, packed and looked-up products of com.microsoft, and mixtures of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from pfmc.errors import InputError
from pfmc.ingest import load
from pfmc.ingest.dialects_packed import PackedTable, TableWeight
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes import pipeline, recipe

from .conftest import make_session, run_model
from .onenode import RNG, Weights, compare, make, normal, proto, typed, whole


@pytest.mark.parametrize("flags", ["", "A", "B", "AB"])
@pytest.mark.parametrize("batch", ["", "A", "B", "AB"])
def test_every_transpose(flags: str, batch: str, tmp_path: Path) -> None:
    """Operands ``[d, M, K]``; the batch transposed lies behind the rows."""
    a, b = normal(2, 3, 4), normal(2, 4, 5)
    if "A" in flags:
        a = a.transpose(0, 2, 1)
    if "B" in flags:
        b = b.transpose(0, 2, 1)
    a = a.transpose(1, 0, 2) if "A" in batch else a
    b = b.transpose(1, 0, 2) if "B" in batch else b
    more = {f"trans{n}": 1 for n in flags} | {f"transBatch{n}": 1 for n in batch}
    feeds = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}
    compare(tmp_path, "FusedMatMul", ["a", "b"], feeds, {}, alpha=0.5, **more)


def test_the_old_name(tmp_path: Path) -> None:
    feeds = {"a": normal(3, 4), "b": normal(5, 4)}
    compare(tmp_path, "TransposeMatMul", ["a", "b"], feeds, {}, transB=1, alpha=2.0)


ACTIVATIONS: dict[str, dict[str, float]] = {
    "Relu": {}, "Tanh": {}, "Sigmoid": {}, "Softplus": {}, "Softsign": {},
    "LeakyRelu": {"activation_alpha": 0.2}, "Elu": {"activation_alpha": 0.7},
    "HardSigmoid": {"activation_alpha": 0.3, "activation_beta": 0.4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_fused_gemm(kind: str, tmp_path: Path) -> None:
    weights = {"b": normal(4, 3), "c": normal(4)}
    compare(tmp_path, "FusedGemm", ["a", "b", "c"], {"a": normal(2, 3)}, weights,
            transB=1, alpha=0.5, beta=2.0, activation=kind, **ACTIVATIONS[kind])  # fmt: skip


def test_fused_convolution(tmp_path: Path) -> None:
    feeds = {"x": normal(1, 2, 5, 5), "z": normal(1, 3, 3, 3)}
    weights = {"w": normal(3, 2, 3, 3), "b": normal(3)}
    compare(tmp_path, "FusedConv", ["x", "w", "b"], {"x": feeds["x"]}, weights,
            activation="LeakyRelu", activation_params=[0.3])  # fmt: skip
    compare(tmp_path, "FusedConv", ["x", "w", "b", "z"], feeds, weights, activation="Relu")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("zeros", ["none", "codes", "floats"])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_few_bits(bits: int, block: int, zeros: str, bias: bool, tmp_path: Path) -> None:
    """The one thing between the two is the rounding of float32 sums (accuracy_level 1)."""
    n, k = 6, 72
    blocks = -(-k // block)
    weights = {
        "B": whole(0, 256, n, blocks, block * bits // 8),
        "s": RNG.uniform(0.01, 0.1, (n, blocks)).astype(np.float32),
    }
    if zeros == "codes":
        weights["z"] = whole(0, 256, n, -(-blocks * bits // 8))
    elif zeros == "floats":
        weights["z"] = RNG.uniform(0, 1 << bits, (n, blocks)).astype(np.float32)
    if bias:
        weights["b"] = normal(n)
    names = ["x", "B", "s", "z" * ("z" in weights), "", "b" * bias]
    while not names[-1]:
        names.pop()
    if bits == 8 and zeros == "floats":
        pytest.skip("ONNX Runtime takes no floating zero points with 8 bits")
    compare(tmp_path, "MatMulNBits", names, {"x": normal(2, 3, k)}, weights, atol=2e-4,
            K=k, N=n, bits=bits, block_size=block, accuracy_level=1)  # fmt: skip


def test_inputs_in_blocks_of_any_order(tmp_path: Path) -> None:
    n, k, block = 6, 64, 16
    weights = {
        "B": whole(0, 256, n, 4, block // 2),
        "s": RNG.uniform(0.01, 0.1, (n, 4)).astype(np.float32),
        "g": RNG.permutation(np.repeat(np.arange(4), block)).astype(np.int32),
    }
    compare(tmp_path, "MatMulNBits", ["x", "B", "s", "", "g"], {"x": normal(2, 3, k)}, weights,
            atol=2e-4, K=k, N=n, bits=4, block_size=block)  # fmt: skip


@pytest.mark.parametrize("kind", [0, 1], ids=["fp4", "nf4"])
@pytest.mark.parametrize("k", [32, 24])
def test_bitsandbytes(kind: int, k: int, tmp_path: Path) -> None:
    n, block = 5, 16
    weights = {
        "B": whole(0, 256, -(-k * n // 2)),
        "m": RNG.uniform(0.5, 1, -(-k * n // block)).astype(np.float32),
    }
    compare(tmp_path, "MatMulBnb4", ["x", "B", "m"], {"x": normal(3, k)}, weights,
            K=k, N=n, block_size=block, quant_type=kind)  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_tables(bits: int, zeros: bool, tmp_path: Path) -> None:
    weights: Weights = {
        "d": whole(0, 256, 10, 48 * bits // 8),
        "s": RNG.uniform(0.1, 1, (10, 3)).astype(np.float32),
    }
    if zeros:
        weights["z"] = whole(0, 256, 10, -(-3 * bits // 8))
    feeds = {"i": np.array([[1, -2, 9]], np.int64)}
    compare(tmp_path, "GatherBlockQuantized", ["d", "i", "s", *("z" * zeros)], feeds, weights,
            atol=0, bits=bits, block_size=16, quantize_axis=1, gather_axis=0)  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4])
def test_tables_of_half_bytes(kind: Any, axis: int, tmp_path: Path) -> None:
    codes = whole(0, 8, 6, 32, kind=np.int8)
    scales, zeros = RNG.uniform(0.1, 1, (6, 2)).astype(np.float32), whole(0, 4, 6, 2, kind=np.int8)
    if axis:
        codes, scales, zeros = codes.T, scales.T, zeros.T
    of = make.np_dtype_to_tensor_dtype(np.dtype(kind))
    weights = {
        "d": make.make_tensor("d", of, codes.shape, codes.ravel().tolist()),
        "s": np.ascontiguousarray(scales),
        "z": make.make_tensor("z", of, zeros.shape, zeros.ravel().tolist()),
    }
    more = {"block_size": 16, "quantize_axis": 1 - axis, "gather_axis": axis}
    feeds = {"i": np.array([1, 3])}
    compare(tmp_path, "GatherBlockQuantized", ["d", "i", "s", "z"], feeds, weights, atol=1e-6,
            **more)  # fmt: skip


# -- experts ---------------------------------------------------------------------------------------

EXPERTS, HIDDEN, INNER, TOKENS = 4, 32, 64, 5


def layers(fused: int, bias: bool) -> Weights:
    """Two products of four experts."""
    found = {
        "w1": normal(EXPERTS, fused * INNER, HIDDEN) / 4,
        "w2": normal(EXPERTS, HIDDEN, INNER) / 4,
    }
    if bias:
        found |= {"b1": normal(EXPERTS, fused * INNER), "b2": normal(EXPERTS, HIDDEN)}
    return found


KINDS: dict[str, dict[str, Any]] = {
    "relu": {}, "gelu": {}, "silu": {}, "identity": {}, "swiglu": {"swiglu_fusion": 1},
}  # fmt: skip
OSS = {"swiglu_fusion": 1, "swiglu_limit": 1.0, "activation_alpha": 1.702, "activation_beta": 1.0}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "gpt-oss"])
def test_mixtures(kind: str, bias: bool, tmp_path: Path) -> None:
    more = OSS if kind == "gpt-oss" else KINDS[kind]
    name = "swiglu" if kind == "gpt-oss" else kind
    weights = layers(2 if name == "swiglu" else 1, bias)
    for count, norm in ((1, 0), (2, 1), (3, 0)):
        feeds = {"x": normal(1, TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
        names = ["x", "r", "w1", "b1" * bias, "w2", *["b2"] * bias]
        compare(tmp_path, "MoE", names, feeds, weights, k=count, activation_type=name,
                normalize_routing_weights=norm, **more)  # fmt: skip


def packed(bits: int, block: int, zeros: bool, fused: int) -> Weights:
    """The two products in codes."""
    found: Weights = {}
    for i, (rows, width) in enumerate(((fused * INNER, HIDDEN), (HIDDEN, INNER)), 1):
        blocks = width // block if block else 1
        found[f"w{i}"] = whole(0, 256, EXPERTS, rows, width * bits // 8)
        shape = (EXPERTS, rows, blocks) if block else (EXPERTS, rows)
        found[f"s{i}"] = (RNG.uniform(0.5, 1, shape) * 0.8 / (1 << bits)).astype(np.float32)
        if zeros:
            inner = -(-blocks * bits // 8)
            zero = (EXPERTS, rows, inner) if block else (EXPERTS, -(-rows * bits // 8))
            found[f"z{i}"] = whole(0, 256, *zero)
    return found


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(2, 0), (4, 0), (8, 0), (4, 32), (2, 32)])
def test_quantised_mixtures(bits: int, block: int, zeros: bool, tmp_path: Path) -> None:
    """Float activations; 8 bits in blocks, which ONNX Runtime rounds, stand below."""
    weights = packed(bits, block, zeros, 1)
    names = ["x", "r", "w1", "s1", "", "w2", "s2", "", "", "", "", *(["z1", "z2"] * zeros)]
    feeds = {"x": normal(TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
    more = {"block_size": block} if block else {}
    compare(tmp_path, "QMoE", names, feeds, weights, k=2, expert_weight_bits=bits,
            activation_type="silu", atol=2e-4, **more)  # fmt: skip


def test_a_mixture_of_rounded_activations(tmp_path: Path) -> None:
    """8 bits in blocks of 32: ONNX Runtime rounds activations to int8, block by block.

    Per product the error is below ``sum |w| max|x| / 254``, here below 2 % of the largest output.
    """
    weights = packed(8, 32, False, 2)
    names = ["x", "r", "w1", "s1", "", "w2", "s2"]
    feeds = {"x": normal(TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
    more = {"k": 2, "expert_weight_bits": 8, "block_size": 32, "activation_type": "swiglu"} | OSS
    model = proto("QMoE", names, feeds, weights, ["y"], more)
    session = make_session(model.SerializeToString())
    want = session.run(None, feeds)[0]
    path = tmp_path / "model.onnx"
    path.write_bytes(typed(model, session).SerializeToString())
    got = run_model(load(path).model, feeds)[0]
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("norm", [0, 1])
def test_other_weights_for_mixing(norm: int, tmp_path: Path) -> None:
    weights = packed(4, 0, False, 1)
    names = ["x", "r", "w1", "s1", "", "w2", "s2", *[""] * 7, "m"]
    feeds = {"x": normal(TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
    feeds["m"] = np.abs(normal(TOKENS, EXPERTS))
    compare(tmp_path, "QMoE", names, feeds, weights, k=2, expert_weight_bits=4, atol=2e-4,
            activation_type="silu", normalize_routing_weights=norm)  # fmt: skip


@pytest.mark.parametrize("op", ["MoE", "QMoE"])
def test_every_expert_becomes_a_fixed_linear(op: str, tmp_path: Path) -> None:
    plain = op == "MoE"
    weights = layers(2, True) if plain else packed(4, 32, False, 2)
    names = ["x", "r", "w1", "b1", "w2", "b2"] if plain else ["x", "r", "w1", "s1", "", "w2", "s2"]
    feeds = {"x": normal(1, TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
    more: dict[str, Any] = {"k": 2, "activation_type": "swiglu", **OSS}
    more |= {} if plain else {"expert_weight_bits": 4, "block_size": 32}
    loaded = compare(tmp_path, op, names, feeds, weights, atol=1e-4, **more)
    want = run_model(loaded, feeds)[0]
    model = pipeline.canonicalise(loaded, recipe.load("stream", ()).passes).model
    assert check.illegal(model, Stage.CANONICAL) == []
    assert len(vocabulary.fixed_linears(model)) == 2 * EXPERTS
    np.testing.assert_allclose(run_model(model, feeds)[0], want, rtol=0, atol=1e-5)


def test_zero_points_that_the_runtime_forgets(tmp_path: Path) -> None:
    """With g_idx ONNX Runtime 1.31 reads no zero points; nobody can say what was meant."""
    weights = {
        "B": whole(0, 256, 6, 4, 8), "s": normal(6, 4), "z": whole(0, 256, 6, 2),
        "g": np.repeat(np.arange(4, dtype=np.int32), 16),
    }  # fmt: skip
    more = {"K": 64, "N": 6, "bits": 4, "block_size": 16}
    _refused("MatMulNBits", ["x", *weights], {"x": normal(3, 64)}, weights, more,
             "g_idx together with zero points", tmp_path)  # fmt: skip


def _refused(
    op: str, names: list[str], feeds: Weights, weights: Weights, more: dict[str, Any],
    message: str, folder: Path,
) -> None:  # fmt: skip
    model = proto(op, names, feeds, weights, ["y"], more)
    model.graph.output[0].type.tensor_type.elem_type = 1
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("op", "more", "message"),
    [
        ("MoE", {"activation_type": "swiglu"}, "not interleaved"),
        ("MoE", {"activation_type": "mish"}, "'mish' is not known"),
        ("MoE", {"use_sparse_mixer": 1}, "use_sparse_mixer"),
        ("QMoE", {"quant_type": "fp4"}, "no integers"),
        ("QMoE", {"expert_weight_bits": 3}, "3 bits"),
        ("QMoE", {"block_size": 48}, "blocks of 48"),
        ("QMoE", {"weights_prepacked": 1}, "prepacked"),
    ],
)
def test_what_is_refused(op: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = op == "MoE"
    weights = layers(1, False) if plain else packed(4, 0, False, 1)
    names = ["x", "r", "w1", "", "w2"] if plain else ["x", "r", "w1", "s1", "", "w2", "s2"]
    feeds = {"x": normal(1, TOKENS, HIDDEN), "r": normal(TOKENS, EXPERTS)}
    _refused(op, names, feeds, weights, more, message, tmp_path)


@pytest.mark.parametrize("kind", [np.int8, np.int32])
def test_zero_points_of_a_type_that_no_kernel_reads(kind: Any, tmp_path: Path) -> None:
    weights = {"B": whole(0, 256, 6, 4, 8), "s": normal(24), "z": np.zeros(12, kind)}
    more = {"K": 64, "N": 6, "bits": 4, "block_size": 16}
    _refused("MatMulNBits", ["x", *weights], {"x": normal(3, 64)}, weights, more,
             "uint8 or floating-point", tmp_path)  # fmt: skip


def test_bitsandbytes_of_floats_for_codes(tmp_path: Path) -> None:
    weights = {"B": normal(128), "m": normal(16)}
    more = {"K": 16, "N": 16, "block_size": 16, "quant_type": 1}
    _refused("MatMulBnb4", ["x", *weights], {"x": normal(3, 16)}, weights, more, "must be uint8",
             tmp_path)  # fmt: skip


@pytest.mark.parametrize("zeros", [whole(0, 9, 5, 1), whole(0, 9, 4, 2), normal(4, 1)])
def test_a_packed_table_with_zero_points_of_another_form(zeros: Any, tmp_path: Path) -> None:
    weights = {"B": whole(0, 256, 4, 16), "s": normal(4, 1), "z": zeros}
    more = {"bits": 4, "block_size": 32}
    _refused("GatherBlockQuantized", ["B", "i", "s", "z"], {"i": np.zeros(2, np.int64)}, weights,
             more, "zero points do not have", tmp_path)  # fmt: skip


@pytest.mark.parametrize("axis", [2, -3, 3])
def test_a_packed_table_in_blocks_of_no_axis(axis: int, tmp_path: Path) -> None:
    weights = {"B": whole(0, 256, 4, 16), "s": normal(4, 1) if axis == 3 else normal(1, 32)}
    more = {"bits": 4, "block_size": 32, "quantize_axis": axis}
    _refused("GatherBlockQuantized", ["B", "i", "s"], {"i": np.zeros(2, np.int64)}, weights,
             more, "of a table of 2 axes", tmp_path)  # fmt: skip


@pytest.mark.parametrize("block", [1 << 28, 1 << 62])
def test_blocks_far_longer_than_what_they_cut(block: int) -> None:
    """Once repeated in memory to the length of the block."""
    codes, peaks = ir.tensor(whole(0, 256, 32)), ir.tensor(normal(1))
    long, fit = (TableWeight(codes, peaks, 8, 8, n, True)().numpy() for n in (block, 64))
    np.testing.assert_array_equal(long, fit)
    codes, scales = ir.tensor(whole(0, 256, 4, 16)), ir.tensor(normal(4, 1))
    tables = [PackedTable(codes, scales, None, (4, 32), 1, 4, n)().numpy() for n in (block, 32)]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
    ("op", "inputs"), [("FusedGemm", ["", "b", "c"]), ("FusedConv", ["x", "", "c"])]
)
def test_a_left_out_operand_is_not_the_next_one(op: str, inputs: list[str], tmp_path: Path) -> None:
    feeds = {n: normal(1, 3, 8, 8) if op == "FusedConv" else normal(3, 3) for n in "xb"}
    weights = {"c": normal(2, 3, 3, 3) if op == "FusedConv" else normal(3, 3)}
    _refused(op, inputs, feeds, weights, {}, "is missing", tmp_path)


def test_experts_with_zero_points_that_are_no_codes(tmp_path: Path) -> None:
    weights = {"w": whole(0, 256, 2, 8, 4), "s": normal(2, 8), "z": normal(2, 4)}
    names = ["x", "r", "w", "s", "", "w", "s", "", "", "", "", "z"]
    feeds = {"x": normal(3, 8), "r": normal(3, 2)}
    _refused("QMoE", names, feeds, weights, {"expert_weight_bits": 4}, "not uint8", tmp_path)
