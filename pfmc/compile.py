"""The road from a model file to an artifact, as one readable function: `compile_model`.

This is the only place where passes meet targets: it asks the target for its limits, hands them to
the passes, and hands the target each fixed linear in turn. One layer stands in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

import pfmc
from pfmc import distilled, ingest, lowered, numbers, rotation, store, technology
from pfmc.artifact import FileEntry, Manifest, Writer, canonical_json, sha256_given
from pfmc.distill.shapes import probe_shapes
from pfmc.errors import UsageError, did_you_mean
from pfmc.hardware import FabricOp, LayerStatistics, Limits
from pfmc.ingest.adapters import CONFIG, WEIGHTS, adapter_files
from pfmc.ir import routing, vocabulary
from pfmc.passes import pipeline
from pfmc.passes import recipe as recipes
from pfmc.passes import unseen as unseen_experts
from pfmc.passes.adapters import KeepBeside, MergeAdapter
from pfmc.passes.base import Context, Pass
from pfmc.passes.fabric_formats import FabricFormats
from pfmc.passes.pipeline import Outcome
from pfmc.passes.quantise import linear_record, release
from pfmc.store import LayerRecord
from pfmc.targets import get
from pfmc.targets.base import Target
from pfmc.targets.fabric.assemble import assemble
from pfmc.targets.fabric.work import fabric_ops, fixed_positions
from pfmc.technology import Technology

if TYPE_CHECKING:
    from pfmc.ingest import Loaded
    from pfmc.passes.recipe import Recipe

Progress = Callable[[str], None]
ADAPTER_FILES = (CONFIG, WEIGHTS)
PHASES = ("ingest", "canonical", "quantised", "lowered")


def _silent(_: str) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Options:
    """What the user chose; see `compile_model`.

    Attributes:
        adapter: folder of a LoRA adapter in PEFT's format, kept beside the fixed linears in
            writable memory; or, with `merge`, added to their weights.
        distilled: folder of a finished distillation, whose layers are taken (`pfmc.distilled`).
    """

    target: str
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    seed: int = 0
    jobs: int = 1
    context: int | None = None
    text: Path | None = None
    inputs: Path | None = None
    tokenizer: Path | None = None
    trust_root: Path | None = None
    dump_ir: Path | None = None
    stop_after: str | None = None
    adapter: Path | None = None
    merge: bool = False
    distilled: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Compilation:
    """A finished compile.

    Attributes:
        path: the artifact; None if the compile was stopped after a phase.
        report: the body of ``report/report.json``.
        timing_s: CPU seconds by phase.
        resumed: layers taken over from an earlier, interrupted run.
        model: the model as far as it came.
    """

    path: Path | None
    report: dict[str, Any]
    timing_s: dict[str, float]
    resumed: int
    model: ir.Model | None = None

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{k}</td><td>{m['typical']:.4g}</td><td>{m['unit']}</td></tr>"
            for k, m in self.report.get("cost", {}).get("metrics", {}).items()
        )
        return f"<table>{rows}</table>"


@dataclass
class _Clock:
    """CPU seconds spent by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress = _silent

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def compile_model(
    model: str | Path, out: str | Path | None = None, *,
    options: Options | None = None, progress: Progress = _silent, **choices: Any,
) -> Compilation:  # fmt: skip
    """Compiles `model` to fixed hardware.

    Args:
        model: an ONNX file, or the folder of a Hugging Face checkpoint.
        out: the artifact to write; by default ``<model>-<target>.pfm`` in the current folder.
        options: what to do; or give its fields as keywords, e.g. ``target="rom"``.
        progress: takes one line at a time.

    Returns:
        the finished compile; the same input, options and seed give the same bytes.

    Raises:
        PfmcError: with an exit code; nothing half-written is left that looks finished.
    """
    options = options or Options(**choices)
    clock = _Clock(progress=progress)
    job = _job(model, options, clock)
    if options.stop_after:
        return _stopped(job, options.stop_after)
    place = Path(out) if out else Path(f"{job.loaded.name}-{job.tech.name}.pfm")
    with Writer(place, force=options.force) as writer, _one_thread():
        if finished := writer.current(job.request):
            return _up_to_date(finished, clock)
        return _compile_into(job, writer)


def _job(model: str | Path, options: Options, clock: _Clock) -> _Job:
    """Everything that is known before the first pass."""
    tech = technology.load(options.target)
    target = get(tech.kind)
    target.check(tech)
    if options.merge and options.adapter is None:
        raise UsageError("there is no adapter to merge", mend="give its folder with --adapter")
    plan = recipes.load(options.recipe or recipes.default_recipe(tech.kind), options.settings)
    with clock.phase("ingest"):
        loaded = ingest.load(model, trust_root=options.trust_root)
    return _Job(loaded, tech, target, plan, options, clock)


