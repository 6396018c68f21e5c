"""Times crossbar layers beside torch.nn.Linear in one run, on one thread.

    python benchmarks/bench_crossbar.py [--runs 20] [--lightning] [--csv]

CPU time of the process, the least of `runs` rounds; rounds alternate between the modules, so that a
busy machine disturbs all alike. ``linear`` is one 1024 x 1024 layer on a batch of 128 vectors;
``block`` is the fixed linears of a decoder block of width 256 (four 256 x 256, 256 x 1024 twice,
1024 x 256) on 512 positions with SiLU between, nothing else. ``train`` is forward and backward,
with gradients of the inputs alone: weights are frozen everywhere. ``--lightning`` adds
aihwkit-lightning (tiles of 256 inputs, no device noise).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from pfmc import technology
from pfmc.hardware import FixedLinear, LayerStatistics, QuantisedMatrix
from pfmc.targets import get
from pfmc.targets.base import Die, StoredLinear

Make = Callable[[int, int], torch.nn.Module]

DIES = {
    "converters": Die(None, 0.0, read_noise=False),
    "converters, write noise, drift": Die(0, 86400.0, read_noise=False),
    "converters, write noise, drift, read noise": Die(0, 86400.0, read_noise=True),
}


def plain(inputs: int, outputs: int) -> torch.nn.Module:
    """The module that everything is compared with."""
    return torch.nn.Linear(inputs, outputs)


def crossbar(die: Die) -> Make:
    """Layers of the default crossbar technology, Gaussian weights."""
    target, tech = get("crossbar"), technology.load("crossbar")

    def make(inputs: int, outputs: int) -> torch.nn.Module:
        rng = np.random.default_rng(inputs)
        codes = np.clip(np.round(rng.standard_normal((inputs, outputs)) * 40), -127, 127)
        scale = np.full((1, outputs), 1 / 40 / np.sqrt(inputs), np.float32)
        matrix = QuantisedMatrix(codes.astype(np.int8), 8, scale, inputs)
        ones = np.ones(outputs, np.float32)
        seen = LayerStatistics(4.0, {}, np.ones(inputs), 5 * ones, ones, 1)
        bias = np.zeros(outputs, np.float32)
        layer = FixedLinear("bench", matrix, bias, 8, 4 / 127, seen)
        tiled = target.lower_linear(layer, tech)
        stored = StoredLinear(
            "bench", inputs, outputs, tiled.tiles, tiled.tensors, bias, 8, 4 / 127
        )  # fmt: skip
        return target.layer(stored, tech, die)

    return make


def lightning(inputs: int, outputs: int) -> torch.nn.Module:
    """aihwkit-lightning's layer with the same converters."""
    from aihwkit_lightning.nn import AnalogLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig

    config = TorchInferenceRPUConfig()
    config.forward.inp_res, config.forward.out_res, config.forward.out_bound = 254, 254, 10.0
    config.mapping.max_input_size = 256
    config.pre_post.input_range.enable = True
    return AnalogLinear(inputs, outputs, rpu_config=config).eval()


class Block(torch.nn.Module):
    """The fixed linears of a gated decoder block in a row."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.square = torch.nn.ModuleList([make(256, 256) for _ in range(4)])
        self.gate, self.up, self.down = make(256, 1024), make(256, 1024), make(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[positions, 256]`` to the same shape."""
        q, k, v, o = self.square
        x = x + o(q(x) + k(x) + v(x))
        y: torch.Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def step(module: torch.nn.Module, x: torch.Tensor, train: bool) -> Callable[[], None]:
    """One call of `module`, with its backward pass where `train`."""

    def run() -> None:
        if train:
            module(x.requires_grad_()).sum().backward()
        else:
            with torch.no_grad():
                module(x)

    return run


def measure(steps: Mapping[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Least CPU seconds of each step over alternating rounds, after one round of warming up."""
    best = dict.fromkeys(steps, float("inf"))
    for round_ in range(runs + 1):
        for name, run in steps.items():
            start = time.process_time()
            run()
            if round_:
                best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--lightning", action="store_true")
    parser.add_argument("--csv", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    makers: dict[str, Make] = {"plain torch": plain} | {k: crossbar(d) for k, d in DIES.items()}
    if options.lightning:
        makers["aihwkit-lightning"] = lightning
    if options.csv:
        print("case,mode,simulator,cpu_ms,ratio")
    cases: dict[str, tuple[Callable[[Make], torch.nn.Module], tuple[int, int]]] = {
        "linear": (lambda make: make(1024, 1024), (128, 1024)),
        "block": (Block, (512, 256)),
    }
    for case, (build, shape) in cases.items():
        modules = {name: build(make).requires_grad_(False) for name, make in makers.items()}
        for mode in ("eval", "train"):
            x = torch.randn(shape)
            steps = {n: step(m, x.clone(), mode == "train") for n, m in modules.items()}
            found = measure(steps, options.runs)
            for name, seconds in found.items():
                ratio = seconds / found["plain torch"]
                if options.csv:
                    print(f"{case},{mode},{name!r},{seconds * 1e3:.3f},{ratio:.3f}")
                else:
                    print(f"{case:7}{mode:6}{name:45}{seconds * 1e3:9.2f} ms{ratio:8.2f} x")


if __name__ == "__main__":
    main()
