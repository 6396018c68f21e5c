"""Export a trained `bard` checkpoint: two ONNX graphs on one weight file, config, sample, card.

    python models/bard/export.py --corpus PATH/tinyshakespeare.txt --out DIR

DIR is where train.py left `checkpoint.safetensors`, `tokenizer.json` and `training.json`. What it
writes, `DIR/bard.toml` and `DIR/bard/`, goes onto the shelf as it is. Same input, same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MethodType

import evaluate
import numpy as np
import onnx_ir as ir
import torch
from evaluate import CONTEXT, HELD_OUT
from recipe import ARCHITECTURE, CORPUS_SHA256, Recipe, read_corpus
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

OPSET = 20
ALIGNMENT = 64  # bytes, of each tensor in the shared data file
INLINE_BYTES = 512  # smaller tensors stay inside the graph
STACK_TRACE = "pkg.torch.onnx.stack_trace"
VERSIONED = ("torch", "transformers", "tokenizers", "onnxscript", "onnx-ir", "onnxruntime")
TOLERANCE = 1e-4  # of logits, absolute
SAMPLING = {"new_tokens": 300, "temperature": 0.8, "seed": 1}
PROMPTS = ("ROMEO:", "First Citizen:\n", "KING RICHARD III:\nWhat", "JULIET:\nO,")


def plain_forward(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Map int64 [batch, sequence] to logits [batch, sequence, vocabulary].

    The empty cache keeps transformers from looking for several texts packed into one row.
    """
    return LlamaForCausalLM.forward(model, input_ids, past_key_values=DynamicCache()).logits


