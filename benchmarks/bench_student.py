"""Times the student against transformers' own forward of the same Llama, on one thread.

    python benchmarks/bench_student.py MODEL.onnx [--batch 8] [--length 64] [--runs 30]

``config.json`` must lie beside the model. Forwards alternate, so that a busy machine disturbs both;
CPU time of the process is compared, median over the runs. Also prints the time that the student
spends outside the operators, per node.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pfmc.distill.student import Student


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def idle(outputs: tuple[int, ...] | int) -> Callable[..., Any]:
    """An operator that does nothing but return as many values as it must."""
    result = None if isinstance(outputs, int) else (None,) * len(outputs)
    return lambda *inputs: result


def overhead_seconds(student: Student, feeds: dict[str, torch.Tensor], runs: int) -> float:
    """Median time of a forward whose operators all do nothing but hand over ready results."""
    student(**feeds)
    kept = student._lean
    student._lean = [(idle(o), i, o, d) for _, i, o, d in kept]
    try:
        return statistics.median(cpu_seconds(lambda: student(**feeds)) for _ in range(runs))
    finally:
        student._lean = kept


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig.from_json_file(str(options.model.parent / "config.json"))
    teacher = LlamaForCausalLM(config).eval()
    student = Student(ir.load(options.model))
    ids = torch.randint(0, config.vocab_size, (options.batch, options.length))
    ours: list[float] = []
    theirs: list[float] = []
    with torch.inference_mode():
        for _ in range(options.runs + 3):
            ours.append(cpu_seconds(lambda: student(input_ids=ids)))
            theirs.append(cpu_seconds(lambda: teacher(input_ids=ids, use_cache=False)))
        mine, yours = statistics.median(ours[3:]), statistics.median(theirs[3:])
        spare = overhead_seconds(student, {"input_ids": ids}, options.runs)
    nodes = len(student._lean)
    print(f"student       {mine * 1e3:8.2f} ms")
    print(f"transformers  {yours * 1e3:8.2f} ms")
    print(f"ratio         {mine / yours:8.3f}")
    print(f"overhead      {spare / nodes * 1e6:8.2f} us a node, {nodes} nodes")


if __name__ == "__main__":
    main()
