"""``pfmc run``: text and arrays through the simulated hardware."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
WORDS = ("--prompt", "w1 w2 w3", "--max-new-tokens", "8")


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_the_same_seed_and_die_write_the_same_text(
    target: str, here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    words = ("run", artifacts[target], *WORDS, "--json")
    first = here(*words, "--seed", "5", "--die", "2").json()
    again = here(*words, "--seed", "5", "--die", "2").json()
    other = here(*words, "--seed", "6", "--die", "2").json()
    assert len(first["tokens"]) == 8
    assert first["tokens"] == again["tokens"]
    assert first["text"] == again["text"]
    assert first["tokens"] != other["tokens"]


def test_dies_differ_where_there_is_noise(
    here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.array([[1, 2, 3]]))

    def logits(target: str, *words: str) -> np.ndarray:
        out = tmp_path / "y.npz"
        done = here("run", artifacts[target], "--input", tmp_path / "x.npz", "-o", out, *words)
        assert done.code == 0, done.err
        with np.load(out) as held:
            return np.array(held["logits"])

    for target in ("crossbar", "optical"):
        assert np.array_equal(logits(target, "--die", "1"), logits(target, "--die", "1"))
        assert not np.array_equal(logits(target, "--die", "1"), logits(target, "--die", "2"))
        assert np.array_equal(
            logits(target, "--die", "1", "--ideal"), logits(target, "--die", "2", "--ideal")
        )
    assert np.array_equal(logits("rom", "--die", "1"), logits("rom", "--die", "2")), "no noise"


def test_speeds_of_simulation_and_hardware_are_apart(
    here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    done = here("run", artifacts["rom"], *WORDS)
    assert done.code == 0
    assert done.out.startswith("w1 w2 w3")
    report = json.loads((artifacts["rom"] / "report" / "report.json").read_bytes())
    simulation, hardware, _ = done.err.splitlines()
    assert re.fullmatch(r"simulation: 8 tokens in [\d.]+ s, [\d.]+ tokens/s", simulation)
    assert re.fullmatch(r"hardware: +\S+/s for one user, \S+ [pnµm]J a token, .*text", hardware)
    body = here("run", artifacts["rom"], *WORDS, "--json").json()
    typical = {k: m["typical"] for k, m in report["cost"]["metrics"].items()}
    assert body["hardware_tokens_per_s"] == typical["throughput__user"]
    assert body["hardware_energy_per_token_j"] == typical["energy__token"]
    assert body["hardware_energy_j"] == pytest.approx(8 * typical["energy__token"], rel=1e-12)
    assert 0 < body["simulation_tokens_per_s"] != body["hardware_tokens_per_s"]
    quiet = here("run", artifacts["rom"], *WORDS, "--quiet")
    assert (quiet.out, quiet.err) == (done.out, "")


def test_the_prompt_may_come_from_stdin(
    start: Callable[..., Any], here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    import subprocess

    words = ("--max-new-tokens", "4", "-q")
    process = start("run", artifacts["rom"], "--prompt", "-", *words, stdin=subprocess.PIPE)
    out, err = process.communicate("w1 w2 w3", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == here("run", artifacts["rom"], "--prompt", "w1 w2 w3", *words).out


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("--top-p", "3"), "top-p"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_wrong_sampling_writes_nothing(
    words: tuple[str, ...], phrase: str, here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    here("run", artifacts["rom"], *WORDS, *words).refused(2, phrase)


def test_an_empty_prompt(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    here("run", artifacts["rom"], "--prompt", "").refused(2, "prompt is empty")


def test_wrong_inputs_are_explained(
    here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    def fed(**arrays: Any) -> Any:
        np.savez(tmp_path / "x.npz", **arrays)
        return here("run", artifacts["rom"], "--input", tmp_path / "x.npz")

    ids = np.array([[1, 2, 3]])
    assert fed(input_ids=ids).code == 0
    fed(inputids=ids).refused(2, "'inputids'", "did you mean 'input_ids'?")
    fed().refused(2, "'input_ids' is missing", "INT64")
    fed(input_ids=ids[0]).refused(2, "'input_ids' has 1 dimensions", "INT64")
    fed(input_ids=ids.astype(np.float32)).refused(2, "'input_ids' is float32", "INT64")
    fed(input_ids=ids + 500).refused(3, "cannot take these inputs", "501", "input_ids: INT64")
    fed(input_ids=np.array([[None]], object)).refused(3, "plain arrays")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no zip")
    here("run", artifacts["rom"], "--input", tmp_path / "x.npz").refused(3, "plain arrays")
    here("run", artifacts["rom"], "--input", tmp_path / "y.npz").refused(2, "no such file")


def test_outputs_that_cannot_be_written(
    here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", input_ids=np.array([[1, 2, 3]]))
    words = ("run", artifacts["rom"], "--input", tmp_path / "x.npz", "-o")
    here(*words, tmp_path / "x.npz" / "y.npz").refused(74, "Not a directory")
    assert here(*words, tmp_path / "named").code == 0
    assert (tmp_path / "named").is_file(), "the very name that was given"


def test_text_needs_a_tokenizer(here: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.data"):
        (tmp_path / name).write_bytes((tiny.parent / name).read_bytes())
    out, model = tmp_path / "out.pfm", tmp_path / "model.onnx"
    assert here("compile", model, "-t", "rom", "--recipe", "stream", "-o", out).code == 0
    here("run", out, *WORDS).refused(2, "no tokenizer", "--tokenizer")


@pytest.mark.skipif(not ZOO.is_dir(), reason="no zoo beside the checkout")
def test_an_encoder_is_fed_arrays(here: Callable[..., Any], tmp_path: Path) -> None:
    model, out = ZOO / "bert__t_dyn.onnx", tmp_path / "out.pfm"
    quick = ("--set", "calibration.sequences=2", "--set", "calibration.length=16")
    assert here("compile", model, "-t", "rom", *quick, "-o", out).code == 0
    rng, shape = np.random.default_rng(0), (2, 6)
    feeds = {
        "input_ids": rng.integers(3, 60, shape), "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }  # fmt: skip
    np.savez(tmp_path / "x.npz", **feeds)
    words = ("run", out, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz", "--json")
    body = here(*words).json()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model))
    expected = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    with np.load(tmp_path / "y.npz") as held:
        for name, wanted in expected.items():
            got = held[name]
            cosine = (got * wanted).sum() / np.sqrt((got**2).sum() * (wanted**2).sum())
            assert cosine > 0.97, name
            assert body["outputs"][name]["shape"] == list(wanted.shape)
    here("run", out, "--prompt", "hello").refused(2)


def test_an_encoder_decoder_writes_about_its_source(
    here: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    """The unquantised student's tokens are held to ONNX Runtime in test_seq2seq."""
    from pfmc.compile import compile_model
    from pfmc.distill.text import load_tokenizer

    path = ZOO / "t5__h_dyn.onnx"
    if not path.is_file():
        pytest.skip("t5__h_dyn.onnx is absent")
    words = tiny.parent / "tokenizer.json"
    compile_model(path, tmp_path / "t5.pfm", target="rom", recipe="stream", tokenizer=words)
    ids = load_tokenizer(words).encode("w1 w2 w3")
    np.savez(tmp_path / "x.npz", input_ids=np.array([ids]))
    words = ("run", tmp_path / "t5.pfm", "--input", tmp_path / "x.npz", "--max-new-tokens", "4")
    done = here(*words, "--start", "0", "--greedy", "--json").json()
    assert len(done["tokens"]) == 4
    said = ("run", tmp_path / "t5.pfm", "--prompt", "w1 w2 w3", "--max-new-tokens", "4")
    told = here(*said, "--start", "0", "--greedy", "--json").json()
    assert (told["tokens"], told["text"]) == (done["tokens"], done["text"])
    assert here(*words, "--start", "0", "--greedy").out.strip() == done["text"].strip()
    here(*words, "--greedy").refused(2, "no start token", "decoder_start_token_id")
    here(*words, "--start", "x").refused(2, "no token ids", "--start 0")
    full = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    np.savez(tmp_path / "x.npz", **full, decoder_input_ids=np.array([[0, 1]]))
    assert "logits: shape [1, 2, 128]" in here(*words[:4]).out
