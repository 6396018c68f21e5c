"""Energy and area of an output converter: the regression of the Murmann survey, or a record.

hwcomponents-adc 1.0.21 (arXiv 2404.06553) fits the best converters of B. Murmann's ADC survey::

    SNDR  = 6.0206 bits + 1.7609
    FOM_S = min(fom_rate[0] + fom_rate[1] ln rate, fom_bits[0] + fom_bits[1] ceil(bits))
    E     = 0.5 * 10^((SNDR - FOM_S) / 10) * exp(energy . (1, ln node, ln bits, 1))
    A     = exp(area . (1, ln node, ln rate, ln E))

with rate in Hz, node in nm, E in pJ and A in um². Its coefficients stand in ``[survey]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pfmc.quantity import Estimate
from pfmc.technology import Technology


@dataclass(frozen=True)
class Converter:
    """Energy of one conversion in J, area of one converter in m², and where they came from."""

    energy: Estimate
    area: Estimate
    formula: str


def survey(
    technology: Technology, bits: float, rate_hz: float, node_nm: float
) -> tuple[float, float]:
    """Energy of a conversion in pJ and area in um² by the regression, without spread."""
    keys = "survey.fom_rate", "survey.fom_bits", "survey.energy", "survey.area"
    rate, most, energy, area = (technology.quantity(k).values for k in keys)
    fom = min(rate[0] + rate[1] * math.log(rate_hz), most[0] + most[1] * math.ceil(bits))
    sndr = 6.0206 * bits + 1.7609
    shape = energy[0] + energy[1] * math.log(node_nm) + energy[2] * math.log(bits) + energy[3]
    e_pj = 0.5 * 10 ** ((sndr - fom) / 10) * math.exp(shape)
    a_um2 = math.exp(
        area[0] + area[1] * math.log(node_nm) + area[2] * math.log(rate_hz)
        + area[3] * math.log(e_pj)
    )  # fmt: skip
    return e_pj, a_um2


def converter(technology: Technology) -> Converter:
    """The technology's converter: its own record where it states one, else the regression."""
    bits, rate = technology.number("adc.bits"), technology.number("adc.rate")
    e_pj, a_um2 = survey(technology, bits, rate, technology.number("adc.node") * 1e9)
    names = frozenset(f"survey.{k}" for k in ("fom_rate", "fom_bits", "energy", "area"))
    names |= {"adc.bits", "adc.rate", "adc.node"}
    fitted = f"survey regression at {bits:g} bits, {rate / 1e6:g} MS/s"
    energy, area = (
        technology[factor] * Estimate(v, v, v, Estimate.exact(1, text).dims, names)
        for factor, v, text in (
            ("adc.energy_factor", e_pj * 1e-12, "J"), ("adc.area_factor", a_um2 * 1e-12, "m2"),
        )
    )  # fmt: skip
    if "adc.energy" in technology.constants:
        energy, fitted = technology["adc.energy"], "adc.energy"
    if "adc.area" in technology.constants:
        area = technology["adc.area"]
    return Converter(energy, area, fitted)
