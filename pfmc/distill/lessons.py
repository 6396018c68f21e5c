"""What is learned from: samples, how they are fed, which outputs count and how they are compared.

A lesson holds arrays with one row a sample. `Language` is for models with token scores: windows of
a text, or text that the teacher writes itself. `Vectors` is for everything else: encoders, vision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from pfmc.distill import losses
from pfmc.distill.drive import Drive, size_of
from pfmc.distill.feeds import text_feed

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Outputs = Mapping[str, Tensor]

_NEAR = 32  # batches whose samples are sorted by length: less padding, order still by chance


class Lesson(Protocol):
    """The samples of one kind of model."""

    @property
    def rows(self) -> int:
        """How many samples there are to learn from."""
        ...

    @property
    def held_out(self) -> int:
        """How many samples are kept for judging."""
        ...

    @property
    def lengths(self) -> Array | None:
        """Positions of each sample, if samples are fed without the padding that none needs."""
        ...

    def feeds(self, rows: Sequence[int], held_out: bool = False) -> Feeds:
        """The graph inputs of samples by number."""
        ...

    def keep(self, outputs: Outputs) -> dict[str, Tensor]:
        """What to keep of a teacher's outputs: one row a sample, as small as it can be."""
        ...

    def loss(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> Tensor:
        """How far the student is off; `target` as `keep` made it."""
        ...

    def figures(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> dict[str, float]:
        """Means over the samples that tell how good the student is; ``loss`` is one of them."""
        ...


@dataclass(frozen=True)
class Language:
    """Token windows of a language model: forward KL at every position.

    Attributes:
        drive: how the graph is driven.
        ids: int64 ``[N, S]`` to learn from; judge: the same to judge by.
    """

    drive: Drive
    ids: Array
    judge: Array

    @property
    def rows(self) -> int:
        """Windows."""
        return len(self.ids)

    @property
    def held_out(self) -> int:
        """Windows kept for judging."""
        return len(self.judge)

    @property
    def lengths(self) -> None:
        """Windows are all as long."""
        return None

    def feeds(self, rows: Sequence[int], held_out: bool = False) -> Feeds:
        """See `Lesson.feeds`."""
        return text_feed(self.drive, (self.judge if held_out else self.ids)[np.asarray(rows)])

    def _scores(self, outputs: Outputs) -> Tensor:
        return outputs[self.drive.logits][:, : self.ids.shape[1]]

    def keep(self, outputs: Outputs) -> dict[str, Tensor]:
        """The teacher's probabilities p, float16, and sum p log p - p + 1 of each position
        ``[B, S]``: the negative entropy, and what float16 drops of many small p made good."""
        kept = functional.softmax(self._scores(outputs).float(), dim=-1).to(torch.float16)
        p = kept.float()
        return {"chances": kept, "certainty": (torch.special.xlogy(p, p) - p).sum(dim=-1) + 1}

    def loss(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> Tensor:
        """Forward KL in nats a token."""
        ours = self._scores(outputs)
        chances = target["chances"].float().flatten(0, 1)
        return losses.forward_kl(ours.flatten(0, 1), chances, target["certainty"])

    def figures(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> dict[str, float]:
        """KL, and the excess in nats a token over the teacher on the tokens themselves."""
        ids = torch.as_tensor(feeds[self.drive.ids])[:, 1 : self.ids.shape[1], None]
        logs = functional.log_softmax(self._scores(outputs).float(), dim=-1)[:, :-1]
        truth = target["chances"].float().clamp_min(1e-7).log()[:, :-1]
        ids = ids.to(logs.device)
        excess = (truth.gather(-1, ids) - logs.gather(-1, ids)).mean()
        return {"loss": float(self.loss(outputs, target, feeds)), "excess": float(excess)}


@dataclass(frozen=True)
class Vectors:
    """Any inputs and real outputs: class scores by KL, vectors by error and cosine.

    Attributes:
        inputs: by graph input, one row a sample; judge: the same to judge by.
        scores: outputs that are scores ``[..., V]``; vectors: outputs that are vectors.
        mask: graph input ``[N, S]`` that says where tokens are, or "".
        padded: whether what follows the last token of a batch is padding that can be left away.
        apart: outputs at positions of their own, of which the mask tells nothing: a decoder's.
    """

    inputs: Feeds
    judge: Feeds
    scores: tuple[str, ...]
    vectors: tuple[str, ...]
    mask: str = ""
    padded: bool = False
    apart: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Samples."""
        return len(next(iter(self.inputs.values())))

    @property
    def held_out(self) -> int:
        """Samples kept for judging."""
        return len(next(iter(self.judge.values())))

    def feeds(self, rows: Sequence[int], held_out: bool = False) -> Feeds:
        """See `Lesson.feeds`."""
        index = np.asarray(rows)
        found = {k: v[index] for k, v in (self.judge if held_out else self.inputs).items()}
        if not self.padded:
            return found
        longest = int(_lengths(found[self.mask]).max())
        return {k: v[:, :longest] for k, v in found.items()}

    @property
    def lengths(self) -> Array | None:
        """Up to the last token of each sample."""
        return _lengths(self.inputs[self.mask]) if self.padded else None

    def keep(self, outputs: Outputs) -> dict[str, Tensor]:
        """Probabilities of scores, and vectors as they are."""
        kept = {n: functional.softmax(outputs[n].float(), dim=-1) for n in self.scores}
        return kept | {n: outputs[n].float() for n in self.vectors}

    def loss(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> Tensor:
        """The sum over all outputs that count."""
        parts = []
        for name in self.scores:
            ours, chances = outputs[name], target[name]
            if (mask := self._mask(name, ours, feeds)) is not None:
                ours, chances = ours[mask], chances[mask]
            parts.append(losses.forward_kl(ours.flatten(0, -2), chances.flatten(0, -2)))
        for name in self.vectors:
            mask = self._mask(name, outputs[name], feeds)
            parts.append(losses.vector_error(outputs[name].float(), target[name], mask))
        return torch.stack(parts).sum()

    def figures(self, outputs: Outputs, target: Outputs, feeds: Feeds) -> dict[str, float]:
        """The loss, and the mean cosine of each vector output's positions that count."""
        found = {"loss": float(self.loss(outputs, target, feeds))}
        for name in self.vectors:
            ours, truth = outputs[name].float(), target[name]
            same = functional.cosine_similarity(ours, truth, dim=-1)
            mask = self._mask(name, ours, feeds)
            found[f"cosine {name}"] = float((same if mask is None else same[mask]).mean())
        return found

    def _mask(self, name: str, value: Tensor, feeds: Feeds) -> Tensor | None:
        """Where ``[B, S]`` an output ``[B, S, D]`` has tokens; None where all of it counts."""
        if not self.mask or name in self.apart:
            return None
        mask = torch.as_tensor(feeds[self.mask], device=value.device) != 0
        return mask if value.ndim == 3 and value.shape[:2] == mask.shape else None


def _lengths(mask: Array) -> Array:
    """Positions up to the last that counts, int64 ``[N]``, at least one."""
    places = np.arange(1, mask.shape[1] + 1)
    return np.asarray(np.where(mask != 0, places, 1).max(axis=1))


def order_of(lesson: Lesson, batch: int, rng: np.random.Generator) -> Array:
    """The samples of an epoch in the order of their batches, int64 ``[rows]``.

    Where lengths differ, samples of like length share a batch: those of `_NEAR` batches are sorted,
    and the whole batches shuffled. The last, incomplete batch stays last.
    """
    order, lengths = rng.permutation(lesson.rows), lesson.lengths
    if lengths is None:
        return order
    groups = np.array_split(order, range(batch * _NEAR, len(order), batch * _NEAR))
    order = np.concatenate([g[np.argsort(lengths[g], kind="stable")] for g in groups])
    whole = len(order) // batch * batch
    batches = rng.permutation(order[:whole].reshape(-1, batch))
    return np.concatenate([batches.ravel(), order[whole:]])


def outputs_that_count(model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(scores, vectors) among the real outputs of a graph, by their names.

    Without those that compare the samples of a batch with each other (``logits_per_image``): what
    they say of a sample depends on which others stand beside it.
    """
    real = [v for v in model.graph.outputs if v.dtype is not None and v.dtype.is_floating_point()]
    samples = {side(v, 0) for v in model.graph.inputs} - {""}
    names = [
        str(v.name) for v in real
        if v.shape is None or len(v.shape) == 3 or (len(v.shape) == 2 and side(v, 1) not in samples)
    ]  # fmt: skip
    scores = tuple(n for n in names if "logits" in n)
    return scores, tuple(n for n in names if n not in scores)


def side(value: ir.Value, axis: int) -> str:
    """The name of a free axis; "" of one that is fixed, nameless or absent."""
    if value.shape is None or len(value.shape) <= axis or size_of(value, axis) is not None:
        return ""
    size = value.shape[axis]
    return "" if isinstance(size, int) or size.value is None else str(size.value)
