"""Reads JSON from untrusted files: sizes capped, no duplicate keys, no NaN, no deep nesting."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from pfmc.errors import InputError

Object = dict[str, Any]


def parse_object(data: bytes, where: str, *, cap: int) -> Object:
    """The JSON object in `data`.

    Args:
        data: UTF-8 text.
        where: the file, for messages.
        cap: the most bytes that are parsed.

    Raises:
        InputError: too large, not UTF-8, not JSON, not an object, or with a key twice.
    """
    if len(data) > cap:
        raise InputError(f"{len(data)} bytes of JSON are too many; at most {cap}", where=where)
    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise InputError(f"Not UTF-8 text: {error.reason}", where=where) from error
    except RecursionError as error:
        raise InputError("The JSON is nested too deeply", where=where) from error
    except ValueError as error:
        raise InputError(f"Not the JSON it should be: {error}", where=where) from error
    if not isinstance(found, dict):
        raise InputError("The JSON is no object", where=where)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> Object:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return made


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