@dataclass(frozen=True)
class _Job:
    loaded: Loaded
    tech: Technology
    target: Target
    plan: Recipe
    options: Options
    clock: _Clock

    def config(self) -> dict[str, Any]:
        """Everything that affects the result, without paths."""
        o = self.options
        return {
            "pfmc": pfmc.__version__,
            "inputs": {f.path.name: f.sha256 for f in self.loaded.files},
            "target": self.tech.name,
            "technology_sha256": self.tech.digest(),
            "recipe": self.plan.canonical(),
            "seed": o.seed,
            "context": self.context,
            "text_sha256": _digest(o.text),
            "calibration_sha256": _digest(o.inputs),
            "tokenizer_sha256": _digest(self.tokenizer),
            **self.adapter(),
            **self.distilled(),
        }

    def origin(self) -> dict[str, Any]:
        """What a distillation is made for: all that decides the quantised model but its data."""
        config = self.config()
        same = ("inputs", "target", "technology_sha256", "adapter")
        parts = {k: v for k, v in self.plan.canonical().items() if k in ("pass", "quantise")}
        return {k: config[k] for k in same if k in config} | {
            "recipe_sha256": hashlib.sha256(canonical_json(parts)).hexdigest()
        }

    def distilled(self) -> dict[str, Any]:
        """What is added to `config` if a distillation's layers are taken."""
        folder = self.options.distilled
        return {} if folder is None else {"distilled_sha256": distilled.read(folder).digest}

    def adapter(self) -> dict[str, Any]:
        """What is added to `config` if there is an adapter: its files, and what becomes of it."""
        o = self.options
        if o.adapter is None:
            return {}
        files = adapter_files(o.adapter, trust_root=o.trust_root)
        held = {name: f.sha256 for name, f in zip(ADAPTER_FILES, files, strict=True)}
        return {"adapter": {"files": held, "merged": o.merge}}

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The recipe's passes, and that of the adapter behind the last ``linears``."""
        o, passes = self.options, self.plan.passes
        if o.adapter is None:
            return passes
        root = None if o.trust_root is None else str(o.trust_root)
        made = (MergeAdapter if o.merge else KeepBeside)(str(o.adapter), root)
        names = [p.name for p in passes]
        at = len(names) - names[::-1].index("linears") if "linears" in names else len(names)
        return (*passes[:at], made, *passes[at:])

    @property
    def request(self) -> str:
        """sha256 of `config`."""
        return hashlib.sha256(canonical_json(self.config())).hexdigest()

    @property
    def context(self) -> int:
        """Positions the cost report assumes: the user's, else the recipe's if they fit."""
        if self.options.context is not None:
            return self.options.context
        return min(self.plan.workload.context, _longest(self.loaded.path.parent))

    @property
    def priced(self) -> Technology:
        """The technology with the KV memory as wide as the recipe wants it."""
        return numbers.with_kv_bits(self.tech, self.plan)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer given, or the one beside the model."""
        if self.options.tokenizer:
            if not self.options.tokenizer.is_file():
                raise UsageError("there is no such tokenizer", where=str(self.options.tokenizer))
            return self.options.tokenizer
        beside = self.loaded.path.parent / "tokenizer.json"
        return beside if beside.is_file() else None


def _longest(folder: Path) -> int:
    """Positions that the ``config.json`` beside a model allows; without one, any number."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        known = (config.get(k) for k in ("max_position_embeddings", "n_positions"))
        return min(int(n) for n in known if n)
    except (OSError, ValueError, TypeError, AttributeError):
        return sys.maxsize


