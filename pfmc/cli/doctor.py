"""``pfmc doctor``: versions, devices, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata

import pfmc
from pfmc import library
from pfmc.cli.options import Json
from pfmc.cli.output import print_json
from pfmc.report.table import Table

_NEEDED = (
    "numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers", "tokenizers", "safetensors",
    "pyarrow", "networkx", "scipy", "pydantic", "cyclopts", "rich", "filelock", "threadpoolctl",
)  # fmt: skip
_TOOLS = ("verilator", "yosys", "ngspice")


def doctor_(*, json: Json = False) -> int:
    """Show versions, devices and what is missing; exit code 1 if something needed is.

    Example: pfmc doctor --json

    Parameters
    ----------
    json
        Print JSON.
    """
    facts = _facts()
    missing = [n for n in _NEEDED if facts[n] == "missing"]
    if json:
        print_json({"schema_version": 1, "facts": facts, "missing": list(missing)})
    else:
        Table(("what", "found"), tuple(facts.items())).show()
    for name in missing:
        print(f"pfmc: {name} is missing; pip install {name}", file=sys.stderr)
    return 1 if missing else 0


def _facts() -> dict[str, str]:
    writable = os.access(tempfile.gettempdir(), os.W_OK)
    facts = {
        "pfmc": pfmc.__version__,
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "shelves": ", ".join(
            f"{s}: {len(library.entries(s))}" for s in ("passes", "targets", "models")
        ),
        "temporary folder": "writable" if writable else "read-only",
    }
    facts |= {name: _version(name) for name in _NEEDED}
    facts |= {t: shutil.which(t) or "not found (not needed yet)" for t in _TOOLS}
    return facts


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
