"""What a crossbar technology states, and which statements are impossible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from pfmc import noise
from pfmc.errors import InfeasibleError, UsageError, did_you_mean
from pfmc.quantity import unit
from pfmc.targets.fabric.keys import FABRIC_KEYS
from pfmc.technology import Technology

KEYS: Final[dict[str, str]] = {
    "array.tile_rows": "1", "array.tile_columns": "1", "array.weight_bits": "bit",
    "array.cell_area": "um2", "array.wire_resistance": "ohm",
    "device.g_min": "uS", "device.g_max": "uS", "device.per_conductance": "1",
    "device.write_energy": "J", "device.write_time": "s", "device.write_parallel": "1",
    "read.voltage": "V", "read.passes": "1", "read.settle": "s",
    "dac.bits": "bit", "dac.clock": "Hz", "dac.energy": "J", "dac.area": "um2",
    "adc.bits": "bit", "adc.share": "1", "adc.rate": "Hz", "adc.node": "nm",
    "adc.energy_factor": "1", "adc.area_factor": "1", "adc.headroom": "1",
    "frontend.power": "W", "frontend.area": "um2",
    "wire.load": "1", "wire.loss": "1",
    "sum.energy": "J", "sum.area": "um2", "buffer.energy": "J/bit", "buffer.area": "um2/bit",
    "survey.fom_rate": "1", "survey.fom_bits": "1", "survey.energy": "1", "survey.area": "1",
    "wafer.price": "USD", "wafer.diameter": "mm", "wafer.defect_density": "1/cm2",
    "wafer.reticle_area": "mm2", "wafer.package_test": "USD", "wafer.mask_set": "USD",
}  # fmt: skip
"""Constants a crossbar states itself, each with a unit of the expected dimensions."""

OPTIONAL: Final[dict[str, str]] = {"adc.energy": "J", "adc.area": "um2"}
"""The technology's own converter record; it overrides the survey regression."""

SETTINGS: Final[dict[str, tuple[str, ...]]] = {
    "dac.scheme": ("pulse_width", "bit_serial"),
    "adc.range": ("statistics", "worst"),
    "drift.compensation": ("tile", "none"),
}
"""Choices by word; the first is the default."""

_WHOLE: Final = (
    "array.tile_rows", "array.tile_columns", "array.weight_bits", "device.per_conductance",
    "device.write_parallel", "read.passes", "dac.bits", "adc.bits", "adc.share",
)  # fmt: skip
_MAY_BE_ZERO: Final = frozenset({"device.g_min", "read.settle", "array.wire_resistance"})
_LISTS: Final = (
    "wire.load", "wire.loss", "survey.fom_rate", "survey.fom_bits", "survey.energy", "survey.area",
)  # fmt: skip


@dataclass(frozen=True)
class Design:
    """The numbers lowering and simulation need, in SI.

    Attributes:
        rows, columns: differential pairs of a tile, inputs and outputs.
        g_min_s, g_max_s: smallest and largest target conductance in siemens.
        input_bits, output_bits: of a DAC and an ADC sample, sign included.
        voltage_v: read voltage of a full pulse.
        headroom: the ADC range over the best range of a Gaussian column current.
        statistics: whether ADC ranges come from calibration (else from the worst case).
        compensate: whether each tile's drift is divided out after the ADC.
        noise: the laws of the device.
    """

    rows: int
    columns: int
    g_min_s: float
    g_max_s: float
    input_bits: int
    output_bits: int
    voltage_v: float
    headroom: float
    statistics: bool
    compensate: bool
    noise: noise.NoiseModel

    @property
    def floor(self) -> float:
        """g_min / g_max: the normalised conductance of a zero weight's devices."""
        return self.g_min_s / self.g_max_s


def setting(technology: Technology, key: str) -> str:
    """The choice `key`, its default where the technology does not state it."""
    return technology.settings.get(key, SETTINGS[key][0])


