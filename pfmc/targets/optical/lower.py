"""Lays a fixed linear out on passive tiles: W_tile = scale * sigma_max * T with |T|_2 <= margin."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pfmc.hardware import FixedLinear, LayerStatistics, TiledLinear
from pfmc.targets.optical import geometry, physics, tiling
from pfmc.targets.optical.technology import detection
from pfmc.targets.optical.tiling import Grid
from pfmc.technology import Technology

Floats = npt.NDArray[np.float64]
Columns = dict[str, npt.NDArray[Any]]

_BATCH: Final = 512
"""Tiles whose Gram matrices are held at the same time."""
_GUARD: Final = 1.0 + 2.0**-20
"""Factor on sigma_max that covers its rounding and that of T to float32: passivity is certain."""


def lower(linear: FixedLinear, technology: Technology) -> TiledLinear:
    """The tiles of one fixed linear: fidelity L0, matrix and noise law, no phase planes designed.

    Tile table (beside row0, col0, rows, cols): ``sigma_max`` (units of the weights), ``scale``
    (1 / margin), ``stable_rank``, ``power_fraction`` (share of a random input's power that leaves
    by the outputs), ``planes``, ``depth_m``, ``footprint_m2``, ``pixels``, ``photons`` (per vector,
    all inputs fully driven), ``transmission``, ``noise_sigma`` (of one reading, in amplitudes of a
    fully driven input), ``snr_full_db``.

    Tensors: ``transfer`` float32 ``[tiles, in, out]``; ``adc_range`` float32 ``[tiles, out]``,
    half range in the same amplitudes; ``code_group`` int32 ``[1]``, inputs that share a code's
    scale. The artifact stores codes and scales themselves beside them.
    """
    tiles = tiling.grid(linear.inputs, linear.outputs, technology)
    weights = tiles.split(linear.matrix.weights())
    sigma = largest_singular_values(weights)
    transfer = passive(weights, sigma, technology.number("matrix.margin"))
    table = _table(tiles, transfer, sigma, technology)
    signal = _signal_power(tiles, transfer, _input_power(linear, technology))
    ranges: npt.NDArray[np.floating] = (
        _adc_range(tiles, transfer, signal, table, linear, technology)
        if linear.output_range is None else linear.output_range
    )  # fmt: skip
    tensors: Columns = {
        "transfer": transfer,
        "adc_range": ranges.astype(np.float32),
        "code_group": np.array([linear.matrix.group], dtype=np.int32),
    }
    return TiledLinear(
        linear.name, linear.inputs, linear.outputs, table, tensors,
        counts=tiling.counts(tiles, technology),
        diagnostics=_diagnostics(signal, table, technology),
    )  # fmt: skip


def largest_singular_values(tiles: npt.NDArray[np.floating]) -> Floats:
    """Upper bound of the largest singular value of each tile, float64 ``[tiles]``.

    Square root of the largest eigenvalue of the Gram matrix of the smaller side, by a direct
    solver in float64, times 1 + 2^-20.
    """
    values = np.empty(len(tiles))
    for start in range(0, len(tiles), _BATCH):
        batch = tiles[start : start + _BATCH].astype(np.float64)
        turned = batch.transpose(0, 2, 1)
        gram = turned @ batch if batch.shape[1] >= batch.shape[2] else batch @ turned
        values[start : start + _BATCH] = np.linalg.eigvalsh(gram)[:, -1]
    return np.asarray(np.sqrt(np.maximum(values, 0.0)) * _GUARD)


def passive(
    tiles: npt.NDArray[np.floating], sigma: Floats, margin: float
) -> npt.NDArray[np.float32]:
    """T = margin W / sigma, float32 ``[tiles, in, out]``; a tile of zeros stays zero."""
    factor = np.divide(margin, sigma, out=np.zeros_like(sigma), where=sigma > 0.0)
    return (tiles * factor[:, None, None]).astype(np.float32)


def _table(
    tiles: Grid, transfer: npt.NDArray[np.float32], sigma: Floats, technology: Technology
) -> Columns:
    rows = np.repeat(tiles.heights(), tiles.columns)
    cols = np.tile(tiles.widths(), tiles.rows)
    margin, norm = technology.number("matrix.margin"), _frobenius(transfer)
    photons, _ = detection(technology)
    columns = _by_shape(rows, cols, technology)
    fraction = norm / rows
    snr = fraction * rows / cols / columns["noise_sigma"] ** 2
    place = np.arange(tiles.tiles, dtype=np.int32)
    return {
        "row0": (place // tiles.columns * tiles.height).astype(np.int32),
        "col0": (place % tiles.columns * tiles.width).astype(np.int32),
        "rows": rows, "cols": cols, "sigma_max": sigma,
        "scale": np.full(tiles.tiles, 1.0 / margin),
        "stable_rank": norm / margin**2, "power_fraction": fraction,
        "photons": photons.si * rows, **columns,
        "snr_full_db": 10.0 * np.log10(np.maximum(snr, 1e-30)),
    }  # fmt: skip


def _frobenius(transfer: npt.NDArray[np.float32]) -> Floats:
    return np.asarray(np.einsum("tio,tio->t", transfer, transfer, dtype=np.float64))


def _by_shape(
    rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32], technology: Technology
) -> Columns:
    """Columns that depend on a tile's shape alone: at most four shapes are computed."""
    shapes, which = np.unique(np.stack([rows, cols], axis=1), axis=0, return_inverse=True)
    found = [_shape(int(r), int(c), technology) for r, c in shapes]
    names = ("planes", "depth_m", "footprint_m2", "pixels", "transmission", "noise_sigma")
    wide = np.array(found, dtype=np.float64)[which.reshape(-1)]
    columns: Columns = {n: wide[:, k] for k, n in enumerate(names)}
    columns["planes"] = wide[:, 0].astype(np.int32)
    columns["pixels"] = wide[:, 3].astype(np.int64)
    return columns


