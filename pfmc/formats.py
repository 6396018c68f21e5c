"""Number formats of weight codes: which integers a code may be, its width, how scales are stored.

Every format stores integers, so a product of codes is exact. ``weight = code * scale``:

========  ====  ==================================  ==========================================
format    bits  codes                               scales
========  ====  ==================================  ==========================================
int       2-8   0 … ±(2**(bits-1) - 1)              any
midrise   2-8   odd, ±1 … ±(2**bits - 1)            any; ``code = 2 c + 1``, so hardware stores c
                                                    and adds the sum of its inputs once
ternary   2     -1, 0, 1, five in a byte            any
mxint8    8     0 … ±127                            a power of two per 32 inputs
mxfp4     4     0 1 2 3 4 6 8 12, either sign       a power of two per 32 inputs
nvfp4     4     0 1 2 3 4 6 8 12, either sign       float8 e4m3 per 16 inputs, times one a matrix
========  ====  ==================================  ==========================================

MX: OCP Microscaling Formats v1.0, sections 5.3 and 6.3 (e2m1 values are doubled here, their
scales halved). nvfp4: NVIDIA cuDNN block scaling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pfmc.errors import UsageError, did_you_mean

Floating = npt.NDArray[np.floating[Any]]
Name = Literal["int", "midrise", "ternary", "mxint8", "mxfp4", "nvfp4"]
Scales = Literal["free", "power", "e4m3"]

NAMES: tuple[Name, ...] = ("int", "midrise", "ternary", "mxint8", "mxfp4", "nvfp4")
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
"""The magnitudes of e2m1, doubled, by their three bits."""

_LOWEST_POWER, _HIGHEST_POWER = -126, 127  # of float32; E8M0 reaches one lower
_E4M3_TOP, _E4M3_LOWEST = 448.0, 2.0**-9
_FIXED: dict[str, tuple[int, int, int, Scales]] = {
    "ternary": (2, 1, 0, "free"),
    "mxint8": (8, 127, 32, "power"),
    "mxfp4": (4, 12, 32, "power"),
    "nvfp4": (4, 12, 16, "e4m3"),
}
"""Format -> bits, top, block, scales."""


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: as in the table above.
        bits: width of a code in storage.
        top: largest code.
        block: inputs that share a scale; 0 where the recipe chooses.
        scales: what a scale may be.
        unit: of e4m3 scales, the factor of the whole matrix; see `bound`.
    """

    name: str
    bits: int
    top: int
    block: int = 0
    scales: Scales = "free"
    unit: float = 1.0

    # -- codes ----------------------------------------------------------------------------------

    def snap(self, magnitude: Floating) -> Floating:
        """The nearest code of ``|w| / scale``, in place; halves go to even mantissas."""
        if self.name == "midrise":
            magnitude -= 1
            magnitude /= 2
            np.rint(magnitude, out=magnitude)
            magnitude *= 2
            magnitude += 1
            np.maximum(magnitude, 1, out=magnitude)
        elif self.top == E2M1[-1]:
            step = np.where(magnitude < 4, 1, np.where(magnitude < 8, 2, 4)).astype(magnitude.dtype)
            magnitude /= step
            np.rint(magnitude, out=magnitude)
            magnitude *= step
        else:
            np.rint(magnitude, out=magnitude)
        return np.minimum(magnitude, self.top, out=magnitude)

    def codes(self, ratio: Floating) -> Floating:
        """The codes of ``w / scale``, in place."""
        if self.name in ("midrise", "mxfp4", "nvfp4"):
            sign = np.copysign(np.ones((), ratio.dtype), ratio)
            np.abs(ratio, out=ratio)
            self.snap(ratio)
            ratio *= sign
            return ratio
        np.rint(ratio, out=ratio)
        np.minimum(ratio, self.top, out=ratio)
        return np.maximum(ratio, -self.top, out=ratio)

    # -- scales ---------------------------------------------------------------------------------

    def bound(self, weight: npt.NDArray[Any]) -> Format:
        """The format for one matrix: e4m3 scales get the unit that its largest weight asks for."""
        if self.scales != "e4m3" or not weight.size:
            return self
        peak = float(np.abs(weight).max())
        if not np.isfinite(peak):
            return self  # refused where the index is known
        unit = np.float32(peak / (self.top * _E4M3_TOP))
        return replace(self, unit=float(unit) if unit > 1e-30 else 1.0)

    def plain(self, peak: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The scale for groups of largest weight `peak`, by each format's own rule, float32."""
        if self.scales == "power":
            _, exponent = np.frexp(np.where(peak > 0, peak, 1.0))
            # OCP MX: floor(log2(peak)) less the element's own largest exponent
            lift = exponent - 1 - int(np.log2(self.top))
            power = np.clip(lift, _LOWEST_POWER, _HIGHEST_POWER)
            return np.where(peak > 0, np.ldexp(1.0, power), 1.0).astype(np.float32)
        return self.lattice((peak / np.float32(self.top)).astype(np.float32))

    def lattice(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The nearest scale that can be stored."""
        if self.scales == "power":
            power = np.rint(np.log2(np.maximum(scale, 2.0**_LOWEST_POWER)))
            power = np.clip(power, _LOWEST_POWER, _HIGHEST_POWER)
            return np.asarray(np.ldexp(1.0, power.astype(np.int32)), np.float32)
        if self.scales == "e4m3":
            wide = np.clip(scale / np.float32(self.unit), _E4M3_LOWEST, _E4M3_TOP)
            held = wide.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            return np.asarray(held * np.float32(self.unit), np.float32)
        return scale

    def scale_bytes(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Block scales as they are stored: E8M0 exponents or e4m3 numbers.

        Raises:
            UsageError: a scale that the format cannot hold, or a format of free scales.
        """
        if self.scales == "power":
            mantissa, exponent = np.frexp(scale)
            if (mantissa != 0.5).any():
                raise UsageError(f"a scale of {self.name} is no power of two")
            return (exponent - 1 + 127).astype(np.uint8)
        if self.scales == "e4m3":
            held = (scale / np.float32(self.unit)).astype(ml_dtypes.float8_e4m3fn)
            if not np.allclose(held.astype(np.float32) * np.float32(self.unit), scale, rtol=1e-6):
                raise UsageError(f"a scale of {self.name} is no e4m3 number times its unit")
            return held.view(np.uint8)
        raise UsageError(f"scales of {self.name} are no bytes")

    def scale_of_bytes(self, held: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The inverse of `scale_bytes`."""
        if self.scales == "power":
            return np.asarray(np.ldexp(1.0, held.astype(np.int32) - 127), np.float32)
        real = held.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.asarray(real * np.float32(self.unit), np.float32)

    # -- what it takes --------------------------------------------------------------------------

    @property
    def nibbles(self) -> bool:
        """Whether the codes fit ONNX's int4."""
        return self.top <= 7

    @property
    def multiplier_bits(self) -> int:
        """Width of the signed factor that a multiplier sees."""
        return 5 if self.top == E2M1[-1] else self.bits

    def word_bytes(self, codes: int) -> int:
        """Bytes of a word of so many codes."""
        return -(-codes // 5) if self.name == "ternary" else codes * self.bits // 8

    @property
    def scale_bits(self) -> int:
        """Width of a stored scale: 31-bit multiplier and 8-bit shift where scales are free."""
        return 39 if self.scales == "free" else 8

    def weight_bits(self, inputs: int, group: int) -> float:
        """Stored bits a weight, scales of more than one group included."""
        bits = 8 / 5 if self.name == "ternary" else float(self.bits)
        groups = -(-inputs // (group or inputs))
        return bits + (groups * self.scale_bits / inputs if groups > 1 else 0.0)


def of(name: str, bits: int = 4) -> Format:
    """The format `name`; `bits` counts where the name leaves them free.

    Raises:
        UsageError: there is no such format, or the bits are out of range.
    """
    if name in _FIXED:
        width, top, block, scales = _FIXED[name]
        return Format(name, width, top, block, scales)
    if name not in NAMES:
        raise UsageError(f"there is no number format {name!r}", mend=did_you_mean(name, NAMES))
    if not 2 <= bits <= 8:
        raise UsageError(f"{bits} bits a weight", mend="weight codes have 2 to 8 bits")
    if name == "midrise":
        if bits == 8:
            raise UsageError("midrise codes of 8 bits reach ±255", mend="use int at 8 bits")
        return Format(name, bits, 2**bits - 1)
    return Format(name, bits, 2 ** (bits - 1) - 1)


def least_bits(name: str) -> int | None:
    """Bits that a format fixes; None where they are chosen."""
    return _FIXED[name][0] if name in _FIXED else None
