"""Reads a technology file of the shelf `targets/`: constants, noise laws and their sources.

A technology is ``kind = "rom"`` (or crossbar, optical, fabric, gpu), a ``title``, tables of
constants (`pfmc.quantity.Quantity`), ``[[noise]]`` laws, and optionally ``uses = ["fabric_n7"]``:
further files whose constants, settings and noise laws it takes in. What it states itself goes
before; stating any noise law replaces all that were taken in.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfmc import library
from pfmc.errors import UsageError, did_you_mean
from pfmc.quantity import Estimate, Quantity, read_quantity, unit

MOMENTS = ("write", "age", "read")


@dataclass(frozen=True)
class NoiseLaw:
    """One law of a device's noise.

    Attributes:
        moment: ``write`` (once per die), ``age`` (time since writing) or ``read`` (each inference).
        law: the name of the law, e.g. ``polynomial``; what it means stands in `pfmc.noise`.
        parameters: its numbers, in their stated units.
    """

    moment: str
    law: str
    parameters: Mapping[str, Quantity]


@dataclass(frozen=True)
class Technology:
    """A piece of hardware as data. ``tech["adc.energy"]`` is an `Estimate` in SI."""

    name: str
    kind: str
    title: str
    constants: Mapping[str, Quantity]
    noise: tuple[NoiseLaw, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Estimate:
        return self.quantity(key).estimate

    def quantity(self, key: str) -> Quantity:
        """The constant `key` with its unit and source.

        Raises:
            UsageError: the technology does not state it.
        """
        if key in self.constants:
            return self.constants[key]
        raise UsageError(
            f"the technology {self.name!r} does not state {key!r}",
            mend=did_you_mean(key, self.constants),
        )

    def number(self, key: str) -> float:
        """The typical value of `key` in SI."""
        return self.quantity(key).si

    def integer(self, key: str) -> int:
        """The typical value of `key` as a whole number, e.g. a tile's rows.

        Raises:
            UsageError: it is not a whole number.
        """
        value = self.quantity(key).value
        if value != int(value):
            raise UsageError(f"{key} = {value} is not a whole number", where=self.name)
        return int(value)

    def digest(self) -> str:
        """sha256 of everything that affects a compile: constants, noise, settings."""
        body = {
            "kind": self.kind,
            "constants": {k: _plain(q) for k, q in sorted(self.constants.items())},
            "noise": [
                [n.moment, n.law, {k: _plain(q) for k, q in sorted(n.parameters.items())}]
                for n in self.noise
            ],
            "settings": dict(sorted(self.settings.items())),
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def require(self, keys: Mapping[str, str]) -> None:
        """Checks that every key is stated, in a unit of the right dimensions, and no other.

        Args:
            keys: constant name -> a unit of the expected dimensions, e.g. ``{"adc.energy": "J"}``.

        Raises:
            UsageError: names every key that is missing, unknown or in a wrong unit.
        """
        wrong = [f"{k} is missing ({u})" for k, u in keys.items() if k not in self.constants]
        for key, quantity in self.constants.items():
            if key not in keys:
                wrong.append(f"{key} is unknown: {did_you_mean(key, keys)}")
            elif quantity.unit.dims != unit(keys[key]).dims:
                wrong.append(f"{key} is in {quantity.unit.text}, not a unit like {keys[key]}")
        if wrong:
            raise UsageError(
                f"the technology {self.name!r} is not complete: " + "; ".join(wrong),
                where=self.name, mend="see targets/README.md",
            )  # fmt: skip


def _plain(q: Quantity) -> list[object]:
    return [list(q.values), q.low, q.high, q.unit.text, q.source, q.grade]


def load(entry: str) -> Technology:
    """Reads technology `entry`: a name on the shelf `targets/` or the path of a TOML file.

    Raises:
        UsageError: not found, not TOML, or a constant without unit, source, grade or range.
    """
    path = library.find("targets", entry)
    return _read(path, frozenset())


def _read(path: Path, seen: frozenset[str]) -> Technology:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not a TOML file: {error}", where=path.name) from error
    if path.stem in seen:
        raise UsageError("technology files use one another in a circle", where=path.name)
    if "kind" not in table:
        raise UsageError("the technology has no kind", where=path.name, mend='kind = "rom"')
    constants: dict[str, Quantity] = {}
    settings: dict[str, str] = {}
    noise: tuple[NoiseLaw, ...] = ()
    for used in _names(path.name, table.pop("uses", [])):
        below = _read(library.find("targets", used), seen | {path.stem})
        constants.update(below.constants)
        settings.update(below.settings)
        noise += below.noise
    if "noise" in table:
        noise = tuple(_law(path.name, n) for n in table.pop("noise"))
    for key, value in table.items():
        _collect(path.name, key, value, constants, settings)
    kind, title = settings.pop("kind"), settings.pop("title", path.stem)
    return Technology(path.stem, kind, title, constants, noise, settings)


def _names(file: str, uses: object) -> list[str]:
    if isinstance(uses, list) and all(isinstance(name, str) for name in uses):
        return uses
    raise UsageError(
        f"uses = {uses!r} is no list of names", where=file, mend='uses = ["fabric_n7"]'
    )


def _collect(
    file: str, key: str, value: object,
    constants: dict[str, Quantity], settings: dict[str, str],
) -> None:  # fmt: skip
    if isinstance(value, str):
        settings[key] = value
    elif isinstance(value, dict) and "value" in value:
        constants[key] = read_quantity(key, value)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _collect(file, f"{key}.{name}", inner, constants, settings)
    else:
        raise UsageError(
            f"{key} = {value!r} has no unit and no source", where=file,
            mend="write { value = …, range = […], unit = …, source = …, grade = … }",
        )  # fmt: skip


def _law(file: str, table: Mapping[str, object]) -> NoiseLaw:
    moment, law = str(table.get("moment", "")), str(table.get("law", ""))
    if moment not in MOMENTS:
        raise UsageError(
            f"a noise law has moment {moment!r}", where=file, mend=did_you_mean(moment, MOMENTS)
        )
    numbers = {
        k: read_quantity(f"noise.{law}.{k}", v) for k, v in table.items() if isinstance(v, dict)
    }
    return NoiseLaw(moment, law, numbers)


def to_json(tech: Technology) -> dict[str, object]:
    """The technology as plain JSON values, complete: `from_json` gives it back."""
    return {
        "name": tech.name,
        "kind": tech.kind,
        "title": tech.title,
        "constants": {k: _plain(q) for k, q in sorted(tech.constants.items())},
        "noise": [
            {
                "moment": n.moment,
                "law": n.law,
                "parameters": {k: [q.name, _plain(q)] for k, q in sorted(n.parameters.items())},
            }
            for n in tech.noise
        ],
        "settings": dict(tech.settings),
    }


def from_json(body: Mapping[str, Any]) -> Technology:
    """The technology that an artifact carries; see `to_json`."""
    return Technology(
        body["name"], body["kind"], body["title"],
        {k: _quantity(k, v) for k, v in body["constants"].items()},
        tuple(
            NoiseLaw(
                n["moment"], n["law"], {k: _quantity(*v) for k, v in n["parameters"].items()}
            )
            for n in body["noise"]
        ),
        body["settings"],
    )  # fmt: skip


def _quantity(name: str, row: list[Any]) -> Quantity:
    values, low, high, text, source, grade = row
    return Quantity(name, tuple(values), low, high, unit(text), source, grade)
