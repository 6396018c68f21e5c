"""What each operator means, written once over the array API, for numpy and for torch alike.

numpy runs shape arithmetic, constant folding and mask probing; torch runs the simulation
(`pfmc.distill.tensors` registers it). Data types follow ONNX. `Shape` and `Size` return numpy
int64 with either library, and shape inputs (`HOST_INPUTS`) are read on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NoReturn

import onnx_ir as ir

from pfmc.errors import InputError, did_you_mean
from pfmc.ir.meaning import growth
from pfmc.ir.meaning.arrays import NUMPY, Array, Arrays, arrays_of, integers, register
from pfmc.ir.meaning.attending import ATTENDING
from pfmc.ir.meaning.attributes import Maker, Run, describe, integer
from pfmc.ir.meaning.elementwise import ELEMENTWISE
from pfmc.ir.meaning.evaluate import evaluate
from pfmc.ir.meaning.neural import NEURAL
from pfmc.ir.meaning.selecting import SELECTING
from pfmc.ir.meaning.shaping import HOST_INPUTS, SHAPING, constant_value

OPS: dict[tuple[str, str], Maker] = {
    **ELEMENTWISE,
    **SHAPING,
    **SELECTING,
    **NEURAL,
    **ATTENDING,
}
"""The maker of each operator, by (domain, op_type); the default domain is ``""``."""


def key_of(node: ir.Node) -> tuple[str, str]:
    """The node's key in `OPS`."""
    return ("" if node.domain == "ai.onnx" else node.domain), node.op_type


def make(node: ir.Node, arrays: Arrays = NUMPY) -> Run:
    """What `node` computes with one array library; attributes are read now, once.

    Returns:
        A function of the node's inputs in order (None where absent) that returns one array, or a
        tuple of them. Raw: a numpy result may be a scalar.

    Raises:
        InputError: the operator or one of its settings has no meaning here.
    """
    maker = OPS.get(key_of(node))
    if maker is None:
        names = {op for domain, op in OPS if domain == key_of(node)[0]}
        raise InputError(
            f"operator {node.domain or 'ai.onnx'}::{node.op_type} has no meaning here",
            where=describe(node),
            mend=did_you_mean(node.op_type, names) if names else "",
        )
    return maker(node, arrays)


def compile_node(node: ir.Node) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    """What `node` computes, for numpy arrays or a registered library's, seen from its inputs.

    Raises:
        InputError: `node` has no meaning here; so does the function, if the inputs do not fit it.
    """
    runs: dict[str, Run] = {NUMPY.name: make(node)}
    axis = integer(node, "axis", 0) if node.op_type == "Gather" else 0

    def run(inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        arrays = arrays_of(inputs)
        if arrays.name not in runs:
            runs[arrays.name] = make(node, arrays)
        growth.check(node.op_type, inputs, describe(node), axis)
        try:
            result = runs[arrays.name](*inputs)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            _misfit(node, inputs, error)
        results = result if isinstance(result, tuple) else (result,)
        growth.check_empty(node.op_type, results, describe(node))
        return results

    return run


def _misfit(node: ir.Node, inputs: Sequence[Array | None], error: Exception) -> NoReturn:
    shapes = [None if x is None else tuple(x.shape) for x in inputs]
    raise InputError(
        f"{node.op_type} does not run on shapes {shapes}: {error}", where=describe(node)
    ) from error


def unsupported(model: ir.Model) -> Counter[tuple[str, str]]:
    """The operators of the model's graph that have no meaning here, counted."""
    return Counter(key_of(n) for n in model.graph if key_of(n) not in OPS)


__all__ = [
    "HOST_INPUTS",
    "NUMPY",
    "OPS",
    "Array",
    "Arrays",
    "Maker",
    "Run",
    "compile_node",
    "constant_value",
    "evaluate",
    "integers",
    "key_of",
    "make",
    "register",
    "unsupported",
]
