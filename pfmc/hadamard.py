"""Hadamard matrices of every order up to 112 and most beyond, and rotations made of them.

A Hadamard matrix H of order n holds ±1 and ``H H^T = n I``; n is 1, 2 or a multiple of 4.
Constructions: Sylvester's doubling, both of Paley (J. Math. Phys. 12, 1933), and Williamson's four
circulants (Duke Math. J. 11, 1944) for 92 and 172. Nothing is read from a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd, isqrt

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Signs = npt.NDArray[np.int64]

_ORBITS = 11
"""Free signs of one of Williamson's circulants at most: their pairs are searched."""


@cache
def hadamard(order: int) -> Signs | None:
    """A Hadamard matrix ``[order, order]`` of ±1, or None if no construction here reaches it."""
    if order in (1, 2):
        return np.array([[1, 1], [1, -1]])[:order, :order]
    if order < 1 or order % 4:
        return None
    made = _paley_one(order)
    made = _paley_two(order) if made is None else made
    half = hadamard(order // 2) if made is None else None
    if half is not None:
        made = np.kron(np.array([[1, 1], [1, -1]]), half)
    return _williamson(order // 4) if made is None else made


# -- Paley -----------------------------------------------------------------------------------------


def _paley_one(order: int) -> Signs | None:
    """``I + S`` of order q + 1 for a prime power q = 3 mod 4, S skew."""
    q = order - 1
    if q % 4 != 3 or (characters := _characters(q)) is None:
        return None
    bordered = np.zeros((order, order), np.int64)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1, characters
    return bordered + np.eye(order, dtype=np.int64)


def _paley_two(order: int) -> Signs | None:
    """Of order 2 (q + 1) for a prime power q = 1 mod 4."""
    q = order // 2 - 1
    if q % 4 != 1 or (characters := _characters(q)) is None:
        return None
    bordered = np.zeros((q + 1, q + 1), np.int64)
    bordered[0, 1:] = bordered[1:, 0] = 1
    bordered[1:, 1:] = characters
    one = np.eye(q + 1, dtype=np.int64)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(bordered, plus) + np.kron(one, minus)


def _characters(q: int) -> Signs | None:
    """``chi(a - b)`` over the field of q elements: 1 for squares, -1 for others, 0 for 0."""
    root = _prime_power(q)
    if root is None:
        return None
    prime, degree = root
    elements = np.array(list(itertools.product(range(prime), repeat=degree)))
    place = prime ** np.arange(degree - 1, -1, -1)
    squares = _squares(elements, prime, degree) @ place
    chi = np.full(q, -1)
    chi[squares] = 1
    chi[0] = 0
    differences = (elements[:, None] - elements[None]) % prime
    return np.asarray(chi[differences @ place])


def _prime_power(q: int) -> tuple[int, int] | None:
    """p and k with ``p^k = q``, p prime."""
    prime = next((p for p in range(2, isqrt(q) + 1) if q % p == 0), q) if q > 1 else 0
    degree, power = 1, prime
    while 0 < power < q:
        degree, power = degree + 1, power * prime
    return (prime, degree) if power == q and prime else None


def _squares(elements: Signs, prime: int, degree: int) -> Signs:
    """The squares of all elements, polynomials with the highest coefficient first."""
    if degree == 1:
        return (elements * elements) % prime
    for low in itertools.product(range(prime), repeat=degree):
        products = np.array([_reduced(np.convolve(e, e), low, prime) for e in elements])
        # a field of odd order has (q - 1) / 2 squares beside 0; a ring that is none has others
        if len(np.unique(products, axis=0)) == (len(elements) + 1) // 2 and _is_field(low, prime):
            return products
    raise AssertionError(f"no irreducible polynomial of degree {degree} over {prime}")


def _is_field(low: tuple[int, ...], prime: int) -> bool:
    """Whether ``x^k + low`` has no factor: powers of x reach 1 only after q^j - 1 steps."""
    degree = len(low)
    one = np.array([0] * (degree - 1) + [1])
    factors = [
        f for size in range(1, degree // 2 + 1)
        for f in itertools.product(range(prime), repeat=size)
    ]  # fmt: skip
    whole = np.array([1, *low])
    assert one.size == degree
    return all(_reduced(whole, f, prime).any() for f in factors)


def _reduced(polynomial: Signs, low: tuple[int, ...], prime: int) -> Signs:
    """The remainder after division by ``x^k + low``, k coefficients."""
    rest, degree = polynomial.copy() % prime, len(low)
    for i in range(len(rest) - degree):
        rest[i + 1 : i + 1 + degree] -= rest[i] * np.array(low)
        rest[i] = 0
        rest %= prime
    padded = np.concatenate([np.zeros(max(0, degree - len(rest)), rest.dtype), rest])
    return np.asarray(padded[len(padded) - degree :])


# -- Williamson ------------------------------------------------------------------------------------


def _williamson(length: int) -> Signs | None:
    """Of order 4 `length` from four symmetric circulants with ``A² + B² + C² + D² = 4 length I``.

    The circulants are searched among those that a group of multipliers leaves as they are.
    """
    if length % 2 == 0 or length > 43:
        return None
    for orbits in _orbits(length):
        found = _four(length, orbits)
        if found is not None:
            shifts = (np.arange(length)[None] - np.arange(length)[:, None]) % length
            a, b, c, d = (row[shifts] for row in found)
            return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
    return None


def _orbits(length: int) -> Iterator[list[list[int]]]:
    """Partitions of 1..length-1 by groups of multipliers that hold -1, the coarsest first."""
    units = [u for u in range(1, length) if gcd(u, length) == 1]
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for pair in itertools.combinations_with_replacement(units, 2):
        group = {1, length - 1}
        while len(more := group | {g * u % length for g in group for u in pair}) > len(group):
            group = more
        rest = sorted({tuple(sorted({g * i % length for g in group})) for i in range(1, length)})
        if len(rest) <= _ORBITS:
            seen.add(tuple(rest))
    for parts in sorted(seen, key=lambda p: (len(p), p)):
        yield [list(p) for p in parts]


def _four(length: int, orbits: list[list[int]]) -> list[Signs] | None:
    """Four rows, constant on `orbits`, whose power spectra add up to 4 length everywhere."""
    rows = np.ones((2 ** len(orbits), length), np.int64)
    for k, orbit in enumerate(orbits):
        rows[:, orbit] = 1 - 2 * ((np.arange(len(rows)) >> k) & 1)[:, None]
    ends = [0, *(orbit[0] for orbit in orbits)]
    power = np.fft.fft(rows).real[:, ends] ** 2
    fits = (power <= 4 * length + 1e-6).all(axis=1)
    rows, power = rows[fits], power[fits]
    left, right = np.triu_indices(len(rows))
    both = power[left] + power[right]
    fits = (both <= 4 * length + 1e-6).all(axis=1)
    left, right, both = left[fits], right[fits], both[fits]
    weights = np.sqrt(np.arange(2, 2 + both.shape[1]))  # tells sums of power apart
    sums = both @ weights
    order = np.argsort(sums, kind="stable")
    wanted = 4 * length * weights.sum() - sums
    place = np.searchsorted(sums[order], wanted - 1e-6)
    other = order[np.minimum(place, len(order) - 1)]
    pairs = np.nonzero((np.abs(both + both[other] - 4 * length) < 1e-6).all(axis=1))[0]
    if not len(pairs):
        return None
    k = pairs[0]
    return [rows[i] for i in (left[k], right[k], left[other[k]], right[other[k]])]


# -- rotations -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix ``R = diag(signs) (I ⊗ core ⊗ H_2^doublings)``, float64.

    Attributes:
        signs: ±1, ``[width]``.
        core: orthogonal, ``[m, m]``; ``m * 2^doublings`` divides the width.
        doublings: Sylvester steps, done as a fast transform.
    """

    signs: Doubles
    core: Doubles
    doublings: int

    def rows(self, x: npt.NDArray[np.floating]) -> Doubles:
        """``x @ R`` over the last axis, float64, of any shape ``[..., width]``."""
        short = 1 << self.doublings
        y = (x.astype(np.float64) * self.signs).reshape(-1, len(self.core), short)
        y = np.swapaxes(np.swapaxes(y, 1, 2) @ self.core, 1, 2)
        step = 1
        while step < short:
            pairs = y.reshape(-1, short // (2 * step), 2, step)
            y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            step *= 2
        return np.asarray(y.reshape(x.shape) / np.sqrt(short))

    def columns(self, weight: npt.NDArray[np.floating]) -> Doubles:
        """``R^T @ weight`` of ``[width, n]``."""
        return self.rows(weight.T).T


def rotation(
    width: int, block: int, kind: str, rng: np.random.Generator, signs: Doubles | None = None
) -> Rotation:
    """A random rotation of `width` numbers in blocks of `block`.

    Args:
        width: a multiple of `block`.
        kind: ``hadamard``, a Hadamard matrix behind random signs where one of order `block` can be
            made, else as ``random``: an orthogonal matrix (Haar's measure), the same in each block.
        rng: draws signs and the orthogonal matrix.
        signs: ±1, ``[width]``, in place of random ones.
    """
    drawn = rng.integers(0, 2, width).astype(np.float64) * 2.0 - 1.0
    held: Doubles = drawn if signs is None else signs
    most = (block & -block).bit_length() - 1
    for doublings in () if kind == "random" else range(most, -1, -1):  # the smallest core there is
        small = block >> doublings
        if (core := hadamard(small)) is not None:
            return Rotation(held, core / np.sqrt(small), doublings)
    factor, upper = np.linalg.qr(rng.normal(size=(block, block)))
    return Rotation(held, factor * np.sign(np.diagonal(upper)), 0)
