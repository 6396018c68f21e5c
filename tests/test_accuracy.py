"""The accuracy benchmark: what it computes, and that docs/results.md says what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accuracy, results
from pfmc.distill.measure import token_losses
from pfmc.evaluation.tasks import read_pairs
from pfmc.targets.base import Die

ROOT = Path(__file__).resolve().parents[1]
STSB = ROOT.parent / "shared" / "data" / "stsbenchmark"


def held() -> dict[str, dict[str, list[dict[str, float]]]]:
    found: dict[str, dict[str, list[dict[str, float]]]] = json.loads(
        (ROOT / "docs" / "results.json").read_text(encoding="utf-8")
    )
    return found


# -- the file --------------------------------------------------------------------------------------


def test_the_page_is_rendered_from_the_measurements() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == results.render(held())
    assert "nan" not in page


def test_the_shipped_model_s_promise_stands_in_it() -> None:
    (row,) = [r for r in held()["bard"]["rows"] if r["recipe"] == "rom"]
    for on in ("self", "text"):
        assert row[on]["ratio"] <= row[on]["high"] <= 1.02  # type: ignore[index]


def test_no_file_of_the_zoo_fails_to_compile_and_run() -> None:
    rows = held()["zoo"]["rows"]
    assert len(rows) >= 150
    assert [r for r in rows if "error" in r] == []
    assert all(math.isfinite(r["worst"]) for r in rows)


def test_dies_are_summed_up_by_mean_and_sample_deviation() -> None:
    def found(ratio: float) -> dict[str, float]:
        return {"ratio": ratio, "low": ratio, "high": ratio, "kl": ratio - 1, "top1": 1.0}

    row = {"target": "t", "ideal": found(1.0), "dies": [found(1.1), found(1.2), found(1.3)]}
    _, ((*_, dies, mean, deviation, worst, kl, _),) = results._die_table([row])
    assert (dies, mean, deviation, worst) == ("3", "1.2000", "0.1000", "1.3000")
    assert kl == "0.20000"


def test_sections_are_kept_side_by_side(tmp_path: Path) -> None:
    place = tmp_path / "results.json"
    accuracy.keep("b", [{"x": 1}], "one", place)
    accuracy.keep("a", [{"x": 2}], "two", place)
    accuracy.keep("b", [{"x": 3}], "three", place)
    assert json.loads(place.read_text()) == {
        "a": {"command": "two", "rows": [{"x": 2}]},
        "b": {"command": "three", "rows": [{"x": 3}]},
    }


# -- language models -------------------------------------------------------------------------------


def test_a_die_against_itself_and_a_hand_made_loss(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfmc import simulate

    ids = np.random.default_rng(0).integers(0, 128, (10, 6))
    own = simulate.open_machine(artifacts["rom"]).decoder().logits(ids)
    same = accuracy.against(artifacts["rom"], Die(0), accuracy.Truth(ids, own))
    assert same["ratio"] == pytest.approx(1.0)
    assert same["kl"] == pytest.approx(0.0, abs=1e-12)
    assert same["top1"] == 1.0
    flat = np.zeros_like(own)  # a teacher that knows nothing: perplexity 128
    found = accuracy.against(artifacts["rom"], Die(0), accuracy.Truth(ids, flat))
    assert found["perplexity"] == pytest.approx(128)
    wanted = math.exp(token_losses(own, ids).mean()) / 128
    assert found["ratio"] == pytest.approx(wanted)


# -- sentences -------------------------------------------------------------------------------------


@pytest.mark.skipif(not STSB.is_dir(), reason="needs the STS benchmark in ../shared")
def test_the_benchmark_is_read_whole() -> None:
    path = STSB / "sts-test.csv"
    found = read_pairs(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(found.scores) == len(lines)  # quotes join no lines
    assert all(0 <= score <= 5 for score in found.scores)
    place = found.sentences.index("The curious boys look in the shed.")
    assert found.sentences[place + 1] == "Two small boys in a woody area looking at a shed."
    assert found.scores[place // 2] == 2.8
