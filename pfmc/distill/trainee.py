"""The model under training: a student whose fixed linears, and what stands beside them, can learn.

`build` takes the QUANTISED model of a compile. Its `Quantise` nodes in front of fixed linears make
way for `InputGrid` modules whose steps learn; number formats of the digital fabric stay as they
are. What lives in the digital fabric and may be learned too: gains and biases of norms, embedding
tables. Batches of any size run even if the source file was exported for one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pfmc.distill.calibrate import Gatherer, real_rows
from pfmc.distill.processes import Processes
from pfmc.distill.student import Student
from pfmc.distill.trainable import InputGrid, TrainableLinear
from pfmc.hardware import FixedLinear, LayerStatistics, TiledLinear
from pfmc.ir import vocabulary
from pfmc.targets.base import Die, Twin
from pfmc.targets.grids import assign, local_part

NORMS = ("RMSNormalization", "LayerNormalization")
IDEAL = Die(seed=None, read_noise=False)

Array = npt.NDArray[Any]
MakeTwin = Callable[[FixedLinear], Twin]
Relower = Callable[[FixedLinear], TiledLinear]


@dataclass
class Trainee:
    """A model under training.

    Attributes:
        student: runs it; ``student.parameters()`` are all that may learn.
        records: every layer as the quantiser left it.
        constants: what learns in the digital fabric, initialiser name -> parameter.
        grids: the input converters by the value they convert.
        converts: whether the target has output converters.
    """

    student: Student
    records: dict[str, FixedLinear]
    constants: dict[str, nn.Parameter]
    grids: dict[str, InputGrid] = field(default_factory=dict)
    converts: bool = False

    @property
    def linears(self) -> dict[str, TrainableLinear]:
        """The layers by name, in graph order."""
        found = self.student.linears
        return {n: m for n, m in found.items() if isinstance(m, TrainableLinear)}

    @property
    def twins(self) -> Iterator[Twin]:
        """The target's stand-in of each layer."""
        return (m.twin for m in self.linears.values())

    def face(self, die: Die, converters: bool = True, readings: int | None = None) -> None:
        """Puts every layer on `die`; see `Twin.face`."""
        for twin in self.twins:
            twin.face(die, converters, readings)

    def forget(self) -> None:
        """Lets go of the activations of the last call."""
        for grid in self.grids.values():
            grid.forget()

    def clip(self, sigmas: float) -> None:
        """Clips the weights of every layer; see `Twin.clip`."""
        for layer in self.linears.values():
            held = layer.weight.detach()
            layer.twin.clip(local_part(held), sigmas)

    # -- statistics, ranges, results --------------------------------------------------------------

    def statistics(self, batches: Iterable[Mapping[str, Array]]) -> dict[str, LayerStatistics]:
        """What every layer sees on the ideal die without output converters."""
        biases = {n: SimpleNamespace(bias=Processes.whole(m.bias)) for n, m in self.linears.items()}
        gatherer = Gatherer(cast(Any, SimpleNamespace(linears=biases)))
        self.face(IDEAL, converters=False)
        self.student.observe = gatherer
        try:
            for feeds in batches:
                gatherer.real = real_rows(feeds)
                with torch.no_grad():
                    self.student(**feeds)
        finally:
            self.student.observe = None
            self.forget()
        return gatherer.statistics()

    def settle(
        self, state: Mapping[str, Tensor], statistics: Mapping[str, LayerStatistics] | None = None
    ) -> dict[str, FixedLinear]:
        """Every layer with what it learned; `state`: the student's parameters, whole."""
        made = {}
        for name, layer in self.linears.items():
            prefix = f"layers.{name.replace('.', '/')}."
            values = {k: state[prefix + k] for k in ("weight", "log_scale", "bias")}
            record = layer.settled(self.records[name], values)
            seen = (statistics or {}).get(name)
            if seen is not None and seen.samples:  # an expert may have been sent no row
                record = replace(record, statistics=seen)
            made[name] = record
        return made

    def ranges(self, state: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.float32]]:
        """The learned ranges of output converters by layer; layers without are left out."""
        found = {}
        for name, layer in self.linears.items():
            key = f"layers.{name.replace('.', '/')}.twin.log_range"
            if key in state:
                assign(dict(layer.twin.named_parameters())["log_range"], state[key])
                if (made := layer.twin.ranges()) is not None:
                    found[name] = made
        return found

    def set_ranges(self, records: Mapping[str, FixedLinear], lower: Relower) -> None:
        """Gives the output converters the ranges that the target's own rule chooses."""
        for name, layer in self.linears.items():
            layer.twin.set_ranges(lower(records[name]))


def build(
    model: ir.Model, records: Mapping[str, FixedLinear], weights: Mapping[str, Tensor],
    twin: MakeTwin, *, tables: bool = True, norms: bool = True, float_inputs: bool = False,
    device: torch.device | str = "cpu",
) -> Trainee:  # fmt: skip
    """The trainee of a QUANTISED model.

    Args:
        model: untouched; a copy is made.
        records: its layers (`pfmc.passes.quantise.linear_record`).
        weights: real weights ``[in, out]`` of each layer.
        twin: makes the target's stand-in of a layer.
        tables: whether embedding tables learn; norms: whether gains and biases of norms learn.
        float_inputs: leave inputs of fixed linears real, to measure what weights alone cost.
        device: where it runs.
    """
    own = model.clone()
    grids: dict[str, InputGrid] = {}
    linears: dict[str, nn.Module] = {}
    for node in [n for n in own.graph if n.op_type == vocabulary.QUANTISED_LINEAR]:
        record = records[str(node.name)]
        key = _without_converter(own.graph, node)
        bits = 0 if float_inputs else record.input_bits
        grid = grids.setdefault(key, InputGrid(bits, record.input_scale if bits else None))
        linears[record.name] = TrainableLinear(record, weights[record.name], grid, twin(record))
    student = Student(own, linears, device)
    student.add_module("grids", nn.ModuleDict({f"{i}": g for i, g in enumerate(grids.values())}))
    student.to(device)
    learned = {n: student.free(n) for n in _learnable(own, tables, norms) if n in student.constants}
    converts = any(m.twin.ranges() is not None for m in linears.values())  # type: ignore[operator, union-attr]
    return Trainee(student, dict(records), learned, grids, converts)


def _without_converter(graph: ir.Graph, node: ir.Node) -> str:
    """Takes the Quantise in front of a linear away; returns a name that its sharers share."""
    x = node.inputs[0]
    assert x is not None
    maker = x.producer()
    if maker is None or maker.op_type not in (vocabulary.QUANTISE, vocabulary.QUANTISE_TOKEN):
        return str(x.name)
    node.replace_input_with(0, maker.inputs[0])
    if not x.uses() and not x.is_graph_output():
        graph.remove(maker, safe=True)
    return str(x.name)


def _learnable(model: ir.Model, tables: bool, norms: bool) -> list[str]:
    """Names of the initialisers of the digital fabric that may learn."""
    found: dict[str, None] = {}
    for node in model.graph:
        if norms and not node.domain and node.op_type in NORMS:
            read, rank = node.inputs[1:3], None
        elif tables and node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            read, rank = node.inputs[:1], 2
        else:
            continue
        found |= {str(v.name): None for v in read if v is not None and _is_real(v, rank)}
    return list(found)


def _is_real(value: ir.Value | None, rank: int | None = None) -> bool:
    tensor = None if value is None else value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return rank is None or len(tensor.shape) == rank
