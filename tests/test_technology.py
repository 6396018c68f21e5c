from __future__ import annotations

from pathlib import Path

import pytest

from pfmc import library, technology
from pfmc.errors import UsageError

GOOD = """
kind = "rom"
title = "a test technology"
[adc]
bits = { value = 8, unit = "bit", source = "design choice", grade = "design" }
energy = { value = 2, range = [1, 3], unit = "pJ", source = "a paper", grade = "published" }
[[noise]]
moment = "write"
law = "polynomial"
spread = { value = [0.1, 0.2], unit = "1", source = "a paper, fig. 3", grade = "published" }
"""


def written(tmp_path: Path, text: str, name: str = "tech.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_technology_is_read(tmp_path: Path) -> None:
    tech = technology.load(written(tmp_path, GOOD))
    assert (tech.name, tech.kind, tech.title) == ("tech", "rom", "a test technology")
    assert tech["adc.energy"].to("pJ") == pytest.approx((1, 2, 3))
    assert tech.integer("adc.bits") == 8
    assert tech.noise[0].parameters["spread"].values == (0.1, 0.2)
    tech.require({"adc.bits": "1", "adc.energy": "J"})


def test_missing_unknown_and_wrong_units_are_all_named(tmp_path: Path) -> None:
    tech = technology.load(written(tmp_path, GOOD))
    with pytest.raises(UsageError) as caught:
        tech.require({"adc.bit": "1", "adc.energy": "s", "laser.power": "W"})
    for word in ("adc.bit is missing", "laser.power is missing", "adc.bits is unknown", "pJ"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = ", "not a TOML"),
        ("title = 'x'", "no kind"),
        ("kind = 'rom'\nspeed = 3", "no unit and no source"),
        ("kind = 'rom'\nuses = ['tech']", "circle|not on the shelf"),
        (GOOD.replace("write", "rite"), "moment"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        technology.load(written(tmp_path, text))


def test_an_unknown_name_gets_the_nearest() -> None:
    nearest = sorted(library.entries("targets"))[0]
    with pytest.raises(UsageError, match=nearest):
        technology.load(nearest + "x")


def test_the_digest_follows_what_matters(tmp_path: Path) -> None:
    a = technology.load(written(tmp_path, GOOD)).digest()
    b = technology.load(written(tmp_path, GOOD.replace("a test technology", "renamed"))).digest()
    c = technology.load(written(tmp_path, GOOD.replace("value = 2", "value = 2.5"))).digest()
    assert a == b != c


@pytest.mark.parametrize("name", sorted(library.entries("targets")))
def test_a_technology_survives_json(name: str) -> None:
    import json

    tech = technology.load(name)
    again = technology.from_json(json.loads(json.dumps(technology.to_json(tech))))
    assert again == tech
    assert again.digest() == tech.digest()
