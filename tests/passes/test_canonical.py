"""The whole zoo: what each architecture is made of is what the canonical model is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.ir import check, provenance, vocabulary
from pfmc.ir.vocabulary import Stage

LLAMA = {"FixedLinear": 15, "Attention": 2, "Rotary": 4, "SwiGLU": 2, "RMSNormalization": 5}
GPT2 = {"FixedLinear": 9, "Attention": 2, "Gelu": 2, "LayerNormalization": 5}
BERT = {"FixedLinear": 13, "Attention": 2, "Gelu": 2, "LayerNormalization": 5}
ARCHITECTURES: dict[str, tuple[dict[str, int], str]] = {
    "llama": (LLAMA, "t_static t_dyn ts h_dyn t_kv h_gen__prefill h_gen__decode"),
    "llama_tied": (LLAMA, "t_static t_dyn ts h_dyn"),
    "mistral": (LLAMA, "t_static t_dyn ts h_dyn"),
    "qwen2": (LLAMA, "t_static t_dyn ts h_dyn"),
    "qwen3": (LLAMA | {"RMSNormalization": 9}, "t_static t_dyn ts h_dyn t_kv"),
    "gpt2": (GPT2, "t_static t_dyn ts h_dyn t_kv h_gen__prefill h_gen__decode"),
    "bert": (BERT, "t_static t_dyn ts h_dyn"),
    "bert_mlm": (
        {"FixedLinear": 14, "Attention": 2, "Gelu": 3, "LayerNormalization": 6},
        "t_static t_dyn ts h_dyn",
    ),
    "distilbert": (BERT | {"FixedLinear": 14}, "t_static t_dyn ts h_dyn"),
    "vit": (BERT | {"FixedLinear": 14}, "t_static t_dyn ts h_dyn"),
    "deit": (BERT | {"FixedLinear": 14}, "t_static t_dyn ts h_dyn"),
}
FILES = [(f"{a}__{m}", a) for a, (_, modes) in ARCHITECTURES.items() for m in modes.split()]
PRODUCTS = ("MatMul", "Gemm", "Conv", "Softmax")


def _structure(counts: dict[str, int]) -> dict[str, int]:
    kinds = set(LLAMA) | set(BERT) | set(PRODUCTS) | {"Swish"}
    return {k: n for k, n in counts.items() if k in kinds and n}


@pytest.mark.parametrize(("name", "architecture"), FILES)
def test_structure(lab: Any, name: str, architecture: str) -> None:
    model = lab.load(name)
    lab.apply(model, lab.canonical)
    assert _structure(lab.counts(model)) == ARCHITECTURES[architecture][0]
    assert [str(v) for v in check.illegal(model, Stage.CANONICAL)] == []


@pytest.mark.parametrize("mode", ["t_dyn", "ts", "h_dyn", "t_static"])
def test_layers_are_named_by_their_modules(lab: Any, mode: str) -> None:
    model = lab.load(f"llama__{mode}")
    lab.apply(model, lab.canonical)
    names = {(n.name or "").removeprefix("m.") for n in vocabulary.fixed_linears(model)}
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    assert names == {f"model.layers.{i}.{p}" for i in (0, 1) for p in parts} | {"lm_head"}


def _feeds(
    model: ir.Model, length: int, padding: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    rng = np.random.default_rng(length)
    feeds: dict[str, np.ndarray] = {}
    mask = None
    for value in model.graph.inputs:
        dims = [2 if a == 0 else length for a in range(2)]
        fixed = [d for d in value.shape]
        if value.dtype == ir.DataType.FLOAT:
            feeds[value.name] = rng.standard_normal([2, *fixed[1:]]).astype(np.float32)
            continue
        dims = [d if isinstance(d, int) else n for d, n in zip(fixed, dims, strict=True)]
        feeds[value.name] = rng.integers(0, 2 if "type" in value.name else 100, dims)
        if "mask" in value.name:
            mask = np.ones(dims, np.int64)
            mask[1, :2] = padding != "left"
            mask[1, -2:] = padding != "right"
            feeds[value.name] = mask
    return feeds, mask


ENCODERS = [n for n, a in FILES if a in ("bert", "bert_mlm", "distilbert", "vit", "deit")]
STATIC = ["llama__t_static", "gpt2__t_static", "qwen3__t_static", "mistral__t_static"]


@pytest.mark.parametrize("name", ENCODERS + STATIC)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_numbers(lab: Any, name: str, padding: str) -> None:
    """Models without a memory: equal to the source, wherever the query is no padding."""
    model = lab.load(name)
    lengths = (7,) if "static" in name else (5, 9)
    cases = [_feeds(model, n, padding) for n in lengths]
    wanted = [lab.run(model, feeds) for feeds, _ in cases]
    lab.apply(model, lab.canonical)
    for (feeds, mask), before in zip(cases, wanted, strict=True):
        after = lab.run(model, feeds)
        assert after.keys() == before.keys()
        for key, array in before.items():
            rows = mask > 0 if mask is not None and array.shape[:2] == mask.shape else ...
            if rows is ... and padding == "left" and mask is not None:
                continue  # pooled from a padded first position: nobody reads it
            np.testing.assert_allclose(after[key][rows], array[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama_tied__ts", "llama_tied__t_dyn", "gpt2__h_dyn", "bert_mlm__ts"]
)
def test_ties(lab: Any, name: str) -> None:
    model = lab.load(name)
    lab.apply(model, lab.canonical)
    tied = [n.op_type for n in model.graph if "pfmc.tied" in n.metadata_props]
    assert sorted(tied) == ["FixedLinear", "Gather"]


def test_untied(lab: Any) -> None:
    model = lab.load("llama__ts")
    lab.apply(model, lab.canonical)
    assert not [n for n in model.graph if "pfmc.tied" in n.metadata_props]


@pytest.mark.parametrize("name", ["llama__ts", "bert__t_dyn", "gpt2__t_kv", "vit__h_dyn"])
def test_linears_hold_the_value_of_the_source(lab: Any, name: str) -> None:
    """`pfmc.value` names a value of the untouched file."""
    model = lab.load(name)
    known = {v.name for n in model.graph for v in n.outputs}
    sources = {i for n in model.graph for i in provenance.sources(n)}
    lab.apply(model, lab.canonical)
    for node in vocabulary.fixed_linears(model):
        assert node.metadata_props["pfmc.value"] in known
        assert set(provenance.sources(node)) <= sources


def test_every_copy_is_found_among_five_thousand_nodes(lab: Any) -> None:
    """27 copies of a two-layer model side by side, 5,049 nodes."""
    model = _copies(lab.load("llama__t_dyn"), 27)
    assert len(model.graph) > 5000
    passes = [p for p in lab.canonical if p.name.startswith("raise") or p.name == "linears"]
    for item in lab.canonical[:3]:
        item.apply(model, _context())
    for item in passes:
        item.apply(model, _context())
    assert _structure(lab.counts(model)) == {k: 27 * n for k, n in LLAMA.items()}


def _context() -> Any:
    from pfmc.passes.base import Context

    return Context()


def _copies(model: ir.Model, times: int) -> ir.Model:
    proto = ir.to_proto(model)
    whole = type(proto)()
    whole.CopyFrom(proto)
    inputs = {v.name for v in proto.graph.input}
    for i in range(1, times):
        for node in proto.graph.node:
            copy = whole.graph.node.add()
            copy.CopyFrom(node)
            copy.name += f"__{i}"
            for names in (copy.input, copy.output):
                for j, name in enumerate(names):
                    names[j] = name if not name or name in inputs else f"{name}__{i}"
        for kind in ("initializer", "value_info", "output"):
            for item in getattr(proto.graph, kind):
                copy = getattr(whole.graph, kind).add()
                copy.CopyFrom(item)
                copy.name += f"__{i}"
    return ir.from_proto(whole)
