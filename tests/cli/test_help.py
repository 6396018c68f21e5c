"""Help, versions and wrong words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfmc import cli

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "scipy", "pyarrow", "networkx")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pfmc.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit as e: print(e.code, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_no_arguments_print_the_help(pfmc: Callable[..., Any]) -> None:
    done = pfmc()
    assert (done.code, done.err) == (0, "")
    assert all(verb in done.out for verb in cli.VERBS)
    assert done.out == pfmc("--help").out
    assert "\x1b" not in done.out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_helps_with_an_example(verb: str, here: Callable[..., Any]) -> None:
    done = here(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: pfmc {verb}")
    example = re.search(r"Examples?: (pfmc .*)", done.out)
    assert example, done.out
    assert example[1].startswith(f"pfmc {verb}")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_explained(verb: str, here: Callable[..., Any]) -> None:
    printed = here(verb, "--help").out
    options = re.findall(r"^│ +(?:\* +)?((?:[A-Z]+ )?-\S+.*?)\s{2,}(\S*)", printed, re.MULTILINE)
    assert options
    assert all(text for _, text in options), options


def test_version(here: Callable[..., Any]) -> None:
    done = here("--version")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.out)


WRONG = {
    "unknown verb": (("compil",), ('Did you mean "compile"?', "see pfmc --help")),
    "unknown flag": (("--versio",), ("did you mean '--version'?",)),
    "unknown option": (("compile", "--targt", "rom"), ("Did you mean --target?", "compile --help")),
    "unknown choice": (
        ("compile", "m.onnx", "--target", "rom", "--stop-after", "canonica"),
        ('Did you mean "canonical"?',),
    ),
    "too many words": (("check", "a", "b"), ("'b'", "check --help")),
    "no path": (("inspect",), ("--path",)),
    "no value": (("compile", "m.onnx", "--target"), ("--target",)),
    "no number": (("compile", "m.onnx", "--seed", "x"), ("--seed", '"x"')),
    "no jobs": (("compile", "m.onnx", "--jobs", "0"), ("--jobs", ">= 1")),
    "negative context": (("compile", "m.onnx", "--context", "-5"), ("--context", ">= 1")),
    "negative seed": (("compile", "m.onnx", "--seed", "-1"), ("--seed", ">= 0")),
    "no depth": (("inspect", "m.onnx", "--depth", "0"), ("--depth", ">= 1")),
    "high level": (("verify", "a.pfm", "--level", "4"), ("--level", "<= 3")),
    "negative die": (("run", "a.pfm", "--prompt", "x", "--die", "-1"), ("--die", ">= 0")),
    "no model": (("compile",), ("no model given", "bard/model.onnx --target rom")),
    "no target": (("compile", "m.onnx"), ("no target given", "--target rom | crossbar | optical")),
    "nothing to compare": (("compare",), ("nothing to compare",)),
    "no prompt": (("run", "a.pfm"), ("--prompt", "--input")),
    "two inputs": (("run", "a.pfm", "--prompt", "x", "--input", "y"), ("either --prompt",)),
    "two forms": (("compare", "a.pfm", "--json", "--csv"), ("choose one of",)),
    "two views": (("inspect", "m.onnx", "--op", "Add", "--dot"), ("choose one of",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_usage_errors(name: str, here: Callable[..., Any]) -> None:
    words, phrases = WRONG[name]
    here(*words).refused(2, *phrases)


def test_a_wrong_verb_through_the_real_command_line(pfmc: Callable[..., Any]) -> None:
    pfmc("compil", "m.onnx").refused(2, 'Did you mean "compile"?')


def test_the_advice_for_a_missing_model_works(here: Callable[..., Any], tmp_path: Path) -> None:
    advice = here("compile").err.partition("pfmc compile ")[2].split()
    done = here("compile", *advice, "--stop-after", "ingest")
    assert done.code == 0, done.err
