"""Every code block of README and of the other documents runs, as a newcomer would type it.

The Python of a document runs in one session. Shell blocks are read by bash, with recorders in the place of the
commands; what they recorded is then run here if it can run offline, and else parsed by the real parsers. Both find a
Hub of the test's own that has small models under the names in the documents.
"""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hub_server import User
from PIL import Image
from shipped import VIT, VIT_EXPLAINER
from tiny import noise_image
from transformers import HfArgumentParser
from zero_shot_models import make_model, make_processor

from tve_hf.benchmark import run as benchmark
from tve_hf.cli import COMMANDS, main
from tve_hf.export import formats

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "model_cards" / "README.md",
]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


# What these read is made by the commands of the first, below, and by a Trainer, tests/evaluation/test_callback.py.
ELSEWHERE = ("bulk.md", "loops.md")
WITH_PYTHON = [document for document in DOCUMENTS if blocks(document, "python") and document.name not in ELSEWHERE]


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(document, workplace):
    cat = Image.fromarray(pytest.importorskip("skimage.data").chelsea())
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        cat.save(workplace / name)
    namespace: dict = {}
    # `label="tabby"` stands for a name that the user's own classifier knows.
    labels = "explain('photo.jpg', top_k=1)[0]['label']"
    for block in blocks(document, "python"):
        if "import timm" in block and find_spec("timm") is None:
            continue  # `make test-extras` has it
        exec(compile(block.replace('"tabby"', labels), str(document), "exec"), namespace)
    if (workplace / "why.png").exists():
        assert Image.open("why.png").size == cat.size
    if "explanation" in namespace:
        assert namespace["explanation"]["attribution"].shape == namespace["explain"].model.config.grid_shape
    for name in namespace.keys() & {"scores", "exact_scores"}:
        assert torch.isfinite(namespace[name]).all() and namespace[name].std() > 0


def test_every_command_is_shown():
    text = "".join(block for document in DOCUMENTS for block in blocks(document, "sh"))
    assert set(re.findall(r"^tve-hf ([\w-]+)", text, flags=re.MULTILINE)) == {*COMMANDS} - {"card"}


# Shell

