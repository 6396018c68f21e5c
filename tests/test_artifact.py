from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from pfmc import artifact
from pfmc.artifact import Writer, problems, read_manifest, require_intact
from pfmc.errors import CorruptError, FileError, LockedError, UsageError


def make(path: Path, names: list[str], pause_s: float = 0.0, force: bool = False) -> str:
    with Writer(path, force=force) as out:
        for name in names:

            def work(name: str = name) -> tuple[list[artifact.FileEntry], dict[str, int]]:
                time.sleep(pause_s)
                return [out.write(f"weights/{name}.bin", name.encode() * 1000)], {"n": len(name)}

            out.once(f"layer/{name}", f"key of {name}", work)
        return out.commit({"request_sha256": "r" + ",".join(names)}).tree


def test_same_content_gives_the_same_tree(tmp_path: Path) -> None:
    assert make(tmp_path / "a.pfm", ["x", "y"]) == make(tmp_path / "b.pfm", ["x", "y"])
    assert make(tmp_path / "c.pfm", ["x", "z"]) != make(tmp_path / "d.pfm", ["x", "y"])
    assert not (tmp_path / "a.pfm" / ".tmp").exists()
    assert not problems(tmp_path / "a.pfm")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    make(out, ["x"])
    for file in (out / "weights" / "x.bin", out / "pfm.json"):
        whole = file.read_bytes()
        step = max(1, len(whole) // 40)
        for position in range(0, len(whole), step):
            changed = bytearray(whole)
            changed[position] ^= 0x10
            file.write_bytes(changed)
            with pytest.raises((CorruptError, UsageError)):
                require_intact(out)
        file.write_bytes(whole)
    require_intact(out)


def test_an_added_or_missing_file_is_found(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    make(out, ["x", "y"])
    (out / "extra").write_bytes(b"")
    (out / "weights" / "y.bin").unlink()
    assert problems(out) == ["weights/y.bin is missing", "extra is not in the manifest"]


def test_a_killed_run_resumes_to_the_same_tree(tmp_path: Path) -> None:
    names = [f"layer{i}" for i in range(12)]
    expected = make(tmp_path / "whole.pfm", names)
    out = tmp_path / "killed.pfm"
    context = multiprocessing.get_context("fork")
    for moment in (0.01, 0.03, 0.06, 0.1):
        child = context.Process(target=make, args=(out, names, 0.01))
        child.start()
        time.sleep(moment)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        if not (out / "pfm.json").exists():
            with pytest.raises(UsageError):
                read_manifest(out)
    assert make(out, names) == expected
    assert not problems(out)


def test_work_done_for_another_key_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    done: list[str] = []

    def attempt(key: str, fail: bool) -> None:
        with Writer(out) as writer:

            def work() -> tuple[list[artifact.FileEntry], dict[str, str]]:
                done.append(key)
                return [writer.write("f", key.encode())], {"key": key}

            record, _ = writer.once("unit", key, work)
            assert record == {"key": key}
            if fail:
                raise KeyboardInterrupt
            writer.commit({})

    with pytest.raises(KeyboardInterrupt):
        attempt("one", fail=True)
    with pytest.raises(KeyboardInterrupt):
        attempt("one", fail=True)
    attempt("two", fail=False)
    assert done == ["one", "two"]
    assert (out / "f").read_bytes() == b"two"


def test_a_damaged_staged_file_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    with pytest.raises(KeyboardInterrupt), Writer(out) as writer:
        writer.once("unit", "k", lambda: ([writer.write("f", b"good")], {}))
        raise KeyboardInterrupt
    (out / ".tmp" / "tree" / "f").write_bytes(b"bad!")
    with Writer(out) as writer:
        _, resumed = writer.once("unit", "k", lambda: ([writer.write("f", b"good")], {}))
        writer.commit({})
    assert not resumed
    assert not problems(out)


def test_foreign_places_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for place in ("file", "full"):
        with pytest.raises(UsageError), Writer(tmp_path / place):
            pass
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_another_artifact_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "a.pfm"
    make(out, ["x", "y"])
    with Writer(out) as writer:
        assert writer.current("rx,y") is not None
        with pytest.raises(UsageError, match="another"):
            writer.current("something else")
    assert not problems(out)
    make(out, ["z"], force=True)
    assert not (out / "weights" / "x.bin").exists()


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.pfm"), pytest.raises(LockedError), Writer(tmp_path / "a.pfm"):
        pass


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Writer(tmp_path / "a.pfm") as writer:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left") as caught:
            writer.write("f", b"x")
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("name", ["a/b", "../../etc/passwd", "x" * 300, "ß☃", "", ".", "a b;$(x)"])
def test_layer_names_become_safe_file_names(name: str) -> None:
    made = artifact.file_name(name)
    assert made == Path(made).name
    assert 0 < len(made) < 120
    assert made.isascii()
    assert made not in (".", "..")
    assert artifact.file_name("a/b") != artifact.file_name("a_b")
