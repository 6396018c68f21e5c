"""Equal weights are found by value, in either orientation, and only if every number is equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfmc.passes.linears import Linears
from pfmc.passes.ties import Ties

Floats = Callable[..., np.ndarray]
TEXT = "(int64[B,S] i) => (float[B,S,V] y) { e = Gather(table, i) y = MatMul(e, head) }"


def _tied(model: Any) -> list[str | None]:
    return [n.metadata_props.get("pfmc.tied") for n in model.graph]


def test_transposed_copy(lab: Any, floats: Floats) -> None:
    table = floats(40, 8)
    model = lab.make(TEXT, table=table, head=table.T.copy())
    lab.same(model, [Linears(), Ties()], {"i": np.array([[1, 2, 3]])})
    assert _tied(model) == ["table", "table"]
    assert model.graph[1].metadata_props["pfmc.tied_transposed"] == "1"


def test_square_table_used_straight(lab: Any, floats: Floats) -> None:
    table = floats(8, 8)
    model = lab.make(TEXT, table=table, head=table.copy())
    lab.same(model, [Linears(), Ties()], {"i": np.array([[1, 2, 3]])})
    assert model.graph[1].metadata_props["pfmc.tied_transposed"] == "0"


@pytest.mark.parametrize("row", [0, 17, 39])
def test_one_number_apart_is_not_tied(lab: Any, floats: Floats, row: int) -> None:
    table = floats(40, 8)
    head = table.T.copy()
    head[3, row] += 1e-6
    model = lab.make(TEXT, table=table, head=head)
    lab.apply(model, [Linears(), Ties()])
    assert _tied(model) == [None, None]