# Writes its name and arguments to $RECORD, and does what later lines of a block depend on.
RECORDER = r"""#!/bin/bash
name=${0##*/}
case $name in
    srun) exec "$@" ;;
    scontrol) echo node-1; exit ;;
    git) mkdir -p "$(basename "${@: -1}")" ;;
esac
printf '%s\0' "$name" "$@" $'\x1e' >> "$RECORD"
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}


@pytest.fixture
def typed(tmp_path) -> Callable[[str], list[list[str]]]:
    """Let bash read a block in the current folder, and return its commands, expanded; variables live on."""
    recorders, record, variables = (tmp_path / name for name in ("recorders", "record", "variables"))
    recorders.mkdir()
    for name in ("accelerate", "bash", "git", "make", "pip", "python", "sbatch", "scontrol", "srun", "tve-hf"):
        (recorders / name).write_text(RECORDER)
        (recorders / name).chmod(0o755)
    environment = SLURM | {"PATH": f"{recorders}:/usr/bin:/bin", "RECORD": str(record)}

    def read(block: str) -> list[list[str]]:
        record.write_bytes(b"")
        before = variables.read_text() if variables.exists() else ""
        script = f"set -euao pipefail\n{before}\n{block}\ndeclare -px > {variables}"
        done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        return [command.split("\0")[:-1] for command in record.read_text().split("\x1e\0")[:-1]]

    return read


class Parsed(Exception):
    """Raised in the place of what a script would do with its arguments."""


def parse_only(script: str, arguments: list[str], is_module: bool = False) -> None:
    """Run a script, or a module, up to where it has parsed its arguments."""

    def stopping(real: Callable) -> Callable:
        def parse(*args, **kwargs):
            real(*args, **kwargs)
            raise Parsed

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for parser, method in (
            (argparse.ArgumentParser, "parse_args"),
            (HfArgumentParser, "parse_args_into_dataclasses"),
        ):
            patch.setattr(parser, method, stopping(getattr(parser, method)))
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(str((ROOT / script).parent))  # as Python does
        with pytest.raises(Parsed):
            if is_module:
                runpy.run_module(script, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")


def make(*targets: str) -> None:
    subprocess.run(["make", "--dry-run", "-C", str(ROOT), *targets], check=True, capture_output=True)


def git(command: str, url: str) -> None:
    assert (command, url) == ("clone", yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"])


def python(script: str, *arguments: str) -> None:
    if "import timm" in (ROOT / script).read_text() and find_spec("timm") is None:
        return  # `make test-extras` has it
    parse_only(script, [*arguments])


def accelerate(command: str, *arguments: str) -> None:
    assert command == "launch"
    args = launch_command_parser().parse_args(arguments)
    load_config_from_file(str(ROOT / args.config_file))
    if args.training_script_args != ["..."]:  # as above, say the documents
        parse_only(args.training_script, args.training_script_args, args.module)


def bash(script: str, *arguments: str) -> None:
    """Its syntax is right, and it is given as many arguments as its head says."""
    subprocess.run(["/bin/bash", "-n", str(ROOT / script)], check=True)
    (usage,) = re.findall(rf"^#   {re.escape(script)}(.*)", (ROOT / script).read_text(), flags=re.MULTILINE)
    assert len(arguments) == len(usage.split())


def sbatch(*arguments: str) -> None:
    script = next(argument for argument in arguments if argument.endswith(".sh"))
    subprocess.run(["/bin/bash", "-n", str(ROOT / script)], check=True)
    parse_only("examples/pretrain.py", [*arguments[arguments.index(script) + 1 :]])


def tve_hf(*arguments: str) -> None:
    assert main([*arguments]) == 0, arguments


HANDLERS: dict[str, Callable[..., None]] = {
    "accelerate": accelerate,
    "bash": bash,
    "git": git,
    "make": make,
    "python": python,
    "sbatch": sbatch,
    "tve-hf": tve_hf,
}


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch) -> Path:
    """A folder and a Hub with what the documents name."""
    place = tmp_path / "place"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for folder, number in (("images", 64), ("held-out", 2)):  # one batch, and a pair to compare methods on
        images = {"image": [noise_image(seed) for seed in range(number)], "label": [0] * number}
        datasets.Dataset.from_dict(images, features=features).to_parquet(place / folder / "0.parquet")
    noise_image(0, (64, 48)).save(place / "photo.jpg")
    shutil.copytree(VIT, place / "my-classifier")
    shutil.copytree(VIT_EXPLAINER, place / "tve-vit-base")
    torch.manual_seed(0)
    make_model("clip").save_pretrained(tmp_path / "clip")
    make_processor("clip").save_pretrained(tmp_path / "clip")
    for name, folder in (
        ("google/vit-base-patch16-224", VIT),
        ("openai/clip-vit-base-patch16", tmp_path / "clip"),
        ("org/tve-other", VIT_EXPLAINER),
    ):
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.users["hf_owner"] = User("someone", orgs={"org": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setitem(benchmark.BUDGETS, "fair", ["random", "rise@2"])  # the real ones are for real machines
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_blocks_run_or_parse(document, workplace, typed, hub):
    if document.name == "deploy.md" and torch.__version__ < formats.TORCH:
        pytest.skip(f"ONNX needs torch {formats.TORCH}")
    fences = set(re.findall(r"^```(\w*)\n", document.read_text(), flags=re.MULTILINE)) - {""}
    assert fences <= {"python", "sh", "mermaid"}  # the first two are run here; directives of the site are in braces
    for block in blocks(document, "sh"):
        run(typed(block))
    if document.name == "share.md":
        assert set(hub.files("org/tve-vit-base")) > {"README.md", "model.safetensors"}
    if document.name == "bulk.md":
        namespace: dict = {}
        exec("".join(blocks(document, "python")), namespace)
        assert namespace["row"]["map"] and namespace["row"]["label"]
    if document.name == "start.md":
        assert (workplace / "explanations" / "photo.tve.json").exists()


def run(commands: list[list[str]]) -> list[list[str]]:
    assert commands
    for name, *arguments in commands:
        HANDLERS[name](*arguments)
    return commands


def test_a_renamed_option_is_noticed(typed, capsys):
    with pytest.raises(SystemExit):
        run(typed("tve-hf explain photo.jpg --top-kk 3"))
    with pytest.raises(SystemExit):
        run(typed("rest='--no_such_option 1'\npython examples/pretrain.py --classifier a --output_dir b $rest"))
    assert "no_such_option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(typed("accelerate launch --no_such_option 1 examples/pretrain.py ..."))
    with pytest.raises(subprocess.CalledProcessError):
        run(typed("make no-such-target"))
    with pytest.raises(AssertionError, match="no-such-command"):
        typed("no-such-command")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_sentences_have_their_options(document, capsys):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`((?:tve-hf|make) [^`]+)`", text):
        name, command, *rest = shlex.split(code)
        if name == "make":
            make(command, *rest)
            continue
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert {option for option in rest if option.startswith("--")} <= known, code


def test_extras_that_are_said_to_be_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*DOCUMENTS, *(ROOT / "tve_hf").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "Makefile"]
    said = {
        extra
        for file in files
        for group in re.findall(r"pip install [^`\n]*?(?:tve_hf|\.)\[([\w,]+)\]", file.read_text())
        for extra in group.split(",")
    }
    assert {"demo", "dev", "methods", "train"} <= said <= set(extras)
