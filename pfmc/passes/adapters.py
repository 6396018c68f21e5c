"""Low-rank adapters on fixed linears: kept beside them in writable memory, or merged into them.

``y = linear(x) + scale * (x @ down) @ up`` (Hu et al. 2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from pfmc.ingest.adapters import Adapter, SidePath, load_adapter
from pfmc.ir import matcher, provenance, vocabulary
from pfmc.passes.base import Context, Pass, PassResult


def _notes(adapter: Adapter) -> dict[str, float | int | str]:
    ranks = sorted({path.rank for path in adapter.paths.values()})
    return {
        "layers": len(adapter.paths), "ranks": " ".join(map(str, ranks)),
        "parameters": sum(int(p.down.size + p.up.size) for p in adapter.paths.values()),
    }  # fmt: skip


@dataclass(frozen=True)
class _WithAdapter(Pass):
    """Does something with each fixed linear that an adapter names."""

    adapter: str
    trust_root: str | None = None

    def apply(self, model: ir.Model, context: Context) -> PassResult:
        """Works on every fixed linear that the adapter names.

        Raises:
            UsageError: there is no adapter in the folder.
            InputError: it is damaged, no plain LoRA, or does not fit the model.
        """
        root = None if self.trust_root is None else Path(self.trust_root)
        found = load_adapter(self.adapter, model, trust_root=root)
        for node in vocabulary.fixed_linears(model):
            if path := found.paths.get(str(node.name)):
                self.adapt(model.graph, node, path)
        vocabulary.install(model)
        return PassResult(model, len(found.paths), (), _notes(found))

    def adapt(self, graph: ir.Graph, node: ir.Node, path: SidePath) -> None:
        """What is done with one of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeepBeside(_WithAdapter):
    """Puts an adapter beside its fixed linears: the base stays fixed, the adapter writable.

    ``y = FixedLinear(x)`` -> ``SidePath(x, FixedLinear(x), down, scale * up)``

    Runs after ``linears``; `pfmc compile --adapter DIR` adds it.

    Attributes:
        adapter: folder of the adapter, in PEFT's format.
        trust_root: folder within which its weights may be reached through links.
    """

    name: ClassVar[str] = "side-path"

    def adapt(self, graph: ir.Graph, node: ir.Node, path: SidePath) -> None:
        """Puts a `SidePath` behind the linear."""
        put_beside(graph, node, path)


def put_beside(graph: ir.Graph, linear: ir.Node, path: SidePath) -> ir.Node:
    """Puts a `SidePath` node behind `linear`; who read the linear reads it."""
    x, y = linear.inputs[0], linear.outputs[0]
    factors = []
    for part, tensor, scaled in (("down", path.down, None), ("up", path.up, path)):
        name = matcher.unique_name(graph, f"{path.layer}:{part}")
        factors.append(matcher.add_initialiser(graph, name, _lazy(name, tensor, None, scaled)))
    node = matcher.fresh(vocabulary.SIDE_PATH, [x, y, *factors], domain=vocabulary.DOMAIN)
    node.name = f"{path.layer}:side_path"
    node.metadata_props[vocabulary.KEY_SCOPE] = path.layer
    provenance.union_sources(node, [linear])
    out = node.outputs[0]
    out.shape, out.type = y.shape, y.type
    _take_over(graph, y, out, node)
    graph.insert_after(linear, node)
    return node


def _take_over(graph: ir.Graph, y: ir.Value, out: ir.Value, node: ir.Node) -> None:
    """Whoever read `y`, and the graph's outputs, get `out`, but `node` itself."""
    name = str(y.name)
    for use in list(y.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, out)
    if not y.is_graph_output():
        out.name = matcher.unique_name(graph, f"{name}:adapted")
        return
    for index, value in enumerate(graph.outputs):
        if value is y:
            graph.outputs[index] = out
    y.name = matcher.unique_name(graph, f"{name}:base")
    out.name = name


@dataclass(frozen=True)
class MergeAdapter(_WithAdapter):
    """Adds an adapter to the weights of its fixed linears, which then are fixed with it.

    ``FixedLinear(x, w, b)`` -> ``FixedLinear(x, w + scale * down @ up, b)``

    The sum is made when the weight is read. Runs after ``linears``;
    `pfmc compile --adapter DIR --merge-adapter` adds it.

    Attributes:
        adapter: folder of the adapter, in PEFT's format.
        trust_root: folder within which its weights may be reached through links.
    """

    name: ClassVar[str] = "merge-adapter"

    def adapt(self, graph: ir.Graph, node: ir.Node, path: SidePath) -> None:
        """Puts a lazy sum in place of the linear's weight."""
        _merge(graph, node, path)


def _merge(graph: ir.Graph, node: ir.Node, path: SidePath) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    name = matcher.unique_name(graph, f"{weight.name}:adapted")
    tensor = _lazy(name, weight.const_value, path, None)
    merged = matcher.add_initialiser(graph, name, tensor, dict(weight.metadata_props))
    node.replace_input_with(1, merged)
    if not weight.uses() and not weight.is_graph_output():
        graph.initializers.pop(str(weight.name), None)


def _lazy(
    name: str, base: ir.TensorProtocol, added: SidePath | None, scaled: SidePath | None
) -> ir.LazyTensor:
    """`base` as float32, times the scale of `scaled`, plus the product of `added`."""
    kind = ir.DataType.FLOAT

    def read() -> ir.TensorProtocol:
        array = np.asarray(base.numpy()).astype(np.float32)
        if scaled is not None:
            array = array * np.float32(scaled.scale)
        if added is not None:
            array = array + added.product()
        return ir.tensor(np.ascontiguousarray(array), dtype=kind, name=name)

    return ir.LazyTensor(read, kind, ir.Shape([int(d) for d in base.shape.numpy()]), name=name)
