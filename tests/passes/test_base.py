"""Options become fields, with types held and errors that answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest

from pfmc.errors import UsageError
from pfmc.passes.base import Context, Pass, PassResult
from pfmc.passes.fold import Fold


@dataclass(frozen=True)
class _Sample(Pass):
    name: ClassVar[str] = "sample"
    bits: int
    ratio: float = 0.5
    deep: bool = False
    mode: Literal["min", "max"] = "min"
    width: int | None = None
    layers: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        return PassResult(model, 0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"bits": 4}, _Sample(4)),
        ({"bits": "4", "ratio": "0.25"}, _Sample(4, 0.25)),
        ({"bits": 4, "ratio": 1}, _Sample(4, 1.0)),
        ({"bits": 4, "deep": "true"}, _Sample(4, deep=True)),
        ({"bits": 4, "mode": "max"}, _Sample(4, mode="max")),
        ({"bits": 4, "width": "none"}, _Sample(4, width=None)),
        ({"bits": 4, "width": "8"}, _Sample(4, width=8)),
        ({"bits": 4, "layers": "a,b"}, _Sample(4, layers=("a", "b"))),
        ({"bits": 4, "layers": ["a"]}, _Sample(4, layers=("a",))),
    ],
)
def test_options(given: dict[str, object], wanted: _Sample) -> None:
    assert _Sample.from_options(given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bit": 4}, "did you mean 'bits'?"),
        ({"bits": 4, "mode": "mx"}, "did you mean 'max'?"),
        ({"bits": 4.5}, "4.5 is not int"),
        ({"bits": True}, "True is not int"),
        ({"bits": "four"}, "'four' is not int"),
        ({"bits": 4, "deep": 1}, "1 is not bool"),
        ({"bits": 4, "layers": 3}, "3 is not"),
        ({}, "needs option 'bits'"),
    ],
)
def test_wrong_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        _Sample.from_options(given)
    assert message in str(caught.value)
    assert "sample" in caught.value.where


def test_fold_takes_its_size() -> None:
    assert Fold.from_options({"largest": "12"}) == Fold(largest=12)
