"""Published fixed-weight machines beside the same figures from our model; misses are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from pfmc import formats
from pfmc import technology as technologies
from pfmc.cost import CostReport, Validation
from pfmc.hardware import FabricOp, LayerSummary, Workload
from pfmc.targets.fabric import money
from pfmc.targets.rom import cost
from pfmc.targets.rom.lower import work
from pfmc.technology import Technology

HNLPU = "HNLPU, arXiv 2508.16151v2"


@dataclass(frozen=True)
class Decoder:
    """The public shape of a decoder: enough for its fixed linears and its fabric."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    vocabulary: int
    experts: int = 1

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, inputs and outputs of every fixed linear."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        for i in range(self.layers):
            yield from ((f"{i}.q", self.width, q), (f"{i}.k", self.width, kv))
            yield from ((f"{i}.v", self.width, kv), (f"{i}.o", q, self.width))
            for e in range(self.experts):
                yield from ((f"{i}.{e}.gate", self.width, self.hidden),
                            (f"{i}.{e}.up", self.width, self.hidden),
                            (f"{i}.{e}.down", self.hidden, self.width))  # fmt: skip
        yield ("head", self.width, self.vocabulary)

    def fabric(self) -> list[FabricOp]:
        """The dynamic operations of one token; of the experts one is active."""
        ops = [_op("embed", "embedding", embedding_values=self.width, moved_values=self.width,
                   stored_values=self.width * self.vocabulary)]  # fmt: skip
        for i in range(self.layers):
            ops += [_op(f"{i}.{n}", k, **w) for n, k, w in self._block()]
        norm, feed = _norm(self.width), _feed(self.width, 1)
        return [*ops, _op("norm", "norm", **norm), _op("feed", "requantise", **feed),
                _op("sample", "sampling", adds=self.vocabulary)]  # fmt: skip

    def _block(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        width, q = self.width, self.heads * self.head_width
        kv = 2.0 * self.kv_heads * self.head_width
        yield "norm1", "norm", _norm(width)
        yield "feed_qkv", "requantise", _feed(width, 3)
        turned = q + kv / 2
        yield "rotary", "rotary", {"muls": 2 * turned, "adds": turned, "moved_values": turned}
        yield "attention", "attention", {
            "macs8_per_context": q, "macs16_per_context": q, "exps_per_context": self.heads,
            "adds_per_context": 2 * self.heads, "roots": self.heads, "muls": q,
            "kv_read_values_per_context": kv, "kv_write_values": kv,
            "kv_held_values_per_context": kv, "heads": self.heads, "moved_values": q,
        }  # fmt: skip
        yield "feed_o", "requantise", _feed(q, 1)
        yield "add1", "elementwise", {"adds": width, "moved_values": width}
        yield "norm2", "norm", _norm(width)
        yield "feed_mlp", "requantise", _feed(width, 2)
        hidden = float(self.hidden)
        gated = {"table_reads": hidden, "muls": hidden, "moved_values": hidden}
        yield "gate", "elementwise", gated
        yield "feed_down", "requantise", _feed(self.hidden, 1)
        yield "add2", "elementwise", {"adds": width, "moved_values": width}


LLAMA_8B = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
GPT_OSS_120B = Decoder(36, 2880, 64, 8, 64, 2880, 201088, experts=128)
"""Shapes from the public configurations of Llama-3.1-8B and gpt-oss-120b."""


def _op(name: str, kind: str, **work: float) -> FabricOp:
    return FabricOp(name, kind, "", (), work)


def _norm(width: int) -> dict[str, float]:
    return {"muls": 3.0 * width, "adds": float(width), "roots": 1.0, "moved_values": float(width)}


def _feed(width: int, linears: int) -> dict[str, float]:
    return {"muls": float(width), "adds": 2.0 * width, "roots": 1.0, "linears": float(linears),
            "moved_values": float(width)}  # fmt: skip


def summaries(shape: Decoder, bits: int, technology: Technology) -> list[LayerSummary]:
    """The layers of a public shape, counted by the code that lowers real ones."""
    rows, cols = (technology.integer(f"array.tile_{side}") for side in ("inputs", "outputs"))
    x = technology.integer("array.input_bits")
    found = []
    for name, inputs, outputs in shape.linears():
        counts = work(inputs, outputs, formats.of("int", bits), x, rows, cols)
        found.append(LayerSummary(name, inputs, outputs, int(counts["tiles"]), counts, {}))
    return found


@lru_cache(maxsize=1)
def rows() -> tuple[Validation, ...]:
    """Taalas HC1 (our 7 nm class) and HNLPU (our 5 nm class), each with its ratio."""
    return (*_taalas(), *_hnlpu())


def taalas() -> CostReport:
    """Llama-3.1-8B at 4 bits for one user at 1,024 positions on the 7 nm class."""
    tech = technologies.load("rom_n7")
    layers = summaries(LLAMA_8B, 4, tech)
    return cost.report(layers, LLAMA_8B.fabric(), tech, Workload("decode", 1024, users=1))


def _taalas() -> Iterator[Validation]:
    ours = taalas()
    press = "Taalas HC1, press and chart via OpenTallas"
    note = (
        "ours: 4 bits everywhere and a lane per 256 weights, whose area is most of the die; "
        "theirs: 3-bit base mixed with 6-bit, ratio unpublished, products shared by selection"
    )
    yield Validation(
        "HC1 die area", 815.0, ours["area__total"].to("mm2")[1], "mm2", press, "secondary", note
    )
    yield Validation(
        "HC1 energy per token",
        13.25,
        ours["energy__token"].to("mJ")[1],
        "mJ",
        "200-250 W over 16,960 tokens/s, the middle of 11.8-14.7",
        "derived",
        note,
    )
    yield Validation(
        "HC1 tokens per second, one user",
        16960.0,
        ours["throughput__user"].typical,
        "1/s",
        press,
        "secondary",
        "ours: every unit in sequence at 1 GHz",
    )
    yield Validation(
        "HC1 power",
        225.0,
        ours["power__total"].typical,
        "W",
        press + ", the middle of 200-250 W a card",
        "secondary",
        note,
    )


def _hnlpu() -> Iterator[Validation]:
    tech = technologies.load("rom")
    layers = summaries(GPT_OSS_120B, 4, tech)
    area = sum(t.value.to("mm2")[1] for t in cost.array_area(layers, tech))
    yield Validation(
        "HNLPU array area, 16 chips",
        573.16 * 16,
        area,
        "mm2",
        HNLPU + " Table 1",
        "full",
        "ours: ROM and lanes; theirs: weights as wires, no multipliers",
    )
    chip_m2, defects = 827.08e-6, tech.number("fabric.defect_density")
    yield Validation(
        "HNLPU yield of one chip",
        0.43,
        money.murphy(chip_m2, defects),
        "1",
        HNLPU + " App. B, Murphy, 0.11/cm2",
        "full",
    )
    diameter = tech.number("fabric.wafer_diameter")
    yield Validation(
        "HNLPU dies a wafer",
        62.0,
        money.dies_per_wafer(chip_m2, diameter),
        "1",
        HNLPU + " App. B",
        "full",
    )
    price = money.good_die(chip_m2, tech.number("fabric.wafer_price"), defects, diameter)
    yield Validation(
        "HNLPU good die",
        629.0,
        price,
        "USD",
        HNLPU + " Table 5",
        "full",
        "without package and test",
    )
    share = 10.0 / tech.number("masks.units")
    yield Validation(
        "HNLPU weight-dependent share of the masks",
        0.077,
        share,
        "1",
        HNLPU + " App. B: 10 of 58 + 12 * 6",
        "full",
    )
    yield Validation(
        "HNLPU masks of one chip variant, middle",
        1.73e6,
        tech.number("fabric.mask_set") * share,
        "USD",
        HNLPU + " App. B: $1.15-2.31M",
        "full",
    )
