"""A checkpoint on the whole road: compile, verify against transformers, run, inspect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not here")

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint without the ONNX file."""
    folder = tmp_path_factory.mktemp("models") / "stories"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(STORIES / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def machine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint compiled to rom at 8 bits."""
    from pfmc.compile import compile_model

    place = tmp_path_factory.mktemp("out") / "stories.pfm"
    settings = ("quantise.weight_bits=8",)
    compile_model(checkpoint, place, target="rom", recipe="stream", settings=settings)
    return place


def test_the_manifest_names_configuration_and_weights(machine: Path) -> None:
    inputs = json.loads((machine / "pfm.json").read_text())["config"]["inputs"]
    assert list(inputs) == ["config.json", "model.safetensors"]
    assert (machine / "tokenizer").exists()


def test_layers_and_perplexity_agree_with_transformers(machine: Path) -> None:
    from pfmc.verify import verify

    found = verify(machine, level=3, windows=2, length=24)
    assert "against transformers" in found.title
    rows = {r.name: r.value for r in found.rows}
    assert rows["integer products that differ from ONNX Runtime"] == 0
    assert rows["median layer"] < 0.05  # 8-bit weights and tokens, errors of the layers before
    assert rows["top-1 agreement"] > 0.97
    assert 1 < rows["perplexity of transformers"] < 20


def test_other_weights_are_told_from_the_right_ones(
    machine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from pfmc.against_source import find_source
    from pfmc.errors import UsageError
    from pfmc.simulate import open_machine

    opened = open_machine(machine)
    assert find_source(opened, checkpoint) == checkpoint / "config.json"
    other = shutil.copytree(checkpoint, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="not the file"):
        find_source(opened, other)


def test_the_command_line_takes_a_folder(
    here: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("compile", checkpoint, "--target", "rom", "--recipe", "stream")
    assert done.code == 0, done.err
    assert (tmp_path / "stories-rom.pfm" / "pfm.json").is_file()
    done = here("inspect", checkpoint)
    assert done.out.startswith("stories: huggingface LlamaForCausalLM, FLOAT"), done.out[:200]
    assert "pfmc.FixedLinear" in done.out