def _digest(path: Path | None) -> str | None:
    return None if path is None else sha256_given(path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One BLAS thread: sums come out in one order, so the same bytes come out everywhere."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def _compile_into(job: _Job, writer: Writer) -> Compilation:
    model, statistics, notes = _quantised(job)
    made = _take_distilled(job, model)
    if made is not None:
        statistics, notes = made.statistics, notes | {"distilled": made.told()}
    with job.clock.phase("lower"):
        records, resumed = _lower(job, writer, model, statistics, made)
    with job.clock.phase("assemble"):
        shapes = probe_shapes(model)
        ops = fabric_ops(model, shapes)
        positions = fixed_positions(model, shapes)
        context = positions or job.context
        seen = {name: found.samples for name, found in statistics.items()}
        shares = routing.activity(model, shapes, seen, positions)
        records = [replace(r, activity=shares.get(r.name, 1.0)) for r in records]
        report = lowered.report(job.target, job.priced, model, records, ops, context, notes)
        _write_rest(job, writer, model, records, ops, report)
    with job.clock.phase("commit"):
        manifest = writer.commit({"config": job.config(), "request_sha256": job.request})
    return Compilation(manifest.path, report, job.clock.seconds, resumed, model)


def _take_distilled(job: _Job, model: ir.Model) -> distilled.Distilled | None:
    """Puts the layers of a distillation into the quantised model, if one was given."""
    if job.options.distilled is None:
        return None
    made = distilled.read(job.options.distilled)
    distilled.require_same(made.manifest, job.origin(), job.options.distilled)
    distilled.install(model, made)
    return made


@dataclass(frozen=True)
class Prepared:
    """Where distillation starts.

    Attributes:
        teacher: the float model at stage CANONICAL; model: at stage QUANTISED, with the fabric's
            formats; statistics: of its layers.
        tech, target, plan: what it is made for.
        tokenizer: of a language model, or None; origin: what a distillation of it is made for.
    """

    teacher: ir.Model
    model: ir.Model
    statistics: Mapping[str, LayerStatistics]
    tech: Technology
    target: Target
    plan: Recipe
    tokenizer: Path | None
    origin: dict[str, Any]


def prepare(model: str | Path, options: Options, progress: Progress = _silent) -> Prepared:
    """Carries a model as far as `compile_model` does before it lowers layers."""
    job = _job(model, options, _Clock(progress=progress))
    with _one_thread():
        canonical = _canonical(job)
        teacher = canonical[0].clone()
        quantised, statistics, _ = _quantised(job, canonical)
    return Prepared(
        teacher, quantised, statistics, job.tech, job.target, job.plan, job.tokenizer, job.origin()
    )


def _limits(job: _Job) -> Limits:
    """What the target holds, and what the digital fabric beside it does."""
    limits = job.target.limits(job.tech)
    if "fabric.kv_bits" not in job.tech.constants:
        return limits
    return replace(limits, fabric_bits=job.tech.integer("fabric.kv_bits"))


def _canonical(job: _Job) -> tuple[ir.Model, dict[str, Any]]:
    """The model after the recipe's passes, and what each pass did."""
    settings = pipeline.Settings(dump=job.options.dump_ir)
    context = Context(
        limits=_limits(job), seed=job.options.seed, progress=job.clock.progress
    )
    judged = rotation.judged(job.passes)
    with job.clock.phase("canonical"):
        passes = [p for p in job.passes if p is not judged]
        outcome = pipeline.canonicalise(job.loaded.model, passes, context, settings)
    if judged is None:
        return outcome.model, _notes(outcome)
    chosen = rotation.choose(
        outcome.model, judged, context, lambda m: _quantised(job, (m, {}))[0],
        job.plan.calibration, _data(job),
    )  # fmt: skip
    return chosen.model, _notes(outcome) | {"rotate": chosen.report}


def _notes(outcome: Outcome) -> dict[str, Any]:
    return {step.label: step.report() for step in outcome.steps}


def _quantised(
    job: _Job, canonical: tuple[ir.Model, dict[str, Any]] | None = None
) -> tuple[ir.Model, Mapping[str, LayerStatistics], dict[str, Any]]:
    """The model with number formats, the calibration statistics, and what each pass did."""
    model, notes = canonical or _canonical(job)
    with job.clock.phase("calibrate"):
        chosen = _numbers(job, model)
        statistics, unseen = unseen_experts.complete(model, chosen.statistics)
    notes = notes | chosen.notes
    if unseen:
        notes = notes | {"calibrate": {"layers_without_rows": list(unseen)}}
        job.clock.progress(f"calibrate: no rows for {len(unseen)} experts: {', '.join(unseen[:4])}")
    context = Context(
        limits=_limits(job), seed=job.options.seed, statistics=statistics,
        matrices=chosen.matrices, progress=job.clock.progress,
    )  # fmt: skip
    folder = job.options.dump_ir / "quantise" if job.options.dump_ir else None
    with job.clock.phase("quantise"):
        held = job.plan.quantise.kv_bits
        steps = [chosen.options, FabricFormats(0 if held == "target" else held)]
        outcome = pipeline.run(model, steps, context, pipeline.Settings(dump=folder))
    told = {step.name: step.report() for step in outcome.steps}
    return outcome.model, statistics, notes | told


def _data(job: _Job) -> numbers.Data:
    o = job.options
    return numbers.Data(job.tokenizer, o.text, o.inputs, o.seed, job.clock.progress)


def _numbers(job: _Job, model: ir.Model) -> numbers.Numbers:
    """Scaling, bits, statistics and rounding as the recipe asks."""
    limits, data = _limits(job), _data(job)
    price = numbers.price_of(job.target, job.tech, limits, job.context)
    return numbers.choose(model, job.plan, limits, price, data)


def _lower(
    job: _Job, writer: Writer, model: ir.Model, statistics: Mapping[str, LayerStatistics],
    made: distilled.Distilled | None = None,
) -> tuple[list[LayerRecord], int]:
    """Lowers every fixed linear, `jobs` at a time; one that an earlier run finished is kept."""
    nodes = vocabulary.fixed_linears(model)

    def one(node: ir.Node) -> tuple[LayerRecord, bool]:
        name = str(node.name)
        key = hashlib.sha256(f"{job.request} {name}".encode()).hexdigest()

        def make() -> tuple[list[FileEntry], dict[str, Any]]:
            linear = linear_record(node, statistics.get(str(node.name)))
            linear = linear if made is None else made.complete(linear)
            tiled = job.target.lower_linear(linear, job.tech)
            return store.write_layer(writer, linear, tiled)

        body, resumed = writer.once(f"layer/{name}", key, make)
        release(node)
        job.loaded.release()
        job.clock.progress(f"lower: {name}")
        return LayerRecord(**body), resumed

    done = list(_in_order(one, nodes, job.options.jobs))
    return [record for record, _ in done], sum(resumed for _, resumed in done)


def _in_order(
    work: Callable[[ir.Node], tuple[LayerRecord, bool]], nodes: Sequence[ir.Node], jobs: int
) -> Iterator[tuple[LayerRecord, bool]]:
    if jobs <= 1:
        yield from map(work, nodes)
        return
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(work, nodes)


def _write_rest(
    job: _Job, writer: Writer, model: ir.Model, records: list[LayerRecord],
    ops: Sequence[FabricOp], report: dict[str, Any],
) -> None:  # fmt: skip
    """Everything but the layers: graph, netlist, technology, tokenizer, report, provenance."""
    writer.write("layers.json", store.layers_json(records))
    lowered.write_model(writer, model, records)
    definitions = {r.name: job.target.definition(r.summary, job.tech) for r in records}
    netlist = assemble(model, definitions, ops)
    writer.write("netlist.json", netlist.to_json().encode())
    writer.write("technology.json", canonical_json(technology.to_json(job.priced)))
    writer.write("report/report.json", canonical_json(report))
    writer.write("report/metrics.csv", lowered.metrics_csv(report).encode())
    if job.tokenizer:
        lowered.write_tokenizer(writer, job.tokenizer)
    source = os.path.relpath(job.loaded.path.resolve(), writer.path.resolve())
    writer.write("provenance/source.txt", f"{source}\n".encode())
    if job.options.adapter is not None:
        adapter = os.path.relpath(job.options.adapter.resolve(), writer.path.resolve())
        writer.write("provenance/adapter.txt", f"{adapter}\n".encode())
    timing = {"cpu_s": job.clock.seconds, "pfmc": pfmc.__version__}
    writer.write("provenance/timing.json", json.dumps(timing, indent=1).encode())


def _up_to_date(manifest: Manifest, clock: _Clock) -> Compilation:
    """The artifact that is already here, made from the same input and options."""
    report = json.loads((manifest.path / "report" / "report.json").read_bytes())
    layers = len(store.layer_records(manifest.path))
    return Compilation(manifest.path, report, clock.seconds, layers)


def _stopped(job: _Job, phase: str) -> Compilation:
    """Runs only as far as `phase`; what can be seen is the model and ``--dump-ir``."""
    if phase not in PHASES:
        raise UsageError(f"there is no phase {phase!r}", mend=did_you_mean(phase, PHASES))
    model = job.loaded.model
    if phase == "canonical":
        model, _ = _canonical(job)
    elif phase in ("quantised", "lowered"):
        model, statistics, _ = _quantised(job)
        if phase == "lowered":
            for node in vocabulary.fixed_linears(model):
                linear = linear_record(node, statistics.get(str(node.name)))
                job.target.lower_linear(linear, job.tech)
    counts = Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in model.graph)
    return Compilation(None, dict(sorted(counts.items())), job.clock.seconds, 0, model)
