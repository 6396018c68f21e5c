"""Verification finds what it must, passes what must pass, and measures what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from pfmc import against_source, artifact, simulate, verification, verify
from pfmc.artifact import MANIFEST, FileEntry, canonical_json
from pfmc.compile import compile_model
from pfmc.errors import UsageError
from pfmc.oracle import Oracle
from pfmc.targets.base import Die

ROOT = Path(__file__).resolve().parents[1]
BARD = ROOT / "models" / "bard" / "model.onnx"
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "data" / "stories260K"
CORPUS = SHARED / "data" / "tinyshakespeare.txt"


def reseal(path: Path) -> None:
    """Writes a manifest that fits the files as they are now, as a forger would."""
    whole = json.loads((path / MANIFEST).read_bytes())
    files = [
        FileEntry(f["path"], (path / f["path"]).stat().st_size,
                  artifact.sha256_file(path / f["path"]))
        for f in whole["files"]
    ]  # fmt: skip
    whole |= {"files": [vars(f) for f in files], "tree_sha256": artifact.tree_sha256(files)}
    (path / MANIFEST).write_bytes(canonical_json(artifact._seal(whole)))


def change_weights(path: Path, layer: str, share: float) -> None:
    """Negates the codes of the first `share` of a layer's bytes, in the weights file alone."""
    (file,) = (path / "weights").glob(f"*{layer}*.safetensors")
    tensors = dict(load_file(file))
    codes = tensors["codes"].copy()
    codes.reshape(-1)[: int(codes.size * share)] ^= codes.dtype.type(0x77)
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = save(tensors | {"codes": codes}, metadata=header["__metadata__"])
    assert len(data) == len(raw)
    file.write_bytes(data)


@pytest.fixture(scope="module")
def bard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model on the rom target with the default recipe; read only."""
    out = tmp_path_factory.mktemp("bard") / "bard.pfm"
    compile_model(BARD, out, target="rom")
    return out


# -- the acceptance line ---------------------------------------------------------------------------


def test_the_shipped_model_keeps_its_perplexity_on_rom(bard: Path) -> None:
    """The promise: 4-bit blocks, at most 2 % above ONNX Runtime's perplexity, interval and all."""
    found = verify.verify(bard)
    rows = {r.name: r for r in found.rows}
    assert found.passed, [r for r in found.rows if r.passed is False]
    ratio = rows["perplexity ratio"]
    assert ratio.limit == 1.02
    assert ratio.value <= 1.02
    assert ratio.high is not None
    assert ratio.high <= 1.02
    assert ratio.value >= 0.99
    assert rows["KL divergence"].value <= 0.012
    assert rows["top-1 agreement"].value >= 0.90
    assert rows["integer products that differ from ONNX Runtime"].value == 0


@pytest.mark.skipif(not CORPUS.is_file(), reason="needs the corpus in ../shared")
def test_and_on_text_that_people_wrote(bard: Path) -> None:
    found = {r.name: r for r in verify.verify(bard, text=CORPUS, windows=16).rows}
    assert found["perplexity ratio"].value <= 1.02
    assert found["KL divergence"].value <= 0.012


# -- forgery ---------------------------------------------------------------------------------------


def test_a_changed_weight_is_found_although_resealed(
    bard: Path, tmp_path: Path, here: Callable[..., Any]
) -> None:
    """One code of one layer: the emitted ROM image and the integer products still tell."""
    forged = tmp_path / "forged.pfm"
    shutil.copytree(bard, forged)
    change_weights(forged, "layers.0.self_attn.q_proj", 1e-3)
    here("verify", forged, "--level", "0").refused(6, "q_proj")
    reseal(forged)
    assert here("verify", forged, "--level", "0").code == 0
    ended = here("verify", forged, "--level", "1", "--quiet")
    assert ended.code == 4, ended.err
    assert "ROM image" in ended.err


def test_thresholds_fail_where_only_the_model_as_a_whole_can_tell(
    bard: Path, tmp_path: Path, here: Callable[..., Any]
) -> None:
    """Weights and ROM images forged alike: nothing is wrong but the text."""
    other = tmp_path / "other.onnx"
    model = onnx.load(BARD)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
            moved = values + 0.25 * values.std() * noise
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, tensor.name))
    onnx.save(model, other)
    shutil.copy(BARD.parent / "tokenizer.json", tmp_path / "tokenizer.json")
    forged = tmp_path / "forged.pfm"
    compile_model(other, forged, target="rom", settings=("calibration.sequences=2",))
    manifest = json.loads((forged / MANIFEST).read_bytes())
    honest = json.loads((bard / MANIFEST).read_bytes())
    manifest["config"]["inputs"] = honest["config"]["inputs"]
    (forged / MANIFEST).write_bytes(canonical_json(manifest))
    reseal(forged)
    words = ("verify", forged, "--model", BARD, "--windows", "4", "--length", "32")
    ended = here(*words, "--quiet")
    assert ended.code == 4, ended.err
    assert "perplexity ratio" in ended.err
    assert "FAIL" in ended.out
    assert "ROM image bits that differ from the codes   0" in ended.out


# -- the source ------------------------------------------------------------------------------------


