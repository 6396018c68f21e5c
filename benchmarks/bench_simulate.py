"""The shipped model's simulated hardware beside plain torch: a forward pass, and written text.

Forward: 8 texts of 64 tokens, one thread, CPU time of the process, the least of several rounds in
which all machines take turns, so that a busy processor disturbs all alike. Plain torch is the
canonical float model in our student with ideal linears; transformers' own Llama stands beside.
Generation: greedy, one text with KV memory, tokens a CPU second, detokenised as `pfmc run` does.

    python -m benchmarks.bench_simulate [--runs 10] [--tokens 200]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figure import Figure, table
from pfmc.cli.models import shipped_model

BATCH, LENGTH = 8, 64
PLAIN, PEER = "plain torch", "transformers"
GOALS = {"crossbar, no read noise": 2.0, "crossbar, read noise": 4.0}


def _machines(folder: Path) -> dict[str, Any]:
    """Every simulated machine by name: the target and whether it is read noisily."""
    from pfmc.compile import compile_model
    from pfmc.simulate import open_machine
    from pfmc.targets.base import Die

    dies = {"no read noise": Die(0, 86400.0, False), "read noise": Die(0, 86400.0, True)}
    found: dict[str, Any] = {}
    for target in ("rom", "crossbar", "optical"):
        path = folder / f"{target}.pfm"
        compile_model(shipped_model(), path, target=target)
        chosen = {"": Die()} if target == "rom" else dies
        for noise, die in chosen.items():
            found[f"{target}, {noise}".rstrip(", ")] = open_machine(path, die)
    return found


def _plain() -> Any:
    """The canonical float model as a student with ideal linears, and its tokenizer."""
    from pfmc.compile import compile_model
    from pfmc.distill.generate import Decoder
    from pfmc.distill.student import Student

    made = compile_model(shipped_model(), target="crossbar", stop_after="canonical")
    assert made.model is not None
    return Decoder(Student(made.model).eval())


def _transformers() -> Any:
    """A Llama of the shipped model's shape; its weights are random, which costs the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_json_file(str(shipped_model().parent / "config.json"))
    return LlamaForCausalLM(config).eval()


def _least(steps: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Least CPU seconds of each step over alternating rounds, after one round of warming up."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(runs + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    return best


def figures(runs: int = 10, tokens: int = 200) -> Iterator[Figure]:
    """Forward passes as ratios to plain torch, then tokens a CPU second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="pfmc-bench-") as folder, torch.inference_mode():
            machines, plain, peer = _machines(Path(folder)), _plain(), _transformers()
            decoders = {PLAIN: plain} | {n: m.decoder() for n, m in machines.items()}
            yield from _forwards(decoders, peer, runs)
            yield from _texts(decoders, machines["rom"].tokenizer, peer, tokens)
    finally:
        torch.set_num_threads(before)


def _forwards(decoders: Mapping[str, Any], peer: Any, runs: int) -> Iterator[Figure]:
    import torch

    ids = np.random.default_rng(0).integers(0, decoders[PLAIN].vocabulary, (BATCH, LENGTH))
    given = torch.from_numpy(ids)
    steps: dict[str, Callable[[], object]] = {
        name: lambda d=decoder: d.session(BATCH).feed(ids)  # type: ignore[misc]
        for name, decoder in decoders.items()
    }
    steps[PEER] = lambda: peer(input_ids=given, use_cache=True)
    seconds = _least(steps, runs)
    base = seconds.pop(PLAIN)
    for name, taken in seconds.items():
        yield Figure(
            f"forward 8 x 64, {name}", taken / base, "x", GOALS.get(name),
            beside=f"{taken * 1e3:.1f} ms; {PLAIN} {base * 1e3:.1f} ms",
        )  # fmt: skip


def _texts(decoders: Mapping[str, Any], tokenizer: Any, peer: Any, tokens: int) -> Iterator[Figure]:
    import torch

    ids = tokenizer.encode("ROMEO:")

    def write(decoder: Any) -> None:
        stream = decoder.generate(ids, tokens, greedy=True, stop_ids=())
        "".join(tokenizer.stream(stream, ids))

    steps: dict[str, Callable[[], object]] = {
        n: lambda d=d: write(d)  # type: ignore[misc]
        for n, d in decoders.items()
    }
    given = torch.tensor([ids])
    steps[PEER] = lambda: peer.generate(
        given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    speeds = {name: tokens / taken for name, taken in _least(steps, 2).items()}
    beside = f"{PEER} {speeds[PEER]:.0f} tokens a CPU s"
    for name, speed in speeds.items():
        yield Figure(f"text generation, {name}", speed, "1/s", beside=beside)


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200)
    chosen = parser.parse_args()
    print(table(figures(chosen.runs, chosen.tokens)))


if __name__ == "__main__":
    main()
