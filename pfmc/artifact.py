"""The artifact `name.pfm/`: the only room that writes one, reads one and checks one.

Files are staged under ``.tmp/`` (temp, fsync, replace), each unit of work with a record of the
key it was made for, so that a killed compile resumes by hash; `Writer.commit` moves them to their
places and writes ``pfm.json`` last: an artifact without it is not one. ``provenance/`` is outside
the tree hash, everything else is inside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from pfmc.errors import CorruptError, FileError, LockedError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "pfm.json"
STAGE: Final = ".tmp"
SEAL: Final = "manifest_sha256"
PROVENANCE: Final = "provenance/"
_SAFE = re.compile(r"[^A-Za-z0-9._-]+")


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, no spaces that vary, and a final newline."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def file_name(name: str) -> str:
    """A file name for layer `name`: unsafe characters replaced, unique by a short digest."""
    safe = _SAFE.sub("_", name).strip("._") or "layer"
    if safe == name and len(safe) <= 100:
        return safe
    return f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def sha256_file(path: Path) -> str:
    """sha256 of a file, streamed."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_given(path: Path) -> str:
    """`sha256_file` of a file that the user named; refuses one that is not there (UsageError)."""
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path))
    return sha256_file(path)


@contextlib.contextmanager
def _io(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _file_error(error, path) from error


def _file_error(error: OSError, path: Path) -> FileError:
    mends = {
        errno.ENOSPC: "free space on that disk, then run the same command again: it resumes",
        errno.EDQUOT: "raise the quota, then run the same command again: it resumes",
        errno.EROFS: "choose a writable place with -o",
        errno.ENOENT: "choose a writable place with -o",
        errno.ENOTDIR: "choose a writable place with -o: a part of its path is a file",
        errno.ENAMETOOLONG: "give a shorter name with -o",
        errno.EACCES: "choose a writable place with -o, or change its permissions",
        errno.EPERM: "choose a writable place with -o, or change its permissions",
    }
    return FileError(
        f"cannot write: {error.strerror or error}", where=str(error.filename or path),
        mend=mends.get(error.errno or 0, "run the same command again: it resumes"),
    )  # fmt: skip


def save_tensors(path: Path, arrays: Mapping[str, npt.NDArray[Any]], told: str) -> None:
    """Writes arrays and one line about them, the metadata key ``pfmc``, as safetensors.

    Raises:
        FileError: the disk is full, or refuses.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with _io(path):
        try:
            save_file(held, path, metadata={"pfmc": told})
        except SafetensorError as error:  # tells of a full disk in words alone
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: relative path, size in bytes, sha256."""

    path: str
    size: int
    sha256: str


def _seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with the sha256 of all its other entries, so that a changed manifest shows."""
    rest = {k: v for k, v in body.items() if k != SEAL}
    return {**rest, SEAL: hashlib.sha256(canonical_json(rest)).hexdigest()}


def tree_sha256(files: Iterable[FileEntry]) -> str:
    """sha256 over paths and digests of all files but those of ``provenance/``."""
    h = hashlib.sha256()
    for f in sorted(files, key=lambda f: f.path):
        if not f.path.startswith(PROVENANCE):
            h.update(f"{f.path}\0{f.sha256}\n".encode())
    return h.hexdigest()


class Writer:
    """Writes one artifact under a lock; a context manager.

    Args:
        path: the folder to make, usually ``name.pfm``.
        force: whether an artifact made from something else may be replaced.

    Raises:
        UsageError: the path is a file, or a folder that is not an artifact.
        LockedError: another run holds it.
        FileError: it cannot be written.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path, self.force = path, force
        self._stage = path / STAGE
        self._files: dict[str, FileEntry] = {}
        self._lock: Any = None

    def __enter__(self) -> Writer:
        with _io(self.path):
            self._refuse_foreign()
            self._stage.mkdir(parents=True, exist_ok=True)
            probe = self._stage / "probe"
            probe.write_bytes(b"")
            probe.unlink()
        self._take_lock()
        for stale in self._stage.rglob("*.part"):
            stale.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        with contextlib.suppress(OSError):  # an empty stage is no use to anyone
            if not any(p.is_file() and p.name != "lock" for p in self._stage.rglob("*")):
                shutil.rmtree(self._stage)
                self.path.rmdir()

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(
                "the output is a file", where=str(self.path), mend="give a folder with -o NAME.pfm"
            )
        if not self.path.is_dir():
            return
        inside = {p.name for p in self.path.iterdir()}
        if inside and not inside & {MANIFEST, STAGE}:
            raise UsageError(
                "the output folder is not empty and is not an artifact", where=str(self.path),
                mend="give another folder with -o, or empty this one",
            )  # fmt: skip

    def _take_lock(self) -> None:
        import filelock

        lock = filelock.FileLock(self._stage / "lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise LockedError(
                "another run is writing this artifact", where=str(self.path),
                mend="wait for it to end, or give another folder with -o",
            ) from error  # fmt: skip
        except OSError as error:
            raise _file_error(error, self.path) from error
        self._lock = lock

    # -- staging ---------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> FileEntry:
        """Stages one file; returns its entry. `path` is relative, with ``/``.

        Raises:
            FileError: it could not be written.
        """
        target = self._stage / "tree" / path
        with _io(target):
            _write_durably(target, data)
        return self._remember(path, len(data), hashlib.sha256(data).hexdigest())

    def write_stream(self, path: str, chunks: Iterable[bytes]) -> FileEntry:
        """Stages one file from chunks, so that it never stands in memory whole."""
        target = self._stage / "tree" / path
        h, size = hashlib.sha256(), 0
        with _io(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with part.open("wb") as f:
                for chunk in chunks:
                    f.write(chunk)
                    h.update(chunk)
                    size += len(chunk)
                f.flush()
                os.fsync(f.fileno())
            part.replace(target)
        return self._remember(path, size, h.hexdigest())

    def _remember(self, path: str, size: int, digest: str) -> FileEntry:
        self._files[path] = FileEntry(path, size, digest)
        return self._files[path]

    def staged(self, path: str) -> Path:
        """Where file `path` lies now: staged, or in its final place after a resume."""
        held = self._stage / "tree" / path
        return held if held.is_file() else self.path / path

    def once(
        self, name: str, key: str, make: Callable[[], tuple[list[FileEntry], dict[str, Any]]]
    ) -> tuple[dict[str, Any], bool]:
        """Does a unit of work unless an earlier run did it for the same key.

        Args:
            name: names the unit, e.g. ``layer/model.layers.0.mlp.up_proj``.
            key: sha256 of everything that affects the result.
            make: does the work, stages its files, returns their entries and a small JSON record.

        Returns:
            The record, and whether it was resumed.
        """
        record = self._stage / "done" / f"{file_name(name)}.json"
        if (found := self._resume(record, key)) is not None:
            return found, True
        entries, body = make()
        state = {"key": key, "files": [vars(e) for e in entries], "record": body}
        with _io(record):
            _write_durably(record, canonical_json(state))
        return body, False

    def _resume(self, record: Path, key: str) -> dict[str, Any] | None:
        try:
            state = json.loads(record.read_bytes())
            entries = [FileEntry(**e) for e in state["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state.get("key") != key or not all(self._intact(e) for e in entries):
            return None
        self._files.update({e.path: e for e in entries})
        body: dict[str, Any] = state["record"]
        return body

    def _intact(self, entry: FileEntry) -> bool:
        path = self.staged(entry.path)
        try:
            return path.stat().st_size == entry.size and sha256_file(path) == entry.sha256
        except OSError:
            return False

    # -- committing ------------------------------------------------------------------------

    def current(self, request: str) -> Manifest | None:
        """The finished artifact already here, if it was made for `request` and is intact.

        Raises:
            UsageError: a finished artifact made for something else is here, without `force`.
        """
        try:
            manifest = read_manifest(self.path)
        except (CorruptError, UsageError):
            return None
        if manifest.body.get("request_sha256") == request and not problems(self.path, manifest):
            with _io(self._stage):  # a run killed right after its manifest leaves a stage behind
                shutil.rmtree(self._stage)
            return manifest
        if manifest.body.get("request_sha256") != request and not self.force:
            raise UsageError(
                "an artifact made from another model, recipe or technology is here",
                where=str(self.path), mend="give another folder with -o, or --force to replace it",
            )  # fmt: skip
        return None

    def commit(self, body: Mapping[str, object]) -> Manifest:
        """Moves every staged file to its place and writes the manifest, last.

        Args:
            body: target, resolved config, digests of inputs …; no time, host or absolute path.
        """
        files = sorted(self._files.values(), key=lambda f: f.path)
        hashed = tuple(f for f in files if not f.path.startswith(PROVENANCE))
        inside = {
            "schema_version": SCHEMA_VERSION, **body, "tree_sha256": tree_sha256(hashed)
        }  # fmt: skip
        full = _seal({**inside, "files": [vars(f) for f in hashed]})
        with _io(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)
            for f in files:
                self._settle(f.path)
            self._sweep({f.path for f in files})
            _write_durably(self.path / MANIFEST, canonical_json(full))
            shutil.rmtree(self._stage)
        return Manifest(self.path, inside, hashed)

    def _settle(self, path: str) -> None:
        staged, final = self._stage / "tree" / path, self.path / path
        if staged.is_file():
            final.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(final)

    def _sweep(self, keep: set[str]) -> None:
        """Removes files of an earlier artifact that this one does not have."""
        for found in sorted(self.path.rglob("*"), reverse=True):
            relative = found.relative_to(self.path).as_posix()
            if relative.startswith(STAGE):
                continue
            if found.is_dir():
                with contextlib.suppress(OSError):
                    found.rmdir()
            elif relative not in keep:
                found.unlink()


def _write_durably(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    part.replace(target)


@dataclass(frozen=True)
class Manifest:
    """What ``pfm.json`` says: its body without the file list, and the files."""

    path: Path
    body: Mapping[str, Any]
    files: tuple[FileEntry, ...]

    def __getitem__(self, key: str) -> Any:
        return self.body[key]

    @property
    def tree(self) -> str:
        """The tree hash."""
        return str(self.body["tree_sha256"])


def is_artifact(path: Path) -> bool:
    """Whether `path` is a finished artifact (by its manifest)."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the artifact at `path`.

    Raises:
        UsageError: there is no artifact, or only the torn one of an unfinished compile.
        CorruptError: the manifest is damaged or of a newer schema.
    """
    file = path / MANIFEST
    if not file.is_file():
        torn = (path / STAGE).is_dir()
        raise UsageError(
            "the compile of this artifact has not finished" if torn else "there is no artifact",
            where=str(path),
            mend="run the same compile again: it resumes" if torn else "pfmc compile makes one",
        )
    try:
        whole = json.loads(file.read_bytes())
        sealed = canonical_json(_seal(whole)) == file.read_bytes()
        body = {k: v for k, v in whole.items() if k not in ("files", SEAL)}
        files = tuple(FileEntry(**f) for f in whole["files"])
        version = body["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError("the manifest is damaged", where=str(file)) from error
    if not sealed:
        raise CorruptError("the manifest was changed", where=str(file), mend="compile it again")
    if version != SCHEMA_VERSION:
        raise CorruptError(
            f"the artifact has schema version {version}, this pfmc reads {SCHEMA_VERSION}",
            where=str(file), mend="install a newer pfmc, or compile again",
        )  # fmt: skip
    return Manifest(path, body, files)


def problems(path: Path, manifest: Manifest | None = None) -> list[str]:
    """Everything wrong with the artifact at `path`: files missing, changed or added.

    Every file but those under ``provenance/`` is read and hashed; a single flipped bit shows.
    """
    manifest = manifest or read_manifest(path)
    found: list[str] = []
    for entry in manifest.files:
        held = path / entry.path
        if not _contained(path, entry.path) or not held.is_file() or held.is_symlink():
            found.append(f"{entry.path} is missing")
        elif held.stat().st_size != entry.size or sha256_file(held) != entry.sha256:
            found.append(f"{entry.path} was changed")
    listed = {e.path for e in manifest.files} | {MANIFEST}
    for held in sorted(path.rglob("*")):
        relative = held.relative_to(path).as_posix()
        outside = relative in listed or relative.startswith((PROVENANCE, STAGE))
        if held.is_file() and not outside:
            found.append(f"{relative} is not in the manifest")
    if tree_sha256(manifest.files) != manifest.tree:
        found.append(f"{MANIFEST} was changed: its tree hash does not fit its files")
    return found


def _contained(root: Path, relative: str) -> bool:
    return not Path(relative).is_absolute() and ".." not in Path(relative).parts


def require_intact(path: Path) -> Manifest:
    """The manifest, after hashing every file.

    Raises:
        CorruptError: names the files that are missing or changed.
    """
    manifest = read_manifest(path)
    if found := problems(path, manifest):
        raise CorruptError(
            "the artifact is damaged: " + "; ".join(found[:8]), where=str(path),
            mend="compile it again",
        )  # fmt: skip
    return manifest