def _shape(rows: int, cols: int, technology: Technology) -> tuple[float, ...]:
    size = geometry.tile(rows, cols, technology)
    planes = geometry.planes(rows, cols, technology)
    return (
        planes, size.depth_m.typical, size.area_m2.typical, size.pixels.typical,
        physics.transmission(technology, planes).typical,
        physics.output_sigma(technology, planes),
    )  # fmt: skip


def _input_power(linear: FixedLinear, technology: Technology) -> Floats:
    """Mean squared field amplitude of each input, float64 ``[in]``: 1 is fully driven."""
    statistics, scale = linear.statistics, linear.input_scale
    if statistics is None or scale is None:
        return np.full(linear.inputs, technology.number("adc.crest") ** -2)
    full = scale * (2.0 ** (linear.input_bits - 1) - 1.0)
    seen = np.asarray(statistics.input_power, dtype=np.float64)
    return np.asarray(np.minimum(seen / full**2, 1.0))


def _adc_range(
    tiles: Grid, transfer: npt.NDArray[np.float32], signal: Floats, table: Columns,
    linear: FixedLinear, technology: Technology,
) -> Floats:  # fmt: skip
    """Half range of each converter: range_sigmas x rms of signal and noise, at most sum |T|.

    The signal's rms takes the inputs as uncorrelated; where calibration saw a larger rms of the
    whole output, all its partial sums are widened by that ratio.
    """
    widen = _correlation(linear, _input_power(linear, technology))
    if widen is not None:
        signal = signal * np.tile(_by_output(tiles, widen), (tiles.rows, 1)) ** 2
    sigma = np.asarray(table["noise_sigma"], dtype=np.float64)[:, None]
    half = technology.number("adc.range_sigmas") * np.sqrt(signal + sigma**2)
    bound = np.abs(transfer).sum(axis=1, dtype=np.float64)
    spread = technology.number("adc.range_sigmas") * sigma
    return np.asarray(np.minimum(half, bound + spread))


def _signal_power(tiles: Grid, transfer: npt.NDArray[np.float32], power: Floats) -> Floats:
    """Mean square of each tile's outputs, ``[tiles, out]``, for uncorrelated inputs."""
    padded = np.zeros(tiles.rows * tiles.height)
    padded[: tiles.inputs] = power
    per_tile = np.repeat(padded.reshape(tiles.rows, tiles.height), tiles.columns, axis=0)
    return np.asarray(np.einsum("ti,tio->to", per_tile, np.square(transfer)))


def _by_output(tiles: Grid, values: Floats) -> Floats:
    padded = np.ones(tiles.columns * tiles.width)
    padded[: tiles.outputs] = values
    return padded.reshape(tiles.columns, tiles.width)


def _correlation(linear: FixedLinear, power: Floats) -> Floats | None:
    """Calibrated rms of each output over that of uncorrelated inputs, at least 1; ``[out]``."""
    statistics: LayerStatistics | None = linear.statistics
    if statistics is None or linear.input_scale is None:
        return None
    full = linear.input_scale * (2.0 ** (linear.input_bits - 1) - 1.0)
    expected = full * np.sqrt(power @ linear.matrix.weights().astype(np.float64) ** 2)
    seen = np.asarray(statistics.output_rms, dtype=np.float64)
    ratio = np.divide(seen, expected, out=np.ones_like(expected), where=expected > 0.0)
    return np.asarray(np.maximum(ratio, 1.0))


def _diagnostics(signal: Floats, table: Columns, technology: Technology) -> dict[str, float]:
    """Numbers for the report; ``fidelity_level`` 0 is L0 of the ladder: matrix and noise law."""
    column = {k: np.asarray(v, dtype=np.float64) for k, v in table.items()}
    gain = (column["sigma_max"] * column["scale"])[:, None] ** 2
    noise = np.where(signal > 0.0, column["noise_sigma"][:, None] ** 2, 0.0)
    noise_sum, signal_sum = float((noise * gain).sum()), float((signal * gain).sum())
    nmse = physics.write_nmse(technology, column["planes"])
    return {
        "fidelity_level": 0.0,
        "passive_scale": technology.number("matrix.margin"),
        "sigma_max_max": float(column["sigma_max"].max()),
        "stable_rank_min": float(column["stable_rank"].min()),
        "stable_rank_median": float(np.median(column["stable_rank"])),
        "power_fraction_min": float(column["power_fraction"].min()),
        "power_fraction_median": float(np.median(column["power_fraction"])),
        "snr_full_db_median": float(np.median(column["snr_full_db"])),
        "snr_read_db": physics.decibel(signal_sum / noise_sum) if noise_sum else 0.0,
        "write_nmse_max": float(np.max(nmse)),
        "planes_max": float(column["planes"].max()),
        "depth_max_m": float(column["depth_m"].max()),
    }
