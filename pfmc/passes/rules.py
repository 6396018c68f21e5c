"""Running rewrite rules: one rule is one class whose docstring is the rule."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir

from pfmc.ir import matcher, vocabulary
from pfmc.ir.matcher import Match, Op
from pfmc.passes.base import Declined


class Rule(abc.ABC):
    """One rewrite: `patterns` say where, `check` whether, `rewrite` what.

    The docstring of a subclass is the rule as text: what is found -> what it becomes.
    """

    patterns: ClassVar[tuple[Op, ...]]

    def check(self, found: Match) -> str:
        """Why the rule must not be applied here; empty if it may."""
        return ""

    @abc.abstractmethod
    def rewrite(self, graph: ir.Graph, found: Match) -> None:
        """Applies the rule; the graph is valid afterwards."""


def apply_rules(
    graph: ir.Graph, rules: Iterable[Rule], pass_name: str
) -> tuple[int, tuple[Declined, ...], dict[str, int]]:
    """Applies each rule once at every node of its root operators, in graph order.

    Returns:
        rewrites made, what was declined, and rewrites per rule class name.
    """
    declined: list[Declined] = []
    counts: dict[str, int] = {}
    for rule in rules:
        for found in matcher.find(graph, *rule.patterns):
            if reason := rule.check(found):
                declined.append(Declined(pass_name, where(found.root), reason))
                continue
            rule.rewrite(graph, found)
            counts[type(rule).__name__] = counts.get(type(rule).__name__, 0) + 1
    return sum(counts.values()), tuple(declined), counts


def widened(found: Match) -> str:
    """Says so where a constant of more axes than x gives the result more axes than x has."""
    ranks = {matcher.rank(found["x"]), matcher.rank(found.output)} - {None}
    return "a constant of more axes than the input" if len(ranks) > 1 else ""


def where(node: ir.Node) -> str:
    """How messages name a node: module scope if known, and the node's name."""
    scope = node.metadata_props.get(vocabulary.KEY_SCOPE, "")
    name = node.name or str(node.outputs[0].name)
    return f"{scope} ({name})" if scope and scope != name else name
