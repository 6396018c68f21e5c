"""Says at once everything that keeps a model from becoming hardware, and what will cost more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pfmc.distill.shapes import probe_shapes
from pfmc.errors import InternalError, PfmcError
from pfmc.ingest.findings import SEVERITIES, Finding
from pfmc.ingest.lint import Progress, SourceLint, lint_source, silent
from pfmc.ir import check, provenance, vocabulary
from pfmc.ir.vocabulary import Stage
from pfmc.passes import pipeline
from pfmc.passes import recipe as recipes
from pfmc.passes.base import Context
from pfmc.passes.pipeline import Outcome
from pfmc.passes.ties import KEY_TIED
from pfmc.targets.fabric.operators import CONTROL, PER_INPUT, PER_OUTPUT, WIRING
from pfmc.targets.fabric.work import fabric_ops

_RAISED = frozenset({
    "Add", "Attention", "Gather", "Gelu", "LayerNormalization", "Mul", "RMSNormalization", "Relu",
    "Rotary", "SidePath", "Sub", "SwiGLU", "Swish", "Tanh", "Trim",
    "Where",
})  # fmt: skip
"""Operations of a transformer that hardware runs whole, or that are single steps anyway."""
_FREE = frozenset({"wiring", "control", "table", "embedding", "sampling"})
_SPECIAL = frozenset({"Attention", "MatMul", "Gemm", "Conv", "ConvTranspose"})
_SHOWN = 8


@dataclass(frozen=True)
class Lint:
    """All findings about one file.

    Attributes:
        path: the file; findings: errors first, then warnings, then notes, each by code.
        recipe: whose passes were tried.
    """

    path: Path
    findings: tuple[Finding, ...]
    recipe: str = "stream"

    def counts(self) -> dict[str, int]:
        """Severity -> how many findings."""
        found = Counter(str(f.severity) for f in self.findings)
        return {s: found[s] for s in SEVERITIES}

    def to_text(self) -> str:
        """Readable lines; at most eight names a finding."""
        counts = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in self.counts().items())
        lines = [f"{self.path.name}: {counts}"]
        for finding in self.findings:
            lines += _lines(finding)
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain data with ``schema_version`` 1."""
        return {
            "schema_version": 1,
            "model": self.path.name,
            "recipe": self.recipe,
            "counts": self.counts(),
            "findings": [
                {
                    "code": f.code, "severity": f.severity, "title": f.title, "what": f.what,
                    "where": f.place, "nodes": list(f.nodes), "tensors": list(f.tensors),
                    "mend": f.mend,
                }
                for f in self.findings
            ],
        }  # fmt: skip


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.code} {finding.severity:<8}{finding.what}"
    if finding.place:
        yield f"    where: {finding.place}"
    if finding.nodes:
        yield f"    nodes: {_some(finding.nodes)}"
    if finding.tensors:
        yield f"    tensors: {_some(finding.tensors)}"
    if finding.mend:
        yield f"    mend: {finding.mend}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def lint(
    path: str | Path, *, trust_root: Path | None = None, recipe: str = "stream",
    progress: Progress = silent,
) -> Lint:  # fmt: skip
    """Looks at an ONNX file as a compile would, but goes on where a compile stops.

    Args:
        path: the .onnx file.
        trust_root: a folder within which external data may be reached through links.
        recipe: whose passes are tried; a name on the shelf or the path of a TOML file.
        progress: takes a word for each step.

    Raises:
        UsageError: there is no such file or recipe.
        FileError: the system refused to read it.
    """
    passes = recipes.load(recipe).passes
    source = lint_source(path, trust_root, progress)
    found = list(source.findings)
    if source.model is not None:
        found += _canonical(source.model, passes, source, progress)
    rank = {s: i for i, s in enumerate(SEVERITIES)}
    ordered = sorted(found, key=lambda f: (rank[f.severity], f.code))
    return Lint(source.path, tuple(ordered), Path(recipe).stem)


def _canonical(
    model: ir.Model, passes: Iterable[Any], source: SourceLint, progress: Progress
) -> Iterator[Finding]:
    try:
        outcome = pipeline.run(model, passes, Context(progress=progress))
    except PfmcError as error:
        what = f"{error.what} ({error.where})" if isinstance(error, InternalError) else error.what
        yield Finding("PFM505", what, error.where, error.mend)
        return
    names = _Names(outcome.model, source.labels)
    illegal = list(_illegal(outcome, names))
    told = {n for f in illegal for n in f.nodes}
    yield from illegal
    yield from _declined(outcome, names, told)
    yield from _ties(outcome.model, names)
    if not vocabulary.fixed_linears(outcome.model):
        mend = "is this a transformer? only products with constant weights become hardware"
        yield Finding("PFM506", "No product with a constant weight was found", mend=mend)
    if not illegal:
        yield from _fabric(outcome.model, names)


