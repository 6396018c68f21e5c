"""Size of a tile in glass: planes, window, gaps, depth, voxels; scaling laws of the prototypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pfmc.quantity import Estimate
from pfmc.technology import Technology


def rising(value: Estimate, function: Callable[[float], float]) -> Estimate:
    """Applies a rising function of a dimensionless estimate to its three ends."""
    ends = function(value.low), function(value.typical), function(value.high)
    return Estimate(*ends, value.dims, value.constants)


def whole(count: float) -> float:
    """`count` rounded up to a whole number; a rounding error above one is forgiven."""
    return float(math.ceil(count - 1e-9))


@dataclass(frozen=True)
class TileGeometry:
    """What one tile of N modes takes up, as estimates in SI.

    Attributes:
        planes: phase planes, P = max(ceil(per_mode N), minimum).
        window_pixels: pixels along a side of a plane's window, ceil(sqrt(pixels_per_mode N)).
        pixels: P window_pixels².
        side_m: window_pixels x pixel.
        gap_m: gap_fraction x side / tan(spread), spread = medium wavelength / (2 pixel).
        depth_m: (P + 1) gap.
        area_m2, volume_m3: side², side² depth.
        height_m: thickness of a full wave of phase, wavelength / index contrast.
        slices: written voxels along one pixel, height / voxel_length, at least one.
        voxels: pixels x slices.
    """

    planes: Estimate
    window_pixels: Estimate
    pixels: Estimate
    side_m: Estimate
    gap_m: Estimate
    depth_m: Estimate
    area_m2: Estimate
    volume_m3: Estimate
    height_m: Estimate
    slices: Estimate
    voxels: Estimate


def planes(inputs: int, outputs: int, technology: Technology) -> int:
    """Phase planes of a tile at the typical constants."""
    return round(_planes(max(inputs, outputs), technology).typical)


def _planes(modes: int, technology: Technology) -> Estimate:
    needed = rising(technology["plane.per_mode"] * modes, whole)
    return needed.at_least(technology["plane.minimum"])


def tile(inputs: int, outputs: int, technology: Technology) -> TileGeometry:
    """The geometry of a tile of ``inputs`` x ``outputs`` modes (the larger counts).

    The gap lets light spread over the fraction ``plane.gap_fraction`` of the window between two
    planes: this reproduces the prototypes' 200, 250 and 300 wavelengths at 16, 32 and 64 modes.
    """
    t, modes = technology, max(inputs, outputs)
    count = _planes(modes, t)
    window = rising(t["plane.pixels_per_mode"] * modes, lambda p: whole(math.sqrt(p)))
    side = window * t["plane.pixel"]
    gap = t["plane.gap_fraction"] * side * 2.0 * t["plane.pixel"] / medium_wavelength(t)
    height = t["optics.wavelength"] / t["plane.index_contrast"]
    slices = rising(height / t["plane.voxel_length"], whole).at_least(1.0)
    pixels = count * window.power(2)
    depth = (count + 1.0) * gap
    area = side.power(2)
    return TileGeometry(
        count, window, pixels, side, gap, depth, area, area * depth, height, slices, pixels * slices
    )


def medium_wavelength(technology: Technology) -> Estimate:
    """Wavelength in the glass."""
    return technology["optics.wavelength"] / technology["optics.index"]


def thickness_parameter(technology: Technology) -> float:
    """Q = 2 pi wavelength h / (n (2 pixel)²) at a full wave of phase, typical constants.

    Above about 0.5 a thin-mask simulation of the plane is meaningless (research notes, section 5).
    """
    t = technology
    wavelength, period = t.number("optics.wavelength"), 2.0 * t.number("plane.pixel")
    height = wavelength / t.number("plane.index_contrast")
    return 2.0 * math.pi * wavelength * height / (t.number("optics.index") * period**2)
