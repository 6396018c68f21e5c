"""The baseline row: a saturated GPU, scaled from published throughput."""

from __future__ import annotations

from typing import Final

from pfmc import technology as technologies
from pfmc.cost import CostReport, Term, ratio, sources, total
from pfmc.quantity import Estimate
from pfmc.technology import Technology

KEYS: Final = {
    "gpu.parameters": "1", "gpu.throughput": "1/s", "gpu.power": "W",
    "gpu.throughput_user": "1/s", "gpu.die_area": "m2", "gpu.price": "USD",
}  # fmt: skip
"""Constants of `targets/gpu.toml`."""

SMALL: Final = 1e9
"""Parameters below which scaling by parameters flatters the GPU."""


def baseline(parameters: float, technology: Technology | None = None) -> CostReport:
    """A GPU serving a model of `parameters` with as many users as it holds.

    Energy per token grows with the parameters, throughput falls with them, both from the published
    Llama-3.1-8B figures; per-user throughput is a separate figure, never mixed with the aggregate.

    Args:
        parameters: of the model, embedding included.
        technology: ``targets/gpu.toml`` if None.
    """
    tech = technology or technologies.load("gpu")
    tech.require(KEYS)
    larger = tech["gpu.parameters"].inverse() * parameters
    text = f"* {parameters:,.6g} parameters / gpu.parameters"
    energy = tech["gpu.power"] / tech["gpu.throughput"] * larger
    metrics = [
        total("energy__token", [Term("gpu", energy, f"gpu.power / gpu.throughput {text}")]),
        ratio("throughput__aggregate", tech["gpu.throughput"] / larger,
              "gpu.throughput / (parameters / gpu.parameters)"),
        ratio("throughput__user", tech["gpu.throughput_user"] / larger,
              "gpu.throughput_user / (parameters / gpu.parameters)"),
        ratio("latency__token", (tech["gpu.throughput_user"] / larger).inverse(),
              "1 / throughput__user"),
        ratio("power__total", tech["gpu.power"], "gpu.power"),
        ratio("area__total", tech["gpu.die_area"], "gpu.die_area"),
        ratio("dies", Estimate.exact(1.0), "one GPU"),
        ratio("cost__unit", tech["gpu.price"], "gpu.price"),
    ]  # fmt: skip
    return CostReport(
        "gpu", tech.name, "decode, saturated", {m.key: m for m in metrics},
        sources(metrics, tech), (), notes(parameters),
    )  # fmt: skip


def notes(parameters: float) -> tuple[str, ...]:
    """What the baseline assumes, and for small models that it is too kind to the GPU."""
    always = (
        "Scaled in proportion to parameters from TensorRT-LLM's Llama-3.1-8B FP8 figures "
        "(31-46 mJ/token at TDP, 15,220-22,714 tokens/s saturated).",
    )
    if parameters >= SMALL:
        return always
    return (
        *always,
        f"At {parameters:,.3g} parameters the scaling is an optimistic bound for the GPU: launch "
        "overheads and KV memory do not shrink with the weights, so a real GPU does worse.",
    )
