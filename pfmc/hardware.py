"""What passes and targets tell each other: limits, number formats, fixed linears, tiles, work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Limits:
    """What a target can hold: read by the quantiser, never ``if target == …``.

    Attributes:
        weight_bits: smallest and largest width of a weight code in bits.
        input_bits: width of an input sample (activation or DAC) in bits.
        output_bits: width of an output sample (ADC) in bits; 0 if outputs stay wide integers.
        tile_inputs: inputs of one tile; a scale group of the ``tile`` granularity is this long.
        tile_outputs: outputs of one tile.
        static_inputs: whether input ranges must be fixed at compile time (a DAC), which needs
            calibration.
        fabric_bits: width of a number in the KV memory, in attention's operands and in stored
            tables on the digital fabric, in bits; 0 if they stay real numbers.
        formats: number formats of weight codes that it holds (`pfmc.formats`).
    """

    weight_bits: tuple[int, int]
    input_bits: int
    output_bits: int
    tile_inputs: int
    tile_outputs: int
    static_inputs: bool
    fabric_bits: int = 0
    formats: tuple[str, ...] = ("int",)


@dataclass(frozen=True)
class QuantisedMatrix:
    """Symmetric integer codes of a weight matrix.

    Attributes:
        codes: int8 ``[in, out]``, integers of the format: within ±(2**(bits-1) - 1) if ``int``.
        bits: width of a stored code.
        scale: float32 ``[groups, out]``; weight[i, o] = codes[i, o] * scale[i // group, o].
        group: inputs that share a scale; the number of inputs when scales are per channel.
        diagnostics: how well it was rounded, for the report.
        format: name of the number format (`pfmc.formats`).
        choice: the search that won (``plain``, ``clip``, ``compensate``, ``learned``), or "".
        unit: what stored block scales are multiples of, where the format has one for the matrix.
    """

    codes: npt.NDArray[np.int8]
    bits: int
    scale: npt.NDArray[np.float32]
    group: int
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    format: str = "int"
    choice: str = ""
    unit: float = 1.0

    def weights(self) -> npt.NDArray[np.float32]:
        """The dequantised matrix, float32 ``[in, out]``."""
        expanded = np.repeat(self.scale, self.group, axis=0)[: self.codes.shape[0]]
        return self.codes.astype(np.float32) * expanded

    def digest(self) -> str:
        """sha256 over codes and scales."""
        form = "" if self.format == "int" else f"{self.format} "
        h = hashlib.sha256(f"{form}{self.bits} {self.group} {self.codes.shape}".encode())
        h.update(np.ascontiguousarray(self.codes).data)
        h.update(np.ascontiguousarray(self.scale).data)
        return h.hexdigest()


@dataclass(frozen=True)
class LayerStatistics:
    """What one calibration run saw of one fixed linear.

    Attributes:
        input_peak: largest |x| seen.
        input_quantiles: |x| quantiles, probability -> value.
        input_power: mean x² per input, float64 ``[in]``.
        output_peak: largest |y| (before bias) per output, float32 ``[out]``.
        output_rms: root mean square of y (before bias) per output, float32 ``[out]``.
        samples: positions seen.
        input_moment: mean of x xᵀ, float64 ``[in, in]``, shared by the layers that share their
            input; None unless it was asked for and fits.
    """

    input_peak: float
    input_quantiles: Mapping[float, float]
    input_power: npt.NDArray[np.float64]
    output_peak: npt.NDArray[np.float32]
    output_rms: npt.NDArray[np.float32]
    samples: int
    input_moment: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class FixedLinear:
    """One weight-stationary product as a target receives it.

    ``y[..., out] = Quantise(x)[..., in] @ matrix + bias``.

    Attributes:
        name: the layer's id (module scope), unique.
        matrix: its codes and scales.
        bias: float32 ``[out]``, or None where it is zero.
        input_bits: width of an input sample in bits.
        input_scale: step of an input sample, so that x ≈ code * input_scale; None when every
            position is scaled afresh by its own peak.
        statistics: calibration statistics, or None where none were taken.
        sources: ids of the source nodes.
        weight: the original weight's name.
        output_range: learned ranges of the output converters in the target's own unit and shape
            (`pfmc.targets.base.Twin.ranges`), or None: the target chooses.
    """

    name: str
    matrix: QuantisedMatrix
    bias: npt.NDArray[np.float32] | None
    input_bits: int
    input_scale: float | None
    statistics: LayerStatistics | None = None
    sources: tuple[str, ...] = ()
    weight: str = ""
    output_range: npt.NDArray[np.float32] | None = None

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return int(self.matrix.codes.shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.matrix.codes.shape[1])


Column = npt.NDArray[np.generic]


@dataclass(frozen=True)
class TiledLinear:
    """A fixed linear laid out on a target's tiles.

    Attributes:
        name, inputs, outputs: of the fixed linear.
        tiles: columns of the tile table, one row a tile; every target has ``row0, col0, rows,
            cols`` (int32, the tile's place in the matrix: inputs are rows, outputs columns) and
            adds its own (scales, ranges, powers …, with the unit as suffix).
        tensors: arrays for ``weights/<layer>.safetensors``: codes, conductances, transfer matrices.
        files: files for ``hardware/``, relative path -> bytes: ROM images and the like.
        counts: what the cost needs, per position unless the name says otherwise (``macs``,
            ``tiles``, ``adc_samples`` …).
        diagnostics: numbers for the report, with the unit as suffix (``stable_rank`` …).
    """

    name: str
    inputs: int
    outputs: int
    tiles: Mapping[str, Column]
    tensors: Mapping[str, npt.NDArray[np.generic]]
    files: Mapping[str, bytes] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> LayerSummary:
        """The layer without its arrays: what stays in memory once they are written."""
        return LayerSummary(
            self.name, self.inputs, self.outputs, len(next(iter(self.tiles.values()))),
            dict(self.counts), dict(self.diagnostics),
        )  # fmt: skip


@dataclass(frozen=True)
class LayerSummary:
    """What cost, netlist and report need of a layer.

    Attributes:
        name, inputs, outputs, counts, diagnostics: as in `TiledLinear`; tiles: how many.
        activity: how often a token uses the layer, on average: 1, or for an expert its share of
            the tokens (`pfmc.ir.routing.activity`). It weighs the energy of a token; area and
            static power are there whether the layer works or not.
    """

    name: str
    inputs: int
    outputs: int
    tiles: int
    counts: Mapping[str, float]
    diagnostics: Mapping[str, float]
    activity: float = 1.0

    def per_token(self, key: str) -> float:
        """``counts[key]`` of a token: the count of one use times `activity`."""
        return self.counts[key] * self.activity


@dataclass(frozen=True)
class FabricOp:
    """One dynamic operation on the digital fabric and its work.

    Work is counted per position; ``…_per_context`` counts are multiplied by the context length.

    Attributes:
        name: the node's name; kind: ``attention``, ``norm``, ``elementwise``, ``softmax``,
            ``rotary``, ``embedding``, ``kv_memory``, ``table``, ``wiring`` or ``control``.
        scope: module scope; sources: ids of the source nodes.
        work: counts by kind of work; `pfmc.targets.fabric.keys` names them.
    """

    name: str
    kind: str
    scope: str
    sources: tuple[str, ...]
    work: Mapping[str, float]


@dataclass(frozen=True)
class Workload:
    """What the cost report is asked for.

    Attributes:
        kind: ``decode`` (a token after `context` tokens) or ``encode`` (an inference over
            `context` positions at once).
        context: positions.
        users: sequences served at the same time, or None to fill the pipeline.
    """

    kind: str
    context: int
    users: int | None = None
