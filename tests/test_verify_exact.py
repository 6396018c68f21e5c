"""Integer products are checked against ONNX Runtime for every layer, many in one session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pfmc.verify as room
from pfmc.targets.base import StoredLinear


def _stored(name: str, inputs: int, outputs: int) -> StoredLinear:
    codes = np.random.default_rng(inputs).integers(-7, 8, (inputs, outputs), np.int8)
    return StoredLinear(name, inputs, outputs, {}, {"codes": codes}, None, 8, None)


LAYERS = [_stored("a", 9, 4), _stored("b", 300, 5), _stored("c", 9, 4)]


@pytest.mark.parametrize("together", [1, 1000, 1 << 24])
def test_groups_hold_every_layer_once(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_TOGETHER", together)
    groups = list(room._grouped(LAYERS))
    assert [s.name for g in groups for s in g] == ["a", "b", "c"]
    assert len(groups) == {1: 3, 1000: 2, 1 << 24: 1}[together]


class _Machine:
    """A machine whose emitted files hold the codes of `LAYERS`, one of them `wrong`."""

    path = Path("unused.pfm")

    def __init__(self, wrong: str) -> None:
        self.wrong, self.target = wrong, self

    def integer_product(self, stored: StoredLinear, _: Path, codes: Any) -> Any:
        weight = stored.tensors["codes"].astype(np.int32)
        if stored.name == self.wrong:
            weight[0, 0] += 1
        return codes.astype(np.int32) @ weight


@pytest.mark.parametrize("wrong", ["", "b", "c"])
def test_one_wrong_weight_shows(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(_: Path) -> Iterator[StoredLinear]:
        return (replace(s) for s in LAYERS)

    monkeypatch.setattr(room.store, "read_layers", layers)
    row = room._exact(_Machine(wrong), seed=1)  # type: ignore[arg-type]
    assert (row.value > 0) == bool(wrong)
    assert row.passed is not bool(wrong)
