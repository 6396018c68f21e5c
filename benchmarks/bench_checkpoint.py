"""Makes a 1.16e9-parameter bf16 Llama checkpoint ready for passes beside transformers' loading it.

Both run in a process of their own, interpreter and imports included; the imports alone are the
line below. Peak memory is the largest resident set, mapped pages of the shards included.

    python -m benchmarks.bench_checkpoint [--folder DIR] [--layers N]
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import process
from benchmarks.figure import Figure
from benchmarks.synthetic import Shape, main, placed

SHARDS = 3

_IMPORTS = "import sys; from pfmc import ingest"
_OURS = f"{_IMPORTS}; ingest.load(sys.argv[1])"
CANONICAL = (
    f"{_IMPORTS}; from pfmc.passes import pipeline, recipe; "
    "pipeline.canonicalise(ingest.load(sys.argv[1]).model, recipe.load('stream', ()).passes)"
)
_THEIRS = (
    "import sys, transformers; "
    "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')"
)


def generate(folder: Path, shape: Shape) -> None:
    """Writes a Llama checkpoint of `shape` in bf16 in `SHARDS` files, in constant memory.

    Its matrices repeat one block of noise: only their size matters here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    names = [(n, d if len(d) == 1 or "embed" in n else d[::-1]) for n, d in shape.weights()]
    cuts = [i * len(names) // SHARDS for i in range(SHARDS + 1)]
    parts = [names[a:b] for a, b in itertools.pairwise(cuts)]
    placed = {}
    for number, part in enumerate(parts, 1):
        title = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        _shard(folder / title, part)
        placed.update({name: title for name, _ in part})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip


def _shard(path: Path, part: list[tuple[str, tuple[int, ...]]]) -> None:
    """One safetensors file; bf16 is the upper half of float32."""
    header, place = {}, 0
    for name, dims in part:
        end = place + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for left in range(place, 0, -len(block)):
            out.write(block[: min(left, len(block))])


def figures(folder: Path | None = None, layers: int = Shape.layers) -> Iterator[Figure]:
    """CPU time and peak memory until the graph is ready, and beside transformers.

    Args:
        folder: where the checkpoint lies or is generated, and is kept; a temporary one by default.
        layers: decoder layers; 20 give 1.1e9 parameters.
    """
    shape = Shape(layers=layers)
    with placed(folder, "config.json", generate, shape) as place:
        yield from _compared(place)


def _compared(folder: Path) -> Iterator[Figure]:
    imports, ours, canonical, theirs = (
        min((_run(code, folder) for _ in range(2)), key=lambda c: c.cpu_s)
        for code in (_IMPORTS, _OURS, CANONICAL, _THEIRS)
    )
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    name = f"checkpoint of {size / 1e9:.2f} GB ready for passes"
    beside = f"imports alone {imports.cpu_s:.2f} CPU s, {imports.peak_bytes / 1e6:.0f} MB"
    yield Figure(name, ours.cpu_s, "CPU s", 2.0, beside=beside)
    yield Figure(f"{name}, peak", ours.peak_bytes / 1e6, "MB", 200.0, beside=beside)
    yield Figure(f"{name} and canonical", canonical.cpu_s, "CPU s", 1.5)
    yield Figure(f"{name} and canonical, peak", canonical.peak_bytes / 1e6, "MB", 250.0)
    words = f"transformers' from_pretrained {theirs.cpu_s:.1f} CPU s, {theirs.wall_s:.1f} s"
    yield Figure(f"{name}, to transformers", ours.cpu_s / theirs.cpu_s, "x", 1.0, beside=words)
    yield Figure(
        f"{name}, peak to transformers", ours.peak_bytes / theirs.peak_bytes, "x", 1.0,
        beside=f"{theirs.peak_bytes / 1e6:.0f} MB",
    )  # fmt: skip


def _run(code: str, folder: Path) -> process.Cost:
    return process.run([sys.executable, "-c", code, str(folder)])


if __name__ == "__main__":
    main(figures)