def design(technology: Technology) -> Design:
    """The design constants of a technology, after `check`."""
    t = technology
    check(t)
    return Design(
        rows=t.integer("array.tile_rows"), columns=t.integer("array.tile_columns"),
        g_min_s=t.number("device.g_min"), g_max_s=t.number("device.g_max"),
        input_bits=t.integer("dac.bits"), output_bits=t.integer("adc.bits"),
        voltage_v=t.number("read.voltage"), headroom=t.number("adc.headroom"),
        statistics=setting(t, "adc.range") == "statistics",
        compensate=setting(t, "drift.compensation") == "tile",
        noise=noise.model(t.noise),
    )  # fmt: skip


def check(technology: Technology) -> None:
    """Refuses a technology that is incomplete (UsageError) or impossible (InfeasibleError)."""
    _complete(technology)
    _choices(technology)
    for key in _WHOLE:
        if not technology.integer(key) > 0:
            raise _impossible(technology, f"{key} = {technology.integer(key)}", "at least 1")
    for key in KEYS.keys() - _MAY_BE_ZERO - set(_LISTS) - set(_WHOLE):
        if not 0 < technology.number(key) < math.inf:
            raise _impossible(technology, f"{key} = {technology.number(key):g}", "more than 0")
    for key in _MAY_BE_ZERO:
        if not 0 <= technology.number(key) < math.inf:
            raise _impossible(technology, f"{key} = {technology.number(key):g}", "0 or more")
    _converters(technology)
    _conductances(technology)


def _complete(technology: Technology) -> None:
    known = KEYS | OPTIONAL | FABRIC_KEYS
    wrong = [
        f"{k} is missing ({u})" for k, u in (KEYS | FABRIC_KEYS).items()
        if k not in technology.constants
    ]  # fmt: skip
    for key, quantity in technology.constants.items():
        if key.startswith("validation."):
            continue
        if key not in known:
            wrong.append(f"{key} is unknown: {did_you_mean(key, known)}")
        elif quantity.unit.dims != unit(known[key]).dims:
            wrong.append(f"{key} is in {quantity.unit.text}, not a unit like {known[key]}")
    if wrong:
        raise UsageError(
            f"the technology {technology.name!r} is not complete: " + "; ".join(wrong),
            where=technology.name, mend="see targets/crossbar.toml",
        )  # fmt: skip
    noise.model(technology.noise)


def _choices(technology: Technology) -> None:
    for key, word in technology.settings.items():
        if key not in SETTINGS:
            raise UsageError(
                f"unknown setting {key!r}", where=technology.name, mend=did_you_mean(key, SETTINGS)
            )
        if word not in SETTINGS[key]:
            raise UsageError(
                f"{key} = {word!r} is no choice", where=technology.name,
                mend=did_you_mean(word, SETTINGS[key]),
            )  # fmt: skip


def _converters(technology: Technology) -> None:
    for key, low, high in (("dac.bits", 2, 16), ("adc.bits", 2, 24), ("array.weight_bits", 2, 8)):
        if not low <= technology.integer(key) <= high:
            raise _impossible(
                technology, f"{key} = {technology.integer(key)}",
                f"{low} to {high} bits, sign included",
            )  # fmt: skip
    lengths = {"survey.fom_rate": 2, "survey.fom_bits": 2, "survey.energy": 4, "survey.area": 4}
    for key, length in lengths.items():
        if len(technology.quantity(key).values) != length:
            raise UsageError(f"{key} does not hold {length} numbers", where=technology.name)


def _conductances(technology: Technology) -> None:
    low, high = technology.number("device.g_min"), technology.number("device.g_max")
    if low >= high:
        raise _impossible(
            technology, f"device.g_min = {low * 1e6:g} uS, device.g_max = {high * 1e6:g} uS",
            "g_min below g_max: exchange them or widen the window",
        )  # fmt: skip


def _impossible(technology: Technology, what: str, wanted: str) -> InfeasibleError:
    return InfeasibleError(
        f"no crossbar can be built with {what}", where=technology.name, mend=f"state {wanted}"
    )
