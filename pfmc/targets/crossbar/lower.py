"""Lays a fixed linear out on crossbar tiles: conductances, converter ranges, counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pfmc.errors import InfeasibleError
from pfmc.hardware import Column, FixedLinear, TiledLinear
from pfmc.targets.crossbar import conductance, emit, ranges, tiling
from pfmc.targets.crossbar.technology import Design
from pfmc.technology import Technology

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_HALF_NORMAL = math.sqrt(2.0 / math.pi)
"""E|x| over the root mean square of a Gaussian x."""


@dataclass(frozen=True)
class _Inputs:
    """Per input, ``[in]``: power E[x²] and mean magnitude E|x|, in codes."""

    power: Doubles
    magnitude: Doubles


def lower_linear(linear: FixedLinear, design: Design, technology: Technology) -> TiledLinear:
    """The tiled form of one fixed linear; works one row of tiles at a time.

    Raises:
        InfeasibleError: the input has no static scale, or more bits than the DAC.
    """
    _accept(linear, design, technology)
    grid = tiling.grid(linear.inputs, linear.outputs, design.rows, design.columns)
    tensors = _tensors(linear, grid)
    inputs = _inputs(linear)
    boost = _boost(linear, inputs)
    columns: dict[str, list[float]] = {k: [] for k in _TILE_COLUMNS}
    siemens = np.zeros(linear.inputs)
    for r in range(grid.down):
        siemens[grid.row_edges[r] : grid.row_edges[r + 1]] = _row_of_tiles(
            linear, design, grid, r, tensors, inputs, boost, columns
        )
    table = _table(grid, design, linear, columns)
    return TiledLinear(
        linear.name, linear.inputs, linear.outputs, table, tensors,
        emit.files(linear.name, tensors),
        _counts(linear, grid, float(siemens @ inputs.magnitude), _largest(linear.input_bits)),
        _diagnostics(design, table, columns["error"]),
    )  # fmt: skip


_TILE_COLUMNS = ("adc_range", "clip_fraction", "mean_conductance_siemens", "error")


def _accept(linear: FixedLinear, design: Design, technology: Technology) -> None:
    if linear.input_scale is None or not linear.input_scale > 0:
        raise InfeasibleError(
            "a crossbar's DAC needs an input range fixed at compile time", where=linear.name,
            mend="calibrate: give pfmc compile data to run the model on",
        )  # fmt: skip
    if linear.input_bits > design.input_bits:
        raise InfeasibleError(
            f"inputs of {linear.input_bits} bits do not fit the DAC of {design.input_bits} bits",
            where=f"{linear.name} on {technology.name}",
            mend=f"quantise inputs to {design.input_bits} bits or state a larger dac.bits",
        )  # fmt: skip


def _largest(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _tensors(linear: FixedLinear, grid: tiling.Grid) -> dict[str, Floats]:
    shape = linear.inputs, linear.outputs
    return {
        conductance.PLUS: np.empty(shape, np.float32),
        conductance.MINUS: np.empty(shape, np.float32),
        conductance.SCALE: np.empty((grid.down, linear.outputs), np.float32),
    }


def _inputs(linear: FixedLinear) -> _Inputs:
    """From calibration, or for inputs spread evenly over the whole range."""
    top = _largest(linear.input_bits)
    if linear.statistics is None:
        even = np.ones(linear.inputs)
        return _Inputs(even * top**2 / 3.0, even * top / 2.0)
    assert linear.input_scale is not None
    power = np.minimum(linear.statistics.input_power / linear.input_scale**2, float(top) ** 2)
    return _Inputs(power, _HALF_NORMAL * np.sqrt(power))


def _boost(linear: FixedLinear, inputs: _Inputs) -> Doubles | None:
    """Measured over predicted power of each output, at least 1: what correlated inputs add."""
    if linear.statistics is None:
        return None
    assert linear.input_scale is not None
    predicted = np.zeros(linear.outputs)
    power = (inputs.power * linear.input_scale**2).astype(np.float32)
    scale, group = linear.matrix.scale, linear.matrix.group
    for g in range(scale.shape[0]):
        codes = linear.matrix.codes[g * group : (g + 1) * group].astype(np.float32)
        rows = power[g * group : (g + 1) * group]
        predicted += (rows @ (codes * codes)) * np.square(scale[g], dtype=np.float64)
    measured = np.square(linear.statistics.output_rms, dtype=np.float64)
    ratio: Doubles = np.maximum(measured / np.maximum(predicted, 1e-300), 1.0)
    return np.where(predicted > 0, ratio, 1.0)


def _row_of_tiles(
    linear: FixedLinear, design: Design, grid: tiling.Grid, r: int,
    tensors: dict[str, Floats], inputs: _Inputs, boost: Doubles | None,
    columns: dict[str, list[float]],
) -> Doubles:  # fmt: skip
    """Fills row `r` of tiles; returns each input's summed conductance in siemens, ``[rows]``."""
    rows = slice(int(grid.row_edges[r]), int(grid.row_edges[r + 1]))
    weights = _weights(linear, rows)
    scale = np.abs(weights).max(axis=0)
    normalised = conductance.normalise(weights, scale)
    plus, minus = conductance.to_conductance(normalised, design)
    tensors[conductance.PLUS][rows], tensors[conductance.MINUS][rows] = plus, minus
    tensors[conductance.SCALE][r] = scale
    magnitude = np.abs(normalised)
    sums = magnitude.sum(axis=0, dtype=np.float32).astype(np.float64)
    power = inputs.power[rows].astype(np.float32) @ np.square(normalised)
    deviation = np.sqrt(power.astype(np.float64) * (1.0 if boost is None else boost))
    top, steps = _largest(linear.input_bits), _largest(design.output_bits)
    low, span = design.g_min_s, design.g_max_s - design.g_min_s
    for a, b in pairwise(grid.column_edges.tolist()):
        limit = ranges.worst(sums[a:b], top)
        chosen = ranges.best(deviation[a:b], scale[a:b], steps, design.headroom, limit)
        if boost is None or not design.statistics:
            chosen = ranges.Range(max(limit, 1.0), 0.0, chosen.error)
        if linear.output_range is not None:
            learned = float(linear.output_range[len(columns["adc_range"])])
            chosen = ranges.given(deviation[a:b], scale[a:b], steps, learned)
        columns["adc_range"].append(chosen.value)
        columns["clip_fraction"].append(chosen.clip_fraction)
        columns["error"].append(chosen.error)
        mean = low + 0.5 * span * float(sums[a:b].mean()) / (rows.stop - rows.start)
        columns["mean_conductance_siemens"].append(mean)
    summed: Doubles = magnitude.sum(axis=1, dtype=np.float32).astype(np.float64)
    summed *= span
    summed += 2.0 * low * linear.outputs
    return summed


