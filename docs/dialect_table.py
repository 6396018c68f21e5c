"""Writes docs/dialects.md from the tables of ingest: `python docs/dialect_table.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from pfmc.ingest import guard  # noqa: E402
from pfmc.ingest.dialects import LOWERINGS, REASONS, STANDARD  # noqa: E402

HEAD = """\
<!-- Written by docs/dialect_table.py; change the code, not this page. -->

# Dialects: operators of com.microsoft, integer operators, old opsets

What becomes of every operator of the domain `com.microsoft` that ONNX Runtime 1.31 knows. Each
lowering is held equal to its CPU provider on the untouched file (graph optimisation BASIC) by
`tests/ingest/test_dialects*.py`; what it does not run, and what cannot become fixed hardware, is
refused by finding PFM101, or PFM110 where only one form of an operator is, which names operator,
node and reason.

## Lowered

| operator | becomes |
|---|---|
"""
PADDING = """
### Padded batches

`GroupQueryAttention` is lowered exactly: rows of different `seqlens_k`, memories longer than what
they hold (shared buffers), prompts and steps. In a prompt ONNX Runtime reads the first of the given
`position_ids` and counts on; so does the lowering. A machine is compiled for sequences that fill
their memory: the pass `kv-memory` drops what only padded rows need, removes an `attention_mask`
that nothing else reads from the inputs, and says so in its report. What padded queries compute in a
window that shows nothing real, or beside a sink, is not defined by ONNX Runtime and may differ.

### Rounded activations

`MatMulNBits` and `QMoE` are lowered with float activations. ONNX Runtime may round them to int8
(`accuracy_level = 4`; 8-bit blocks of `QMoE` always): the results then differ by up to
`sum |w| max|x| / 254` a product. `DynamicQuantizeMatMul`, `DynamicQuantizeLinear` and all QDQ
forms keep the rounding that the file asks for, and equal ONNX Runtime but for float32 sums.

## Standard operators of integer arithmetic

Where they touch activations; of constants `DequantizeLinear` stays and folds into a lazy weight.

| operator | becomes |
|---|---|
"""
OLD = """
## Old opsets

Opsets {oldest} to {newest} are read and brought to 24 (`pfmc/ingest/opset.py`): attributes that
became inputs (Slice, Clip, Pad, TopK, Split, Squeeze, Unsqueeze, reductions), Softmax, LogSoftmax
and Hardmax that flatten (below 13), Upsample and Resize of opset 10 (nearest and linear,
asymmetric), Scatter, Dropout, BatchNormalization. Files of IR {format}, which ONNX Runtime 1.31
does not read, are read if they hold no type that is new in it.

## Refused

| operator | reason |
|---|---|
"""


def page() -> str:
    """The whole page."""
    foreign = {name: lower for (domain, name), lower in LOWERINGS.items() if domain}
    standard = {name: lower for (_, name), lower in STANDARD.items()}
    refused = "".join(f"| `{name}` | {REASONS[name]} |\n" for name in sorted(REASONS))
    versions = {"oldest": guard.OPSETS[0], "newest": guard.OPSETS[-1]}
    old = OLD.format(**versions, format=guard.IR_VERSIONS[-1])
    return HEAD + _rows(foreign) + PADDING + _rows(standard) + old + refused


def _rows(table: Mapping[str, Callable[..., Any]]) -> str:
    """One row for each operator: the first line of what its lowering says of itself."""
    lines = []
    for name in sorted(table):
        text = str(table[name].__doc__).strip().partition("\n")[0].rstrip(".")
        lines.append(f"| `{name}` | {text} |\n".replace("*", "\\*"))
    return "".join(lines)


if __name__ == "__main__":
    (DOCS / "dialects.md").write_text(page())
