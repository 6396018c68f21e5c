"""Post-training quantisation beside its peers on one model, bits and data, in one run.

Peers: GPTQ and rounding to nearest of ONNX Runtime's vendored neural-compressor, and torchao's
affine quantiser (its GPTQ asks for CUDA), where they are installed; and GPTQ as published, because
ONNX Runtime 1.31's never spreads an error (it reads the zero half of its triangular factor) and so
rounds to nearest. All round each fixed linear
but the head per output channel; GPTQ gets the float model's second moments, as ours does in the
row ``compensate``. CPU seconds hold the rounding alone; those of the rows that run the model while
they round (``prefix rounded``, ``learned``) hold that too, and `moments` says what the others need
before they start.

    python -m benchmarks.bench_ptq [--model FILE] [--bits 4 3 2] [--rows NAME ...] [--json FILE]
"""

from __future__ import annotations

import os

from benchmarks.process import ONE_THREAD

os.environ.update(ONE_THREAD)  # before numpy and torch are loaded

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from pfmc import formats, ingest
from pfmc.distill import calibrate, drive, measure
from pfmc.distill.feeds import text_feeds
from pfmc.distill.generate import Decoder
from pfmc.distill.learned import Learning
from pfmc.distill.sequential import Order, solve
from pfmc.distill.student import IdealLinear, Student
from pfmc.distill.text import load_tokenizer, self_generated
from pfmc.hardware import LayerStatistics
from pfmc.ir import vocabulary
from pfmc.layer_rounding import LayerPlan, Seen, round_layer
from pfmc.passes import pipeline, recipe
from pfmc.passes.base import Context
from pfmc.rounding import Floats

Array = npt.NDArray[Any]
Rounded = Mapping[str, Floats]

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "data" / "stories260K" / "model.onnx"
SEQUENCES, LENGTH, WINDOWS, BATCH = 128, 256, 48, 8
HEAD = "lm_head"


@dataclass(frozen=True)
class Row:
    """One way of rounding at one width.

    Attributes:
        error: geometric mean over layers of the output's wrong power over its power, inputs
            float; ratio, low, high: perplexity over the float model's and its 95 % interval over
            windows; cpu_s: of rounding.
    """

    bits: int
    name: str
    error: float
    ratio: float
    low: float
    high: float
    cpu_s: float


@dataclass(frozen=True)
class Bench:
    """A model in canonical form, what calibration saw, and windows to judge on."""

    model: ir.Model
    weights: Mapping[str, Floats]
    statistics: Mapping[str, LayerStatistics]
    calibration: Array
    windows: Array
    decoder: Decoder
    losses: Array
    moments_s: float

    @classmethod
    def of(cls, path: Path) -> Bench:
        """Self-written text, different for calibration and judging."""
        model = pipeline.canonicalise(
            ingest.load(path).model, recipe.load("rom").passes, Context(), pipeline.Settings()
        ).model
        decoder = Decoder(Student(model).eval(), load_tokenizer(path.parent / "tokenizer.json"))
        calibration = self_generated(decoder, SEQUENCES, LENGTH, 7)
        windows = self_generated(decoder, WINDOWS, LENGTH, 1)
        start = time.process_time()
        statistics = calibrate.calibrate(
            model, text_feeds(drive.detect(model), calibration), moments=True
        )
        spent = time.process_time() - start
        return cls(
            model, dict(_weights(model)), statistics, calibration, windows, decoder,
            _losses(decoder, windows), spent,
        )  # fmt: skip

    def judge(self, bits: int, name: str, rounded: Rounded, cpu_s: float) -> Row:
        """Layer errors and perplexity ratio of rounded weights."""
        student = Student(self.model).eval()
        for layer, weight in rounded.items():
            bias = getattr(student.linears[layer], "bias", None)
            student.replace(layer, IdealLinear(torch.from_numpy(weight), bias))
        excess = _losses(Decoder(student, self.decoder.tokenizer), self.windows) - self.losses
        found = measure.mean_estimate(excess.mean(axis=1))
        errors = [self._error(layer, weight) for layer, weight in rounded.items()]
        return Row(
            bits, name, math.exp(np.mean(np.log(errors))), math.exp(found.value),
            math.exp(found.low), math.exp(found.high), cpu_s,
        )  # fmt: skip

    def _error(self, layer: str, held: Floats) -> float:
        weight, moment = self.weights[layer].astype(np.float64), self.moment(layer)
        wrong = weight - held
        return float((wrong * (moment @ wrong)).sum() / (weight * (moment @ weight)).sum())

    def moment(self, layer: str) -> npt.NDArray[np.float64]:
        """The float model's second moment of a layer's inputs."""
        moment = self.statistics[layer].input_moment
        assert moment is not None
        return moment


def _weights(model: ir.Model) -> Iterator[tuple[str, Floats]]:
    for node in vocabulary.fixed_linears(model):
        value = node.inputs[1]
        assert value is not None
        assert value.const_value is not None
        if node.name != HEAD:
            yield str(node.name), np.asarray(value.const_value.numpy(), np.float32)


@torch.inference_mode()
def _losses(decoder: Decoder, windows: Array) -> Array:
    parts = [
        measure.token_losses(decoder.logits(windows[i : i + BATCH]), windows[i : i + BATCH])
        for i in range(0, len(windows), BATCH)
    ]
    return np.concatenate(parts)


# -- ways of rounding ------------------------------------------------------------------------------

Way = Callable[[Bench, int], Rounded]


