"""What an optical technology file must state, and what is refused as impossible."""

from __future__ import annotations

from typing import Final

from pfmc import noise
from pfmc.errors import InfeasibleError, UsageError, did_you_mean
from pfmc.quantity import Quantity
from pfmc.targets.fabric import FABRIC_KEYS
from pfmc.targets.optical import geometry
from pfmc.technology import Technology

KEYS: Final[dict[str, str]] = {
    "physics.planck": "J.s", "physics.light": "m/s",
    "optics.wavelength": "m", "optics.index": "1",
    "array.tile_inputs": "1", "array.tile_outputs": "1",
    "matrix.margin": "1", "matrix.max_weight_bits": "bit",
    "plane.per_mode": "1", "plane.minimum": "1", "plane.pixels_per_mode": "1",
    "plane.pixel": "m", "plane.gap_fraction": "1", "plane.transmission": "1",
    "plane.index_contrast": "1", "plane.voxel_length": "m", "plane.phase_bits": "bit",
    "write.phase_error": "rad", "write.lateral_error": "1", "write.scatter_fraction": "1",
    "write.lateral_sensitivity": "1", "write.fit_residual": "1",
    "writer.beams": "1", "writer.silica_rate": "bit/s", "writer.femtosecond_rate": "voxel/s",
    "writer.twophoton_rate": "voxel/s", "writer.hour_cost": "USD/h",
    "volume.side": "m", "volume.glass_cost": "USD/cm3",
    "coupling.output": "1", "coupling.input": "1", "coupling.path": "m",
    "laser.wall_plug": "1", "oscillator.ratio": "1", "oscillator.transmission": "1",
    "splitter.transmission": "1", "splitter.copies": "1",
    "modulator.energy": "J", "modulator.transmission": "1", "modulator.area": "m2",
    "dac.bits": "bit", "dac.energy": "J", "dac.area": "m2", "dac.latency": "s",
    "receiver.energy": "J", "receiver.noise": "electron", "receiver.area": "m2",
    "adc.bits": "bit", "adc.energy": "J", "adc.rate": "Hz", "adc.share": "1", "adc.area": "m2",
    "adc.latency": "s", "adc.range_sigmas": "1", "adc.crest": "1",
    "anchor.digital_mac": "J", "anchor.digital_floor": "J", "anchor.pair_energy": "J",
    "anchor.pair_16": "J", "anchor.pair_64": "J", "anchor.pair_256": "J",
    "anchor.oscillator_mac": "J", "anchor.signal_mac": "J",
    "anchor.designed_density": "1/m3", "anchor.fanout_density": "1/m3",
    "anchor.plane_efficiency": "1", "anchor.fanout_penalty": "dB",
}  # fmt: skip
"""Constant -> a unit of the expected dimensions; those of the fabric come on top."""

WRITERS: Final = {"silica": "bit", "femtosecond": "voxel", "twophoton": "voxel"}
"""Writer -> what its rate counts."""

_FRACTIONS: Final = (
    "matrix.margin", "plane.transmission", "coupling.output", "coupling.input",
    "laser.wall_plug", "oscillator.transmission", "splitter.transmission",
    "modulator.transmission",
)  # fmt: skip
_NOT_NEGATIVE: Final = (
    "write.phase_error", "write.lateral_error", "write.lateral_sensitivity", "write.fit_residual",
    "write.scatter_fraction", "receiver.noise",
)  # fmt: skip
_WHOLE: Final = (
    "array.tile_inputs", "array.tile_outputs", "plane.minimum", "plane.phase_bits", "dac.bits",
    "adc.bits", "adc.share", "splitter.copies", "matrix.max_weight_bits",
)  # fmt: skip


def detection(technology: Technology) -> tuple[Quantity, Quantity]:
    """Photons per fully driven input mode, and quantum efficiency, of the read law.

    Raises:
        UsageError: the technology does not state exactly one ``homodyne_shot`` read law.
    """
    laws = [n for n in technology.noise if n.law == "homodyne_shot" and n.moment == "read"]
    if len(laws) != 1 or len(laws) != len(technology.noise):
        raise UsageError(
            "an optical technology states one noise law, homodyne_shot at moment read",
            where=technology.name, mend="give its photons and efficiency; write errors: [write]",
        )  # fmt: skip
    noise.law(laws[0])
    return laws[0].parameters["photons"], laws[0].parameters["efficiency"]


def check(technology: Technology) -> None:
    """Refuses a technology that is incomplete (UsageError) or impossible (InfeasibleError)."""
    technology.require(KEYS | FABRIC_KEYS)
    photons, efficiency = detection(technology)
    writer(technology)
    for quantity in [technology.quantity(k) for k in _FRACTIONS] + [efficiency]:
        if not 0.0 <= quantity.low <= quantity.high <= 1.0 or quantity.value == 0.0:
            _refuse(technology, quantity, "glass and detectors cannot amplify: keep it in (0, 1]")
    for key in [k for k in KEYS if k not in _NOT_NEGATIVE]:
        if technology.quantity(key).low <= 0.0:
            _refuse(technology, technology.quantity(key), "it must be positive")
    for key in _NOT_NEGATIVE:
        if technology.quantity(key).low < 0.0:
            _refuse(technology, technology.quantity(key), "it must not be negative")
    if photons.low <= 0.0:
        _refuse(technology, photons, "detection needs light: state more than zero photons")
    for key in _WHOLE:
        if technology.integer(key) < 1:
            _refuse(technology, technology.quantity(key), "it must be at least 1")
    _converters(technology)
    _room(technology)


def writer(technology: Technology) -> str:
    """The writer the technology chose.

    Raises:
        UsageError: none, or not one of `WRITERS`.
    """
    choice = technology.settings.get("writer.choice", "")
    if choice not in WRITERS:
        raise UsageError(
            f"the technology chooses the writer {choice!r}", where=technology.name,
            mend=did_you_mean(choice, WRITERS),
        )  # fmt: skip
    return choice


def _converters(technology: Technology) -> None:
    for key in ("dac.bits", "adc.bits"):
        if not 2 <= technology.integer(key) <= 24:
            _refuse(technology, technology.quantity(key), "a signed converter has 2 to 24 bits")
    if not 2 <= technology.integer("matrix.max_weight_bits") <= 8:
        _refuse(technology, technology.quantity("matrix.max_weight_bits"), "codes fit a byte: 2..8")


def _room(technology: Technology) -> None:
    """A written plane must fit between its neighbours."""
    t = technology
    size = geometry.tile(t.integer("array.tile_inputs"), t.integer("array.tile_outputs"), t)
    height, gap = size.height_m.typical, size.gap_m.typical
    if height > gap:
        contrast = t.number("plane.index_contrast") * height / gap
        raise InfeasibleError(
            f"a plane of {height * 1e6:.3g} um for a full wave of phase does not fit into the gap "
            f"of {gap * 1e6:.3g} um", where=t.name,
            mend=f"raise plane.index_contrast to {contrast:.3g}, or take larger pixels or tiles",
        )  # fmt: skip


def _refuse(technology: Technology, quantity: Quantity, mend: str) -> None:
    raise InfeasibleError(
        f"{quantity.name} = {quantity.value:g} {quantity.unit.text} "
        f"(range {quantity.low:g} to {quantity.high:g}) is impossible",
        where=technology.name, mend=mend,
    )  # fmt: skip
