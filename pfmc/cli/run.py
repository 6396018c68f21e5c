"""``pfmc run``: an artifact's simulated hardware at work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pfmc.cli.options import Json, NotNegative, Quiet
from pfmc.cli.output import Progress, print_json, warn_of_die
from pfmc.errors import FileError, InputError, UsageError
from pfmc.report.format import quantity

if TYPE_CHECKING:
    from pfmc.simulate import Machine


def run_(
    path: Path,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    input: Path | None = None,
    out: Annotated[Path | None, Parameter(name=["-o", "--out"])] = None,
    max_new_tokens: NotNegative = 64,
    start: str = "",
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: NotNegative = 0,
    top_p: float = 1.0,
    seed: NotNegative = 0,
    die: NotNegative = 0,
    ideal: bool = False,
    age: str = "0s",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run an artifact's simulated hardware: stream text, or feed it a file.

    Examples: pfmc run out.pfm --prompt "Once upon a time"
    and pfmc run encoder.pfm --input tokens.npz -o embeddings.npz

    Parameters
    ----------
    path
        The artifact.
    prompt
        Text to continue, or for the encoder to read; "-" reads it from stdin.
    input
        .npz file with one array per input of the model. Of an encoder-decoder without
        decoder_input_ids: what the encoder reads, and text is written.
    out
        .npz file for the outputs of --input.
    max_new_tokens
        Tokens to write at most.
    start
        Encoder-decoders: tokens the decoder starts with, such as 0 (T5) or 2 (BART), or
        50258,50259,50359 (Whisper): decoder_start_token_id of config.json.
    greedy
        Always take the likeliest token.
    temperature
        Sampling temperature.
    top_k
        Choose among the k likeliest tokens; 0 for all.
    top_p
        Choose among the likeliest tokens that together have this probability.
    seed
        Seed of the sampling.
    die
        Which die: the seed of its write noise and, with it, of its read noise.
    ideal
        The ideal die: no write, age or read noise.
    age
        Time since writing: 30s, 5min, 1h, 1day, 1year.
    json
        Print JSON.
    quiet
        No progress and no speeds.
    """
    if (prompt is None) == (input is None):
        raise UsageError("give either --prompt TEXT or --input FILE.npz")
    from pfmc.simulate import open_machine
    from pfmc.targets.base import Die

    age_s = seconds_of(age)
    progress = Progress(quiet=quiet or json)
    progress("reading the artifact")
    chosen = Die(None if ideal else die, age_s, not ideal)
    machine = open_machine(path, chosen)
    progress.done()
    warn_of_die(path, [chosen.seed], age_s, quiet)
    choices: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "greedy": greedy, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    if machine.is_pair:
        choices["start_ids"] = _tokens(start)
    if input is not None:
        arrays = read_arrays(input)
        if machine.is_pair and not any("decoder" in name for name in arrays):
            return _tell(machine, arrays, choices, json)
        return _feed(machine, arrays, out, json)
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    return _write(machine, text, choices, json, quiet)


def _tokens(start: str) -> list[int]:
    """Token ids, written with commas between them."""
    try:
        return [int(word) for word in start.split(",") if word.strip()]
    except ValueError as error:
        raise UsageError(f"no token ids: {start!r}", mend="e.g. --start 0") from error


def _tell(machine: Machine, arrays: dict[str, Any], choices: dict[str, Any], json: bool) -> int:
    """Writes about what the encoder reads; tokens where there is no tokenizer."""
    new = list(machine.pair().generate(arrays, **choices))
    tokenizer = machine.tokenizer
    text = "" if tokenizer is None else "".join(tokenizer.stream(iter(new), []))
    if json:
        body = {"text": text, "tokens": new, **_hardware(machine, len(new))}
        print_json({"schema_version": 1, **body})
    else:
        print(text if tokenizer is not None else " ".join(map(str, new)))
    return 0


def seconds_of(age: str) -> float:
    """An age like ``30s`` or ``1day`` in seconds; refuses what is none (UsageError)."""
    from pfmc.quantity import Estimate

    number = age.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        age_s = Estimate.exact(float(number), age[len(number) :] or "s").to("s")[1]
    except (ValueError, UsageError) as error:
        raise UsageError(f"cannot read the age {age!r}", mend="e.g. 30s, 1h, 1day") from error
    if not 0 <= age_s < float("inf"):
        raise UsageError(f"the age {age!r} is no time since writing", mend="e.g. 30s, 1h, 1day")
    return age_s


