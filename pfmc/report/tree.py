"""A model as a tree of module scopes, equal neighbours folded: ``layers 0–5 ×6``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Item:
    """One operation: its name, operator, scope and what it holds.

    Attributes:
        name: the node's name; op: its operator, with our domain as prefix.
        scope: module path, ``model.layers.0.mlp``.
        weights: numbers it holds as constants; size: their bytes.
        inputs, outputs: names of the values it reads and makes.
    """

    name: str
    op: str
    scope: str
    weights: int = 0
    size: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass
class Branch:
    """A module: what it holds itself, and its parts."""

    name: str
    items: list[Item] = field(default_factory=list)
    parts: dict[str, Branch] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Numbers held here and below."""
        return sum(i.weights for i in self.items) + sum(p.weights for p in self.parts.values())

    @property
    def size(self) -> int:
        """Bytes held here and below."""
        return sum(i.size for i in self.items) + sum(p.size for p in self.parts.values())

    def operators(self) -> Counter[str]:
        """Operators here and below, counted."""
        count = Counter(i.op for i in self.items)
        for part in self.parts.values():
            count.update(part.operators())
        return count

    def signature(self) -> tuple[object, ...]:
        """Equal for modules of the same structure, whatever their names and numbers."""
        return (
            tuple((i.op, i.weights) for i in self.items),
            tuple((_stem(n), p.signature()) for n, p in self.parts.items()),
        )


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


_DEEPEST = 64  # levels; what a scope has below them is one name


def grow(items: Iterable[Item], root: str = "model") -> Branch:
    """The tree of `items` by their scopes."""
    tree = Branch(root)
    for item in items:
        branch = tree
        for name in filter(None, item.scope.split(".", _DEEPEST)):
            branch = branch.parts.setdefault(name, Branch(name))
        branch.items.append(item)
    return tree


@dataclass(frozen=True)
class Row:
    """One line of the printed tree; `count` equal modules stand behind it."""

    depth: int
    label: str
    count: int
    operators: dict[str, int]
    weights: int
    size: int


def rows(tree: Branch, depth: int | None = None) -> list[Row]:
    """The tree as lines, repeats folded, to `depth` levels."""
    return list(_rows(tree, tree.name, 1, 0, depth))


def _rows(branch: Branch, label: str, count: int, level: int, depth: int | None) -> Iterator[Row]:
    yield Row(
        level, label, count, dict(sorted(branch.operators().items())), branch.weights, branch.size
    )
    if depth is not None and level >= depth:
        return
    for group in _groups(list(branch.parts.values())):
        first = group[0]
        label = first.name if len(group) == 1 else f"{first.name}–{group[-1].name} ×{len(group)}"
        while not first.items and len(first.parts) == 1 and len(group) == 1:
            (first,) = first.parts.values()  # a chain of modules with one part each is one line
            label = f"{label}.{first.name}"
        yield from _rows(first, label, len(group), level + 1, depth)


def _groups(parts: list[Branch]) -> Iterator[list[Branch]]:
    group: list[Branch] = []
    for part in parts:
        same = group and _stem(group[0].name) == _stem(part.name) != part.name
        if same and group[0].signature() == part.signature():
            group.append(part)
            continue
        if group:
            yield group
        group = [part]
    if group:
        yield group


def dot(items: Iterable[Item], depth: int) -> str:
    """The modules at `depth` as a Graphviz digraph; an edge says how many values pass."""
    held = list(items)
    names: dict[str, str] = {}
    maker = {o: _cut(i.scope, depth) for i in held for o in i.outputs}
    edges: Counter[tuple[str, str]] = Counter()
    for item in held:
        here = _cut(item.scope, depth)
        names.setdefault(here, f"n{len(names)}")
        for value in item.inputs:
            there = maker.get(value)
            if there is not None and there != here:
                edges[(there, here)] += 1
    lines = ["digraph model {", "  rankdir=TB; node [shape=box, fontname=sans];"]
    lines += [f"  {i} [label={_quoted(n or '(no module)')}];" for n, i in names.items()]
    lines += [f'  {names[a]} -> {names[b]} [label="{n}"];' for (a, b), n in sorted(edges.items())]
    return "\n".join([*lines, "}"]) + "\n"


def _cut(scope: str, depth: int) -> str:
    return ".".join(scope.split(".")[:depth])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
