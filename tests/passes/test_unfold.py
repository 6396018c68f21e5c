"""Convolutions as fixed linears: every kernel, stride, padding, dilation and grouping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfmc.ir import vocabulary
from pfmc.passes.fold import Fold
from pfmc.passes.linears import Linears

SIZES = st.integers(1, 3)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.lists(SIZES, min_size=1, max_size=2),
    data=st.data(),
    groups=st.sampled_from([1, 2, 4]),
    free=st.booleans(),
)
def test_any_convolution(
    lab: Any, kernel: list[int], data: Any, groups: int, free: bool
) -> None:
    """Equal to ONNX Runtime's own convolution."""
    dims = len(kernel)
    steps, spread = (data.draw(st.lists(SIZES, min_size=dims, max_size=dims)) for _ in range(2))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * dims, max_size=2 * dims))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, *[9 + i for i in range(dims)])).astype(np.float32)
    w = rng.standard_normal((8, 4 // groups, *kernel)).astype(np.float32)
    b = rng.standard_normal(8).astype(np.float32)
    sizes = ",".join("L" if free and i == dims - 1 else str(9 + i) for i in range(dims))
    outs = ",".join(f"O{i}" for i in range(dims))
    options = f"strides={steps}, dilations={spread}, pads={pads}, group={groups}"
    text = (
        f"(float[B,4,{sizes}] x) => (float[B,8,{outs}] y) {{ y = Conv<{options}>(x, w, b) }}"
    )
    model = lab.make(text, w=w, b=b)
    assert lab.same(model, [Linears(), Fold()], {"x": x}) == []
    assert "Conv" not in lab.counts(model)
    assert len(vocabulary.fixed_linears(model)) == 1  # small groups share a block


@pytest.mark.parametrize(("groups", "width", "linears"), [(4, 32, 4), (8, 8, 2), (32, 1, 1)])
def test_groups_fill_blocks_of_256_inputs(
    lab: Any, floats: Any, groups: int, width: int, linears: int
) -> None:
    """A group of 256 inputs stands alone, four of 64 share a block, all 32 of 8 share one."""
    channels = groups * width
    text = f"(float[2,{channels},20] x) => (float[2,C,L] y) {{ y = Conv<group={groups}>(x, w) }}"
    model = lab.make(text, w=floats(channels, width, 8))
    lab.same(model, [Linears()], {"x": floats(2, channels, 20)})
    nodes = vocabulary.fixed_linears(model)
    assert len(nodes) == linears
    assert nodes[0].inputs[1].const_value.shape[0] == channels * 8 // linears
    assert ("pfmc.value" in nodes[0].metadata_props) == (linears == 1)


def test_one_linear_tells_how_its_output_lies(lab: Any, floats: Any) -> None:
    text = "(float[2,4,9] x) => (float[2,8,L] y) { y = Conv<strides=[2]>(x, w) }"
    model = lab.make(text, w=floats(8, 4, 3))
    lab.apply(model, [Linears()])
    (node,) = vocabulary.fixed_linears(model)
    assert node.metadata_props["pfmc.perm"] == "0 2 1"
    assert node.metadata_props["pfmc.value"] == "y"


def test_padding_left_to_the_runtime_is_declined(lab: Any, floats: Any) -> None:
    text = '(float[2,4,9] x) => (float[2,8,L] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }'
    model = lab.make(text, w=floats(8, 4, 3))
    (declined,) = lab.same(model, [Linears()], {"x": floats(2, 4, 9)})
    assert "auto_pad" in declined.reason


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_do_not_divide_the_channels_are_declined(
    groups: int, lab: Any, floats: Any
) -> None:
    text = f"(float[2,A,9] x) => (float[2,8,L] y) {{ y = Conv<group={groups}>(x, w) }}"
    model = lab.make(text, w=floats(8, 4, 3))
    (declined,) = lab.apply(model, [Linears()])
    assert f"in {groups} groups of 8" in declined.reason
