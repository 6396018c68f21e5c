"""Where a compile may write, who else writes there, and what is left when it is stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc import artifact
from pfmc.artifact import MANIFEST, STAGE, Writer, read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent

QUICK = ("--target", "rom", "--recipe", "stream")


@pytest.fixture
def torn(tiny: Path, tmp_path: Path) -> Callable[[Path], str]:
    """Compiles into a place where a compile was stopped; returns the tree hash."""

    def finish(out: Path) -> str:
        from pfmc.compile import compile_model

        compile_model(tiny, out, target="rom", recipe="stream")
        assert not artifact.problems(out)
        assert not (out / STAGE).exists()
        return read_manifest(out).tree

    return finish


def test_places_that_cannot_be_written(
    here: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    words = ("compile", tiny, *QUICK, "-o")
    here(*words, tmp_path / "file").refused(2, "the output is a file", "-o")
    here(*words, tmp_path / "full").refused(2, "not empty", str(tmp_path / "full"))
    here(*words, tmp_path / "file" / "out.pfm").refused(74, "Not a directory", "choose a writable")
    here(*words, "/proc/no/out.pfm").refused(74, "/proc/no", "choose a writable")
    here(*words, tmp_path / ("x" * 300)).refused(74, "name too long", "shorter name")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(here: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    here("compile", tiny, *QUICK, "-o", tmp_path / "out.pfm").refused(74, "Permission denied")


def test_an_occupied_place_is_kept(
    here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.pfm"
    shutil.copytree(artifacts["rom"], out)
    tree = read_manifest(out).tree
    again = here("compile", tiny, *QUICK, "-o", out)
    assert again.code == 0
    assert "resumed" in again.out
    here("compile", tiny, *QUICK, "--seed", "7", "-o", out).refused(2, "another", "--force")
    assert read_manifest(out).tree == tree
    assert not artifact.problems(out)
    assert here("compile", tiny, *QUICK, "--context", "64", "-o", out, "--force").code == 0
    assert read_manifest(out).tree != tree
    assert not artifact.problems(out)


def test_a_second_writer_is_turned_away(
    pfmc: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.pfm"
    with Writer(out) as writer:
        writer.write("f", b"mine")
        pfmc("compile", tiny, *QUICK, "-o", out).refused(75, "another run", str(out))
        assert writer.staged("f").read_bytes() == b"mine"


def _until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits for something to be there while `process` runs."""
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_signal_stops_it_and_it_resumes(
    sent: signal.Signals, code: int, jobs: int, start: Callable[..., Any], tiny: Path,
    artifacts: dict[str, Path], torn: Callable[[Path], str], tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out.pfm"
    process = start("compile", tiny, *QUICK, "-o", out, "--jobs", jobs)
    _until((out / STAGE / "lock").exists, process)
    asked = time.monotonic()
    process.send_signal(sent)
    printed, message = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert (process.returncode, printed) == (code, ""), message
    assert message.startswith("pfmc: ")
    assert message.count("\n") == 1
    assert "resumes" in message
    assert not (out / MANIFEST).exists()
    assert not list(out.rglob("*.part"))
    assert torn(out) == read_manifest(artifacts["rom"]).tree


def test_an_interrupt_within_text_that_is_evaluated(
    pfmc: Callable[..., Any], tmp_path: Path
) -> None:
    """It reaches a dataclass that is just being made, say; the exit code stays ours."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pfmc.cli\npfmc.cli._app = lambda _: exec('raise KeyboardInterrupt')\n"
    )
    ended = pfmc("check", tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    ended.refused(130, "stopped")


def test_a_kill_leaves_no_artifact(
    start: Callable[..., Any], here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path],
    torn: Callable[[Path], str], tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out.pfm"
    process = start("compile", tiny, *QUICK, "-o", out)
    _until(lambda: len(list(out.glob(f"{STAGE}/done/*.json"))) > 3, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for verb in (("check",), ("inspect",), ("compare",), ("verify",), ("run", "--prompt", "w1")):
        here(*verb, out).refused(2, "has not finished", "run the same compile again")
    assert torn(out) == read_manifest(artifacts["rom"]).tree


def test_a_disk_that_fills_up_again_and_again(
    here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every run may write 9 more files; the last one gives the same tree as an undisturbed one."""
    out, write = tmp_path / "out.pfm", artifact._write_durably
    left = [0]

    def narrow(target: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        write(target, data)

    monkeypatch.setattr(artifact, "_write_durably", narrow)
    for attempt in range(1, 12):
        left[0] = 9 * attempt
        done = here("compile", tiny, *QUICK, "-o", out)
        if done.code == 0:
            break
        done.refused(74, "No space left on device", "free space", "it resumes")
        assert not (out / MANIFEST).exists()
    assert attempt > 2
    assert read_manifest(out).tree == read_manifest(artifacts["rom"]).tree
    assert not artifact.problems(out)


def _may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    try_it = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(try_it, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="no mount namespace here")
def test_a_disk_that_is_really_full(tiny: Path, tmp_path: Path) -> None:
    pfmc = f"{sys.executable} -m pfmc"
    script = f"""
        mount -t tmpfs -o size=160k none {tmp_path}
        {pfmc} compile {tiny} {" ".join(QUICK)} -o {tmp_path}/out.pfm; echo "rc $?"
        ls {tmp_path}/out.pfm
        mount -o remount,size=8m {tmp_path}
        {pfmc} compile {tiny} {" ".join(QUICK)} -o {tmp_path}/out.pfm > /dev/null; echo "rc $?"
        {pfmc} check {tmp_path}/out.pfm
    """
    root = str(Path(artifact.__file__).parents[1])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr.startswith("pfmc: cannot write: No space left on device"), done.stderr
    assert "Traceback" not in done.stderr
    first, second, checked = done.stdout.splitlines()
    assert (first, second) == ("rc 74", "rc 0")
    assert checked.startswith(f"{tmp_path}/out.pfm: ")


def test_what_a_kill_after_the_manifest_leaves_is_swept(
    here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.pfm"
    shutil.copytree(artifacts["rom"], out)
    (out / STAGE / "done").mkdir(parents=True)
    (out / STAGE / "done" / "layer_x.json").write_text("{}")
    assert here("check", out).code == 0
    assert here("compile", tiny, *QUICK, "-o", out).code == 0
    assert not (out / STAGE).exists()
    assert not artifact.problems(out)


HARMS = {
    "flipped": "layers.json was changed",
    "missing": "layers.json is missing",
    "extra": "notes.txt is not in the manifest",
    "manifest": "the manifest was changed",
    "garbage": "the manifest is damaged",
    "newer": "schema version 99",
}


def harmed(whole: Path, out: Path, how: str) -> Path:
    """A copy of the artifact `whole`, with something wrong."""
    shutil.copytree(whole, out)
    layers, manifest = out / "layers.json", out / MANIFEST
    text = manifest.read_text()
    if how == "flipped":
        content = bytearray(layers.read_bytes())
        content[len(content) // 2] ^= 1
        layers.write_bytes(content)
    elif how == "missing":
        layers.unlink()
    elif how == "extra":
        (out / "notes.txt").write_text("hello")
    elif how == "manifest":
        manifest.write_text(text.replace('"seed": 0', '"seed": 1'))
    elif how == "garbage":
        manifest.write_bytes(b"\x00" * 100)
    else:
        import json

        body = {**json.loads(text), "schema_version": 99}
        manifest.write_bytes(artifact.canonical_json(artifact._seal(body)))
    return out


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_artifact_is_found_by_every_verb(
    how: str, here: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = harmed(artifacts["rom"], tmp_path / "out.pfm", how)
    here("check", out).refused(6, HARMS[how], str(out))
    here("verify", out, "--level", "0").refused(6, HARMS[how])
    here("run", out, "--prompt", "w1").refused(6, HARMS[how])
    if how in ("manifest", "garbage", "newer"):
        here("inspect", out).refused(6, HARMS[how])
        here("compare", out).refused(6, HARMS[how])


def test_a_damaged_artifact_is_mended_by_compiling_again(
    here: Callable[..., Any], tiny: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = harmed(artifacts["rom"], tmp_path / "out.pfm", "flipped")
    assert here("compile", tiny, *QUICK, "-o", out).code == 0
    assert not artifact.problems(out)
    assert read_manifest(out).tree == read_manifest(artifacts["rom"]).tree