def ours(form: str, search: str) -> Way:
    """Each layer alone, on the float model's moments."""

    def run(bench: Bench, bits: int) -> Rounded:
        made = {}
        for layer, weight in bench.weights.items():
            seen = Seen(bench.statistics[layer].input_power, bench.moment(layer))
            matrix = round_layer(weight, formats.of(form, bits), 0, search, seen)  # type: ignore[arg-type]
            made[layer] = matrix.weights()
        return made

    return run


def prefix(form: str, search: str) -> Way:
    """One layer after the other, on what the layers rounded before give."""

    def run(bench: Bench, bits: int) -> Rounded:
        made: dict[str, Floats] = {}
        plan = LayerPlan(formats.of(form, bits), 0, search)  # type: ignore[arg-type]
        order = Order(lambda n: None if n == HEAD else plan, lambda _: None, Learning())
        feeds = text_feeds(drive.detect(bench.model), bench.calibration)
        solve(bench.model, feeds, order, lambda n, m: made.update({n: m.weights()}))
        return made

    return run


def ort_gptq(scheme: str) -> Way:
    """ONNX Runtime's GPTQ."""

    def run(bench: Bench, bits: int) -> Rounded:
        from onnxruntime.quantization.neural_compressor.weight_only import gptq

        return {
            layer: np.asarray(
                gptq(weight.copy(), 2 * bench.moment(layer), bits, -1, scheme), np.float32
            )
            for layer, weight in bench.weights.items()
        }

    return run


def paper_gptq(bench: Bench, bits: int) -> Rounded:
    """GPTQ as published: arXiv:2210.17323 algorithm 1, inputs by power, 1 % damping, symmetric."""
    made = {}
    for layer, weight in bench.weights.items():
        moment = bench.moment(layer).copy()
        power = np.diagonal(moment).copy()
        np.fill_diagonal(moment, power + 0.01 * power.mean())
        order = np.argsort(-power, kind="stable")
        upper = np.linalg.cholesky(np.linalg.inv(moment[np.ix_(order, order)])).T
        left, top = weight[order].astype(np.float64), 2 ** (bits - 1) - 1
        scale = np.abs(weight).max(axis=0) / top
        held = np.empty_like(left)
        for i in range(len(left)):
            held[i] = np.clip(np.rint(left[i] / scale), -top, top) * scale
            left[i:] -= np.outer(upper[i, i:], (left[i] - held[i]) / upper[i, i])
        back = np.empty_like(weight)
        back[order] = held
        made[layer] = back
    return made


def ort_rtn(bench: Bench, bits: int) -> Rounded:
    """ONNX Runtime's rounding to nearest, symmetric."""
    from onnxruntime.quantization.neural_compressor.weight_only import qdq_tensor

    return {
        layer: np.asarray(qdq_tensor(w.T.copy(), bits, w.shape[0], "sym"), np.float32).T.copy()
        for layer, w in bench.weights.items()
    }


def torchao(symmetric: bool) -> Way:
    """torchao's affine quantiser, a scale for each output."""

    def run(bench: Bench, bits: int) -> Rounded:
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )

        kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        made = {}
        for layer, weight in bench.weights.items():
            w = torch.from_numpy(weight.T.copy())
            block = (1, w.shape[1])
            scale, zero = choose_qparams_affine(w, kind, block, torch.int8, low, high)
            codes = quantize_affine(w, block, scale, zero, torch.int8, low, high)
            back = dequantize_affine(codes, block, scale, zero, torch.int8, low, high)
            made[layer] = back.float().numpy().T.copy()
        return made

    return run


WAYS: dict[str, Way] = {
    "ONNX Runtime RTN": ort_rtn,
    "ONNX Runtime GPTQ sym": ort_gptq("sym"),
    "ONNX Runtime GPTQ asym": ort_gptq("asym"),
    "GPTQ as published": paper_gptq,
    "torchao sym": torchao(True),
    "torchao asym": torchao(False),
    "pfmc plain": ours("int", "plain"),
    "pfmc plain midrise": ours("midrise", "plain"),
    "pfmc clip": ours("int", "clip"),
    "pfmc clip midrise": ours("midrise", "clip"),
    "pfmc compensate": ours("int", "compensate"),
    "pfmc compensate midrise": ours("midrise", "compensate"),
    "pfmc compensate, prefix rounded": prefix("int", "compensate"),
    "pfmc compensate midrise, prefix rounded": prefix("midrise", "compensate"),
    "pfmc learned": prefix("int", "learned"),
    "pfmc learned midrise": prefix("midrise", "learned"),
}


def rows(bench: Bench, bits: list[int], names: list[str]) -> Iterator[Row]:
    """Every way at every width; peers that are not installed are left out."""
    for width in bits:
        for name in names:
            if name.startswith("torchao") and importlib.util.find_spec("torchao") is None:
                continue
            start = time.process_time()
            made = WAYS[name](bench, width)
            yield bench.judge(width, name, made, time.process_time() - start)


def main() -> None:
    """Parses the command line, measures and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench.of(chosen.model)
    print(f"moments of the float model: {bench.moments_s:.1f} CPU s", file=sys.stderr)
    print("| bits | by | layer error | perplexity ratio | 95 % | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = []
    for row in rows(bench, chosen.bits, chosen.rows):
        found.append(asdict(row))
        span = f"{row.low:.4f} - {row.high:.4f}"
        print(f"| {row.bits} | {row.name} | {row.error:.3g} | {row.ratio:.4f} | {span} "
              f"| {row.cpu_s:.2f} |", flush=True)  # fmt: skip
    if chosen.json:
        body = {"model": chosen.model.name, "moments_s": bench.moments_s, "rows": found}
        chosen.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
