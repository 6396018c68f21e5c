"""One mismatched twin: a small classifier whose device differs from its model, for every rule.

The network is 32-48-48-10 with tanh (4,330 parameters, 4,320 without the last bias). The device
multiplies every weight by 1 + 0.15 z, every output by 1 + 0.2 z and adds offsets of 0.1 z, drawn
once: none of it is known to the model. Task: ten Gaussian classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pfmc import noise
from pfmc.distill.rules.base import Problem
from pfmc.distill.rules.masks import MaskStack
from pfmc.distill.rules.slopes import slope_of
from pfmc.distill.student import Student

SIZES = (32, 48, 48, 10)
MISMATCH, GAIN, OFFSET = 0.15, 0.2, 0.1
LAYERS = tuple(f"layers.{i}" for i in range(len(SIZES) - 1))


def network(seed: int = 0) -> ir.Model:
    """The classifier as a canonical graph."""
    rng = np.random.default_rng(seed)
    x = ir.Value(name="x", shape=ir.Shape(["n", SIZES[0]]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants, last = [], [], x
    for i, (inputs, outputs) in enumerate(itertools.pairwise(SIZES)):
        weight = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        w = ir.Value(name=f"w{i}", const_value=ir.tensor(weight, name=f"w{i}"))
        b = ir.Value(
            name=f"b{i}", const_value=ir.tensor(np.zeros(outputs, np.float32), name=f"b{i}")
        )
        nodes.append(ir.node("FixedLinear", [last, w, b], domain="pfmc", name=LAYERS[i]))
        constants += [w, b]
        last = nodes[-1].outputs[0]
        if i < len(SIZES) - 2:
            nodes.append(ir.node("Tanh", [last]))
            last = nodes[-1].outputs[0]
    last.name = "logits"
    graph = ir.Graph([x], [last], nodes=nodes, initializers=constants, opset_imports={"": 24},
                     name="mismatched")  # fmt: skip
    return ir.Model(graph, ir_version=11)


class Modelled(nn.Module):
    """``x @ weight + bias`` of shared parameters."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in]`` to ``[n, out]``."""
        return x @ self.weight + self.bias


class Mismatched(Modelled):
    """The same parameters on a device that differs: fixed by `die`, or anew at every call."""

    def __init__(self, inner: Modelled, layer: str, die: int | None) -> None:
        super().__init__(inner.weight, inner.bias)
        self.layer, self.die, self.calls = layer, die, 0

    def forward(self, x: Tensor) -> Tensor:
        """The device's reading."""
        seed = self.die
        if seed is None:
            self.calls += 1
            seed = 1_000_000 + self.calls
        rng = noise.generator(seed, self.layer, "write")
        weight = self.weight * (1 + MISMATCH * _drawn(rng, self.weight))
        gain, offset = 1 + GAIN * _drawn(rng, self.bias), OFFSET * _drawn(rng, self.bias)
        return gain * (x @ weight + self.bias) + offset


def _drawn(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), np.float32))


def data(count: int, seed: int) -> dict[str, Tensor]:
    """Inputs ``x [n, 32]`` and ``label [n]`` of ten Gaussian classes."""
    centres = np.random.default_rng(7).normal(0, 1, (SIZES[-1], SIZES[0]))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, SIZES[-1], count)
    x = centres[label] + 1.1 * rng.normal(size=(count, SIZES[0]))
    return {"x": torch.from_numpy(x).float(), "label": torch.from_numpy(label)}


class _Unlabelled:
    """A student that is fed a batch with its labels and leaves them to the loss."""

    def __init__(self, student: Student) -> None:
        self.student, self.linears, self.replace = student, student.linears, student.replace

    def __call__(self, **feeds: Any) -> dict[str, Tensor]:
        return self.student(x=feeds["x"])


def loss(outputs: Mapping[str, Tensor], feeds: Mapping[str, Any]) -> Tensor:
    """Mean cross entropy in nats."""
    return nn.functional.cross_entropy(outputs["logits"], feeds["label"])


def contrast(feeds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch, and beside each sample the next one of another class."""
    x, label = feeds["x"], feeds["label"]
    other = torch.arange(len(label))
    for shift in range(len(label) - 1, 0, -1):
        partner = (torch.arange(len(label)) + shift) % len(label)
        other = torch.where(label[partner] != label, partner, other)
    return {"x": x}, {"x": x[other]}


def problem(die: int = 0, seed: int = 0) -> Problem:
    """Model, twin and noisy model with shared parameters."""
    graph = network(seed)
    students = [Student(graph) for _ in range(3)]
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    for name in LAYERS:
        ideal: Any = students[0].linears[name]
        weight, bias = ideal.weight, nn.Parameter(torch.zeros(ideal.weight.shape[1]))
        inner = Modelled(weight, bias)
        parameters[name] = {"weight": weight, "bias": bias}
        students[0].replace(name, inner)
        students[1].replace(name, Mismatched(inner, name, die))
        students[2].replace(name, Mismatched(inner, name, None))
    model, device, noisy = (_Unlabelled(s) for s in students)
    return Problem(model, parameters, loss, device, noisy, contrast=contrast, slope=slope_of(graph))


def wave_problem(die: int = 0, modes: int = 48, planes: int = 9) -> Problem:
    """As `problem`, the middle layer being a stack of phase masks with unknown phase errors."""
    whole = problem(die)
    name, (inputs, outputs) = LAYERS[1], SIZES[1:3]
    error = torch.from_numpy(
        0.3 * noise.generator(die, name, "phase errors").standard_normal((planes, modes))
    ).float()
    model, device = (MaskStack(inputs, outputs, modes, planes, name, 0, e) for e in (None, error))
    device.phase, device.gain = model.phase, model.gain
    assert whole.device is not None
    whole.model.replace(name, model)
    whole.device.replace(name, device)
    parameters = {**whole.parameters, name: {"phase": model.phase, "gain": model.gain}}
    return Problem(
        whole.model, parameters, loss, whole.device, None, slope=whole.slope,
        stacks={name: device},
    )  # fmt: skip


def true_gradient(whole: Problem, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    """dL/dtheta of the device itself, by differentiating through the twin."""
    from pfmc.distill.rules.base import differentiate

    return differentiate(whole, loss(whole.measured()(**feeds), feeds))


def accuracy(whole: Problem, feeds: Mapping[str, Any]) -> float:
    """Share of samples that the device classifies right."""
    with torch.no_grad():
        guess = whole.measured()(**feeds)["logits"].argmax(-1)
    return float((guess == feeds["label"]).float().mean())
