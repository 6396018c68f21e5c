"""What stands behind an encoder: nothing, a word for each place, or classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import Graph, dims, width

Head = Callable[[Graph, Config, ir.Value, Frame], None]


def _first(g: Graph, x: ir.Value, at: str) -> ir.Value:
    """The hidden state of the first token, ``[B, D]``."""
    zero = g.constant(np.asarray(0, np.int64), "pfmc/from")
    return g.op("Gather", [x, zero], (dims(x)[0], dims(x)[-1]), at, axis=1)


def hidden(g: Graph, c: Config, x: ir.Value, frame: Frame) -> None:
    """No head: the hidden state, and the pooled one if the checkpoint holds a pooler."""
    g.output(x, "last_hidden_state")
    at = f"{g.root}pooler"
    if g.find(f"{at}.dense.weight") is not None:
        wide = c.integer("pooler_output_size", default=width(x))
        y = g.linear(_first(g, x, at), f"{at}.dense", wide, bias=True)
        kind = blocks.activation(c, "pooler_act", default="tanh")
        g.output(blocks.ACTIVATIONS[kind](g, y, at), "pooler_output")


@dataclass(frozen=True)
class Words:
    """A masked-language-model head: transform, activation, norm, and the (tied) table.

    Attributes:
        dense, norm, decoder: its modules.
        table: the embedding, without the root; bias: the parameter of the scores' bias.
        activation: configuration key; None for the exact GELU.
    """

    dense: str
    norm: str
    decoder: str
    table: str
    bias: str
    activation: str | None

    def __call__(self, g: Graph, c: Config, x: ir.Value, frame: Frame) -> None:
        """Writes the head."""
        modern = self.dense == "head.dense"
        eps = c.real("norm_eps" if modern else "layer_norm_eps", default=1e-12, low=1e-30)
        eps = 1e-5 if modern and "norm_eps" not in c.body else eps
        kind = "gelu"
        if self.activation:
            kind = blocks.activation(c, self.activation, default="gelu")
        dense_bias = not modern or c.flag("classifier_bias", False)
        y = g.linear(x, self.dense, width(x), bias=dense_bias)
        y = blocks.ACTIVATIONS[kind](g, y, self.dense)
        y = blocks.layer_norm(g, y, self.norm, eps, bias=not modern or c.flag("norm_bias", False))
        tied = c.flag("tie_word_embeddings", True)
        y = g.linear(
            y, self.decoder, c.integer("vocab_size"),
            bias=not modern or c.flag("decoder_bias", True),
            weight=f"{g.root}{self.table}.weight" if tied else "", bias_name=self.bias,
        )  # fmt: skip
        g.output(y, "logits")


BERT_WORDS = Words(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder", "embeddings.word_embeddings", "cls.predictions.bias", "hidden_act",
)  # fmt: skip
ROBERTA_WORDS = Words(
    "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "embeddings.word_embeddings",
    "lm_head.bias", None,
)  # fmt: skip
DISTILBERT_WORDS = Words(
    "vocab_transform", "vocab_layer_norm", "vocab_projector", "embeddings.word_embeddings",
    "vocab_projector.bias", "activation",
)  # fmt: skip
MODERNBERT_WORDS = Words(
    "head.dense", "head.norm", "decoder", "embeddings.tok_embeddings", "decoder.bias",
    "classifier_activation",
)  # fmt: skip


@dataclass(frozen=True)
class Classes:
    """A sequence classifier: one or two products on the first token's state.

    Attributes:
        dense, act: the first product and its activation; dense is relative to the root with ``~``.
        out: the second product.
    """

    dense: str
    act: str
    out: str = "classifier"

    def __call__(self, g: Graph, c: Config, x: ir.Value, frame: Frame) -> None:
        """Writes the head."""
        y = _first(g, x, self.out)
        dense = self.dense.replace("~", g.root)
        y = g.linear(y, dense, width(x), bias=True)
        y = blocks.ACTIVATIONS[self.act](g, y, dense)
        g.output(g.linear(y, self.out, _labels(c), bias=True), "logits")


def _labels(c: Config) -> int:
    """How many classes: ``id2label`` counts them, else ``num_labels``, else two."""
    named = c.part("id2label")
    if named is not None and named.body:
        return len(named.body)
    return c.integer("num_labels", default=2)


BERT_CLASSES = Classes("~pooler.dense", "tanh")
ROBERTA_CLASSES = Classes("classifier.dense", "tanh", "classifier.out_proj")
DISTILBERT_CLASSES = Classes("pre_classifier", "relu")


def image_classes(g: Graph, c: Config, x: ir.Value, frame: Frame) -> None:
    """ViT's classifier: one product on the class token."""
    y = _first(g, x, "classifier")
    g.output(g.linear(y, "classifier", _labels(c), bias=True), "logits")