class _Names:
    """Turns nodes of the canonical graph into names of source nodes."""

    def __init__(self, model: ir.Model, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self.nodes = {str(n.name): n for n in model.graph}

    def of(self, node: ir.Node | None) -> tuple[str, ...]:
        """Names of the source nodes that `node` came from."""
        ids = [int(i[1:]) for i in provenance.sources(node) if i[1:].isdecimal()] if node else []
        return tuple(self._labels[i] for i in ids if i < len(self._labels))

    def behind(self, name: str) -> tuple[str, ...]:
        """The same for the name of a node, which may be gone by now."""
        if name in self.nodes:
            return self.of(self.nodes[name])
        return (name,) if name in self._labels else ()


def _illegal(outcome: Outcome, names: _Names) -> Iterator[Finding]:
    """What may not stand in the canonical graph, grouped by what is wrong and why."""
    why = {_node_of(where): reason for where, reason in outcome.reasons().items()}
    groups: dict[str, list[ir.Node]] = {}
    nodes = {check.describe(n): n for n in outcome.model.graph}
    for violation in check.illegal(outcome.model, Stage.CANONICAL):
        node = nodes[violation.where]
        reason = why.get(str(node.name), "")
        what = f"{violation.what}: {reason}" if reason else violation.what
        groups.setdefault(what, []).append(node)
    for what, group in groups.items():
        places = ", ".join(dict.fromkeys(filter(None, map(provenance.scope, group))))
        sources = tuple(dict.fromkeys(n for node in group for n in names.of(node)))
        mend = "`pfmc passes --explain MODEL` shows what each pass did and declined"
        yield Finding("PFM503", f"{what} x {len(group)}", places, mend, sources)


def _node_of(where: str) -> str:
    """The node in ``scope (node)``."""
    return where.rpartition("(")[2].rstrip(")")


def _declined(outcome: Outcome, names: _Names, told: set[str]) -> Iterator[Finding]:
    """What passes left alone, by pass and reason; what `_illegal` told is not told again."""
    groups: dict[tuple[str, str], list[str]] = {}
    for step in outcome.steps:
        for declined in step.declined:
            places = groups.setdefault((declined.pass_name, declined.reason), [])
            if declined.where not in places:
                places.append(declined.where)
    for (pass_name, reason), places in groups.items():
        nodes = tuple(dict.fromkeys(n for p in places for n in names.behind(_node_of(p))))
        if nodes and told.issuperset(nodes):
            continue
        yield Finding("PFM501", f"{pass_name}: {reason} x {len(places)}", _some(tuple(places)),
                      nodes=nodes)  # fmt: skip


def _ties(model: ir.Model, names: _Names) -> Iterator[Finding]:
    for node in vocabulary.fixed_linears(model):
        tag = node.metadata_props.get(KEY_TIED)
        if tag:
            what = f"{node.name} is tied to the embedding {tag}: hardware holds the matrix once"
            yield Finding("PFM309", what, nodes=names.of(node), tensors=(str(tag),))


def _fabric(model: ir.Model, names: _Names) -> Iterator[Finding]:
    unknown = [n for n in model.graph if not _has_unit(n)]
    for op in sorted({n.op_type for n in unknown}):
        nodes = [n for n in unknown if n.op_type == op]
        sources = tuple(dict.fromkeys(s for n in nodes for s in names.of(n)))
        yield Finding("PFM504", f"There is no unit for {op} x {len(nodes)}", nodes=sources,
                      mend="replace the operator in the model and export again")  # fmt: skip
    if unknown:
        return
    try:
        ops = fabric_ops(model, probe_shapes(model))
    except PfmcError as error:
        yield Finding("PFM507", error.what, error.where, error.mend)
        return
    yield from _pieces({o.name: o.kind for o in ops}, names)


def _has_unit(node: ir.Node) -> bool:
    if node.domain == vocabulary.DOMAIN:
        return True
    return any(node.op_type in t for t in (PER_OUTPUT, PER_INPUT, WIRING, CONTROL, _SPECIAL))


def _pieces(kinds: dict[str, str], names: _Names) -> Iterator[Finding]:
    """Real-number work outside the blocks, by operator."""
    groups: dict[str, list[ir.Node]] = {}
    for name, node in names.nodes.items():
        if kinds.get(name, "control") not in _FREE and node.op_type not in _RAISED:
            groups.setdefault(node.op_type, []).append(node)
    for op, nodes in sorted(groups.items()):
        places = tuple(dict.fromkeys(filter(None, map(provenance.scope, nodes))))
        sources = tuple(dict.fromkeys(s for n in nodes for s in names.of(n)))
        yield Finding("PFM502", f"{op} x {len(nodes)} outside the known blocks", _some(places),
                      nodes=sources)  # fmt: skip
