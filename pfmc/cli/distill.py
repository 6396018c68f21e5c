"""``pfmc distill``: a model learns to live with a target's number formats and noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from pfmc.cli.options import Json, NotNegative, Positive, Quiet
from pfmc.cli.output import Progress, print_json

if TYPE_CHECKING:
    from pfmc.distillation import Distillation

Seconds = Annotated[float, Parameter(validator=Number(gt=0))]


def distill_(
    model: Path,
    *,
    target: Annotated[str, Parameter(name=["--target", "-t"])],
    out: Annotated[Path | None, Parameter(name=["-o", "--out"])] = None,
    recipe: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    seconds: Seconds | None = None,
    steps: Positive | None = None,
    rule: str | None = None,
    rule_set: Annotated[tuple[str, ...], Parameter(name="--rule-set")] = (),
    die: NotNegative | None = None,
    age: str = "0s",
    text: Path | None = None,
    input: Path | None = None,
    tokenizer: Path | None = None,
    trust_root: Path | None = None,
    seed: NotNegative = 0,
    device: str = "cpu",
    threads: Positive = 1,
    force: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Distil a model: its quantised copy learns to follow it on noisy hardware.

    Examples: pfmc distill model.onnx --target crossbar -o model.distilled
    and pfmc distill model.onnx --target crossbar --die 0 --rule physics-aware

    Parameters
    ----------
    model
        The ONNX file, or the folder of a Hugging Face checkpoint: the teacher.
    target
        A technology of the shelf targets/ (`pfmc targets` lists them), or a TOML file.
    out
        The folder to write; MODEL-TARGET.distilled in the current folder by default.
    recipe
        A recipe of the shelf passes/, or a TOML file; its [distill] section is the course.
    set_
        Change an option of the recipe, e.g. distill.lr=3e-4.
    seconds
        CPU seconds to spend, instead of the recipe's.
    steps
        Steps to take instead; the same number gives the same bytes.
    rule
        Training rule (docs/rules.md): noise-aware without a die, physics-aware with one.
    rule_set
        Change an option of the rule, e.g. probes=16.
    die
        Train this one rewritable die instead of masks for all dies.
    age
        Time since that die was written: 30s, 1h, 1day.
    text
        Text file to learn from; by default a language model writes its own.
    input
        .npz file with input arrays to learn from, for encoders and vision models.
    tokenizer
        tokenizer.json; the one beside the model by default.
    trust_root
        Folder within which external data may be reached through links.
    seed
        Seed of every random choice.
    device
        Where it runs: cpu or cuda.
    threads
        Threads of torch.
    force
        Start again although another distillation is in the folder.
    json
        Print JSON.
    quiet
        No progress.
    """
    from pfmc.cli.run import seconds_of
    from pfmc.compile import Options
    from pfmc.distill.rules.method import method
    from pfmc.distillation import Choices, distil_model

    chosen = method(rule, rule_set, die, seconds_of(age))
    options = Options(
        target=target, recipe=recipe, settings=set_, seed=seed, text=text, inputs=input,
        tokenizer=tokenizer, trust_root=trust_root,
    )  # fmt: skip
    choices = Choices(steps, seconds, device, chosen, force=force, threads=threads)
    progress = Progress(quiet=quiet or json)
    done = distil_model(model, out, options=options, choices=choices, progress=progress)
    progress.done()
    _show(done, json)
    return 0


def _show(done: Distillation, json: bool) -> None:
    told = {k: done.manifest[k] for k in ("kept", "steps", "best_step", "start", "best")}
    if json:
        body: dict[str, Any] = {"schema_version": 1, "distilled": str(done.path), **told}
        print_json(body | {"timing_cpu_s": done.cpu_s})
        return
    print(f"kept: {told['kept']} (step {told['best_step']} of {told['steps']})")
    for name, before in told["start"].items():
        print(f"  {name:<24}{before:12.5f}  ->{told['best'][name]:12.5f}")
    print(f"written: {done.path}")
    print(f"next:    pfmc compile … --distilled {done.path}")