def test_the_source_is_found_when_named_and_proved_by_its_digest(
    artifacts: dict[str, Path], tiny: Path, tmp_path: Path, here: Callable[..., Any]
) -> None:
    moved = tmp_path / "deep" / "er" / "rom.pfm"
    shutil.copytree(artifacts["rom"], moved)
    short = ("--windows", "2", "--length", "8")
    here("verify", moved, *short, "-q").refused(2, "not where it was", "--model")
    here("verify", moved, *short, "-q", "--model", BARD).refused(2, "not the file", "--model")
    assert here("verify", moved, *short, "-q", "--model", tiny).code in (0, 4)
    machine = simulate.open_machine(moved, Die(None, 0.0, False))
    with pytest.raises(UsageError, match="not where it was"):
        against_source.find_source(machine, tmp_path / "absent.onnx")
    assert against_source.find_source(machine, tiny) == tiny


# -- small models of every kind --------------------------------------------------------------------

KINDS = ("llama__t_dyn", "gpt2__t_kv", "gpt2__h_gen__decode", "llama__h_gen__prefill",
         "llama_fp32/model", "bert__t_dyn", "distilbert__t_dyn", "vit__t_static")  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_export_is_measured(name: str, tmp_path: Path) -> None:
    """Random weights: thresholds mean little, but layers must follow ONNX Runtime closely."""
    source = SHARED / "zoo" / f"{name}.onnx"
    if not source.is_file():
        pytest.skip("needs the zoo in ../shared")
    small = ("calibration.sequences=4", "calibration.length=16")
    compile_model(source, tmp_path / "a.pfm", target="rom", recipe="rom8", settings=small)
    found = {r.name: r for r in verify.verify(tmp_path / "a.pfm", windows=3).rows}
    assert found["median layer"].value < 0.02
    assert found["integer products that differ from ONNX Runtime"].value == 0
    if "KL divergence" in found:
        assert abs(found["KL divergence"].value) < 1e-4
    else:
        cosines = [r.value for n, r in found.items() if n.endswith("mean cosine")]
        assert cosines
        assert min(cosines) > 0.99


def test_a_decode_graph_is_stepped_as_its_prefill_graph_reads() -> None:
    """Scores of ONNX Runtime: token by token through the memory, and all at once."""
    from pfmc import ingest
    from pfmc.distill import drive

    paths = [SHARED / "zoo" / f"llama__h_gen__{n}.onnx" for n in ("decode", "prefill")]
    if not all(p.is_file() for p in paths):
        pytest.skip("needs the zoo in ../shared")
    ids = np.arange(14).reshape(2, 7) + 3
    scores = []
    for path in paths:
        lead = drive.detect(ingest.load(path).model)
        with Oracle(path) as oracle:
            feeds = against_source.feeds_of(lead, ids)
            scores.append(against_source.token_scores(oracle, lead, feeds))
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-5)


GREEDY_TOKENS = 60
"""All that greedy.json holds."""


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K in ../shared")
def test_the_pretrained_model_writes_the_same_story_at_8_bits(tmp_path: Path) -> None:
    out = tmp_path / "stories.pfm"
    compile_model(STORIES / "model.onnx", out, target="rom", recipe="rom8")
    story = json.loads((STORIES / "greedy.json").read_text())
    prompt, wanted = story["prompt_ids"], story["greedy_ids"]
    decoder = simulate.open_machine(out).decoder()
    found = list(decoder.generate(prompt, GREEDY_TOKENS, greedy=True, stop_ids=()))
    assert found == wanted[len(prompt) : len(prompt) + GREEDY_TOKENS]


# -- the measures ----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 9))
def test_cosine_is_scipys(seed: int, rows: int, width: int) -> None:
    from scipy.spatial.distance import cosine as distance

    a, b = np.random.default_rng(seed).standard_normal((2, rows, width))
    ours = against_source.cosine(a, b)
    np.testing.assert_allclose(
        ours, [1 - distance(x, y) for x, y in zip(a, b, strict=True)], atol=1e-12
    )
    np.testing.assert_allclose(against_source.cosine(a, -3 * a), -1, atol=1e-12)


def test_rank_correlation_is_spearmans_formula() -> None:
    """Without ties rho = 1 - 6 sum d² / n (n² - 1), here over the 6 pairs of 4 unit vectors."""
    angles = np.array([0.0, 0.1, 0.5, 1.3])
    moved = np.array([0.0, 0.85, 0.5, 1.3])

    def vectors(at: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(at), np.sin(at)], axis=1)

    i, j = np.triu_indices(4, 1)
    ranks = [np.argsort(np.argsort(-np.abs(at[i] - at[j]))) for at in (angles, moved)]
    wanted = 1 - 6 * float(((ranks[0] - ranks[1]) ** 2).sum()) / (6 * (36 - 1))
    rho = against_source.rank_correlation
    assert rho(vectors(angles), 7 * vectors(moved)) == pytest.approx(wanted)
    assert rho(vectors(angles), vectors(angles)) == pytest.approx(1.0)


def test_a_row_passes_by_its_relation_and_nan_never_does() -> None:
    assert verification.Row("a", 1.0).passed is None
    assert verification.Row("a", 1.0, 1.0).passed is True
    assert verification.Row("a", 1.1, 1.0).passed is False
    assert verification.Row("a", 0.9, 1.0, ">=").passed is False
    assert verification.Row("a", float("nan"), 1.0).passed is False
    assert verification.Row("a", float("nan"), 1.0, ">=").passed is False
    assert not verification.Verification("t", (verification.Row("a", 2.0, 1.0),)).passed