def _write(machine: Machine, prompt: str, choices: dict[str, Any], json: bool, quiet: bool) -> int:
    tokenizer = machine.tokenizer
    if tokenizer is None:
        raise UsageError(
            "the artifact holds no tokenizer", where=str(machine.path),
            mend="compile with --tokenizer tokenizer.json",
        )  # fmt: skip
    ids = tokenizer.encode(prompt)
    new: list[int] = []

    def taken(stream: Iterator[int]) -> Iterator[int]:
        for token in stream:
            new.append(token)
            yield token

    start = time.perf_counter()
    if machine.is_pair:
        pair = machine.pair()
        stream, ids = pair.generate(pair.source_of(ids), **choices), []
    else:
        stream = machine.decoder().generate(ids, **choices)
    pieces: list[str] = []
    if not json and not machine.is_pair:
        print(prompt, end="", flush=True)
    for piece in tokenizer.stream(taken(stream), ids):
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    elapsed_s = time.perf_counter() - start
    if json:
        body = {"prompt": prompt, "text": "".join(pieces), "tokens": list(new)}
        speed = {"simulation_tokens_per_s": len(new) / elapsed_s}
        print_json({"schema_version": 1, **body, **speed, **_hardware(machine, len(new))})
        return 0
    print()
    if not quiet:
        _say_speeds(machine, len(new), elapsed_s)
    return 0


def _hardware(machine: Machine, tokens: int) -> dict[str, float]:
    metrics = machine.report["cost"]["metrics"]
    speed, energy_j = (
        float(metrics.get(key, {}).get("typical", "nan"))
        for key in ("throughput__user", "energy__token")
    )
    return {
        "hardware_tokens_per_s": speed,
        "hardware_energy_per_token_j": energy_j,
        "hardware_energy_j": energy_j * tokens,
    }


def _say_speeds(machine: Machine, tokens: int, elapsed_s: float) -> None:
    hardware = _hardware(machine, tokens)
    speed = quantity(hardware["hardware_tokens_per_s"], "1/s")
    energy, whole = (
        quantity(hardware[k], "J") for k in ("hardware_energy_per_token_j", "hardware_energy_j")
    )
    print(
        f"simulation: {tokens} tokens in {elapsed_s:.2f} s, {tokens / elapsed_s:.1f} tokens/s\n"
        f"hardware:   {speed} for one user, {energy} a token, {whole} for this text\n"
        f"            ({machine.technology.title}; typical values of the cost report)",
        file=sys.stderr,
    )


def _feed(machine: Machine, arrays: dict[str, Any], out: Path | None, json: bool) -> int:
    import numpy as np

    results = machine.run(arrays)
    if out is not None:
        with out.open("wb") as f:  # a path would be given the suffix .npz
            np.savez(f, **results)  # type: ignore[arg-type]
    shown = {name: _facts(a) for name, a in results.items() if a.dtype.kind == "f"}
    if json:
        print_json({"schema_version": 1, "outputs": shown})
    else:
        for name, facts in shown.items():
            mean, rms = facts["mean"], facts["rms"]
            print(f"{name}: shape {facts['shape']}, mean {mean:.4g}, rms {rms:.4g}")
    return 0


def _facts(array: Any) -> dict[str, Any]:
    """Shape, mean and root mean square of an output."""
    rms = float((array**2).mean() ** 0.5)
    return {"shape": list(array.shape), "mean": float(array.mean()), "rms": rms}


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` file by name; nothing is unpickled.

    Raises:
        UsageError: there is no such file.
        InputError: it is not an .npz file of plain arrays.
    """
    import numpy as np

    if not path.is_file():
        raise UsageError("there is no such file", where=str(path))
    try:
        with np.load(path, allow_pickle=False) as held:
            return {k: held[k] for k in held.files}
    except OSError as error:
        raise FileError("the file cannot be read", where=str(path)) from error
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise InputError(
            f"not an .npz file of plain arrays: {error}", where=str(path),
            mend="write it with numpy.savez(path, input_ids=…)",
        ) from error  # fmt: skip
