"""Unknown and wrong settings: recipes, their options, technologies, model cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TARGET = ("--target", "rom")

SETTINGS = {
    "recipe": (("--recipe", "steam"), ("'steam'", "did you mean 'stream'?")),
    "recipe file": (("--recipe", "my.toml"), ("'my.toml'",)),
    "key": (("--set", "quantise.weight_bit=3"), ("'weight_bit'", "did you mean 'weight_bits'?")),
    "section": (("--set", "quantize.weight_bits=3"), ("'quantize'", "did you mean 'quantise'?")),
    "pass": (("--set", "fodl.largest=3"), ("'fodl'", "did you mean 'fold'?")),
    "option": (("--set", "fold.largst=3"), ("'largst'", "did you mean 'largest'?")),
    "value": (("--set", "quantise.weight_bits=99"), ("'99'", "weight_bits", "8")),
    "word": (("--set", "quantise.search=best"), ("'best'", "clip", "plain")),
    "no value": (("--set", "quantise.weight_bits"), ("not a setting", "pass.option=value")),
    "no owner": (("--set", "weight_bits=3"), ("not a setting", "pass.option=value")),
    "text": (("--text", "gone.txt"), ("gone.txt",)),
    "input": (("--input", "gone.npz"), ("gone.npz",)),
    "tokenizer": (("--tokenizer", "gone.json"), ("tokenizer", "gone.json")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting_is_explained(
    name: str, here: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    words, phrases = SETTINGS[name]
    out = tmp_path / "out.pfm"
    here("compile", tiny, *TARGET, *words, "-o", out).refused(2, *phrases)
    assert not out.exists()


RECIPES = {
    "no TOML": ("title = rom", "not a TOML file"),
    "unknown key": ("[quantize]\nweight_bits = 4", "did you mean 'quantise'?"),
    "unknown pass": ("[[pass]]\nname = 'fodl'", "did you mean 'fold'?"),
    "unknown option": ("[[pass]]\nname = 'fold'\nlargst = 3", "did you mean 'largest'?"),
    "wrong type": ("[calibration]\nsequences = 'many'", "sequences"),
    "pass no table": ("pass = 'fold'", "[[pass]]"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe_file_is_explained(
    name: str, here: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    text, phrase = RECIPES[name]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    done = here("compile", tiny, *TARGET, "--recipe", path, "-o", tmp_path / "out.pfm")
    done.refused(2, phrase)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


TECHNOLOGIES = {
    "no TOML": ("kind = rom", "not a TOML file"),
    "binary": ("\udcff\udcfe", "not a TOML file"),
    "no kind": ("title = 'mine'", "no kind"),
    "unknown kind": ("kind = 'romm'", "did you mean 'rom'?"),
    "no target": ("kind = 'gpu'", "crossbar, optical, rom"),
    "no unit": ("kind = 'rom'\n[array]\ntile_inputs = 256", "no unit and no source"),
    "no source": (
        "kind = 'rom'\n[array]\ntile_inputs = { value = 256, unit = '1', grade = 'design' }",
        "source",
    ),
    "unknown unit": (
        "kind = 'rom'\n[a]\nb = { value = 1, unit = 'furlong', source = 's', grade = 'design' }",
        "furlong",
    ),
    "uses text": ("kind = 'rom'\nuses = 'fabric_n5'", "no list of names"),
    "uses unknown": ("kind = 'rom'\nuses = ['fabric_n6']", "did you mean 'fabric_n"),
    "incomplete": ("kind = 'rom'\nuses = ['fabric_n5']", "is missing"),
    "noise": ("kind = 'rom'\n[[noise]]\nmoment = 'rite'\nlaw = 'gauss'", "did you mean 'write'?"),
}


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_a_wrong_technology_file_is_explained(
    name: str, here: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    text, phrase = TECHNOLOGIES[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = here("compile", tiny, "--target", path, "-o", tmp_path / "out.pfm")
    done.refused(2, phrase)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("compile", "m.onnx", "--target", "opticl"), "did you mean 'optical'?"),
        (("compile", "m.onnx", "--target", "gone.toml"), "there is no file 'gone.toml'"),
        (("targets", "opticl"), "did you mean 'optical'?"),
        (("passes", "steam"), "did you mean 'stream'?"),
        (("models", "brad"), "did you mean 'bard'?"),
        (("run", "a.pfm", "--prompt", "x", "--age", "3parsec"), "e.g. 30s, 1h, 1day"),
        (("run", "a.pfm", "--prompt", "x", "--age=-5s"), "e.g. 30s, 1h, 1day"),
        (("run", "a.pfm", "--prompt", "x"), "pfmc compile makes one"),
        (("run", "a.pfm", "--input", "x.npz"), "pfmc compile makes one"),
        (("verify", "a.pfm"), "pfmc compile makes one"),
        (("check", "a.pfm"), "pfmc compile makes one"),
        (("compare", "a.pfm"), "pfmc compile makes one"),
    ],
)
def test_names_that_are_not_there(
    words: tuple[str, ...], phrase: str, here: Callable[..., Any]
) -> None:
    here(*words).refused(2, phrase)