def _weights(linear: FixedLinear, rows: slice) -> Floats:
    """Rows of the dequantised matrix, float32 ``[rows, out]``."""
    matrix = linear.matrix
    codes = matrix.codes[rows].astype(np.float32)
    groups = np.arange(rows.start, rows.stop) // matrix.group
    if groups[0] == groups[-1]:
        codes *= matrix.scale[groups[0]]
    else:
        codes *= matrix.scale[groups]
    return codes


def _table(
    grid: tiling.Grid, design: Design, linear: FixedLinear, columns: dict[str, list[float]]
) -> dict[str, Column]:
    places = grid.table()
    table: dict[str, Column] = dict(places)
    used = (places["rows"] * places["cols"]).astype(np.float32)
    span = design.g_max_s - design.g_min_s
    full = design.voltage_v * span / _largest(linear.input_bits)
    table["core"] = np.arange(grid.tiles, dtype=np.int32)
    for name in ("adc_range", "clip_fraction", "mean_conductance_siemens"):
        table[name] = np.array(columns[name], np.float32)
    table["adc_range_ampere"] = np.array(columns["adc_range"], np.float32) * np.float32(full)
    table["dac_scale"] = np.full(grid.tiles, linear.input_scale, np.float32)
    table["utilisation"] = used / np.float32(design.rows * design.columns)
    return table


def _counts(
    linear: FixedLinear, grid: tiling.Grid, siemens_codes: float, top: int
) -> dict[str, float]:
    """Per position: products, converted samples and sums; ``read_siemens`` is the conductance of
    all devices weighted by the mean magnitude of their input, 0 to 1."""
    return {
        "macs": float(linear.inputs * linear.outputs),
        "tiles": float(grid.tiles),
        "dac_samples": float(linear.inputs * grid.across),
        "adc_samples": float(linear.outputs * grid.down),
        "partial_sums": float(linear.outputs * grid.down),
        "row_tiles": float(grid.down),
        "conductances_total": float(2 * linear.inputs * linear.outputs),
        "read_siemens": siemens_codes / top,
    }


def _diagnostics(
    design: Design, table: dict[str, Column], errors: list[float]
) -> dict[str, float]:
    weight, conduct, clip = (
        np.asarray(table[k], np.float64)
        for k in ("utilisation", "mean_conductance_siemens", "clip_fraction")
    )
    result = {
        "utilisation": float(weight.mean()),
        "mean_conductance_siemens": float((conduct * weight).sum() / weight.sum()),
        "clip_fraction": float(clip.mean()),
    }
    if design.statistics:
        result["adc_noise_ratio"] = float(np.mean(errors))
    return result
