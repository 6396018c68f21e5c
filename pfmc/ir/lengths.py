"""Lengths as polynomials: the dimensions of a graph's values in those of its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

Monomial: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Poly:
    """A polynomial with integer coefficients: sorted ``((symbols…), coefficient)`` pairs."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        parts = []
        for symbols, factor in self.terms:
            names = list(symbols) if factor == 1 and symbols else [str(factor), *symbols]
            parts.append("*".join(names))
        return " + ".join(parts)


Dim: TypeAlias = int | Poly
Dims: TypeAlias = tuple[Dim, ...]


def symbol(name: str) -> Poly:
    """The dimension called `name`."""
    return Poly((((name,), 1),))


def _terms(dim: Dim) -> dict[Monomial, int]:
    return dict(dim.terms) if isinstance(dim, Poly) else {(): dim}


def _made(terms: Mapping[Monomial, int]) -> Dim:
    left = {key: factor for key, factor in terms.items() if factor}
    if not left or set(left) == {()}:
        return left.get((), 0)
    return Poly(tuple(sorted(left.items(), key=lambda item: (-len(item[0]), item))))


def add(a: Dim, b: Dim) -> Dim:
    """a + b."""
    terms = _terms(a)
    for key, factor in _terms(b).items():
        terms[key] = terms.get(key, 0) + factor
    return _made(terms)


def multiply(a: Dim, b: Dim) -> Dim:
    """a · b."""
    terms: dict[Monomial, int] = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            key = tuple(sorted((*left, *right)))
            terms[key] = terms.get(key, 0) + x * y
    return _made(terms)


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b if it is exact, by long division; for two integers the floor; else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a >= 0 else None
    if b == 0:
        return None
    lead, factor = _leading(b)
    rest: Dim = a
    quotient: Dim = 0
    while rest != 0:
        symbols, x = _leading(rest)
        left = _without(symbols, lead)
        if left is None or x % factor:
            return None
        term = _made({left: x // factor})
        rest = add(rest, multiply(multiply(term, b), -1))
        quotient = add(quotient, term)
    return quotient


def _leading(dim: Dim) -> tuple[Monomial, int]:
    """The term that comes first: most symbols, then by name."""
    return min(_terms(dim).items(), key=lambda item: (-len(item[0]), item[0]))


def _without(symbols: Monomial, taken: Monomial) -> Monomial | None:
    rest = list(symbols)
    for name in taken:
        if name not in rest:
            return None
        rest.remove(name)
    return tuple(rest)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all."""
    start: Dim = 1
    return reduce(multiply, dims, start)


def value_at(dim: Dim, sizes: Mapping[str, int]) -> int:
    """`dim` with numbers put for its symbols.

    Raises:
        KeyError: a symbol has no number.
    """
    total = 0
    for symbols, factor in _terms(dim).items():
        for name in symbols:
            factor *= sizes[name]
        total += factor
    return total


def symbols_of(dims: Iterable[Dim]) -> set[str]:
    """The symbols in `dims`."""
    return {s for d in dims if isinstance(d, Poly) for key, _ in d.terms for s in key}


_SUM = re.compile(r"^\w+( \+ \w+)+$")


def parse(dim: object) -> Dim | None:
    """A dimension as written in a file: a number, a name, or a sum of them; None if unnamed."""
    if isinstance(dim, int):
        return dim
    text = getattr(dim, "value", None)
    if not isinstance(text, str) or not text:
        return None
    if text.isdecimal():
        return int(text)
    if not _SUM.match(text):
        return symbol(text)
    parts: list[Dim] = [int(p) if p.isdecimal() else symbol(p) for p in text.split(" + ")]
    return reduce(add, parts)


def broadcast(known: Sequence[Dims]) -> Dims | None:
    """The common shape of several; None where two different symbols meet."""
    rank = max(len(s) for s in known)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in known]
    result: list[Dim] = []
    for dims in zip(*padded, strict=True):
        wide = [d for d in dict.fromkeys(dims) if d != 1]
        numbers = [d for d in wide if isinstance(d, int)]
        if len(wide) > 1 and not numbers:
            return None
        result.append(numbers[0] if numbers else wide[0] if wide else 1)
    return tuple(result)


def same(a: Dim, b: Dim) -> bool | None:
    """Whether two lengths are equal; None if that depends on the symbols. None is negative."""
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    number = a if isinstance(a, int) else b if isinstance(b, int) else None
    return False if number is not None and number < 0 else None
