"""Every file of the shared zoo: how many linears and attentions, the same numbers, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfmc.compile import compile_model
from pfmc.ingest.load import load
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes import pipeline, recipe

from . import exports, sources

ZOO = Path(__file__).resolve().parents[2].parent / "shared" / "zoo"

STRUCTURE = {
    "bart": (33, 6), "bert": (13, 2), "bert_mlm": (14, 2), "clip": (27, 4), "deit": (14, 2),
    "distilbert": (14, 2), "gpt2": (9, 2), "gpt_neox": (9, 2), "gpt_oss": (27, 2),
    "llama": (15, 2), "llama_tied": (15, 2), "mistral": (15, 2), "mixtral": (27, 2),
    "qwen2": (15, 2), "qwen3": (15, 2), "t5": (33, 6), "vit": (14, 2), "wav2vec2": (18, 2),
}  # fmt: skip
"""Architecture -> fixed linears and attentions. Experts: 4 of 2 matrices in each of 2 layers."""
PARTS = {
    "bart__h_gen__prefill": (21, 4), "bart__h_gen__decode": (17, 4),
    "llama_fp32": (11, 2), "llama_int4": (11, 2),
}  # fmt: skip
"""Files that hold a part of their architecture, or its QKV in one matrix."""
EXPORTED = {
    "roberta__t_static": (13, 2), "gemma2__t_static": (15, 2), "gemma3__t_static": (15, 2),
    "phi3__t_static": (9, 2), "opt__t_static": (13, 2), "modernbert__t_static": (8, 2),
    "dinov2__t_static": (13, 2), "swin__h_static": (20, 3), "whisper__t_static": (35, 6),
    "patchtst__t_static": (14, 2), "qwen3_moe__h_dyn": (27, 2), "deberta_v2__t_static": (44, 2),
    "gemma2__h_dyn": (15, 2), "gemma3__h_dyn": (15, 2), "whisper__h_dyn": (35, 6),
    "phi3__h_dyn": (9, 2), "opt__h_dyn": (13, 2), "modernbert__h_dyn": (8, 2),
    "gptj__t_static": (13, 2), "cohere__t_static": (15, 2), "falcon__t_static": (9, 2),
    "bloom__t_static": (9, 2), "olmo2__t_static": (15, 2), "stablelm__t_static": (15, 2),
    "albert__t_static": (14, 2), "siglip__t_static": (17, 3), "convnext__t_static": (18, 0),
    "segformer__t_static": (21, 2),
    "deberta_v2__h_dyn": (12, 2), "patchtst__h_dyn": (14, 2), "dinov2__h_dyn": (13, 2),
    "gptj__h_dyn": (13, 2), "glm__h_dyn": (13, 2), "codegen__h_dyn": (9, 2),
    "bloom__h_dyn": (9, 2), "mpt__t_static": (9, 2), "siglip__h_dyn": (18, 3),
}  # fmt: skip
"""What the zoo lacks. DeBERTa's relative positions are, at fixed sizes, products with a stack of
16 matrices (2 rows of the batch, 4 heads, c2p and p2c, 2 layers); their sum is its attention's
bias."""
ROUNDED = {"llama_int4": 5e-3}
"""ONNX Runtime rounds the activations in front of MatMulNBits; all else is held to 1e-5."""


def _files() -> list[Path]:
    return [*sorted(ZOO.glob("*.onnx")), *sorted(ZOO.glob("*/model.onnx"))]


def _name(path: Path) -> str:
    return path.parent.name if path.stem == "model" else path.stem


def _canonical(path: Path) -> Any:
    plan = recipe.load("stream", ())
    return pipeline.canonicalise(load(path).model, plan.passes).model


def _counted(model: Any) -> tuple[int, int]:
    attentions = sum(vocabulary.is_op(n, "Attention") for n in model.graph)
    return len(vocabulary.fixed_linears(model)), attentions


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_structure_and_numbers(path: Path) -> None:
    """The canonical graph has the parts of the architecture and computes what the file does."""
    name = _name(path)
    model = _canonical(path)
    assert check.illegal(model, Stage.CANONICAL) == []
    assert _counted(model) == (PARTS.get(name) or STRUCTURE[name.partition("__")[0]])
    assert sources.difference(model, path) < ROUNDED.get(name, 1e-5)


@pytest.mark.parametrize("path", sorted(ZOO.glob("*.onnx")), ids=_name)
def test_numbers_with_larger_weights(path: Path, tmp_path: Path) -> None:
    """Fresh weights are so small that scores hardly matter; eight times larger they do."""
    loud = sources.louder(path, tmp_path / path.name)
    assert sources.difference(_canonical(loud), loud) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("path", _files(), ids=_name)
def test_compiles(path: Path, tmp_path: Path) -> None:
    done = compile_model(path, tmp_path / "x.pfm", target="rom", recipe="stream")
    assert done.path is not None
    assert done.report["cost"]["metrics"]["energy__token"]["typical"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "bart__h_gen__decode", "wav2vec2__t_dyn", "gpt_oss__t_static_batched_mm", "mixtral__h_dyn",
        "t5__h_dyn", "clip__ts",
    ],
)  # fmt: skip
def test_the_hardest_compile(name: str, tmp_path: Path) -> None:
    path = ZOO / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is absent")
    assert compile_model(path, tmp_path / "x.pfm", target="rom", recipe="stream").path is not None


def test_experts_are_named_by_their_number() -> None:
    path = ZOO / "mixtral__h_dyn.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is absent")
    names = [str(n.name) for n in vocabulary.fixed_linears(_canonical(path))]
    wanted = {
        f"model.layers.{i}.mlp.experts.{e}.{part}"
        for i in range(2) for e in range(4) for part in ("gate_up_proj", "down_proj")
    }  # fmt: skip
    assert {n for n in names if "experts" in n} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_afresh(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Architectures that the zoo lacks, exported here by the installed torch and transformers."""
    pytest.importorskip("transformers.exporters")
    folder = tmp_path_factory.getbasetemp() / "exports"
    path = exports.export(*name.split("__"), folder)
    model = _canonical(path)
    assert _counted(model) == EXPORTED[name]
    loud = sources.louder(path, folder / f"loud_{path.name}")
    for source in (path, loud):
        assert sources.difference(_canonical(source), source) < 1e-5
    assert compile_model(
        path, folder / f"{name}.pfm", target="rom", recipe="stream", force=True
    ).path is not None  # fmt: skip
