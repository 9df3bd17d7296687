"""The commands as one: help, recipes, exit codes, and what is said of each error."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from tve_hf import __version__, messages
from tve_hf.cli import COMMANDS, main
from tve_hf.evaluation import report

ROOT = Path(__file__).parents[2]


def test_usage(capsys):
    assert main([]) == 2
    assert "usage: tve-hf" in capsys.readouterr().err
    assert main(["frobnicate"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "'frobnicate'" in err and "explain" in err
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("explain", "pretrain", "evaluate", "card", "push"))
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--no-such-option"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("top_k is\n 0"), "tve-hf: top_k is 0"),
        (FileNotFoundError("no such folder"), "tve-hf: no such folder"),
        (ModuleNotFoundError("No module named 'x'", name="x.y"), "tve-hf: No module named 'x'"),
        (ModuleNotFoundError("No module", name="accelerate"), "tve-hf: No module; run `pip install tve_hf[train]`."),
        (ImportError("too old", name="datasets.arrow"), "tve-hf: too old; run `pip install tve_hf[train]`."),
        (ImportError("This is captum's: pip install it."), "tve-hf: This is captum's: pip install it."),
        (ModuleNotFoundError("No module named 'tve_hf.x'", name="tve_hf.x"), None),
        (TypeError("unsupported operand"), None),
        (KeyError("pixel_values"), None),
        (AttributeError("no attribute"), None),
        (RuntimeError("CUDA error"), None),
    ],
)
def test_what_is_said_of_each_error(error, expected, capsys, monkeypatch):
    def command(arguments):
        raise error

    monkeypatch.setitem(COMMANDS, "info", command)
    if expected:
        assert main(["info"]) == 1
        assert capsys.readouterr().err.strip() == expected
    else:  # Python shows its traceback, and this below it
        with pytest.raises(type(error)) as raised:
            main(["info"])
        assert raised.value is error and "please report" in error.__notes__[0]


def test_the_advice_for_training_names_what_its_extra_brings():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {need.partition(">")[0] for need in extras["train"]} == set(messages._TRAIN)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_reads_recipes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: tve-hf {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([command, "@no-such-recipe"])
    assert ended.value.code == 2
    assert "no-such-recipe" in capsys.readouterr().err


def test_settings_of_training_and_evaluation_come_from_recipes_too(tmp_path, monkeypatch):
    from tve_hf import pretrain
    from tve_hf.benchmark import run as benchmark

    (tmp_path / "recipe").write_text("--classifier=from the recipe\n--output_dir=out\n--seed=3\n")
    seen = []
    monkeypatch.setattr(pretrain, "pretrain", seen.append)
    monkeypatch.setattr(benchmark, "evaluate", seen.append)
    monkeypatch.setattr(report, "table_of", str)
    for command, needed in (("pretrain", []), ("evaluate", ["--test_files", "held-out.parquet"])):
        assert main([command, f"@{tmp_path / 'recipe'}", "--seed", "4", *needed]) == 0
        assert (seen[-1].classifier, seen[-1].seed) == ("from the recipe", 4)


def broadcast():
    """What numpy says of arrays of two shapes; no `raise` stands in the code that calls it."""
    np.zeros(2) + np.zeros(3)


def raised():
    raise ValueError("top_k is 0")


def parsed():
    int("x")


@pytest.mark.parametrize(
    ("operation", "package", "is_expected"),
    [
        (broadcast, "tve_hf.pipeline_tve", False),
        (parsed, "tve_hf.pipeline_tve", False),
        (raised, "tve_hf.pipeline_tve", True),
        (parsed, "PIL.PngImagePlugin", True),
        (lambda: np.stack([np.zeros(2), np.zeros(3)]), "tve_hf.pipeline_tve", False),
        (lambda: Path("/no/such/file").read_text(), "tve_hf.cli", True),
    ],
)
def test_operations_that_fail_in_our_own_code_are_bugs(operation, package, is_expected):
    """As if these functions stood in other packages."""
    there = type(operation)(operation.__code__, operation.__globals__ | {"__name__": package})
    with pytest.raises((ValueError, OSError)) as caught:
        there()
    assert messages.is_expected(caught.value) == is_expected


def test_memory_that_is_not_enough_is_no_bug(capsys, monkeypatch):
    def command(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(COMMANDS, "info", command)
    assert main(["info"]) == 1
    assert "lower the batch size" in capsys.readouterr().err


def test_an_interruption_has_its_exit_code(capsys, monkeypatch):
    def command(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "push", command)
    assert main(["push"]) == 130
    assert capsys.readouterr().err == "tve-hf: interrupted.\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_version(command, capsys):
    if command:
        with pytest.raises(SystemExit) as ended:
            main([command, "--version"])
        assert ended.value.code == 0
    else:
        assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tve-hf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_both_spellings_and_one_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out.partition("options:")[2]))
    spelled = {option for option in options if "-" in option[2:] or "_" in option}
    assert all(f"--{option[2:].replace('-', '_')}" in options for option in spelled)
    assert all(f"--{option[2:].replace('_', '-')}" in options for option in spelled)


def test_a_full_standard_output_ends_in_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tve_hf", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 1
    assert done.stderr.startswith("tve-hf: ") and "No space left" in done.stderr and len(done.stderr.splitlines()) == 1
