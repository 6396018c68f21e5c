"""``pfmc compile``: from a model file to an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from pfmc.cli.models import shipped_model
from pfmc.cli.options import Json, NotNegative, Positive, Quiet
from pfmc.cli.output import Progress, print_json
from pfmc.errors import UsageError
from pfmc.report.format import triple

if TYPE_CHECKING:
    from pfmc.compile import Compilation, Options

_SHOWN = (
    "energy__token", "latency__token", "throughput__user", "throughput__aggregate",
    "area__total", "volume__optics", "memory__weights", "cost__unit",
)  # fmt: skip


def compile_(
    model: Path | None = None,
    *,
    target: Annotated[str | None, Parameter(name=["--target", "-t"])] = None,
    out: Annotated[Path | None, Parameter(name=["-o", "--out"])] = None,
    recipe: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    seed: NotNegative = 0,
    jobs: Positive = 1,
    context: Positive | None = None,
    text: Path | None = None,
    input: Path | None = None,
    tokenizer: Path | None = None,
    trust_root: Path | None = None,
    adapter: Path | None = None,
    merge_adapter: bool = False,
    distilled: Path | None = None,
    distill: str | None = None,
    dump_ir: Path | None = None,
    stop_after: Literal["ingest", "canonical", "quantised", "lowered"] | None = None,
    timing: bool = False,
    force: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compile a model to hardware whose weights can never change again.

    Example: pfmc compile model.onnx --target optical -o out.pfm

    Parameters
    ----------
    model
        The ONNX file, or the folder of a Hugging Face checkpoint.
    target
        A technology of the shelf targets/ (`pfmc targets` lists them), or a TOML file.
    out
        The artifact to write; MODEL-TARGET.pfm in the current folder by default.
    recipe
        A recipe of the shelf passes/, or a TOML file; the target's own by default.
    set_
        Change an option of the recipe: pass.option=value.
    seed
        Seed of every random choice.
    jobs
        Layers worked on at the same time.
    context
        Positions of context that the cost report assumes.
    text
        Text file to calibrate on; the model writes its own text by default.
    input
        .npz file with input arrays to calibrate on, for encoders and vision models.
    tokenizer
        tokenizer.json; the one beside the model by default.
    trust_root
        Folder within which external data may be reached through links.
    adapter
        Folder of a LoRA adapter (PEFT's format) to keep beside the fixed weights, writable.
    merge_adapter
        Fix the adapter too: add it to the weights instead.
    distilled
        Folder that `pfmc distill` wrote for the same model, target and recipe: take its layers.
    distill
        Distil first: CPU seconds as 300s, or steps as 2000; resumes if interrupted.
    dump_ir
        Folder for the graph after every pass.
    stop_after
        Stop after a phase; nothing is written but --dump-ir.
    timing
        Print CPU seconds by phase.
    force
        Replace an artifact that was made from something else.
    json
        Print JSON.
    quiet
        No progress.
    """
    if model is None:
        raise UsageError("no model given", mend=_use_shipped())
    if target is None:
        raise UsageError("no target given", mend="--target rom | crossbar | optical | FILE.toml")
    from pfmc.compile import Options, compile_model

    options = Options(
        target=target, recipe=recipe, settings=set_, seed=seed, jobs=jobs, context=context,
        text=text, inputs=input, tokenizer=tokenizer, trust_root=trust_root, dump_ir=dump_ir,
        stop_after=stop_after, adapter=adapter, merge=merge_adapter, force=force,
        distilled=distilled,
    )  # fmt: skip
    progress = Progress(quiet=quiet or json)
    if distill is not None:
        options = _distil_first(model, out, options, distill, progress)
    done = compile_model(model, out, options=options, progress=progress)
    progress.done()
    _show(done, json, timing)
    return 0


def _distil_first(
    model: Path, out: Path | None, options: Options, amount: str, progress: Progress
) -> Options:
    """`options` with a fresh distillation's folder, which lies beside the artifact."""
    from pfmc.distillation import Choices, distil_model

    if options.distilled is not None:
        raise UsageError("give either --distill or --distilled")
    number = amount.removesuffix("s")
    try:
        value = float(number)
    except ValueError as error:
        raise UsageError(
            f"cannot read {amount!r}", where="--distill", mend="e.g. 300s, or 2000 for steps"
        ) from error
    seconds = amount != number
    if not value > 0 or (not seconds and value != int(value)):
        raise UsageError(f"{amount} is no amount of training", where="--distill", mend="e.g. 300s")
    choices = Choices(None if seconds else int(value), value if seconds else None)
    place = None if out is None else out.with_suffix(".distilled")
    done = distil_model(model, place, options=options, choices=choices, progress=progress)
    return replace(options, distilled=done.path)


def _use_shipped() -> str:
    return f"try the one that is shipped: pfmc compile {shipped_model()} --target rom"


def _show(done: Compilation, json: bool, timing: bool) -> None:
    if json:
        body: dict[str, Any] = {"schema_version": 1, "artifact": str(done.path or "")}
        print_json(body | {"report": done.report, "timing_cpu_s": done.timing_s})
        return
    for line in _summary(done):
        print(line)
    if timing:
        for phase, seconds in done.timing_s.items():
            print(f"  {phase:<24}{seconds:9.2f} CPU s")


def _summary(done: Compilation) -> list[str]:
    report = done.report
    if done.path is None:
        return [f"{k:<24}{v}" for k, v in report.items()]
    model, metrics = report["model"], report["cost"]["metrics"]
    lines = [
        f"{model['fixed_linears']} fixed linears, {model['fixed_weights']:,} weights on "
        f"{model['tiles']:,} tiles; {model['fabric_ops']} operations on the digital fabric",
        f"workload: {report['cost']['workload']}",
    ]
    lines += [f"  {k:<24}{triple(metrics[k])}" for k in _SHOWN if k in metrics]
    lines += _rounding(report.get("rounding", {}))
    if done.resumed:
        lines.append(f"resumed: {done.resumed} layers were ready from an earlier run")
    lines.append(f"written: {done.path}")
    lines.append(f"next:    pfmc verify {done.path}")
    return lines


def _rounding(facts: Mapping[str, Any]) -> list[str]:
    """How the layers were rounded, and what each search got wrong of their outputs' power."""
    if not facts:
        return []
    choices = ", ".join(f"{n} {name}" for name, n in facts["choices"].items())
    lines = [f"  {'weight bits':<24}{facts['weight_bits_mean']:.3g} a weight; layers by {choices}"]
    means = facts["errors_geometric_mean"]
    if means:
        errors = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in means.items())
        lines.append(f"  {'layer errors':<24}{errors} (relative, geometric mean)")
    return lines
