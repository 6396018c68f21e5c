"""Looking into models and artifacts: trees, layers, operations, tiles and graphs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfmc import store
from pfmc.inspect_model import look, select_items, select_layers, tile
from pfmc.report.tree import Item, dot, grow, rows

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_a_model_is_shown_as_a_tree(here: Callable[..., Any], tiny: Path) -> None:
    done = here("inspect", tiny)
    assert (done.code, done.err) == (0, "")
    title, headings, whole, *_ = done.out.splitlines()
    assert title == "model.onnx: pfmc benchmarks, FLOAT16, opset 24"
    assert headings.split() == ["module", "operations", "weights", "bytes"]
    assert "MatMul" in whole


def test_equal_layers_are_folded(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    lines = here("inspect", artifacts["rom"]).out.splitlines()
    (folded,) = (line for line in lines if "×2 " in line and "–" in line)
    assert folded.split()[:2] == ["0–1", "×2"]
    assert "7×pfmc.QuantisedLinear" in folded
    assert sum("q_proj" in line for line in lines) == 1


def test_weights_are_counted_without_folding_them_away(
    here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    """15 matrices and 8 norms' worth of numbers; what is in the tree adds up to its root."""
    rows = here("inspect", artifacts["rom"], "--json").json()["rows"]
    root, linears = rows[0], [r for r in rows if r["label"].endswith("_proj")]
    (layers,) = (r for r in rows if r["label"] == "model.layers")
    assert sum(r["weights"] for r in linears) * 2 == layers["weights"] < root["weights"]
    assert root["operators"]["pfmc.QuantisedLinear"] == 15


