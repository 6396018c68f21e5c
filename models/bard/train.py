"""Train `bard`, the small Llama of this shelf, on tinyshakespeare and export it to ONNX.

    python models/bard/train.py --corpus PATH/tinyshakespeare.txt --out DIR

One CPU core, one thread, fixed seeds: the same versions on the same kind of machine give the same
weights. The corpus is public domain text and is never stored here; only its sha256 is. DIR gets the
checkpoint and what export.py makes of it: `bard.toml` and `bard/`, laid out as on the shelf.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from evaluate import BOS_ID, CONTEXT, split
from export import export
from recipe import ARCHITECTURE, BOS, EOS, Recipe, read_corpus
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def train_tokenizer(text: str) -> Tokenizer:
    """Learn a byte-level BPE that prepends BOS to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Encode `text` without BOS: int64 [tokens]."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """Build the untrained model; in bfloat16 on a CPU eager attention beats the fused kernel."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, attn_implementation="eager"))
    add_dropout(model, recipe.dropout)
    return model.train()


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop a part of the embedding and of each residual branch while training."""

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


def logits(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Run int64 [batch, sequence] through the model in bfloat16: float32 [..., vocabulary]."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=windows, use_cache=False).logits.float()


def with_bos(targets: Tensor) -> Tensor:
    """Shift targets [batch, sequence] right by one and put BOS in front: the model's input."""
    return torch.cat([torch.full_like(targets[:, :1], BOS_ID), targets[:, :-1]], dim=1)


def batches(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield random windows of the training tokens for ever: int64 [batch, CONTEXT]."""
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT + 1, (recipe.batch, 1), generator=generator)
        yield tokens[starts + offsets]


def scored_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cut tokens into windows a half context apart and mark what each one scores.

    Returns targets int64 [windows, CONTEXT] and scored bool [windows, CONTEXT]. Each window scores
    its second half, the first window all of it: every token up to the ragged end counts once.
    """
    targets = tokens.unfold(0, CONTEXT, CONTEXT // 2)
    scored = torch.zeros(targets.shape, dtype=torch.bool)
    scored[:, CONTEXT // 2 :] = True
    scored[0] = True
    return targets, scored


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, batch: int = 32) -> float:
    """Mean negative log likelihood of the held-out tokens, in nats a token."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    targets, scored = scored_windows(tokens)
    for window, mask in zip(targets.split(batch), scored.split(batch), strict=True):
        scores = logits(model, with_bos(window))
        total += nn.functional.cross_entropy(scores[mask], window[mask], reduction="sum")
    model.train()
    return total.item() / int(scored.sum())


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rise linearly over the warm-up, then fall along a half cosine to `final_lr`."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    span = recipe.peak_lr - recipe.final_lr
    return recipe.final_lr + span * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norm gains alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.99))


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, targets: Tensor, clip: float
) -> Tensor:
    """Take one step on targets [batch, CONTEXT] and return the loss in nats a token."""
    scores = logits(model, with_bos(targets))
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def save_checkpoint(model: LlamaForCausalLM, path: Path) -> None:
    """Write the weights, the tied head once, through a temporary file."""
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    partial.replace(path)


def train(train_tokens: Tensor, held_out: Tensor, recipe: Recipe, out: Path) -> None:
    """Train, keep in `out` the weights with the lowest held-out loss and what they cost."""
    model = new_model(recipe)
    optimizer = make_optimizer(model, recipe)
    best, losses, record, start = math.inf, [], {}, time.process_time()
    for step, targets in zip(range(recipe.steps), batches(train_tokens, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        losses.append(float(train_step(model, optimizer, targets, recipe.clip)))
        if (step + 1) % recipe.evaluate_every:
            continue
        loss, seen = held_out_loss(model, held_out), (step + 1) * targets.numel()
        if loss < best:
            best, record["tokens_to_best"] = loss, seen
            save_checkpoint(model, out / "checkpoint.safetensors")
        record |= {"tokens_seen": seen, "cpu_s": round(time.process_time() - start)}
        (out / "training.json").write_text(json.dumps(record))
        mean, losses = sum(losses) / len(losses), []
        print(f"{step + 1} train {mean:.4f} held-out {loss:.4f} {record}", file=sys.stderr)


def prepare(corpus: str, out: Path) -> tuple[Tensor, Tensor]:
    """Train the tokenizer on the training text, save it, return (train, held-out) tokens."""
    text, held_out = split(corpus)
    tokenizer = train_tokenizer(text)
    tokenizer.save(str(out / "tokenizer.json"))
    return encode(tokenizer, text), encode(tokenizer, held_out)


def main() -> None:
    """Corpus in; checkpoint, training record and everything of the shelf out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus, out = read_corpus(arguments.corpus), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    train(*prepare(corpus, out), Recipe(), out)
    export(out, corpus)


if __name__ == "__main__":
    main()
