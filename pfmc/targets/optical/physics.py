"""Laws of light through a tile: loss, homodyne shot noise, writing errors, incoherent baseline.

Fields are normalised: amplitude 1 is one fully driven input mode, which carries ``photons`` photons
into the glass per symbol. A balanced homodyne receiver reads the real quadrature of each output.
Sources: research notes `optical.md` sections 2c and 3 (Monte Carlo and wave-optics prototypes).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pfmc.noise_laws import HomodyneShot
from pfmc.quantity import Estimate
from pfmc.targets.optical.geometry import rising
from pfmc.targets.optical.technology import detection
from pfmc.technology import Technology

Array = Any
"""A numpy array, a torch tensor or a float."""


def photon_energy(technology: Technology) -> Estimate:
    """h c / wavelength in joule."""
    t = technology
    return t["physics.planck"] * t["physics.light"] / t["optics.wavelength"]


def phase_variance(technology: Technology) -> float:
    """Variance of one pixel's phase in rad²: writing error and rounding to 2^bits levels."""
    step = 2.0 * math.pi / 2.0 ** technology.integer("plane.phase_bits")
    return technology.number("write.phase_error") ** 2 + step**2 / 12.0


def scatter_nmse(variance: Array, planes: Array, fraction: float) -> Array:
    """Matrix error of oversampled planes with phase errors, relative to |T|_F².

    nmse = fraction (exp(P variance) - 1): of the light scattered out of the straight path, the
    share `fraction` falls into the signal modes. Fits the prototype of 16 modes and 16 planes at
    2, 3, 4 and 6 phase bits and at 0.1 and 0.3 rad within a factor of 1.7.
    """
    exponent = variance * planes
    return fraction * np.expm1(exponent)


def write_nmse(technology: Technology, planes: Array) -> Array:
    """Squared relative error of a written tile: phases, sideways shifts and the design's residual.

    nmse = scatter_nmse + lateral_sensitivity P d² + fit_residual²; d is the rms shift in pixels.
    """
    t = technology
    shift = t.number("write.lateral_sensitivity") * t.number("write.lateral_error") ** 2
    scatter = scatter_nmse(phase_variance(t), planes, t.number("write.scatter_fraction"))
    return scatter + shift * planes + t.number("write.fit_residual") ** 2


def transmission(technology: Technology, planes: int) -> Estimate:
    """Power that stays in the designed path from the glass' entrance to the detector.

    Plane transmission^P, output coupling, and exp(-P variance) lost by scattering (research notes,
    section 3). The design's own loss to surplus modes is part of T, not of this.
    """
    straight = math.exp(-planes * phase_variance(technology))
    per_plane = rising(technology["plane.transmission"], lambda t: float(t**planes))
    return per_plane * technology["coupling.output"] * straight


def oscillator_photons(technology: Technology) -> Estimate:
    """Photons of the local oscillator at one balanced receiver per symbol.

    Chosen so that its shot noise is ``oscillator.ratio`` times the receiver's noise power:
    efficiency n = ratio noise².
    """
    _, efficiency = detection(technology)
    noise_power = technology["receiver.noise"].power(2)
    return technology["oscillator.ratio"] * noise_power / efficiency.estimate


def output_sigma(technology: Technology, planes: int) -> float:
    """Standard deviation of one reading of an output, in units of a fully driven input's amplitude.

    Homodyne shot noise, 1 / (2 sqrt(efficiency photons transmission)), with the receiver's noise
    added as (1 + 1 / oscillator.ratio) in power.
    """
    photons, efficiency = detection(technology)
    receiver = 1.0 + 1.0 / technology.number("oscillator.ratio")
    detected = photons.si * transmission(technology, planes).typical
    return HomodyneShot(detected, efficiency.si / receiver).output_sigma()


def homodyne_snr(photons: float, power_fraction: float, outputs: int) -> float:
    """Mean signal over noise power of the outputs of one tile.

    SNR = 4 (n / M) |T|_F² / N for n detected-equivalent photons per input vector, N inputs, M
    outputs and ``power_fraction`` = |T|_F² / N = s² |W|_F² / (N sigma_max²).
    """
    return 4.0 * photons / outputs * power_fraction


def passive_excess(tiles: npt.NDArray[np.floating]) -> float:
    """Largest singular value over all tiles ``[tiles, in, out]``; above 1 a tile would amplify."""
    if not tiles.size:
        return 0.0
    return float(np.linalg.svd(tiles.astype(np.float64), compute_uv=False).max())


def fanout_snr(
    photons: float, weights: npt.NDArray[np.floating], power: npt.NDArray[np.floating]
) -> float:
    """SNR of the incoherent fan-out multiplier: intensities, two rails of transmissions |w|±.

    Each of N inputs of power share p_i (sum 1) is copied to 2 M detectors; rail ± of output j
    detects (n / 2M) sum_i p_i |w±_ij| / w_max photons, and the difference has the shot noise of
    both.

    Args:
        photons: per input vector; weights: ``[N, M]``; power: ``[samples, N]``, rows sum to 1.
    """
    per_rail = photons / (2.0 * weights.shape[1] * np.abs(weights).max())
    signal = (per_rail * (power @ weights)) ** 2
    noise_power = per_rail * (power @ np.abs(weights))
    return float(signal.mean() / noise_power.mean())


def decibel(ratio: float) -> float:
    """10 log10 of a power ratio."""
    return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf
