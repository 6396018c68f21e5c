"""``pfmc adapt``: another adapter into the writable memory of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pfmc.cli.options import Json
from pfmc.cli.output import print_json


def adapt_(
    path: Path,
    *,
    adapter: Path,
    out: Annotated[Path, Parameter(name=["-o", "--out"])],
    trust_root: Path | None = None,
    force: bool = False,
    json: Json = False,
) -> int:
    """Put another LoRA adapter beside the fixed layers of an artifact, without compiling.

    Example: pfmc adapt out.pfm --adapter DIR -o other.pfm

    Parameters
    ----------
    path
        An artifact that was compiled with --adapter.
    adapter
        Folder of the new adapter, as PEFT saves it.
    out
        The artifact to write; its tiles are those of PATH.
    trust_root
        Folder within which the adapter may be reached through links.
    force
        Replace an artifact made from something else.
    json
        Print JSON.
    """
    from pfmc.adapt import adapt

    done = adapt(path, adapter, out, force=force, trust_root=trust_root)
    if json:
        tree = done.manifest.tree
        print_json({"schema_version": 1, "tree_sha256": tree, "layers": list(done.layers)})
    else:
        print(f"{out}: {len(done.layers)} layers adapted, tree {done.manifest.tree}")
    return 0
