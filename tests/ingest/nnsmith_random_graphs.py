"""Random graphs of NNSmith through pfmc, by hand: ``generate`` makes them, ``check`` compares.

NNSmith 0.1.0 needs an environment of its own and, with a torch of today, its exporter turned to
TorchScript and opset 17 (done here)::

    python -m venv nns && nns/bin/pip install torch onnx nnsmith==0.1.0
    nns/bin/python tests/ingest/nnsmith_random_graphs.py generate FOLDER --count 1000
    python -m tests.ingest.nnsmith_random_graphs check FOLDER

Each graph is a file ``N.onnx`` with its inputs and torch's outputs in ``N.npz``; nothing is a
pickle. `check` needs pfmc and ONNX Runtime, and no NNSmith; it ends with 1 on any disagreement.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOST_NODES = 40


def generate(folder: Path, count: int, first: int) -> Iterator[tuple[int, str]]:
    """Writes graphs `first` to ``first + count - 1``; yields each number and how it went."""
    kind, operators = _prepare()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        if (folder / f"{number}.npz").exists():
            continue
        try:
            _write(kind, operators, folder / str(number), number)
        except Exception as error:  # NNSmith or the exporter: some graphs cannot be exported
            yield number, f"{type(error).__name__}: {str(error)[:100]}"
        else:
            yield number, "made"


def _prepare() -> tuple[Any, Any]:
    """NNSmith's model type and the operators that can be exported, with the exporter patched."""
    import torch
    from nnsmith.materialize import Model
    from nnsmith.narrow_spec import auto_opset

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    export = torch.onnx.export

    def patched(*args: Any, **more: Any) -> Any:
        return export(*args, **{**more, "dynamo": False, "opset_version": 17, "verbose": False})

    torch.onnx.export = patched  # type: ignore[assignment]
    kind = Model.init("onnx", backend_target="cpu")
    kind.add_seed_setter()
    return kind, auto_opset(kind)


def _write(kind: Any, operators: Any, path: Path, seed: int) -> None:
    import random

    import torch
    from nnsmith.graph_gen import model_gen

    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    nodes = 3 + seed * 7 % (MOST_NODES - 3)
    made = model_gen(
        opset=operators, method="symbolic-cinit", seed=seed, max_elem_per_tensor=4096,
        max_nodes=nodes, timeout_ms=10000,
    )  # fmt: skip
    model = kind.from_gir(made.make_concrete())
    model.refine_weights()
    oracle = model.make_oracle()
    path.with_suffix(".onnx").write_bytes(model.native_model.SerializeToString())
    arrays = {f"in:{k}": v for k, v in oracle.input.items()}
    arrays |= {f"out:{k}": v for k, v in oracle.output.items()}
    np.savez(path.with_suffix(".npz"), **arrays)


# -- comparison, in pfmc's environment -----------------------------------------------------------


def check(folder: Path, count: int) -> Counter[str]:
    """Compares the first `count` graphs of `folder`; prints what disagrees, counts fates."""
    from tests.ingest.agreement import agree

    found: Counter[str] = Counter()
    worst = 0.0
    for path in sorted(folder.glob("*.onnx"), key=lambda p: int(p.stem))[:count]:
        with np.load(path.with_suffix(".npz")) as held:
            feeds = {k[3:]: held[k] for k in held.files if k.startswith("in:")}
            torch = {k[4:]: held[k] for k in held.files if k.startswith("out:")}
        outcome = agree(path, feeds, torch)
        found[outcome.fate] += 1
        worst = max(worst, outcome.error)
        if outcome.wrong:
            print(f"{path.name}: {outcome.wrong}", flush=True)
            found["WRONG"] += 1
    print(f"largest error of those that agree: {worst:.3g} of the largest element")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("generate", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    if asked.what == "generate":
        for number, how in generate(asked.folder, asked.count, asked.first):
            print(number, how, flush=True)
        return 0
    found = check(asked.folder, asked.count)
    for fate, count in found.most_common():
        print(f"{count:5} {fate}")
    return 1 if found["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
