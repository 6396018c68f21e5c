"""What decides `bard`: the corpus, the architecture and the numbers of the training run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from evaluate import BOS_ID, CONTEXT

CORPUS_SHA256: Final = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BOS: Final = "<s>"
EOS: Final = "</s>"
EOS_ID: Final = 1
ARCHITECTURE: Final = {  # keyword arguments of transformers.LlamaConfig
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


@dataclass(frozen=True)
class Recipe:
    """The training run; with the corpus and the library versions it decides every weight."""

    seed: int = 1616
    batch: int = 8  # windows a step
    steps: int = 4800
    warmup: int = 200  # steps
    peak_lr: float = 3e-3
    final_lr: float = 3e-5
    weight_decay: float = 0.5  # on matrices only
    dropout: float = 0.2  # on the embedding and the residual branches
    clip: float = 1.0  # largest gradient norm
    evaluate_every: int = 400  # steps


def read_corpus(path: Path) -> str:
    """Return the text at `path` after checking that it is tinyshakespeare, byte for byte."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != CORPUS_SHA256:
        raise SystemExit(
            f"{path.name}: sha256 is {digest}, expected {CORPUS_SHA256}. The file wanted is "
            "data/tinyshakespeare/input.txt of the char-rnn repository (karpathy/char-rnn)."
        )
    return data.decode("ascii")
