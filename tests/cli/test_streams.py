"""stdout is data, stderr is progress and messages, whatever they are connected to."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc import technology

QUICK = ("--target", "rom", "--recipe", "stream")
LONG = (("targets", "rom"), ("targets", "rom", "--json"), ("passes",), ("inspect",))


def test_data_goes_to_stdout_and_nothing_else_without_a_terminal(
    pfmc: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    done = pfmc("compile", tiny, *QUICK, "-o", tmp_path / "out.pfm")
    assert (done.code, done.err) == (0, "")
    assert f"written: {tmp_path}/out.pfm" in done.out
    assert "\x1b" not in done.out


def test_no_line_is_folded_without_a_terminal(pfmc: Callable[..., Any]) -> None:
    narrow = pfmc("targets", "rom", env={"COLUMNS": "30"})
    assert narrow.out == pfmc("targets", "rom").out
    _, headings, *rows = narrow.out.splitlines()
    assert headings.split() == ["constant", "value", "unit", "grade", "source"]
    assert all(row.split()[0].count(".") == 1 or row.startswith("noise") for row in rows)
    assert not any(line.endswith(" ") for line in narrow.out.splitlines())


def _on_terminal(words: list[object], **variables: str) -> tuple[int, str, str]:
    """Runs pfmc with stdout and stderr on terminals of their own."""
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TERM": "xterm", **variables}
    (out, out_end), (err, err_end) = pty.openpty(), pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pfmc", *map(str, words)], stdout=out_end, stderr=err_end, env=env,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(out_end)
    os.close(err_end)
    return process.wait(), _all_of(out), _all_of(err)


def _all_of(terminal: int) -> str:
    held = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the last writer has gone
            break
        if not piece:
            break
        held += piece
    os.close(terminal)
    return held.decode().replace("\r\n", "\n")


def test_progress_is_shown_on_a_terminal_only(tiny: Path, tmp_path: Path) -> None:
    words = ["compile", tiny, *QUICK, "-o", tmp_path / "out.pfm"]
    code, out, err = _on_terminal([*words, "--stop-after", "quantised"])
    assert code == 0
    assert "s  quantise" in err
    assert err.endswith("\r\x1b[K"), "the line is cleared at the end"
    assert "\n" not in err
    assert "\x1b" not in out
    code, _, err = _on_terminal([*words, "--stop-after", "ingest", "--quiet"])
    assert (code, err) == (0, "")


def test_a_message_after_progress_starts_a_clean_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["compile", tiny, *QUICK, "-o", tmp_path / "file"]
    code, _, err = _on_terminal(words)
    assert code == 2
    assert "\r\x1b[Kpfmc: the output is a file\n" in err


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_on_request(variables: dict[str, str]) -> None:
    code, out, err = _on_terminal(["targets"], **variables)
    assert (code, err) == (0, "")
    assert "\x1b[3" not in out.replace("\x1b[3m", ""), "no colours; italics are none"


@pytest.mark.parametrize("words", LONG, ids=" ".join)
def test_a_closed_pipe_is_no_error(
    words: tuple[str, ...], start: Callable[..., Any], tiny: Path
) -> None:
    """As with ``pfmc … | true``: whoever reads has gone before the first byte."""
    reader, writer = os.pipe()
    os.close(reader)
    more = (tiny,) if words[0] == "inspect" else ()
    process = start(*words, *more, stdout=writer)
    os.close(writer)
    _, message = process.communicate(timeout=60)
    assert (process.returncode, message) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_is_an_error(start: Callable[..., Any]) -> None:
    with open("/dev/full", "w") as full:
        process = start("targets", stdout=full)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 74
    assert message.startswith("pfmc: No space left on device")
    assert "Traceback" not in message
    assert "Exception ignored" not in message


@pytest.mark.parametrize(("closed", "code"), [("1>&-", 0), ("2>&-", 0), ("1>&- 2>&-", 0)])
def test_closed_streams_are_no_error(closed: str, code: int) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pfmc targets {closed}"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")


def test_an_error_with_a_closed_stderr_is_silent(pfmc: Callable[..., Any]) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pfmc targets nope 2>&-"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX"}])
def test_a_poor_encoding_is_no_error(variables: dict[str, str], pfmc: Callable[..., Any]) -> None:
    done = pfmc("targets", "rom", env=variables)
    assert (done.code, done.err) == (0, "")
    assert all(key in done.out for key in technology.load("rom").constants)


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from pfmc.report.table import Table

    Table(("[bold]x", "y"), (("[red]a[/red]", "[low – high]"), ("[b]s",)), "[i]t").show()
    printed = capsys.readouterr().out
    for text in ("[bold]x", "[red]a[/red]", "[low – high]", "[b]s", "[i]t"):
        assert text in printed


def test_a_bug_of_ours_is_short_and_kept_in_a_file(
    here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tempfile

    from pfmc import library

    def broken(_: str) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(library, "entries", broken)
    here("targets").refused(1, "internal error: ZeroDivisionError: on purpose", str(tmp_path))
    (crash,) = tmp_path.glob("pfmc-crash-*.txt")
    assert "Traceback" in crash.read_text()
    assert "['targets']" in crash.read_text()
