"""Published figures beside ours, and the plain sentences of an optical cost report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pfmc.cost import Validation
from pfmc.hardware import LayerSummary
from pfmc.quantity import Estimate, Quantity, unit
from pfmc.targets.optical import energy, geometry, physics, size
from pfmc.targets.optical.technology import WRITERS, detection
from pfmc.technology import NoiseLaw, Technology


def rows(
    technology: Technology, energy_mac: Estimate, glass_mac: Estimate
) -> tuple[Validation, ...]:
    """Every published figure with ours; misses are shown."""
    return (
        *_digital(technology, energy_mac, glass_mac),
        *_formulas(technology),
        *_density(technology),
    )


def _digital(t: Technology, whole: Estimate, optics: Estimate) -> Iterator[Validation]:
    """Not a validation of the model but the comparison that must stand beside it."""
    for key, text in (("digital_mac", "digital baseline"), ("digital_floor", "arithmetic floor")):
        for name, value in (("whole token", whole), ("optics and converters", optics)):
            yield _row(
                t, key, f"energy per MAC, {name}, beside the {text}", value.typical * 1e15, "fJ",
                "a comparison, not a prediction of the same machine",
            )  # fmt: skip


def _formulas(t: Technology) -> Iterator[Validation]:
    pair = t.number("anchor.pair_energy")
    for width in (16, 64, 256):
        ours = energy.converters_per_mac(pair, 0.0, width) * 1e15
        yield _row(t, f"pair_{width}", f"converters per MAC, width {width}, SimPhony devices", ours)
    anchored = anchor_technology(t)
    lo = energy.oscillator(anchored).typical / 64 * 1e15
    yield _row(t, "oscillator_mac", "local oscillator per MAC, 624 electrons, width 64", lo)
    photons = 1e4 / (4.0 * 0.036)
    light = photons * physics.photon_energy(anchored).typical / anchored.number("laser.wall_plug")
    yield _row(
        t, "signal_mac", "signal light per MAC at 40 dB, power fraction 0.036", light / 64 * 1e15
    )


def anchor_technology(technology: Technology) -> Technology:
    """The technology with the notes' example instead: 1000 nm, wall plug 0.2, 624 electrons, no
    loss, efficiency 1."""
    changes = {
        "optics.wavelength": 1000e-9, "laser.wall_plug": 0.2, "receiver.noise": 624.0,
        "oscillator.transmission": 1.0, "oscillator.ratio": 10.0,
    }  # fmt: skip
    changed = changed_constants(technology, changes)
    return replace(changed, noise=tuple(_all_seeing(law) for law in changed.noise))


def _all_seeing(law: NoiseLaw) -> NoiseLaw:
    efficiency = _exact(law.parameters["efficiency"], 1.0)
    return replace(law, parameters={**law.parameters, "efficiency": efficiency})


def changed_constants(technology: Technology, changes: Mapping[str, float]) -> Technology:
    """The technology with some constants replaced by exact SI numbers."""
    constants = {**technology.constants}
    for key, value in changes.items():
        constants[key] = _exact(technology.quantity(key), value)
    return replace(technology, constants=constants)


def _exact(quantity: Quantity, si: float) -> Quantity:
    value = si / quantity.unit.factor
    return replace(quantity, values=(value,), low=value, high=value)


def _density(t: Technology) -> Iterator[Validation]:
    prototype = changed_constants(
        t,
        {"optics.wavelength": 1000e-9, "optics.index": 1.45, "plane.pixel": 1.4e-6,
         "plane.per_mode": 0.125, "plane.pixels_per_mode": 400.0},
    )  # fmt: skip
    yield _row(
        t, "designed_density", "weights per mm3, 64 x 64 prototype at 1000 nm",
        weights_per_m3(prototype, 64) * 1e-9, note="same formulas, the prototype's pixel",
    )  # fmt: skip
    side = max(t.integer("array.tile_inputs"), t.integer("array.tile_outputs"))
    yield _row(
        t, "fanout_density", f"weights per mm3, this technology, {side} modes, beside fan-out",
        weights_per_m3(t, side) * 1e-9, note="a single plane of transmissions is the baseline",
    )  # fmt: skip
    yield _row(
        t, "fanout_penalty", "photons of incoherent fan-out over homodyne, 256 x 256",
        fanout_penalty_db(256), note="closed form for Gaussian weights, uniform inputs",
    )  # fmt: skip


def weights_per_m3(technology: Technology, modes: int) -> float:
    """Weights of a square tile over its volume, typical constants."""
    return modes**2 / geometry.tile(modes, modes, technology).volume_m3.typical


def fanout_penalty_db(modes: int) -> float:
    """Photons the incoherent two-rail readout needs over homodyne at equal SNR, in dB.

    Square Gaussian weights, |w|_max = sqrt(2 ln N²) sigma, inputs uniform in [0, 1].
    """
    mean_abs, peak = math.sqrt(2.0 / math.pi), math.sqrt(2.0 * math.log(modes**2))
    incoherent = (4.0 / 3.0) / (2.0 * modes) / (mean_abs * peak)
    return physics.decibel(4.0 * 0.25 / incoherent)


def _row(
    t: Technology, key: str, name: str, ours: float, shown: str = "", note: str = ""
) -> Validation:
    anchor = t.quantity(f"anchor.{key}")
    text = shown or anchor.unit.text
    return Validation(
        name, anchor.si / unit(text).factor if shown else anchor.value, ours, text,
        anchor.source, anchor.grade, note,
    )  # fmt: skip


def notes(layers: Sequence[LayerSummary], technology: Technology) -> tuple[str, ...]:
    """What the report covers and what it must not be read as."""
    return (
        "L0: matrix and noise law; no phase planes designed yet. Planes, depth and voxels follow "
        "scaling laws of thin-mask prototypes that no full-wave solver has certified.",
        "Glass performs the products with fixed weights alone, isomorphic lowering: one matrix, "
        "one set of tiles. Attention, softmax, norms, nonlinearities and KV memory are electronic.",
        *_light(layers),
        _thickness(technology),
        _demonstrated(technology),
        "A reading is signed by balanced homodyne; it needs a phase-stable local oscillator, "
        "whose light is counted, and a phase reference, which is not. Laser and index drift, "
        "temperature, polarisation, cross-talk between tiles and the oscillator's own noise are "
        "not modelled.",
        "Lasers and converters are taken as switched off while a layer waits; clock and leakage "
        "of the digital logic are counted all the time. Packaging, test and alignment of optics "
        "are not priced.",
        _writers(layers, technology),
        _voxel_arithmetic(layers, technology),
    )


def _light(layers: Sequence[LayerSummary]) -> Iterator[str]:
    kept = [layer.diagnostics for layer in layers if "power_fraction_median" in layer.diagnostics]
    if not kept:
        return
    low = min(d["power_fraction_min"] for d in kept)
    mid = float(np.median([d["power_fraction_median"] for d in kept]))
    snr = [d["snr_read_db"] for d in kept]
    yield (
        f"Delivered power (margin² stable rank / inputs): median {mid:.3g}, least {low:.3g} of a "
        f"tile's light. Read SNR per layer: median {float(np.median(snr)):.1f} dB, "
        f"least {min(snr):.1f} dB."
    )


def _thickness(technology: Technology) -> str:
    q = geometry.thickness_parameter(technology)
    verdict = (
        "above 0.5, so thin-mask simulation of these planes is meaningless and multi-slice "
        "design is mandatory" if q > 0.5 else "below 0.5, where thin masks hold"
    )  # fmt: skip
    return f"Q = 2 pi wavelength h / (n (2 pixel)²) = {q:.3g} for a full wave of phase: {verdict}."


def _demonstrated(technology: Technology) -> str:
    t = technology
    count = geometry.planes(t.integer("array.tile_inputs"), t.integer("array.tile_outputs"), t)
    shown, assumed = t.number("anchor.plane_efficiency"), t.number("plane.transmission")
    return (
        f"Planes shown in glass so far pass about {shown:.0%} each; {assumed:.0%} is assumed here. "
        f"At the shown figure {count} planes would pass {shown**count:.2g} of the light and lose "
        f"{-physics.decibel((shown / assumed) ** count):.0f} dB of the read SNR."
    )


def _voxel_arithmetic(layers: Sequence[LayerSummary], technology: Technology) -> str:
    """One voxel of half a medium wavelength per weight, beside the lowered design."""
    weights = sum(layer.inputs * layer.outputs for layer in layers)
    ideal = weights * (geometry.medium_wavelength(technology).typical / 2.0) ** 3
    needed = size.over_tiles(size.shapes(layers, technology), technology, lambda g: g.volume_m3)
    return (
        f"One voxel of half a wavelength per weight would fill {ideal * 1e9:.3g} mm3; these tiles "
        f"fill {needed.typical * 1e9:.3g} mm3. The first is no design: a cube of P voxels has "
        "P^(2/3) modes on a face and is not a dense matrix of P weights."
    )


def _writers(layers: Sequence[LayerSummary], technology: Technology) -> str:
    tiles = size.shapes(layers, technology)
    parts = []
    for name in WRITERS:
        low, typical, high = size.writing_time(tiles, technology, name).to("h")
        parts.append(f"{name} {typical:.3g} h ({low:.3g} to {high:.3g})")
    photons, _ = detection(technology)
    return (
        "Time to write all tiles, one writer: " + ", ".join(parts) + ". Two-photon writers print "
        f"polymer, not silica. {photons.value:.3g} photons per fully driven input and symbol."
    )
