"""``pfmc check``: hashes every file of an artifact against its manifest."""

from __future__ import annotations

from pathlib import Path

from pfmc import artifact
from pfmc.cli.options import Json
from pfmc.cli.output import print_json
from pfmc.errors import CorruptError


def check_(path: Path, *, json: Json = False) -> int:
    """Hash every file of an artifact; exit code 6 if one was changed, added or removed.

    Example: pfmc check out.pfm

    Parameters
    ----------
    path
        The artifact.
    json
        Print JSON.
    """
    manifest = artifact.read_manifest(path)
    found = artifact.problems(path, manifest)
    if json:
        print_json({"schema_version": 1, "tree_sha256": manifest.tree, "problems": list(found)})
    elif not found:
        size = sum(f.size for f in manifest.files)
        print(f"{path}: {len(manifest.files)} files, {size:,} bytes, tree {manifest.tree}")
    if found:
        if json:
            return CorruptError.exit_code
        raise CorruptError("the artifact is damaged: " + "; ".join(found), where=str(path))
    return 0
