"""Fills the measured parts of README.md: no figure in it is written by hand.

    python -m benchmarks.readme [--speed]

Parts stand between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->``. ``--speed`` also runs the
benchmarks, which takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("rom", "crossbar", "optical")


def pfmc(folder: Path, *arguments: str) -> str:
    """What a pfmc call says on stdout, then on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pfmc", *arguments], cwd=folder, capture_output=True, text=True,
        check=False, env=None,
    )  # fmt: skip
    if done.returncode not in (0, 4):
        raise RuntimeError(f"pfmc {' '.join(arguments)}: {done.stderr}")
    return done.stdout + done.stderr


def fill(text: str, name: str, body: str) -> str:
    """`text` with part `name` replaced."""
    pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no part {name!r}")
    return pattern.sub(lambda m: m[1] + body.rstrip("\n") + "\n" + m[2], text)


def block(command: str, output: str) -> str:
    """A shell transcript as a fenced block."""
    return f"```\n$ {command}\n{output.rstrip()}\n```"


def measured(folder: Path) -> dict[str, str]:
    """The parts that compiling, comparing, running and verifying the shipped model give."""
    model = str(ROOT / "models" / "bard" / "model.onnx")
    names = [f"bard-{t}.pfm" for t in TARGETS]
    for target, name in zip(TARGETS, names, strict=True):
        pfmc(folder, "compile", model, "--target", target, "-o", name, "--quiet")
    run = ["run", names[0], "--prompt", "ROMEO:", "--temperature", "0.8", "--seed", "3"]
    parts = {
        "compare": pfmc(folder, "compare", *names, "--markdown"),
        "run": block(
            f"pfmc run build/demo/{names[0]} " + " ".join(run[2:]),
            pfmc(folder, *run),
        ),
        "verify": "\n\n".join(
            block(f"pfmc verify build/demo/{n}", pfmc(folder, "verify", n)) for n in names
        ),
    }
    return parts


def speed() -> str:
    """The table of all benchmarks; a missed goal stands in it and is no error here."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return block("make benchmarks", done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed", action="store_true")
    chosen = parser.parse_args()
    path = ROOT / "README.md"
    with tempfile.TemporaryDirectory(prefix="pfmc-readme-") as folder:
        parts = measured(Path(folder))
    if chosen.speed:
        parts["speed"] = speed()
    text = path.read_text(encoding="utf-8")
    for name, body in parts.items():
        text = fill(text, name, body)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
