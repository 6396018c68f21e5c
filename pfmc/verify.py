"""The ladder of truth: hashes, emitted files, integer products, and the source end to end.

From level 2 on it is measured against ONNX Runtime (`pfmc.oracle`); level 3 stands in
`pfmc.against_source`. Thresholds are those of the recipe the artifact was compiled with.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pfmc import artifact, simulate, store
from pfmc.against_source import Plan, end_to_end, find_source, judge_of
from pfmc.ir import vocabulary
from pfmc.oracle import Oracle
from pfmc.simulate import Machine
from pfmc.targets.base import Die, StoredLinear
from pfmc.verification import Row, Verification
from pfmc.with_adapter import MERGED, has_adapter, merged_source

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

EXACT_POSITIONS = 4
"""Random input vectors that each layer's integer product is checked on."""
_TOGETHER = 1 << 24


def _silent(_: str) -> None:
    """No progress shown."""


def verify(
    path: str | Path, *, model: Path | None = None, level: int = 3, text: Path | None = None,
    inputs: Path | None = None, windows: int | None = None, length: int | None = None,
    seed: int = 1, die: Die | None = None, adapter: Path | None = None,
    progress: Progress = _silent,
) -> Verification:  # fmt: skip
    """Measures the artifact at `path`.

    Args:
        path: the artifact; model: the ONNX file it came from, if it has moved.
        level: 0 hashes, 1 emitted files, 2 integer products, 3 layers and the whole model.
        text, inputs: what to measure on; self-written text or seeded inputs by default.
        windows, length, seed: how much of it.
        adapter: the adapter the artifact was compiled with, if it has moved.
        die: which die; die 0, new and noisy, by default.

    Raises:
        CorruptError: a file is missing or was changed (level 0).
        UsageError: the input file, or the adapter, is not found or is another one.
        InputError: ONNX Runtime refuses it.
    """
    place, die = Path(path), die or Die()
    progress("hashing every file")
    manifest = artifact.require_intact(place)
    rows = [Row("files intact", float(len(manifest.files)), unit="files")]
    machine = simulate.describe_machine(place, die) if level >= 1 else None
    if machine is not None:
        progress("checking the emitted files")
        rows += _emitted(machine)
    if machine is not None and level >= 2 and machine.target.exact:
        progress("integer products against ONNX Runtime")
        rows.append(_exact(machine, seed))
    judge = "ONNX Runtime"
    if machine is not None and level >= 3:
        source = find_source(machine, model)
        plan = Plan.of(machine, text, inputs, windows, length, seed)
        judge = judge_of(source) + (MERGED if has_adapter(machine) else "")
        with merged_source(machine, source, adapter) as truth:
            rows += end_to_end(machine, truth, replace(plan, judge=judge), progress)
    name = "ideal die" if die.seed is None else f"die {die.seed}"
    return Verification(f"{place.name}, {name}, against {judge}", tuple(rows))


# -- levels 1 and 2 ------------------------------------------------------------------------------


def _emitted(machine: Machine) -> list[Row]:
    """The worst of each of the target's own checks over all layers."""
    worst: dict[str, Row] = {}
    for stored in store.read_layers(machine.path):
        for check in machine.target.verify(stored, machine.path / "hardware", machine.technology):
            row = Row(f"emitted: {check.name}", check.value, check.limit, unit=check.unit)
            held = worst.get(row.name)
            if held is None or row.value > held.value or math.isnan(row.value):
                worst[row.name] = row
    return list(worst.values())


def _exact(machine: Machine, seed: int) -> Row:
    """Products of the emitted files that differ from ONNX Runtime's MatMulInteger: none may."""
    rng = np.random.Generator(np.random.Philox(seed))
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="pfmc-verify-") as folder:
        for group in _grouped(store.read_layers(machine.path)):
            tops = [2 ** (s.input_bits - 1) - 1 for s in group]
            codes = [_codes(rng, top, s.inputs) for top, s in zip(tops, group, strict=True)]
            theirs = _matmul_integer(Path(folder) / "product.onnx", group, codes)
            for stored, given, product in zip(group, codes, theirs, strict=True):
                ours = machine.target.integer_product(  # type: ignore[attr-defined]
                    stored, machine.path / "hardware", given
                )
                wrong += int(np.count_nonzero(ours != product))
    return Row("integer products that differ from ONNX Runtime", float(wrong), 0.0)


def _grouped(layers: Iterable[StoredLinear]) -> Iterator[list[StoredLinear]]:
    """Layers by groups of about `_TOGETHER` weights: starting ONNX Runtime costs more than they."""
    group: list[StoredLinear] = []
    for stored in layers:
        group.append(stored)
        if sum(s.inputs * s.outputs for s in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _codes(rng: np.random.Generator, top: int, inputs: int) -> npt.NDArray[np.int8]:
    """Input codes ``[EXACT_POSITIONS, inputs]``, the largest in the first row."""
    codes = rng.integers(-top, top + 1, (EXACT_POSITIONS, inputs)).astype(np.int8)
    codes[0] = top
    return codes


def _matmul_integer(
    path: Path, layers: Sequence[StoredLinear], codes: Sequence[Array]
) -> list[Array]:
    """ONNX Runtime's products of each layer's codes, all in one graph written to `path`."""
    nodes, constants = [], []
    for index, stored in enumerate(layers):
        x = ir.Value(
            name=f"x{index}", type=ir.TensorType(ir.DataType.INT8),
            shape=ir.Shape(["n", stored.inputs]),
        )  # fmt: skip
        weight = np.ascontiguousarray(stored.tensors["codes"]).astype(np.int8)
        held = ir.Value(name=f"w{index}", const_value=ir.tensor(weight, name=f"w{index}"))
        node = ir.Node("", "MatMulInteger", [x, held], num_outputs=1)
        y = node.outputs[0]
        y.name, y.type = f"y{index}", ir.TensorType(ir.DataType.INT32)
        y.shape = ir.Shape(["n", stored.outputs])
        nodes.append(node)
        constants.append(held)
    graph = ir.Graph(
        [n.inputs[0] for n in nodes if n.inputs[0] is not None], [n.outputs[0] for n in nodes],
        nodes=nodes, initializers=constants, name="products",
        opset_imports={"": vocabulary.OPSET},
    )  # fmt: skip
    path.write_bytes(
        ir.to_proto(ir.Model(graph, ir_version=vocabulary.IR_VERSION)).SerializeToString()
    )
    with Oracle(path) as oracle:
        found = oracle.run({f"x{i}": c for i, c in enumerate(codes)})
    return [found[f"y{i}"] for i in range(len(layers))]
