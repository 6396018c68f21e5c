"""Cost reports side by side: sums, forms of printing, thresholds, the GPU beside them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc.compare import Comparison, Rule, compare, enforce
from pfmc.cost import METRICS
from pfmc.errors import UsageError, VerificationError

TARGETS = ("rom", "crossbar", "optical")
RANGE = ("low", "typical", "high")


@pytest.fixture(scope="module")
def found(artifacts: dict[str, Path]) -> dict[str, Any]:
    """``pfmc compare --json`` of the three artifacts."""
    return json.loads(json.dumps(compare([artifacts[t] for t in TARGETS]).json()))


@pytest.mark.parametrize("name", [*TARGETS, "gpu"])
def test_terms_add_up(name: str, found: dict[str, Any]) -> None:
    summed = 0
    for key, metric in found["reports"][name]["metrics"].items():
        assert metric["low"] <= metric["typical"] <= metric["high"], key
        assert all(math.isfinite(metric[edge]) for edge in RANGE), key
        if not metric.get("terms"):
            assert metric["formula"], key
            continue
        summed += 1
        for edge in RANGE:
            total = math.fsum(t[edge] for t in metric["terms"])
            assert total == pytest.approx(metric[edge], rel=1e-12), (key, edge)
        assert all(t["formula"] for t in metric["terms"])
    assert summed >= 3 or name == "gpu"


@pytest.mark.parametrize("name", TARGETS)
def test_every_constant_of_a_term_has_a_source(name: str, found: dict[str, Any]) -> None:
    report = found["reports"][name]
    used = {
        c
        for m in report["metrics"].values() for t in m.get("terms", []) for c in t["constants"]
    }  # fmt: skip
    assert used
    assert used <= set(report["sources"])


def test_ratios_are_those_of_the_sums(found: dict[str, Any]) -> None:
    for name in TARGETS:
        metrics = found["reports"][name]["metrics"]
        macs = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 128
        assert metrics["energy__mac"]["typical"] == pytest.approx(
            metrics["energy__token"]["typical"] / macs
        )


def test_the_gpu_stands_beside(found: dict[str, Any]) -> None:
    assert found["baseline"] == "gpu"
    assert list(found["reports"]) == [*TARGETS, "gpu"]
    gpu = found["reports"]["gpu"]
    assert "saturated" in gpu["workload"]
    assert {"energy__token", "throughput__user", "throughput__aggregate"} <= set(gpu["metrics"])


def test_the_table(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    done = here("compare", *(artifacts[t] for t in TARGETS))
    assert done.code == 0
    title, headings, *rows = done.out.splitlines()
    assert "[low – high]" in title
    assert headings.split() == ["metric", *TARGETS, "gpu"]
    keys = [row.split()[0] for row in rows]
    assert keys == [k for k in METRICS if k in keys], "in one order"
    assert {"energy__token", "area__total", "volume__optics", "throughput__aggregate"} <= set(keys)
    assert all(line.startswith("note: ") for line in done.err.splitlines())


def test_the_breakdown(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    done = here("compare", artifacts["rom"], "--breakdown")
    report = json.loads((artifacts["rom"] / "report" / "report.json").read_bytes())
    for term in report["cost"]["metrics"]["energy__token"]["terms"]:
        assert f"    {term['name']} " in done.out


def test_csv(here: Callable[..., Any], artifacts: dict[str, Path], found: dict[str, Any]) -> None:
    done = here("compare", *(artifacts[t] for t in TARGETS), "--csv")
    assert (done.code, done.err) == (0, "")
    table = list(csv.DictReader(io.StringIO(done.out)))
    assert {r["report"] for r in table} == {*TARGETS, "gpu"}
    for row in table:
        metric = found["reports"][row["report"]]["metrics"][row["metric"]]
        assert [float(row[e]) for e in RANGE] == [metric[e] for e in RANGE]
        assert row["unit"] == metric["unit"]


def test_markdown(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    done = here("compare", artifacts["rom"], artifacts["optical"], "--markdown")
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if line.startswith("|")]
    assert lines[0] == "| metric | rom | optical | gpu |"
    assert lines[1] == "| --- | --- | --- | --- |"
    assert {line.count("|") for line in lines} == {5}


def test_a_threshold_that_holds(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    rom = artifacts["rom"]
    assert here("compare", rom, rom, "--fail-on", "energy__token:+5%").code == 0
    rules = ("--fail-on", "energy__token:+0%", "--fail-on", "throughput__user:-0%")
    assert here("compare", rom, rom, *rules).code == 0


def test_a_threshold_that_fails(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    words = ("compare", artifacts["rom"], artifacts["optical"], "--fail-on", "area__total:+5%")
    done = here(*words, "--csv")
    assert done.code == 4
    assert done.err.startswith("pfmc: thresholds failed: area__total of optical is ")
    assert done.out.startswith("report,metric,unit"), "the data is printed all the same"


def _reports(*values: float) -> Comparison:
    bodies = [{"metrics": {"energy__token": {"typical": v}}} for v in (*values, 1e-9)]
    names = tuple(f"r{i}" for i in range(len(values)))
    return Comparison((*names, "gpu"), tuple(bodies), "gpu")


@pytest.mark.parametrize(
    ("rule", "old", "new", "fails"),
    [
        ("energy__token:+5%", 1.0, 1.04, False),
        ("energy__token:+5%", 1.0, 1.06, True),
        ("energy__token:+5%", 1.0, 0.5, False),
        ("energy__token:-5%", 1.0, 0.96, False),
        ("energy__token:-5%", 1.0, 0.94, True),
        ("energy__token:-5%", 1.0, 2.0, False),
        ("area__total:+5%", 1.0, 1.0, True),
    ],
)
def test_rules(rule: str, old: float, new: float, fails: bool) -> None:
    """The GPU row is never judged; a metric that is missing fails."""
    rules = [Rule.parse(rule)]
    if not fails:
        enforce(_reports(old, new), rules)
        return
    with pytest.raises(VerificationError, match="thresholds failed"):
        enforce(_reports(old, new), rules)


@pytest.mark.parametrize("text", ["energy__token", "energy__token:5%", "x y:+5%", "", ":+5%"])
def test_a_rule_that_cannot_be_read(
    text: str, here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    here("compare", artifacts["rom"], "--fail-on", text).refused(2, "energy__token:+5%")
    with pytest.raises(UsageError):
        Rule.parse(text)


def test_an_unknown_metric(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    words = ("compare", artifacts["rom"], "--fail-on", "energy_token:+5%")
    here(*words).refused(2, "did you mean 'energy__token'?")


def test_one_model_on_several_targets(
    here: Callable[..., Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = tmp_path / "quick.toml"
    quick.write_text(
        '[[pass]]\nname = "fold"\n'
        + "".join(f'[[pass]]\nname = "{name}"\n' for name in _passes())
        + "[calibration]\nsequences = 2\nlength = 16\n[quantise]\nweight_bits = 4\n"
    )
    words = ("compare", tiny, "--targets", "rom, crossbar,optical", "--recipe", quick)
    body = here(*words, "--json").json()
    assert list(body["reports"]) == sorted([*TARGETS, "gpu"])
    assert [p.name for p in tmp_path.iterdir()] == ["quick.toml"], "no artifact is left"
    again = here("compare", tiny, "--targets", "rom", "--recipe", quick, "--json").json()
    assert again["reports"]["rom"] == body["reports"]["rom"]


def _passes() -> list[str]:
    import tomllib

    from pfmc import library

    body = tomllib.loads(library.entries("passes")["rom"].read_text())
    return [entry["name"] for entry in body["pass"]]


def test_wrong_targets(here: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    here("compare", tiny, "--targets", "opticl").refused(2, "did you mean 'optical'?")
    here("compare", tiny).refused(2, "add --targets rom,crossbar,optical")
    here("compare", tiny, tiny, "--targets", "rom").refused(2, "one model")
    here("compare", tiny, "--targets", ",").refused(2, "nothing to compare")
    here("compare", tiny.with_name("gone.onnx"), "--targets", "rom").refused(2, "No such file")


def test_equal_names_are_told_apart(artifacts: dict[str, Path]) -> None:
    found = compare([artifacts["rom"], artifacts["rom"]])
    assert found.names == ("rom (1)", "rom (2)", "gpu")


def test_nothing_to_compare() -> None:
    with pytest.raises(UsageError):
        compare([])
