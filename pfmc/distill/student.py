"""The student: a model at any stage as a torch module, each fixed linear replaceable.

It runs the graph step by step with the operators' meanings (`pfmc.ir.meaning`), so a simulated
layer, a quantised layer and the ideal layer all sit in the very graph that is compiled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfmc.distill.program import Builder, schedule
from pfmc.distill.tensors import TorchArrays, to_torch
from pfmc.errors import InputError, UsageError, did_you_mean
from pfmc.ir import meaning, vocabulary

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with a fixed linear's layer name, its input ``[..., in]``, its output ``[..., out]``."""

REMEMBERED = 8
"""Input shapes whose host values are remembered."""


class IdealLinear(nn.Module):
    """The ideal meaning of a fixed linear: ``x @ weight + bias`` in floating point.

    Args:
        weight: ``[in, out]``.
        bias: ``[out]``; None for zero.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return functional.linear(x, self.weight.T, self.bias)


def ideal_linear(node: ir.Node, dtype: torch.dtype, device: torch.device) -> IdealLinear:
    """The ideal module of a `FixedLinear` or `QuantisedLinear` node (codes times scale)."""
    arrays = [_array(v) for v in node.inputs[1:]]
    weight, bias = arrays[0], arrays[-1]
    if node.op_type == vocabulary.QUANTISED_LINEAR:
        line = ir.Node("", "DequantizeLinear", [], list(node.attributes.values()))
        weight = meaning.compile_node(line)(arrays[:2])[0]
    zero = not np.any(bias)
    return IdealLinear(
        to_torch(weight, dtype).to(device), None if zero else to_torch(bias, dtype).to(device)
    )


def _array(value: ir.Value | None) -> np.ndarray:
    if value is None or value.const_value is None:
        where = "" if value is None else value.name or ""
        raise InputError("a fixed linear whose weight is not a constant", where=where)
    return value.const_value.numpy()


class _Layer:
    """One fixed linear's step: runs the module that stands there now, then tells the observer."""

    def __init__(self, student: Student, name: str) -> None:
        self.student, self.name = student, name

    def __call__(self, x: Tensor) -> Tensor:
        student = self.student
        y: Tensor = student.linears[self.name](x)
        if student.observe is not None:
            student.observe(self.name, x, y)
        return y


