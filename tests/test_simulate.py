"""An artifact as a machine: its inputs, its dies, and what it computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc import simulate
from pfmc.errors import CorruptError, InputError, UsageError
from pfmc.simulate import Machine, open_machine
from pfmc.targets.base import Die

IDS = np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
IDEAL = Die(None, 0.0, False)


@pytest.fixture(scope="module")
def rom(artifacts: dict[str, Path]) -> Machine:
    return open_machine(artifacts["rom"])


def test_a_machine_knows_what_it_is(rom: Machine, artifacts: dict[str, Path]) -> None:
    assert rom.path == artifacts["rom"]
    assert rom.technology.kind == "rom"
    assert rom.tokenizer is not None
    assert rom.tokenizer.encode("w1 w2") == [1, 2]
    assert rom.manifest["config"]["target"] == "rom"
    assert rom.report["model"]["fixed_linears"] == 15


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_the_ideal_die_is_close_to_the_source_model(
    target: str, artifacts: dict[str, Path], tiny: Path
) -> None:
    """Against ONNX Runtime on the untouched input file; 4 bits (rom) leave more distance than 8."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tiny))
    (wanted,) = session.run(None, {"input_ids": IDS})
    got = open_machine(artifacts[target], IDEAL).run({"input_ids": IDS})["logits"]
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    assert cosine > (0.9 if target == "rom" else 0.99)


def test_rows_of_a_batch_do_not_mix(rom: Machine) -> None:
    both = rom.run({"input_ids": IDS})["logits"]
    for i in range(2):
        alone = rom.run({"input_ids": IDS[i : i + 1]})["logits"]
        np.testing.assert_allclose(both[i], alone[0], rtol=1e-4, atol=1e-4)


def test_memory_continues_where_it_stopped(rom: Machine) -> None:
    """Five tokens at once, and three then two with the memory of the first three."""
    whole = rom.run({"input_ids": IDS})
    first = rom.run({"input_ids": IDS[:, :3]})
    past = {
        f"past_key_values.{i}.{kind}": first[f"present.{i}.{kind}"]
        for i in range(2)
        for kind in ("key", "value")
    }
    rest = rom.run({"input_ids": IDS[:, 3:], **past})
    np.testing.assert_allclose(rest["logits"], whole["logits"][:, 3:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["crossbar", "optical"])
def test_one_seed_is_one_die(target: str, artifacts: dict[str, Path]) -> None:
    def logits(die: Die) -> Any:
        return open_machine(artifacts[target], die).run({"input_ids": IDS})["logits"]

    assert np.array_equal(logits(Die(1)), logits(Die(1)))
    assert not np.array_equal(logits(Die(1)), logits(Die(2)))
    assert np.array_equal(logits(IDEAL), logits(IDEAL))


def test_wrong_inputs_are_explained(rom: Machine) -> None:
    with pytest.raises(UsageError, match="did you mean 'input_ids'"):
        rom.run({"inputids": IDS})
    with pytest.raises(UsageError, match="'input_ids' is missing"):
        rom.run({})
    with pytest.raises(UsageError, match="has 3 dimensions"):
        rom.run({"input_ids": IDS[None]})
    with pytest.raises(UsageError, match="is float64"):
        rom.run({"input_ids": IDS / 2})
    with pytest.raises(InputError, match="cannot take these inputs") as caught:
        rom.run({"input_ids": IDS + 128})
    assert "input_ids: INT64" in caught.value.mend
    past = np.zeros((3, 4, 2, 16), np.float32)
    with pytest.raises(InputError, match="cannot take these inputs"):
        rom.run({"input_ids": IDS, "past_key_values.0.key": past})


def test_smaller_integers_are_taken(rom: Machine) -> None:
    wide, narrow = (rom.run({"input_ids": IDS.astype(t)})["logits"] for t in (np.int64, np.int16))
    assert np.array_equal(wide, narrow)


def test_damaged_artifacts_are_not_run(artifacts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "rom.pfm"
    shutil.copytree(artifacts["rom"], out)
    path = out / "weights" / "lm_head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"weights/lm_head.safetensors was changed"):
        open_machine(out)
    with pytest.raises(UsageError, match="there is no artifact"):
        open_machine(tmp_path / "gone.pfm")


def test_what_an_artifact_says_of_itself_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"technology.json cannot be read"):
        simulate.read_technology(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{")
    with pytest.raises(CorruptError, match=r"report.json cannot be read"):
        simulate.read_report(tmp_path)
