"""Reading a node's attributes with their defaults, and the types every operator maker shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import onnx_ir as ir

from pfmc.errors import InputError
from pfmc.ir.meaning.arrays import Array, Arrays

Run: TypeAlias = Callable[..., Any]
"""Takes the node's inputs in order (None where absent); returns one array or a tuple of them."""

Maker: TypeAlias = Callable[[ir.Node, Arrays], Run]
"""Reads a node once and returns what it computes with one array library."""


def describe(node: ir.Node) -> str:
    """Where the node is, for an error message."""
    outputs = ", ".join(v.name or "?" for v in node.outputs)
    return f"node {node.name or '(unnamed)'} {node.domain}::{node.op_type} -> {outputs}"


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The plain value of attribute `name`, or `default`."""
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        raise InputError(f"attribute {name} refers to a function's attribute", where=describe(node))
    return found.value


def integer(node: ir.Node, name: str, default: int) -> int:
    """The integer attribute `name`, or `default`."""
    return int(attribute(node, name, default))


def real(node: ir.Node, name: str, default: float) -> float:
    """The float attribute `name`, or `default`."""
    return float(attribute(node, name, default))


def text(node: ir.Node, name: str, default: str) -> str:
    """The string attribute `name`, or `default`."""
    value = attribute(node, name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def sequence(node: ir.Node, name: str) -> list[int] | None:
    """The integer-list attribute `name`, or None."""
    value = attribute(node, name)
    return None if value is None else [int(item) for item in value]


def has_input(node: ir.Node, position: int) -> bool:
    """Whether input `position` is given."""
    return position < len(node.inputs) and node.inputs[position] is not None


def wanted(node: ir.Node, position: int) -> bool:
    """Whether output `position` is used by anybody."""
    if position >= len(node.outputs):
        return False
    value = node.outputs[position]
    return bool(value.name) and (bool(value.uses()) or value.is_graph_output())


__all__ = [
    "Array",
    "Arrays",
    "Maker",
    "Run",
    "attribute",
    "describe",
    "has_input",
    "integer",
    "real",
    "sequence",
    "text",
    "wanted",
]
