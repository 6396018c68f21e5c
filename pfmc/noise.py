"""Noise of hardware as laws with parameters: what a die's devices do when written, aged and read.

One order holds for every target, in simulation, in distillation and in emitted netlists:
quantise -> write -> age -> input converter -> product -> read -> output converter (`ORDER`).
``write`` happens once per die, ``age`` depends on the time since writing, ``read`` is drawn at
each inference. Laws (`pfmc.noise_laws`) act on the *normalised* quantity x = g / g_max of one
device (a conductance, or whatever the target normalises). A law never draws: the standard normal
numbers are handed to it, and those of a die come from `generator`, so that one seed names one die
everywhere. Laws are data: `law` and `model` build them from the ``[[noise]]`` of a technology.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pfmc.errors import UsageError, did_you_mean
from pfmc.noise_laws import (
    Additive,
    AgeLaw,
    Array,
    Curve,
    FlickerRead,
    FlickerReadLog,
    Gaussian,
    HomodyneShot,
    Law,
    Polynomial,
    PowerDrift,
    ReadLaw,
    Relaxation,
    WriteLaw,
)
from pfmc.quantity import Quantity, unit
from pfmc.technology import MOMENTS, NoiseLaw

ORDER: Final = (
    "quantise", "write", "age", "input converter", "product", "read", "output converter",
)  # fmt: skip
"""The one documented order of effects."""


def generator(die_seed: int, layer: str, moment: str) -> np.random.Generator:
    """The random numbers of one moment of one layer of one die.

    Philox keyed by the first 128 bits of sha256 over seed, layer and moment: independent of the
    order in which layers are drawn, of the process and of the machine.
    """
    text = f"pfmc noise\0{die_seed}\0{layer}\0{moment}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class LawKind:
    """What a law name of a technology file means.

    Attributes:
        moments: where it may stand.
        parameters: name -> unit of the same dimensions; `optional` those that may be left out.
        formula, paper: for the report.
        build: parameters (SI, lists as tuples) -> the law.
    """

    moments: tuple[str, ...]
    parameters: Mapping[str, str]
    optional: frozenset[str]
    formula: str
    paper: str
    build: Callable[[Mapping[str, tuple[float, ...]]], Law]


def _curve(p: Mapping[str, tuple[float, ...]], name: str) -> Curve:
    slope, offset = p[f"{name}_log"]
    low, high = p[f"{name}_clamp"]
    split = p.get(f"{name}_split", (math.inf,))[0]
    return Curve(slope, offset, low, high, split, p.get(f"{name}_polynomial", ()))


def _one(p: Mapping[str, tuple[float, ...]], name: str, default: float = math.inf) -> float:
    return p.get(name, (default,))[0]


def _polynomial(p: Mapping[str, tuple[float, ...]]) -> Law:
    low, high = p.get("valid", (0.0, 1.0))
    return Polynomial(p["coefficients"], _one(p, "full_scale"), low, high)


def _drift(p: Mapping[str, tuple[float, ...]]) -> Law:
    return PowerDrift(_one(p, "t0"), _curve(p, "mean"), _curve(p, "spread"), _one(p, "valid_age"))


def _relaxation(p: Mapping[str, tuple[float, ...]]) -> Law:
    ages, flat = p["ages"], p["coefficients"]
    width, rest = divmod(len(flat), len(ages))
    if rest or list(ages) != sorted(ages):
        raise UsageError("relaxation needs rising ages and equally many coefficients for each")
    rows = tuple(flat[k * width : (k + 1) * width] for k in range(len(ages)))
    return Relaxation(ages, rows, _one(p, "full_scale"))


def _flicker_read(p: Mapping[str, tuple[float, ...]]) -> Law:
    numbers = [_one(p, k) for k in ("coefficient", "exponent", "cap", "t0", "read", "valid_age")]
    return FlickerRead(*numbers)


def _flicker_log(p: Mapping[str, tuple[float, ...]]) -> Law:
    return FlickerReadLog(_curve(p, "q"), _one(p, "t0"), _one(p, "read"), _one(p, "valid_age"))


def _curve_units(name: str) -> dict[str, str]:
    return {f"{name}_{k}": "1" for k in ("log", "clamp", "split", "polynomial")}


_AIHWKIT = "aihwkit inference/noise"
LAWS: Final[dict[str, LawKind]] = {
    "polynomial": LawKind(
        ("write", "read"),
        {"coefficients": "uS", "full_scale": "uS", "valid": "1"}, frozenset({"valid"}),
        "sigma(x) = sum_k c_k x^k / full_scale", f"Nandakumar, ICECS 2019; {_AIHWKIT}/pcm.py",
        _polynomial,
    ),
    "gaussian": LawKind(
        ("write",), {"relative": "1"}, frozenset(),
        "sigma of a weight = relative * largest |w| of its column of a tile, not clipped",
        "as in Analog Foundation Models, arXiv:2505.09663", lambda p: Gaussian(_one(p, "relative")),
    ),
    "power_drift": LawKind(
        ("age",),
        {"t0": "s", "valid_age": "s"} | _curve_units("mean") | _curve_units("spread"),
        frozenset({"mean_split", "mean_polynomial", "spread_split", "spread_polynomial"}),
        "x(t) = x ((t + t0) / t0)^-|mean(x) + spread(x) z|",
        f"Nandakumar, ICECS 2019; {_AIHWKIT}/pcm.py, hermes.py", _drift,
    ),
    "relaxation": LawKind(
        ("age",), {"ages": "s", "coefficients": "uS", "full_scale": "uS"}, frozenset(),
        "x(t) = x + sqrt(max(sigma_t(x)^2 - sigma_0(x)^2, 0)) z",
        f"Wan, Nature 2022; {_AIHWKIT}/reram.py", _relaxation,
    ),
    "flicker_read": LawKind(
        ("read",),
        {"coefficient": "1", "exponent": "1", "cap": "1", "t0": "s", "read": "s",
         "valid_age": "s"}, frozenset(),
        "sigma = x(t) min(c / x^e, cap) sqrt(ln((t + t0 + t_read) / (2 t_read)))",
        f"Nandakumar, ICECS 2019; {_AIHWKIT}/pcm.py", _flicker_read,
    ),
    "flicker_read_log": LawKind(
        ("read",), {"t0": "s", "read": "s", "valid_age": "s"} | _curve_units("q"),
        frozenset({"q_split", "q_polynomial"}),
        "sigma = x(t) Q(x) sqrt(ln((t + t0 + t_read) / (2 t_read)))",
        f"Le Gallo, Nat. Electron. 2023; {_AIHWKIT}/hermes.py", _flicker_log,
    ),
    "additive": LawKind(
        ("read",), {"relative": "1"}, frozenset(), "sigma_y = relative * full scale", "",
        lambda p: Additive(_one(p, "relative")),
    ),
    "homodyne_shot": LawKind(
        ("read",), {"photons": "photon", "efficiency": "1"}, frozenset(),
        "sigma_y / full scale = 1 / (2 sqrt(efficiency * photons))",
        "quadrature variance 1/4 of a coherent state, e.g. Walls and Milburn, Quantum Optics",
        lambda p: HomodyneShot(_one(p, "photons"), _one(p, "efficiency")),
    ),
}  # fmt: skip
"""Law name -> what it means: the literal registry."""


def law(record: NoiseLaw) -> Law:
    """Builds the law a technology file states.

    Raises:
        UsageError: unknown law, wrong moment, or a parameter missing, unknown or in a wrong unit.
    """
    if record.law not in LAWS:
        raise UsageError(f"unknown noise law {record.law!r}", mend=did_you_mean(record.law, LAWS))
    kind = LAWS[record.law]
    if record.moment not in kind.moments:
        raise UsageError(
            f"the noise law {record.law} is not one of {record.moment}",
            mend=f"state it as moment = {kind.moments[0]!r}",
        )
    _parameters(record, kind)
    return kind.build({k: _si(q) for k, q in record.parameters.items()})


def _si(q: Quantity) -> tuple[float, ...]:
    return tuple(v * q.unit.factor for v in q.values)


def _parameters(record: NoiseLaw, kind: LawKind) -> None:
    wrong = [
        f"{k} is missing ({u})" for k, u in kind.parameters.items()
        if k not in record.parameters and k not in kind.optional
    ]  # fmt: skip
    for name, q in record.parameters.items():
        if name not in kind.parameters:
            wrong.append(f"{name} is unknown: {did_you_mean(name, kind.parameters)}")
        elif q.unit.dims != unit(kind.parameters[name]).dims:
            wrong.append(f"{name} is in {q.unit.text}, not a unit like {kind.parameters[name]}")
    if wrong:
        raise UsageError(
            f"the noise law {record.law} is not complete: " + "; ".join(wrong), mend=kind.formula
        )


@dataclass(frozen=True)
class NoiseModel:
    """All laws of a technology by moment; each tuple may be empty.

    `read` holds laws per device, `output` those that act on an output directly.
    """

    write: tuple[WriteLaw, ...]
    age: tuple[AgeLaw, ...]
    read: tuple[ReadLaw, ...]
    output: tuple[Additive | HomodyneShot, ...]

    def write_sigma(self, x: Array) -> Array:
        """Standard deviation of writing x, all write laws together, in units of full scale."""
        return _root_sum([law.sigma(x) for law in self.write], x)

    def read_sigma(self, written: Array, aged: Array, age_s: float) -> Array:
        """Standard deviation of one reading of a device, in units of full scale."""
        return _root_sum([law.sigma(written, aged, age_s) for law in self.read], aged)

    def output_sigma(self) -> float:
        """Standard deviation added to an output, in units of its full scale."""
        return math.sqrt(sum(law.output_sigma() ** 2 for law in self.output))

    def device(
        self, target: npt.NDArray[np.float32], seed: int | None, layer: str, age_s: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """x as written and x as aged of the devices of die `seed`, float32, shape of `target`.

        The ideal die (seed None) is written exactly and does not age.
        """
        if seed is None:
            return target, target

        def draws(moment: str) -> Iterator[Array]:
            rng = generator(seed, layer, moment)
            while True:
                yield rng.standard_normal(target.shape, dtype=np.float32)

        return self.lived(target, draws("write"), draws("age"), age_s)

    def lived(
        self, target: Array, write: Iterable[Array], age: Iterable[Array], age_s: float
    ) -> tuple[Array, Array]:
        """`target` as written and as aged, one of the normal numbers `write` and `age` a law."""
        written = target
        for law, z in zip(self.write, write, strict=False):
            written = law.apply(written, z)
        aged = written
        for change, z in zip(self.age if age_s != 0.0 else (), age, strict=False):
            aged = change.apply(target, aged, z, age_s)
        return written, aged


def _root_sum(sigmas: Sequence[Array], like: Array) -> Array:
    if len(sigmas) == 1:
        return sigmas[0]
    total = like * 0.0
    for s in sigmas:
        total = total + s * s
    return total**0.5


def model(records: Sequence[NoiseLaw]) -> NoiseModel:
    """The noise model of a technology's ``[[noise]]`` laws, in the order they stand.

    Raises:
        UsageError: as `law`.
    """
    found: dict[str, list[Any]] = {m: [] for m in (*MOMENTS, "output")}
    for record in records:
        built = law(record)
        output = isinstance(built, Additive | HomodyneShot)
        found["output" if output else record.moment].append(built)
    return NoiseModel(*(tuple(found[k]) for k in ("write", "age", "read", "output")))
