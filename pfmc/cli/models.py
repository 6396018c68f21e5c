"""``pfmc models``: the model cards on the shelf."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pfmc import library
from pfmc.cli.options import Json
from pfmc.cli.output import print_json
from pfmc.report.format import prefixed
from pfmc.report.table import Table


def models_(
    name: str | None = None, *, json: Json = False
) -> int:
    """List the model cards, or show one.

    Example: pfmc models bard

    Parameters
    ----------
    name
        A card's name; all are listed without it.
    json
        Print JSON.
    """
    if name is not None:
        return _show(library.find("models", name), json)
    cards = {n: _read(p) for n, p in library.entries("models").items()}
    if json:
        print_json({"schema_version": 1, "models": cards})
        return 0
    rows = [
        (n, prefixed(float(c["architecture"]["parameters"])), _shipped(c), str(c["title"]))
        for n, c in cards.items()
    ]
    Table(("name", "parameters", "shipped", "title"), tuple(rows)).show()
    return 0


def shipped_model() -> Path:
    """The ONNX file of the pretrained model that is shipped (the card with ``default = true``)."""
    for path in library.entries("models").values():
        card = _read(path)
        if card.get("default"):
            return path.parent / str(card["files"]["model"])
    raise LookupError("no model card is marked default = true")


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _shipped(card: dict[str, Any]) -> str:
    return str(card.get("files", {}).get("model", "–"))


def _show(path: Path, json: bool) -> int:
    if json:
        print_json({"schema_version": 1, **_read(path)})
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0
