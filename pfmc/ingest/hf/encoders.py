"""Encoders of BERT's kind: BERT, ELECTRA, RoBERTa, XLM-R, MPNet and DistilBERT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pfmc.ingest.hf import blocks, relative
from pfmc.ingest.hf.blocks import Frame
from pfmc.ingest.hf.config import Config
from pfmc.ingest.hf.graph import BATCH, SEQUENCE, Graph, dims, width
from pfmc.ingest.hf.heads import Head


@dataclass(frozen=True)
class Names:
    """What a family calls the modules of one layer, ``{}`` being its index."""

    layer: str
    q: str
    k: str
    v: str
    out: str
    norm: str
    inner: str
    outer: str
    last_norm: str


_BERT = Names(
    "encoder.layer.{}", "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
    "output.LayerNorm",
)  # fmt: skip
_DISTILBERT = Names(
    "transformer.layer.{}", "attention.q_lin", "attention.k_lin", "attention.v_lin",
    "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip


_MPNET = Names(
    "encoder.layer.{}", "attention.attn.q", "attention.attn.k", "attention.attn.v",
    "attention.attn.o", "attention.LayerNorm", "intermediate.dense", "output.dense",
    "output.LayerNorm",
)  # fmt: skip


def _layer(
    frame: Frame, x: ir.Value, names: Names, i: int, sizes: tuple[int, int], kind: str, eps: float,
    mask: ir.Value | None = None,
) -> ir.Value:  # fmt: skip
    """One layer of BERT's kind: each block is followed by its norm."""
    g, at, (heads, inner) = frame.g, frame.g.root + names.layer.format(i), sizes
    hidden = width(x)
    own = f"{at}.{names.q.rpartition('.')[0]}"
    parts = (g.linear(x, f"{at}.{n}", hidden, bias=True) for n in (names.q, names.k, names.v))
    q, k, v = (frame.forward(frame.heads(p, heads, own), own) for p in parts)
    y = frame.attend(q, k, v, own, (hidden // heads) ** -0.5, mask=mask)
    x = blocks.add(g, x, g.linear(y, f"{at}.{names.out}", hidden, bias=True), at)
    x = blocks.layer_norm(g, x, f"{at}.{names.norm}", eps)
    y = g.linear(x, f"{at}.{names.inner}", inner, bias=True)
    y = blocks.ACTIVATIONS[kind](g, y, f"{at}.{names.inner}")
    x = blocks.add(g, x, g.linear(y, f"{at}.{names.outer}", hidden, bias=True), at)
    return blocks.layer_norm(g, x, f"{at}.{names.last_norm}", eps)


def _sizes(c: Config, hidden: int, heads: str, inner: str) -> tuple[int, int]:
    """How many heads, and the width of the feed-forward block."""
    return blocks.split(c, hidden, heads)[0], c.integer(inner)


# -- BERT and RoBERTa ----------------------------------------------------------------------------


def bert(g: Graph, c: Config, head: Head) -> None:
    """BERT, and ELECTRA, whose embedding may be narrower: learned positions, token types."""
    frame = Frame.encoder(g)
    types = g.input("token_type_ids", dims(frame.ids), blocks.INT)
    at, hidden = f"{g.root}embeddings", c.integer("hidden_size")
    if c.body.get("model_type") == "electra":
        hidden = c.integer("embedding_size", default=128)
    kinds = c.integer("type_vocab_size", default=2)
    segment = blocks.embed(g, types, f"{at}.token_type_embeddings", kinds, hidden)
    _bert_like(frame, c, head, segment, frame.positions)


def roberta(g: Graph, c: Config, head: Head) -> None:
    """RoBERTa: positions count the tokens that are no padding, from ``pad_token_id + 1`` on."""
    frame = Frame.encoder(g)
    at, hidden = f"{g.root}embeddings", c.integer("hidden_size")
    kinds = c.integer("type_vocab_size", default=2)
    first = g.constant(np.asarray(0, np.int64), "pfmc/first_type")
    segment = blocks.embed(g, first, f"{at}.token_type_embeddings", kinds, hidden)
    _bert_like(frame, c, head, segment, _counted(frame, c))


def _counted(frame: Frame, c: Config) -> ir.Value:
    """``cumsum(ids != pad) * (ids != pad) + pad`` along each row."""
    g, shape = frame.g, dims(frame.ids)
    at = f"{g.root}embeddings"
    pad = g.constant(np.asarray(c.integer("pad_token_id", default=1, low=0), np.int64), "pfmc/pad")
    blank = g.op("Equal", [frame.ids, pad], shape, at, kind=blocks.BOOL)
    real = g.op("Not", [blank], shape, at, kind=blocks.BOOL)
    one = g.op("Cast", [real], shape, at, kind=blocks.INT, to=int(blocks.INT))
    axis = g.constant(np.asarray(1, np.int64), "pfmc/by")
    count = g.op("CumSum", [one, axis], shape, at, kind=blocks.INT)
    return g.op(
        "Add", [g.op("Mul", [count, one], shape, at, kind=blocks.INT), pad], shape, at,
        kind=blocks.INT,
    )  # fmt: skip


def _bert_like(frame: Frame, c: Config, head: Head, segment: ir.Value, places: ir.Value) -> None:
    """The rest of both: `segment` and the rows at `places` are added to the embedding."""
    c.demand("position_embedding_type", "absolute", None)
    c.demand("is_decoder", False, None)
    c.demand("add_cross_attention", False, None)
    g, at, hidden = frame.g, f"{frame.g.root}embeddings", c.integer("hidden_size")
    eps, narrow = c.real("layer_norm_eps", default=1e-12, low=1e-30), width(segment)
    x = blocks.embed(g, frame.ids, f"{at}.word_embeddings", c.integer("vocab_size"), narrow)
    x = blocks.add(g, x, segment, at)
    longest = c.integer("max_position_embeddings", default=512)
    x = blocks.add(g, x, blocks.embed(g, places, f"{at}.position_embeddings", longest, narrow), at)
    x = blocks.layer_norm(g, x, f"{at}.LayerNorm", eps)
    if narrow != hidden:
        x = g.linear(x, f"{g.root}embeddings_project", hidden, bias=True)
    kind = blocks.activation(c, "hidden_act", default="gelu")
    sizes = _sizes(c, hidden, "num_attention_heads", "intermediate_size")
    for i in range(c.layers("num_hidden_layers")):
        x = _layer(frame, x, _BERT, i, sizes, kind, eps)
    head(g, c, x, frame)


def mpnet(g: Graph, c: Config, head: Head) -> None:
    """MPNet: RoBERTa without token types, and distances that act on the scores."""
    frame, hidden = Frame.encoder(g), c.integer("hidden_size")
    at, eps = f"{g.root}embeddings", c.real("layer_norm_eps", default=1e-12, low=1e-30)
    x = blocks.embed(g, frame.ids, f"{at}.word_embeddings", c.integer("vocab_size"), hidden)
    longest, counted = c.integer("max_position_embeddings", default=512), _counted(frame, c)
    places = blocks.embed(g, counted, f"{at}.position_embeddings", longest, hidden)
    x = blocks.layer_norm(g, blocks.add(g, x, places, at), f"{at}.LayerNorm", eps)
    sizes = _sizes(c, hidden, "num_attention_heads", "intermediate_size")
    c.demand("relative_attention_num_buckets", None, 32)  # transformers computes with 32 whatever
    table = f"{g.root}encoder.relative_attention_bias"
    bias = relative.bias(frame, frame.ids, table, sizes[0], 32, 128, both=True)
    mask = frame.mask(0)
    assert mask is not None
    mask = g.op("Add", [bias, mask], (BATCH, sizes[0], SEQUENCE, SEQUENCE), table)
    kind = blocks.activation(c, "hidden_act", default="gelu")
    for i in range(c.layers("num_hidden_layers")):
        x = _layer(frame, x, _MPNET, i, sizes, kind, eps, mask)
    head(g, c, x, frame)


def distilbert(g: Graph, c: Config, head: Head) -> None:
    """DistilBERT: BERT without token types."""
    frame, at = Frame.encoder(g), f"{g.root}embeddings"
    hidden = c.integer("dim", "hidden_size")
    x = blocks.embed(g, frame.ids, f"{at}.word_embeddings", c.integer("vocab_size"), hidden)
    longest = c.integer("max_position_embeddings", default=512)
    places = blocks.embed(g, frame.positions, f"{at}.position_embeddings", longest, hidden)
    x = blocks.layer_norm(g, blocks.add(g, x, places, at), f"{at}.LayerNorm", 1e-12)
    kind = blocks.activation(c, "activation", default="gelu")
    sizes = _sizes(c, hidden, "n_heads", "hidden_dim")
    for i in range(c.layers("n_layers", "num_hidden_layers")):
        x = _layer(frame, x, _DISTILBERT, i, sizes, kind, 1e-12)
    head(g, c, x, frame)
