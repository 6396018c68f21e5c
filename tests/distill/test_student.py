"""The student against ONNX Runtime: the zoo, canonical and quantised graphs, replaced layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pfmc.distill.student import IdealLinear, Student
from pfmc.errors import InputError, UsageError

Oracle = Callable[..., list[np.ndarray]]
Maker = Callable[..., ir.Model]

FAMILIES = ("llama", "llama_tied", "gpt2", "bert", "vit", "qwen3", "mistral", "distilbert")
EXPORTS = (
    *((f, e) for e in ("t_static", "t_dyn", "ts", "h_dyn") for f in FAMILIES),
    *((f, "t_kv") for f in ("llama", "gpt2", "qwen3")),
    *((f, e) for e in ("h_gen__decode", "h_gen__prefill") for f in ("llama", "gpt2")),
)
"""Family and export of every file that must be there."""


def feeds_of(model: ir.Model, batch: int = 2, length: int = 6) -> dict[str, np.ndarray]:
    """Random inputs; symbolic sizes by their name, the mask covering past and present."""
    rng = np.random.default_rng(0)
    sizes = {"batch": batch, "s44": batch, "s36": 5, "past": 5, "total": length}

    def size(axis: int | ir.SymbolicDim) -> int:
        name = str(axis) if isinstance(axis, int) else str(axis.value)
        return int(name) if name.isdigit() else sizes.get(name, batch if name == "s72" else length)

    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape, name = [size(axis) for axis in value.shape], value.name or ""
        if value.dtype.is_floating_point():
            feeds[name] = rng.normal(size=shape).astype(np.float32)
        elif "mask" in name:
            feeds[name] = np.ones(shape, np.int64)
        elif "position" in name:
            feeds[name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
        else:
            feeds[name] = rng.integers(0, 2 if "type" in name else 60, shape)
    return feeds


@pytest.mark.parametrize(("family", "export"), EXPORTS)
def test_zoo_models_equal_onnx_runtime(family: str, export: str, zoo: Path, oracle: Oracle) -> None:
    path = zoo / f"{family}__{export}.onnx"
    model = ir.load(path)
    student = Student(model)
    fixed = export == "t_static"
    for batch, length in [(2, 6)] if fixed else [(2, 6), (1, 6), (2, 6)]:
        feeds = feeds_of(model, batch, length)
        want = oracle(path, feeds)
        with torch.inference_mode():
            got = student(**feeds)
        for value, expected in zip(model.graph.outputs, want, strict=True):
            found = got[value.name or ""].numpy()
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_canonical_graph_equals_onnx_runtime(
    memory: bool, quantised: bool, canonical_llama: Maker, oracle: Oracle
) -> None:
    model = canonical_llama(memory, quantised)
    student = Student(model)
    for past, length in [(0, 5), (3, 2), (4, 1), (3, 2)]:
        feeds = {"input_ids": np.arange(2 * length).reshape(2, length) % 32}
        if memory:
            for i, name in enumerate(student.input_names[1:]):
                rng = np.random.default_rng(i + past)
                feeds[name] = rng.normal(size=(2, 2, past, 4)).astype(np.float32)
        want = oracle(model, feeds)
        got = student(**feeds)
        for name, expected in zip(student.output_names, want, strict=True):
            np.testing.assert_allclose(got[name].detach().numpy(), expected, atol=2e-5)


def test_the_observer_sees_every_fixed_linear_in_order(canonical_llama: Maker) -> None:
    student = Student(canonical_llama())
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    student.observe = lambda name, x, y: seen.setdefault(name, (tuple(x.shape), tuple(y.shape)))  # type: ignore[assignment,return-value]
    student(input_ids=np.zeros((1, 3), np.int64))
    assert list(seen) == list(student.linears)
    assert seen["layers.0.mlp.down_proj"] == ((1, 3, 24), (1, 3, 16))
    assert len(seen) == 8


def test_a_layer_can_be_replaced(canonical_llama: Maker) -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros((*x.shape[:-1], 32))

    model, ids = canonical_llama(), np.zeros((1, 3), np.int64)
    student = Student(model, {"lm_head": Zero()})
    assert torch.all(student(input_ids=ids)["logits"] == 0)
    assert isinstance(student.replace("lm_head", Student(model).linears["lm_head"]), Zero)
    torch.testing.assert_close(
        student(input_ids=ids)["logits"], Student(model)(input_ids=ids)["logits"]
    )
    with pytest.raises(UsageError, match=r"(?s)'lm_heat'.*did you mean 'lm_head'"):
        student.replace("lm_heat", Zero())
    with pytest.raises(UsageError, match="no fixed linear 'other'"):
        Student(model, {"other": Zero()})


def test_parameters_are_the_fixed_linears(canonical_llama: Maker) -> None:
    student = Student(canonical_llama())
    names = [n for n, _ in student.named_parameters()]
    assert sum(n.endswith(".weight") for n in names) == 8
    assert sum(n.endswith(".bias") for n in names) == 7  # o_proj's bias is zero: none is kept
    layer = student.linears["layers.0.attn.q_proj"]
    assert isinstance(layer, IdealLinear)
    assert layer.weight.shape == (16, 16)


@pytest.mark.parametrize("quantised", [False, True])
def test_gradients_reach_every_parameter(quantised: bool, canonical_llama: Maker) -> None:
    student = Student(canonical_llama(quantised=quantised))
    with torch.inference_mode():
        student(input_ids=np.arange(4)[None])  # must not poison what is remembered
    student(input_ids=np.arange(4)[None])["logits"].square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_quantise_passes_the_gradient_straight_through_where_it_does_not_clip() -> None:
    from pfmc.distill.tensors import TORCH

    x = torch.tensor([0.3, -2.6, 9.0, -9.0], requires_grad=True)
    y = TORCH.quantise(x, torch.tensor(1.0), 7.0)
    assert y.tolist() == [0.0, -3.0, 7.0, -7.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_working_type(canonical_llama: Maker) -> None:
    ids = np.arange(6)[None]
    with torch.inference_mode():
        exact = Student(canonical_llama())(input_ids=ids)["logits"]
        half = Student(canonical_llama(), dtype=torch.bfloat16)(input_ids=ids)["logits"]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_moving_the_student_takes_its_constants_along(canonical_llama: Maker) -> None:
    student, ids = Student(canonical_llama()), np.arange(4)[None]
    before = student(input_ids=ids)["logits"]
    student.to(torch.float64)
    assert all(b.dtype == torch.float64 for b in student.buffers() if b.is_floating_point())
    student.to(torch.float32)
    torch.testing.assert_close(student(input_ids=ids)["logits"], before)


@pytest.mark.parametrize("memory", [False, True])
def test_nothing_stays_behind_on_another_device(memory: bool, canonical_llama: Maker) -> None:
    """The meta device refuses to mix with CPU tensors, as an accelerator would."""
    model = canonical_llama(memory, quantised=True)
    for student in (Student(model, device="meta"), Student(model).to("meta")):
        feeds = {"input_ids": np.zeros((2, 3), np.int64)}
        feeds |= {n: np.zeros((2, 2, 5, 4), np.float32) for n in student.input_names[1:]}
        for value in student(**feeds).values():
            assert value.device.type == "meta"


def test_wrong_inputs_are_explained(canonical_llama: Maker) -> None:
    student = Student(canonical_llama())
    with pytest.raises(UsageError, match=r"'input_ids' is missing"):
        student()
    with pytest.raises(UsageError, match=r"(?s)no input 'input_idz'.*did you mean 'input_ids'"):
        student(input_ids=np.zeros((1, 1), np.int64), input_idz=1)


def test_unknown_operators_are_named(canonical_llama: Maker) -> None:
    model = canonical_llama()
    model.graph[0].op_type = "Gather2"
    with pytest.raises(InputError, match="Gather2"):
        Student(model)


def test_intermediate_values_are_freed(canonical_llama: Maker) -> None:
    student = Student(canonical_llama())
    freed = {slot for *_, dead in student._full for slot in dead}
    made = {s for step in student._program.steps if not step.host for s in step.outputs}
    assert freed >= made - set(student._program.outputs.values())
