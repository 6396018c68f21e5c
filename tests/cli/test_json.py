"""``--json`` of every verb: one strict document with a schema version, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc import cli

CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "compile": (("MODEL", "-t", "rom", "--recipe", "stream", "-o", "OUT"), ("artifact", "report")),
    "compare": (("ROM", "CROSSBAR"), ("reports", "baseline")),
    "inspect": (("ROM",), ("title", "rows")),
    "inspect model": (("MODEL",), ("title", "rows")),
    "inspect layer": (("ROM", "--layer", "*q_proj"), ("rows",)),
    "inspect op": (("ROM", "--op", "Attention"), ("rows",)),
    "inspect tile": (("ROM", "--tile", "lm_head[0,0]"), ("tile", "codes", "sources")),
    "run": (("ROM", "--prompt", "w1 w2", "--max-new-tokens", "3"), ("text", "tokens")),
    "verify": (("ROM", "--level", "2"), ("rows", "passed")),
    "check": (("ROM",), ("tree_sha256", "problems")),
    "targets": ((), ("technologies",)),
    "targets one": (("optical",), ("constants", "kind", "title")),
    "passes": ((), ("recipes", "passes")),
    "passes one": (("rom",), ("pass", "quantise", "calibration")),
    "passes explain": (("stream", "--explain", "MODEL"), ("steps",)),
    "models": ((), ("models",)),
    "models one": (("bard",), ("architecture", "files")),
    "reduce": (("MODEL", "--check", "false", "-o", "SMALL"), ("sha256", "nodes", "checks")),
    "doctor": ((), ("facts", "missing")),
    "eval": (("ROM", "--documents", "2", "--length", "8"), ("figures", "dies")),
    "distill": (
        ("MODEL", "-t", "rom", "--recipe", "stream", "--steps", "1", "-o", "FOLDER",
         "--set", "distill.sequences=48", "--set", "distill.length=16"),
        ("kept", "steps"),
    ),
}


ELSEWHERE = {"adapt": "test_adapters", "calibrate": "test_calibrate_die"}
"""Verbs whose arguments are long in the making, and the file that tests their JSON."""


def test_every_verb_is_among_the_cases() -> None:
    assert {name.split()[0] for name in CASES} | set(ELSEWHERE) == set(cli.VERBS)
    for verb, file in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / f"{file}.py").read_text(encoding="utf-8")
        assert f'"{verb}"' in text
        assert '"--json"' in text


@pytest.mark.parametrize("name", CASES)
def test_json(
    name: str, here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    words, keys = CASES[name]
    places = {
        "MODEL": tiny, "OUT": tmp_path / "out.pfm", "ROM": artifacts["rom"],
        "CROSSBAR": artifacts["crossbar"], "SMALL": tmp_path / "small.onnx",
        "FOLDER": tmp_path / "made.distilled",
    }  # fmt: skip
    given = [places.get(word, word) for word in words]
    body = here(name.split()[0], *given, "--json").json()
    assert body["schema_version"] == 1
    assert set(keys) <= set(body)


def test_problems_of_a_damaged_artifact_in_json(
    here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.pfm"
    shutil.copytree(artifacts["rom"], out)
    (out / "layers.json").unlink()
    done = here("check", out, "--json")
    assert (done.code, done.err) == (6, "")
    assert json.loads(done.out)["problems"] == ["layers.json is missing"]


def test_numbers_that_json_cannot_say_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    from pfmc.cli.output import print_json

    print_json({"a": [float("nan"), 1.5], "b": {"c": float("-inf"), "d": (float("inf"), 2)}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, 1.5], "b": {"c": None, "d": [None, 2]}
    }  # fmt: skip


def test_json_through_the_real_command_line(
    pfmc: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    body = pfmc("inspect", artifacts["rom"], "--json", env={"NO_COLOR": "1"}).json()
    assert body["schema_version"] == 1
