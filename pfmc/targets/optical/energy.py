"""Energy of one position through the optical layers: converters, light, receivers, partial sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pfmc.cost import Term
from pfmc.hardware import LayerSummary
from pfmc.quantity import Estimate
from pfmc.targets.optical import physics, tiling
from pfmc.targets.optical.technology import detection
from pfmc.technology import Technology


def terms(layers: Sequence[LayerSummary], technology: Technology) -> Iterator[Term]:
    """The terms of ``energy__token`` that belong to the optical layers."""
    t = technology
    dac, modulators, receivers, adc, partial = (
        used(layers, key) for key in
        ("dac_samples", "modulator_samples", "receiver_samples", "adc_samples", "partial_sums")
    )  # fmt: skip
    yield Term("converters.dac", t["dac.energy"] * dac, f"{dac:,.6g} samples * dac.energy")
    yield Term(
        "light.modulators", t["modulator.energy"] * modulators,
        f"{modulators:,.6g} samples * modulator.energy",
    )  # fmt: skip
    yield _signal(layers, t)
    yield Term(
        "light.oscillator", oscillator(t) * receivers,
        f"{receivers:,.6g} receivers * n_LO h c / wavelength / (oscillator.transmission * "
        "laser.wall_plug), n_LO = oscillator.ratio * receiver.noise^2 / efficiency",
    )  # fmt: skip
    yield Term(
        "converters.receivers", t["receiver.energy"] * receivers,
        f"{receivers:,.6g} samples * receiver.energy",
    )  # fmt: skip
    yield Term("converters.adc", t["adc.energy"] * adc, f"{adc:,.6g} samples * adc.energy")
    yield Term(
        "partial_sums", (t["fabric.energy_mul"] + t["fabric.energy_add"]) * partial,
        f"{partial:,.6g} sums * (fabric.energy_mul + fabric.energy_add)",
    )  # fmt: skip


def used(layers: Sequence[LayerSummary], key: str) -> float:
    """Sum of one count of a token: experts count with their share of the tokens."""
    return sum(layer.per_token(key) for layer in layers)


def _signal(layers: Sequence[LayerSummary], technology: Technology) -> Term:
    modes: dict[int, float] = {}
    for layer in layers:
        grid = tiling.grid(layer.inputs, layer.outputs, technology)
        stages = tiling.splitter_stages(grid, technology)
        modes[stages] = modes.get(stages, 0.0) + layer.per_token("driven_modes")
    value = sum(
        (signal(technology, stages) * n for stages, n in sorted(modes.items())),
        start=Estimate(0.0, 0.0, 0.0),
    )
    return Term(
        "light.signal", value,
        f"{sum(modes.values()):,.10g} tile inputs * photons * h c / wavelength / (coupling.input * "
        "modulator.transmission * splitter.transmission^stages * laser.wall_plug)",
    )  # fmt: skip


def signal(technology: Technology, stages: int) -> Estimate:
    """Electrical energy of the laser for one input mode of one tile per symbol, in joule.

    The laser always gives a full drive: what a modulator does not pass is lost.
    """
    t = technology
    photons, _ = detection(t)
    chain = t["coupling.input"] * t["modulator.transmission"] * t["laser.wall_plug"]
    if stages:
        chain = chain * t["splitter.transmission"].power(stages)
    return photons.estimate * physics.photon_energy(t) / chain


def oscillator(technology: Technology) -> Estimate:
    """Electrical energy of the laser for the local oscillator of one receiver per symbol, J."""
    t = technology
    chain = t["oscillator.transmission"] * t["laser.wall_plug"]
    return physics.oscillator_photons(t) * physics.photon_energy(t) / chain


def converters_per_mac(input_j: float, output_j: float, width: int) -> float:
    """(E_in + E_out) / width: converters of a square tile, J per product (the 1/width law)."""
    return (input_j + output_j) / width
