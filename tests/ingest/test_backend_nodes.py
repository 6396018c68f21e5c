"""Every node model that onnx's backend test generator yields: right, or refused for a reason.

The table beside this file says for each operator how many models are accepted (a floor) and why
the others are refused; ``python -m tests.ingest.backend_nodes`` writes it anew.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pfmc.errors import InputError
from pfmc.ir import meaning

from . import backend_nodes

TABLE = backend_nodes.table()


@pytest.mark.parametrize("operator", sorted(TABLE))
def test_operator(operator: str) -> None:
    if operator not in backend_nodes.groups():
        pytest.skip("this onnx has no cases of it")
    results = backend_nodes.results(operator)
    cases = [c.name for c in backend_nodes.groups()[operator]]
    assert not [(n, r.wrong) for n, r in zip(cases, results, strict=True) if r.wrong]
    found, known = backend_nodes.row(operator, results), TABLE[operator]
    assert found.accepted >= known.accepted, found
    assert set(found.refused) <= set(known.refused), found


def test_table_is_whole() -> None:
    assert sum(row.accepted for row in TABLE.values()) >= FLOOR
    operators = set(backend_nodes.groups())
    assert len(operators - set(TABLE)) == 0 or len(operators) > len(TABLE)  # a newer onnx


FLOOR = 1239


# -- what random graphs found and the node models do not ask ---------------------------------------


@pytest.mark.parametrize("kind", ["int8", "uint8", "int64", "bool"])
def test_the_place_of_the_least(kind: str) -> None:
    """The least integer has no negative, and unsigned ones have none at all."""
    least = np.array([1, 0 if kind in ("bool", "uint8") else np.iinfo(kind).min, 1], kind)
    (found,) = meaning.compile_node(ir.node("ArgMin", [ir.val("x")]))([least])
    assert found.tolist() == [1]


def test_erf_keeps_its_type() -> None:
    (found,) = meaning.compile_node(ir.node("Erf", [ir.val("x")]))([np.float16([0.5, -2.0])])
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, [0.5205, -0.9953], rtol=1e-3)


def test_nothing_is_cast_to_narrow_numbers() -> None:
    node = ir.node("CastLike", [ir.val("x"), ir.val("like")])
    like = np.zeros(1, ir.DataType.FLOAT8E4M3FN.numpy())
    with pytest.raises(InputError, match="has no meaning here"):
        meaning.compile_node(node)([np.float32([1e9]), like])
