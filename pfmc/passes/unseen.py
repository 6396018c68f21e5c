"""Experts that calibration sent no row to: their statistics are inferred, and they are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from pfmc.hardware import LayerStatistics
from pfmc.ir import routing, vocabulary


def complete(
    model: ir.Model, statistics: Mapping[str, LayerStatistics]
) -> tuple[dict[str, LayerStatistics], tuple[str, ...]]:
    """`statistics` with those of layers without a row inferred, and the names of these layers.

    An expert without rows gets the largest input range and the mean input power of the experts of
    its stack, and the output power that independent inputs of this power give with its own weight:
    ``rms² = power @ weight²``. Its `samples` stay 0. If no expert of the stack saw a row, it has no
    statistics, and its weight is rounded by itself.

    Args:
        model: CANONICAL.
        statistics: layer -> what calibration saw; empty without calibration.
    """
    if not statistics:
        return {}, ()
    nodes = {str(n.name): n for n in vocabulary.fixed_linears(model)}
    found = {n: s for n, s in statistics.items() if s.samples}
    empty = tuple(n for n in nodes if n not in found)
    stacks = {name: names for names in routing.groups(model) for name in names}
    made = {}
    for name in empty:
        others = [found[n] for n in stacks.get(name, ()) if n in found]
        if others:
            made[name] = _inferred(nodes[name], others)
    return {n: s for n in nodes if (s := found.get(n) or made.get(n))}, empty


def _inferred(node: ir.Node, others: Sequence[LayerStatistics]) -> LayerStatistics:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    matrix = np.asarray(weight.const_value.numpy()).astype(np.float64)
    power = np.mean([s.input_power for s in others], axis=0)
    rms = np.sqrt(power @ np.square(matrix))
    crest = max(float(np.max(s.output_peak / np.maximum(s.output_rms, 1e-30))) for s in others)
    widest = max(others, key=lambda s: s.input_peak)
    return LayerStatistics(
        input_peak=widest.input_peak, input_quantiles=widest.input_quantiles, input_power=power,
        output_peak=(rms * crest).astype(np.float32), output_rms=rms.astype(np.float32), samples=0,
    )  # fmt: skip