class Student(nn.Module):
    """Runs a model with torch.

    Weights of the fixed linears are `nn.Parameter`; every other constant is a buffer. Gradients
    flow through everything, straight through `Quantise` and `QuantiseToken`. Call it under
    ``torch.inference_mode()`` unless you train.

    Args:
        model: at any stage.
        linears: layer name to the module that stands in for this fixed linear: called with x
            ``[..., in]`` it returns ``[..., out]`` including the bias. Others are ideal.
        device: where it runs.
        dtype: type of all float32, float16 and bfloat16 values; fixed from here on, while ``to``
            may move the student to another device.

    Attributes:
        layers: the same modules, registered; in parameter names ``/`` stands for ``.``.
        linears: layer name to module, all fixed linears in graph order; see `replace`.
        observe: called after each fixed linear, or None.
        constants: value name to the buffer that holds it on the device; see `free`.
        input_names: names of the graph's inputs, in order.
        output_names: names of the graph's outputs, in order.

    Raises:
        InputError: an operator has no meaning here.
        UsageError: `linears` names a layer that the model lacks.
    """

    def __init__(
        self,
        model: ir.Model,
        linears: Mapping[str, nn.Module] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.observe: Observer | None = None
        self.linears: dict[str, nn.Module] = {}
        self.layers = nn.ModuleDict()
        self._arrays = arrays = TorchArrays(device, dtype)
        given = dict(linears or {})

        def layer(node: ir.Node) -> _Layer:
            name = node.name or node.outputs[0].name or ""
            module = given.pop(name, None)
            self._place(name, module or ideal_linear(node, dtype, arrays.device))
            return _Layer(self, name)

        builder = Builder(model, arrays, layer)
        self._program = builder.build()
        if given:
            unknown = next(iter(given))
            raise UsageError(
                f"the model has no fixed linear {unknown!r}",
                mend=did_you_mean(unknown, self.linears),
            )
        self.input_names, self.output_names = (
            list(self._program.inputs),
            list(self._program.outputs),
        )
        self.constants: dict[str, str] = {
            str(value.name): f"constant_{slot}" for (value, host), slot in builder.slots.items()
            if not host and slot in self._program.device
        }  # fmt: skip
        for slot, value in self._program.device.items():
            self.register_buffer(f"constant_{slot}", arrays.asarray(value), persistent=False)
        self._program.device.clear()
        self._buffer_slots = [int(n.split("_")[1]) for n, _ in self.named_buffers(recurse=False)]
        self._plan()

    # -- layers -------------------------------------------------------------------------------

    def _place(self, name: str, module: nn.Module) -> None:
        self.linears[name] = module
        self.layers[name.replace(".", "/")] = module

    def replace(self, name: str, module: nn.Module) -> nn.Module:
        """Puts `module` in the place of fixed linear `name`; returns what stood there."""
        if name not in self.linears:
            raise UsageError(
                f"the model has no fixed linear {name!r}", mend=did_you_mean(name, self.linears)
            )
        before = self.linears[name]
        self._place(name, module)
        return before

    def free(self, name: str) -> nn.Parameter:
        """Makes the constant `name`, one of `constants`, a parameter that can learn."""
        attribute = self.constants[name]
        made = nn.Parameter(self._buffers.pop(attribute).detach().clone())  # type: ignore[union-attr]
        self._non_persistent_buffers_set.discard(attribute)
        self.register_parameter(attribute, made)
        self._forget()
        return made

    # -- running ------------------------------------------------------------------------------

    def _plan(self) -> None:
        program = self._program
        host = {slot for step in program.steps if step.host for slot in step.outputs}
        keep = {*program.inputs.values(), *program.outputs.values(), *program.host, *host}
        keep.update(self._buffer_slots)
        self._full = schedule(program.steps, keep)
        self._lean = schedule([s for s in program.steps if not s.host], keep)
        self._host_slots = sorted(host)
        self._inputs = [(v.name or "", self._type(v)) for v in self.model.graph.inputs]
        self._forget()

    def _type(self, value: ir.Value) -> torch.dtype | None:
        return None if value.dtype is None else self._arrays.dtype(value.dtype)

    def _forget(self) -> None:
        self._base: list[Any] | None = None
        self._memory: OrderedDict[tuple[Any, ...], list[Any]] = OrderedDict()

    def _apply(self, *arguments: Any, **options: Any) -> Student:
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        moved = next((b for b in (*self.buffers(), *self.parameters())), None)
        if moved is not None:
            self._arrays.device = moved.device
        self._forget()
        return self

    def _constants(self) -> list[Any]:
        base: list[Any] = [None] * (self._program.count + 1)  # the last slot is always None
        for slot, value in self._program.host.items():
            base[slot] = value
        for slot in self._buffer_slots:
            base[slot] = getattr(self, f"constant_{slot}")
        return base

    def forward(self, **inputs: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Runs the model.

        Args:
            inputs: every graph input by name, with the graph's shapes; integers as int64.

        Returns:
            Every graph output by name.

        Raises:
            UsageError: an input is missing or unknown.
        """
        if self._base is None:
            self._base = self._constants()
        slots = self._base.copy()
        key = self._feed(slots, inputs)
        known = self._memory.get(key) if self._program.memorable else None
        if known is None:
            self._run(self._full, slots)
            self._remember(key, slots)
        else:
            for slot, value in zip(self._host_slots, known, strict=True):
                slots[slot] = value
            self._run(self._lean, slots)
        return {name: slots[slot] for name, slot in self._program.outputs.items()}

    def _feed(self, slots: list[Any], inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        if len(inputs) != len(self._inputs):
            unknown = next((n for n in inputs if n not in self._program.inputs), None)
            if unknown is not None:
                mend = did_you_mean(unknown, self.input_names)
                raise UsageError(f"the model has no input {unknown!r}", mend=mend)
        key: list[Any] = [torch.is_inference_mode_enabled()]  # such tensors cannot be trained on
        for name, dtype in self._inputs:
            if name not in inputs:
                raise UsageError(f"input {name!r} is missing", mend=f"inputs: {self.input_names}")
            value = inputs[name]
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
            tensor = tensor.to(self._arrays.device, dtype or tensor.dtype)
            slots[self._program.inputs[name]] = tensor
            key.append(tensor.shape)
        return tuple(key)

    def _run(self, plan: list[Any], slots: list[Any]) -> None:
        with np.errstate(all="ignore"):
            for run, inputs, outputs, dead in plan:
                result = run(*[slots[i] for i in inputs])
                if type(outputs) is int:
                    slots[outputs] = result[0] if type(result) is tuple else result
                else:
                    for slot, value in zip(outputs, result, strict=False):
                        slots[slot] = value
                for slot in dead:
                    slots[slot] = None

    def _remember(self, key: tuple[Any, ...], slots: list[Any]) -> None:
        if self._program.memorable:
            self._memory[key] = [slots[slot] for slot in self._host_slots]
            while len(self._memory) > REMEMBERED:
                self._memory.popitem(last=False)