def cached_forward(model: LlamaForCausalLM, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """Return logits, then key and value of each layer with the new positions appended.

    `past` is key, value, key, value ... by layer, each [batch, kv heads, past, head size].
    """
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(key, value, layer)
    scores = LlamaForCausalLM.forward(model, input_ids, past_key_values=cache).logits
    return (scores, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def load(checkpoint: Path, forward: Callable[..., object]) -> LlamaForCausalLM:
    """Build the model in float32 from a checkpoint of train.py, with `forward` as its forward.

    A bound function instead of a subclass: class names in the graph stay those of transformers.
    """
    weights = load_file(checkpoint)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.forward = MethodType(forward, model)
    return model.eval()


def cache_names(layers: int, prefix: str) -> list[str]:
    """Name keys and values of all layers: prefix.0.key, prefix.0.value, prefix.1.key ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def to_onnx(
    model: LlamaForCausalLM,
    arguments: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dims: dict[str, object],
) -> ir.Model:
    """Run torch's dynamo exporter; drop its stack traces, they hold paths of this machine."""
    program = torch.onnx.export(
        model,
        arguments,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dims,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop(STACK_TRACE, None)
    return program.model


def export_plain(checkpoint: Path) -> ir.Model:
    """Export input_ids -> logits with free batch and sequence."""
    dims = {"input_ids": {0: "batch", 1: "sequence"}}
    ids = torch.zeros(2, 5, dtype=torch.int64)
    return to_onnx(load(checkpoint, plain_forward), (ids,), ["input_ids"], ["logits"], dims)


def export_cached(checkpoint: Path) -> ir.Model:
    """Export the graph with a key/value cache and free batch, sequence and past length."""
    model = load(checkpoint, cached_forward)
    config = model.config
    shape = (2, config.num_key_value_heads, 3, config.head_dim)
    names = cache_names(config.num_hidden_layers, "past_key_values")
    arguments = (torch.zeros(2, 5, dtype=torch.int64), *(torch.zeros(shape) for _ in names))
    dims = {
        "input_ids": {0: "batch", 1: "sequence"},
        "past": tuple({0: "batch", 2: "past_sequence"} for _ in names),
    }
    presents = cache_names(config.num_hidden_layers, "present")
    return to_onnx(model, arguments, ["input_ids", *names], ["logits", *presents], dims)


def untranspose(model: ir.Model) -> None:
    """Replace an initialiser that is another one transposed (the tied head) by a Transpose node."""
    graph = model.graph
    matrices = {k: v for k, v in graph.initializers.items() if len(v.shape) == 2}
    by_bytes = {v.const_value.tobytes(): v for v in matrices.values()}
    for name, value in matrices.items():
        turned = value.const_value.numpy().T
        origin = by_bytes.get(np.ascontiguousarray(turned).tobytes())
        if origin is None or origin.name >= name:
            continue
        user = value.consumers()[0]
        node = ir.node("Transpose", [origin], {"perm": [1, 0]}, name=f"node_{name}")
        node.metadata_props.update(user.metadata_props)
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, value.dtype
        graph.insert_before(user, node)
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[name]


def share_weights(models: list[ir.Model], folder: Path, location: str) -> None:
    """Move large initialisers of all models to one file, equal ones to one place in it."""
    offsets: dict[bytes, int] = {}
    data = bytearray()
    for value in [v for model in models for v in model.graph.initializers.values()]:
        raw = value.const_value.tobytes()
        if len(raw) < INLINE_BYTES:
            continue
        if raw not in offsets:
            data.extend(bytes(-len(data) % ALIGNMENT))
            offsets[raw] = len(data)
            data.extend(raw)
        value.const_value = ir.ExternalTensor(
            location,
            offsets[raw],
            len(raw),
            value.dtype,
            shape=value.shape,
            name=value.name,
            base_dir=folder,
        )
    (folder / location).write_bytes(data)


def write_models(checkpoint: Path, folder: Path) -> None:
    """Write model.onnx, model_kv.onnx and their common model.data."""
    graphs = {"model.onnx": export_plain(checkpoint), "model_kv.onnx": export_cached(checkpoint)}
    for model in graphs.values():
        untranspose(model)
    share_weights(list(graphs.values()), folder, "model.data")
    for name, model in graphs.items():
        ir.save(model, folder / name)


def check_models(checkpoint: Path, folder: Path) -> float:
    """Compare both graphs with torch on random tokens; return the largest logit difference."""
    ids = torch.randint(2, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load(checkpoint, plain_forward)(ids).numpy()
    plain = evaluate.logits(evaluate.open_session(folder / "model.onnx"), ids.numpy())
    cached = evaluate.open_session(folder / "model_kv.onnx")
    stepped = evaluate.token_by_token(cached, ids.numpy())
    worst = max(float(np.abs(got - wanted).max()) for got in (plain, stepped))
    if worst > TOLERANCE:
        raise SystemExit(f"exported logits differ from torch by {worst}, more than {TOLERANCE}")
    return worst


def write_config(checkpoint: Path, folder: Path) -> None:
    """Write the transformers configuration: what differs from the defaults of Llama."""
    config = load(checkpoint, plain_forward).config.to_diff_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_sample(folder: Path) -> None:
    """Write what the exported model says after the first prompt."""
    session = evaluate.open_session(folder / "model.onnx")
    tokenizer = evaluate.open_tokenizer(folder / "tokenizer.json")
    text = evaluate.sample(session, tokenizer, PROMPTS[0], **SAMPLING)
    (folder / "sample.txt").write_text(text.rstrip() + "\n")


def quality(folder: Path, text: str) -> dict[str, float]:
    """Measure the exported graph on held-out text: the figures of the card's [quality] table."""
    session = evaluate.open_session(folder / "model.onnx")
    tokenizer = evaluate.open_tokenizer(folder / "tokenizer.json")
    whole = evaluate.score(session, tokenizer, text)
    part = evaluate.score(session, tokenizer, text, evaluate.SLICE_TOKENS)
    return {
        "perplexity": whole.perplexity,
        "nats_per_token": whole.nats / whole.tokens,
        "nats_per_character": whole.nats / whole.characters,
        "bits_per_character": whole.nats / whole.characters / math.log(2),
        "heldout_tokens": whole.tokens,
        "heldout_characters": whole.characters,
        "slice_perplexity": part.perplexity,
        "slice_tokens": part.tokens,
    }


def parameters(checkpoint: Path) -> int:
    """Count weights, the tied embedding once."""
    return sum(tensor.numel() for tensor in load_file(checkpoint).values())


def write_card(run: Path, folder: Path, text: str) -> None:
    """Fill in `card.toml.in` and write it as `bard.toml` beside the folder `bard`."""
    values = (
        ARCHITECTURE
        | asdict(Recipe())
        | json.loads((run / "training.json").read_text())
        | quality(folder, text)
        | {
            "parameters": parameters(run / "checkpoint.safetensors"),
            "corpus_sha256": CORPUS_SHA256,
            "prompts": json.dumps(PROMPTS),
            "sampling": SAMPLING,
            "half_context": CONTEXT // 2,
            "held_out": HELD_OUT,
            "versions": "\n".join(f'{name} = "{version(name)}"' for name in VERSIONED),
            "python": platform.python_version(),
        }
    )
    template = Path(__file__).with_name("card.toml.in").read_text()
    (run / "bard.toml").write_text(template.format_map(values))


def export(run: Path, corpus: str) -> None:
    """Turn what train.py left in `run` into `run/bard.toml` and `run/bard/`."""
    folder, checkpoint = run / "bard", run / "checkpoint.safetensors"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(run / "tokenizer.json", folder / "tokenizer.json")
    write_models(checkpoint, folder)
    print(f"largest difference to torch: {check_models(checkpoint, folder):.1e}", file=sys.stderr)
    write_config(checkpoint, folder)
    write_sample(folder)
    write_card(run, folder, evaluate.split(corpus)[1])


def main() -> None:
    """Export a finished training run again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder train.py wrote to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    export(arguments.out, read_corpus(arguments.corpus))


if __name__ == "__main__":
    main()
