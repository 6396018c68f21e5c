"""LoRA adapters: read side paths equal the difference that PEFT's formula gives transformers."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from pfmc.errors import InputError, UsageError
from pfmc.ingest import load
from pfmc.ingest.adapters import load_adapter
from pfmc.ir import vocabulary

_spec = importlib.util.spec_from_file_location(
    "pfmc_tests_checkpoints", Path(__file__).with_name("checkpoints.py")
)
assert _spec is not None
assert _spec.loader is not None
C = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(C)

RANK, ALPHA = 4, 6.0
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SIZES = {Q: (32, 32), DOWN: (64, 32)}


def write(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES, **config: Any) -> dict[str, Any]:
    """An adapter of random matrices as PEFT saves it; returns the matrices."""
    rng = np.random.default_rng(3)
    held = {}
    for module, (inputs, outputs) in sizes.items():
        for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            held[name] = rng.normal(0, 0.3, shape).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "adapter_model.safetensors")
    base = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(base | config))
    return held


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama: its folder, and transformers' model."""
    folder = tmp_path_factory.mktemp("base")
    return folder, C.make(C.DECODERS["llama"], folder)


@pytest.mark.parametrize(("config", "scale"), [
    ({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / 2), ({"alpha_pattern": {"q_proj": 2}}, None),
])  # fmt: skip
def test_side_paths_change_the_model_as_peft_says(
    config: dict[str, Any], scale: float | None, base: tuple[Path, Any], tmp_path: Path
) -> None:
    import torch

    held = write(tmp_path / "adapter", **config)
    model = load(base[0]).model
    adapter = load_adapter(tmp_path / "adapter", model)
    assert list(adapter.paths) == [Q, DOWN]
    nodes = {n.name: n for n in vocabulary.fixed_linears(model)}
    changed = copy.deepcopy(base[1])
    for name, path in adapter.paths.items():
        wanted = scale or (2 / RANK if name == Q else ALPHA / RANK)
        assert (path.rank, path.scale) == (RANK, pytest.approx(wanted))
        a, b = (held[f"base_model.model.{name}.lora_{h}.weight"] for h in "AB")
        with torch.no_grad():
            changed.get_submodule(name).weight += torch.from_numpy(wanted * b @ a)
        weight = nodes[name].inputs[1]
        merged = weight.const_value.numpy() + path.scale * path.down.numpy() @ path.up.numpy()
        weight.const_value = ir.tensor(merged.astype(np.float32))
    ids = np.random.default_rng(0).integers(3, 96, (2, 9))
    ours, truth = C.Runner(model)({"input_ids": ids}), C.truth(changed, {"input_ids": ids})
    np.testing.assert_allclose(ours["logits"], truth["logits"], atol=1e-5, rtol=0)
    assert np.abs(truth["logits"] - C.truth(base[1], {"input_ids": ids})["logits"]).max() > 0.01


def test_an_adapter_that_does_not_fit_names_every_module(
    base: tuple[Path, Any], tmp_path: Path
) -> None:
    write(tmp_path / "a", {"model.layers.9.mlp.up_proj": (32, 64), Q: (16, 32)})
    with pytest.raises(InputError) as caught:
        load_adapter(tmp_path / "a", load(base[0]).model)
    assert "layers.9" in caught.value.what
    assert "16 to 4" in caught.value.what


@pytest.mark.parametrize("config", [
    {"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]},
    {"lora_alpha": "8"}, {"alpha_pattern": {"(a+)+$": 1}},
])  # fmt: skip
def test_other_kinds_are_refused(
    config: dict[str, Any], base: tuple[Path, Any], tmp_path: Path
) -> None:
    write(tmp_path / "a", **config)
    with pytest.raises(InputError, match=next(iter(config))):
        load_adapter(tmp_path / "a", load(base[0]).model)


def test_no_adapter(base: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapter_config"):
        load_adapter(tmp_path, load(base[0]).model)
