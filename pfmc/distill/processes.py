"""Training on several processes: FSDP2 shards the layers' parameters, small ones are copies.

Every process draws the same die, since a die follows from the step's number; each takes its part of
a step's samples. Run it with ``torchrun --nproc-per-node N -m pfmc distill …``; without torchrun
there is one process and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from pfmc.distill.student import Student
from pfmc.errors import UsageError
from pfmc.targets.grids import assign, local_part, whole


@dataclass(frozen=True)
class Processes:
    """The processes that train together: this one's number and how many there are."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def join(device: str = "cpu") -> Processes:
        """Joins those that torchrun started, if it did."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return Processes()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return Processes(distributed.get_rank(), count)

    def leave(self) -> None:
        """Leaves the others at the end."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def shard(self, student: Student) -> None:
        """Spreads the parameters of the layers over all processes (FSDP2)."""
        if self.count == 1:
            return
        from torch.distributed.fsdp import fully_shard

        for layer in student.layers.values():
            twin = getattr(layer, "twin", None)
            if twin is not None and hasattr(twin, "keeps"):
                twin.keeps = False  # whole weights of every layer are what sharding avoids
            fully_shard(layer)

    def share(self, rows: Sequence[int]) -> list[int]:
        """The part of a step's samples that this process computes.

        Raises:
            UsageError: they cannot be shared evenly.
        """
        if len(rows) % self.count:
            raise UsageError(
                f"{len(rows)} samples a step cannot be shared by {self.count} processes",
                mend=f"--set distill.batch={-(-len(rows) // self.count) * self.count}",
            )
        each = len(rows) // self.count
        return list(rows[self.rank * each : (self.rank + 1) * each])

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return float(tensor) / self.count

    def greatest(self, *values: float) -> list[float]:
        """The greatest of each of some numbers over all processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return [float(v) for v in tensor]

    def average(self, student: Student) -> None:
        """Averages the gradients of parameters that are copies; FSDP2 does so for the others."""
        if self.count == 1:
            return
        for parameter in student.parameters():
            if not hasattr(parameter, "to_local") and parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def clip(self, student: Student, limit: float) -> None:
        """Scales all gradients so that their joint norm is at most `limit`."""
        held = [p.grad for p in student.parameters() if p.grad is not None]
        if self.count == 1:
            nn.utils.clip_grads_with_norm_(
                student.parameters(), limit, nn.utils.get_total_norm(held)
            )
            return
        sharded = torch.zeros((), dtype=torch.float64)
        copies = torch.zeros((), dtype=torch.float64)
        for gradient in held:
            local = local_part(gradient)
            power = local.double().square().sum().cpu()
            if hasattr(gradient, "to_local"):
                sharded += power
            else:
                copies += power
        distributed.all_reduce(sharded)
        factor = min(1.0, limit / (float((sharded + copies).sqrt()) + 1e-6))
        for gradient in held:
            gradient.mul_(factor)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy of all parameters, whole, on the host."""
        return {n: self.whole(p.detach()) for n, p in module.named_parameters()}

    @staticmethod
    def whole(value: Tensor) -> Tensor:
        """A copy on the host of a tensor, whole if it was sharded; all processes must call it."""
        return whole(value)

    @staticmethod
    def like(value: Tensor, parameter: Tensor) -> Tensor:
        """`value` laid out as `parameter` is, if it has its shape."""
        if value.shape != parameter.shape:
            return value
        made = torch.empty_like(parameter, requires_grad=False)
        assign(made, value)
        return made