def test_depth_cuts_the_tree(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    for depth in (1, 2, 3):
        rows = here("inspect", artifacts["rom"], "--depth", depth, "--json").json()["rows"]
        assert max(r["depth"] for r in rows) == depth


def test_csv_holds_plain_numbers(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    printed = here("inspect", artifacts["rom"], "--csv").out
    table = list(csv.DictReader(io.StringIO(printed)))
    rows = here("inspect", artifacts["rom"], "--json").json()["rows"]
    assert [int(r["weights"]) for r in table] == [r["weights"] for r in rows]
    assert [int(r["bytes"]) for r in table] == [r["size"] for r in rows]
    assert [int(r["count"]) for r in table] == [r["count"] for r in rows]


def test_layers_by_glob(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    body = here("inspect", artifacts["rom"], "--layer", "*.self_attn.?_proj", "--json").json()
    assert len(body["rows"]) == 8
    assert {(r["inputs"], r["outputs"], r["bits"]) for r in body["rows"]} == {(64, 64, 4)}
    assert {r["counts"]["macs"] for r in body["rows"]} == {4096.0}
    printed = here("inspect", artifacts["rom"], "--layer", "*.self_attn.?_proj", "--csv").out
    table = list(csv.DictReader(io.StringIO(printed)))
    assert [r["layer"] for r in table] == [r["name"] for r in body["rows"]]
    headings = printed.splitlines()[0].split(",")
    assert len(headings) == len(set(headings))
    one = here("inspect", artifacts["rom"], "--layer", "lm_head").out
    assert re.search(r"^outputs +128$", one, re.MULTILINE)


def test_operations_by_type(here: Callable[..., Any], tiny: Path) -> None:
    body = here("inspect", tiny, "--op", "Softmax", "--json").json()
    assert len(body["rows"]) == 2
    assert {r["op"] for r in body["rows"]} == {"Softmax"}
    printed = here("inspect", tiny, "--op", "Softmax").out
    assert printed.count(" Softmax ") == 2


def test_an_operation_of_ours_by_its_short_name(artifacts: dict[str, Path]) -> None:
    view = look(artifacts["rom"])
    assert select_items(view, "SwiGLU") == select_items(view, "pfmc.SwiGLU")
    assert len(select_items(view, "SwiGLU")) == 2


WRONG = {
    "layer": (("--layer", "model.layers.0.mlp.upproj"), "did you mean 'model.layers.0.mlp.up"),
    "op": (("--op", "Atention"), "did you mean 'Attention'?"),
    "tile form": (("--tile", "lm_head"), "write LAYER[row,column]"),
    "tile layer": (("--tile", "lm_hed[0,0]"), "did you mean 'lm_head'?"),
    "tile place": (("--tile", "lm_head[9,9]"), "[0,0] to [0,1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there(
    name: str, here: Callable[..., Any], artifacts: dict[str, Path]
) -> None:
    words, phrase = WRONG[name]
    here("inspect", artifacts["rom"], *words).refused(2, phrase)


def test_layers_and_tiles_are_of_artifacts(here: Callable[..., Any], tiny: Path) -> None:
    here("inspect", tiny, "--layer", "*").refused(2, "--layer looks into an artifact", "--op")
    here("inspect", tiny, "--tile", "lm_head[0,0]").refused(2, "--tile looks into an artifact")


@pytest.mark.parametrize("target", ["rom", "crossbar", "optical"])
def test_a_tile_shows_its_own_codes(target: str, artifacts: dict[str, Path]) -> None:
    """Every tile of a layer, put together, is the layer."""
    view = look(artifacts[target])
    record = store.find_layer(view.layers, "lm_head")
    stored = store.read_layer(artifacts[target], record)
    codes = stored.tensors["codes"].astype(np.int64)
    grid = [sorted(set(stored.tiles[k].tolist())) for k in ("row0", "col0")]
    seen, share, zeros = np.zeros_like(codes), 0.0, 0.0
    for r in range(len(grid[0])):
        for c in range(len(grid[1])):
            found = tile(view, f"lm_head[{r},{c}]")
            row = found["tile"]
            assert (row["row0"], row["col0"]) == (grid[0][r], grid[1][c])
            part = np.s_[row["row0"] : row["row0"] + row["rows"],
                         row["col0"] : row["col0"] + row["cols"]]  # fmt: skip
            seen[part] += 1
            assert found["first_codes"] == codes[part][:8, :8].tolist()
            assert found["codes"]["max"] == codes[part].max()
            assert found["codes"]["rms"] == pytest.approx(np.sqrt((codes[part] ** 2.0).mean()))
            share += found["share_of_layer"]
            zeros += found["codes"]["zero_fraction"] * codes[part].size
    assert (seen == 1).all()
    assert share == pytest.approx(1)
    assert zeros == pytest.approx((codes == 0).sum())
    assert found["sources"] == record.sources
    assert found["weight"] == "lm_head.weight"


def test_a_tile_names_its_source_in_the_model(tiny: Path, artifacts: dict[str, Path]) -> None:
    import onnx

    nodes = onnx.load(tiny, load_external_data=False).graph.node
    for name in (Q_PROJ, "lm_head"):
        (source,) = tile(look(artifacts["rom"]), f"{name}[0,0]")["sources"]
        assert nodes[int(source.removeprefix("n"))].input[1] == f"{name}.weight"


def test_no_weights_are_read_but_for_a_tile(
    here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "rom.pfm"
    shutil.copytree(artifacts["rom"], out)
    for folder in ("weights", "tiles", "hardware"):
        shutil.rmtree(out / folder)
    for words in ((), ("--layer", "*"), ("--op", "Attention"), ("--dot",), ("--csv",)):
        bare, whole = here("inspect", out, *words), here("inspect", artifacts["rom"], *words)
        assert (bare.code, bare.out) == (0, whole.out)
    here("inspect", out, "--tile", "lm_head[0,0]").refused(6, "the weights cannot be read")


DOT = """\
digraph model {
  rankdir=TB; node [shape=box, fontname=sans];
  n0 [label="(no module)"];
  n1 [label="model.layers"];
  n2 [label="lm_head"];
  n0 -> n2 [label="1"];
  n0 -> n1 [label="14"];
  n1 -> n0 [label="14"];
}
"""


def test_dot_is_stable(here: Callable[..., Any], artifacts: dict[str, Path]) -> None:
    for target in ("rom", "crossbar", "optical"):
        done = here("inspect", artifacts[target], "--dot")
        assert (done.code, done.out, done.err) == (0, DOT, "")
    deep = here("inspect", artifacts["rom"], "--dot", "--depth", "9").out
    assert f'[label="{Q_PROJ}"]' in deep


def test_any_name_makes_valid_dot() -> None:
    nasty = 'a"; b -> c; "\n\\'
    items = [
        Item("x", "Add", nasty, inputs=("in",), outputs=("v",)),
        Item("y", "Mul", "other", inputs=("v", "v"), outputs=("w",)),
    ]
    text = dot(items, 1)
    quoted = r'"(?:[^"\\\n]|\\.)*"'
    for line in text.splitlines()[2:-1]:
        assert re.fullmatch(rf"  n\d+( -> n\d+)? \[label={quoted}\];", line), line
    assert text.count("->") == 1 + nasty.count("->")
    assert 'n0 -> n1 [label="2"]' in text


def test_trees_fold_only_neighbours_of_one_structure() -> None:
    items = [Item(f"{i}", "Add" if i != 2 else "Mul", f"layers.{i}", weights=4) for i in range(5)]
    labels = [r.label for r in rows(grow(items))]
    assert labels == ["model", "layers", "0–1 ×2", "2", "3–4 ×2"]
    assert rows(grow(items))[0].weights == 20


def test_layers_are_found_in_order_of_the_graph(artifacts: dict[str, Path]) -> None:
    names = [r.name for r in select_layers(look(artifacts["rom"]), "*")]
    assert names[0] == Q_PROJ
    assert names[-1] == "lm_head"
    listed = json.loads((artifacts["rom"] / "layers.json").read_bytes())
    assert names == [r["name"] for r in listed]
