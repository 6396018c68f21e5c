"""Reads an untrusted ``config.json``: every value has a type, a range and a default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pfmc.errors import InputError
from pfmc.ingest.hf.strict_json import Object, parse_object

CAP = 4 << 20
LARGEST = 1 << 24
"""The most that a width, a count of heads or of tokens may be."""

MOST_LAYERS = 4096


@dataclass(frozen=True)
class Config:
    """The keys of a ``config.json``, or of an object in it.

    Attributes:
        body: the JSON object; where: the file and key, for messages.
    """

    body: Object
    where: str

    @staticmethod
    def of(data: bytes, where: str) -> Config:
        """The configuration in `data`."""
        return Config(parse_object(data, where, cap=CAP), where)

    def refuse(self, key: str, fault: str, mend: str = "") -> InputError:
        """The error that `key` is at fault."""
        shown = repr(self.body.get(key))[:100]
        return InputError(f"{key} = {shown} {fault}", where=self.where, mend=mend)

    def get(self, *keys: str) -> tuple[str, Any]:
        """The first of `keys` that is there and not null, and its value; or the first and None."""
        for key in keys:
            if self.body.get(key) is not None:
                return key, self.body[key]
        return keys[0], None

    def integer(
        self, *keys: str, default: int | None = None, low: int = 1, high: int = LARGEST
    ) -> int:
        """A whole number from `low` to `high` under the first of `keys` that is there."""
        key, found = self.get(*keys)
        if found is None:
            return default if default is not None else self._missing(key)
        if type(found) is not int or not low <= found <= high:
            raise self.refuse(key, f"is no whole number from {low} to {high}")
        return found

    def layers(self, *keys: str) -> int:
        """The number of layers."""
        return self.integer(*keys, high=MOST_LAYERS)

    def optional(self, key: str) -> int | None:
        """A positive whole number, or None if it is absent or null."""
        return None if self.body.get(key) is None else self.integer(key)

    def real(self, *keys: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number not below `low`."""
        key, found = self.get(*keys)
        if found is None:
            return default if default is not None else float(self._missing(key))
        number = type(found) in (int, float) and abs(found) < 1e30
        if not number or not math.isfinite(found) or found < low:
            raise self.refuse(key, f"is no number from {low:g} on")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null is the default."""
        found = self.body.get(key)
        if found is None:
            return default
        if type(found) is not bool:
            raise self.refuse(key, "is neither true nor false")
        return found

    def text(self, *keys: str, default: str | None = None) -> str:
        """A word."""
        key, found = self.get(*keys)
        if found is None:
            return default if default is not None else str(self._missing(key))
        if not isinstance(found, str):
            raise self.refuse(key, "is no text")
        return found

    def texts(self, key: str, count: int) -> tuple[str, ...] | None:
        """A list of `count` words, or None if it is absent."""
        found = self.body.get(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
            raise self.refuse(key, "is no list of words")
        if len(found) != count:
            raise self.refuse(key, f"has {len(found)} entries, not {count}")
        return tuple(found)

    def reals(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        found = self.body.get(key)
        if not isinstance(found, list) or len(found) != count:
            raise self.refuse(key, f"is no list of {count} numbers")
        return tuple(Config({key: n}, self.where).real(key, low=1e-30) for n in found)

    def part(self, key: str) -> Config | None:
        """The object under `key`, or None if it is absent."""
        found = self.body.get(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self.refuse(key, "is no object")
        return Config(found, f"{self.where}: {key}")

    def demand(self, key: str, *allowed: object, default: object = None) -> None:
        """Refuses any other value of `key` than `allowed`, because no builder knows it."""
        found = self.body.get(key, default)
        if not any(found is a or (type(found) is type(a) and found == a) for a in allowed):
            raise self.refuse(
                key, "is not supported", "export the model as ONNX and compile that file"
            )

    def _missing(self, key: str) -> int:
        raise InputError(f"The configuration has no {key!r}", where=self.where)
