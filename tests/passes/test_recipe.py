"""Recipes: everything on the shelf loads, and what is wrong is said with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfmc import library
from pfmc.errors import UsageError
from pfmc.passes import PASSES, get, recipe
from pfmc.passes.fold import Fold


@pytest.mark.parametrize("name", sorted(library.entries("passes")))
def test_every_recipe_loads_and_explains_itself(name: str) -> None:
    found = recipe.load(name)
    assert found.title != name
    assert found.passes
    assert len(found.digest()) == 64


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_of_the_table_exists_under_its_name(name: str) -> None:
    assert get(name).name == name


def test_defaults_by_kind() -> None:
    assert [recipe.default_recipe(k) for k in ("rom", "crossbar", "optical", "spin")] == [
        "rom", "crossbar", "optical", "rom8",
    ]  # fmt: skip


def test_settings_are_typed() -> None:
    found = recipe.load(
        "rom",
        [
            "fold.largest=4096", "quantise.weight_bits=3", "calibration.sequences=2",
            "quantise.layers.model.layers.*.q_proj.weight_bits=8", "verify.kl=none",
            "quantise.layers.lm_head.search=plain", "calibration.source=none",
        ],
    )  # fmt: skip
    assert [p.largest for p in found.passes if isinstance(p, Fold)] == [4096, 4096]
    assert found.quantise.weight_bits == 3
    assert found.calibration.sequences == 2
    assert found.calibration.source == "none"
    assert found.verify.kl is None
    assert found.quantise.layers["model.layers.*.q_proj"].weight_bits == 8
    assert found.quantise.layers["lm_head"].weight_bits == 8
    assert found.quantise.layers["lm_head"].search == "plain"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("fold.larges=3", "did you mean 'largest'?"),
        ("fold.largest=x", "'x' is not int"),
        ("fald.largest=1", "did you mean 'fold'?"),
        ("quantize.weight_bits=3", "did you mean 'quantise'?"),
        ("quantise.weight_bit=3", "did you mean 'weight_bits'?"),
        ("quantise.weight_bits=abc", "'abc' is not"),
        ("quantise.weight_bits=9", "less than or equal to 8"),
        ("quantise.layers.lm_head.weight_bit=3", "did you mean 'weight_bits'?"),
        ("quantise.granularity=tiles", "'tiles' is not"),
        ("calibration.sequences=0", "greater than or equal to 1"),
        ("quantise.weight_bits.lm_head=8", "layers.<glob>.key=value"),
        ("quantise.search.lm_head=plain", "no keys below it"),
        ("calibration.length.most=8", "no keys below it"),
        ("weight_bits=3", "pass.option=value"),
        ("quantise.weight_bits", "pass.option=value"),
    ],
)
def test_wrong_settings_say_what_was_meant(setting: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.load("rom", [setting])
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"quantize": {}}, "did you mean 'quantise'?"),
        ({"quantise": 4}, "no keys below it"),
        ({"calibration": [{}]}, "no keys below it"),
        ({"pass": [{"name": "fol"}]}, "did you mean 'fold'?"),
        ({"pass": [{"name": "fold", "larges": 1}]}, "did you mean 'largest'?"),
        ({"pass": [{"name": "quantise"}]}, "[quantise] section"),
        ({"pass": ["fold"]}, "[[pass]]"),
        ({"verify": {"top1": 2.0}}, "less than or equal to 1"),
        ({"distill": {"lr": float("inf")}}, "finite number"),
        ({"distill": {"clip_sigmas": float("nan")}}, "finite number"),
    ],
)
def test_wrong_recipes(body: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse(body, "mine", "mine.toml")
    assert says in str(caught.value)


def test_none_is_a_word_where_it_is_a_value() -> None:
    found = recipe.load("rom", ["quantise.budget.metric=none", "calibration.source=none"])
    assert found.quantise.budget.metric == "none"
    assert found.calibration.source == "none"


def test_the_canonical_form_reads_back_to_the_same_recipe() -> None:
    found = recipe.load("optical", ["quantise.search=plain"])
    body = found.canonical()
    again = recipe.parse({k: v for k, v in body.items() if k != "name"}, body["name"])
    assert again == found
    assert again.digest() == found.digest() != recipe.load("optical").digest()


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "t"\n[quantise]\nweight_bits = 2\n')
    assert recipe.load(str(path)).quantise.weight_bits == 2
    path.write_text("title = ")
    with pytest.raises(UsageError, match="not a TOML file"):
        recipe.load(str(path))
    with pytest.raises(UsageError, match="not on the shelf"):
        recipe.load("roms")
