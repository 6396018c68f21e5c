"""Matter of the optical layers: glass, dies, time to write and price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pfmc.cost import Term
from pfmc.hardware import LayerSummary
from pfmc.quantity import Estimate
from pfmc.targets.fabric import money
from pfmc.targets.optical import cells, geometry, tiling
from pfmc.targets.optical.geometry import TileGeometry
from pfmc.targets.optical.technology import WRITERS, writer
from pfmc.technology import Technology

_ZERO = Estimate(0.0, 0.0, 0.0)


def shapes(layers: Sequence[LayerSummary], technology: Technology) -> dict[tuple[int, int], int]:
    """How many tiles of each shape (inputs, outputs) all layers have."""
    found: Counter[tuple[int, int]] = Counter()
    for layer in layers:
        for rows, cols, number in tiling.grid(layer.inputs, layer.outputs, technology).shapes():
            found[rows, cols] += number
    return dict(sorted(found.items()))


def over_tiles(
    tiles: dict[tuple[int, int], int],
    technology: Technology,
    of: Callable[[TileGeometry], Estimate],
) -> Estimate:
    """Sum of one property over all tiles."""
    each = (of(geometry.tile(*shape, technology)) * n for shape, n in tiles.items())
    return sum(each, start=_ZERO)


def electronics(layers: Sequence[LayerSummary], technology: Technology) -> Iterator[Term]:
    """Area of converters, modulators, receivers and accumulators."""
    t, parts = technology, Counter[str]()
    for layer in layers:
        tiles = tiling.grid(layer.inputs, layer.outputs, t)
        parts["dac"] += tiling.modulators(tiles, t)
        parts["receiver"] += tiles.rows * tiles.outputs
        parts["adc"] += cells.adcs(tiles, t)
    parts["modulator"] = parts["dac"]
    for name in ("dac", "modulator", "receiver", "adc"):
        formula = f"{parts[name]:,} * {name}.area"
        yield Term(f"converters.{name}", t[f"{name}.area"] * parts[name], formula)
    each = (t["fabric.area_mul"] + t["fabric.area_add"]) / t["fabric.utilisation"]
    yield Term(
        "partial_sums", each * parts["adc"],
        f"{parts['adc']:,} * (fabric.area_mul + fabric.area_add) / fabric.utilisation",
    )  # fmt: skip


def writing_time(tiles: dict[tuple[int, int], int], technology: Technology, which: str) -> Estimate:
    """Seconds to write all tiles with one writer of `WRITERS`.

    Every slice of every pixel is one voxel. A writer rated in bits is taken to write voxels of
    ``plane.phase_bits`` each: its layers are as thick as a slice (301 in 2 mm, Project Silica).
    """
    rate = technology[f"writer.{which}_rate"] * technology["writer.beams"]
    if WRITERS[which] == "bit":
        rate = rate / technology["plane.phase_bits"]
    return over_tiles(tiles, technology, lambda g: g.voxels) / rate


def blocks(area: Estimate, technology: Technology) -> Estimate:
    """Glass blocks whose faces hold the footprint of all tiles."""
    face = technology["volume.side"].power(2)
    return geometry.rising(area / face, geometry.whole)


def unit_cost(
    tiles: dict[tuple[int, int], int], technology: Technology, area: Estimate
) -> Iterator[Term]:
    """Price of one unit: writer hours, glass, and good electronic dies of `area` m²."""
    chosen = writer(technology)
    hours = writing_time(tiles, technology, chosen) * technology["writer.beams"]
    yield Term(
        "writing", hours * technology["writer.hour_cost"],
        f"time__write with {chosen} * writer.beams * writer.hour_cost",
    )  # fmt: skip
    glass = over_tiles(tiles, technology, lambda g: g.volume_m3)
    yield Term("glass", glass * technology["volume.glass_cost"], "volume * volume.glass_cost")
    silicon = money.unit_cost(area, technology)
    yield Term("electronics", silicon.value, silicon.terms[0].formula)
