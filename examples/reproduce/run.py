"""Run a study of the papers, in miniature: the steps of a recipe, of which those that are done are not done again.

    python examples/reproduce/run.py fidelity --data data --models models
    python examples/reproduce/run.py targets explainers fidelity --data data --models models --dry_run

A recipe is a file beside this one: a title, the question that it answers, and steps. Each step is a command with the
file that it leaves behind, and an estimate of its minutes on two CPU cores. It is repeated for all combinations of the
things of `common.yaml` that it names, whose values it may use in braces. Before anything is computed, the steps that
are left are printed with their minutes, and what they read must be there: a file, or what another step leaves. Stopped
anywhere, the same command goes on: each step's own command resumes. With `--only /vit` and `--only /cnn`, two commands
share the work. The seconds that each took are kept in `compute/`.
"""

import argparse
import glob
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from tve_hf.compatibility import verdict_by_name
from tve_hf.files import dumps, write_whole

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPES = sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "common")
# One thread a process, and an allocator that keeps what it has: on a CPU both are faster than torch's defaults.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        command: its words.
        creates: the file whose presence says that it is done.
        minutes: an estimate for two CPU cores.
        reads: paths and patterns among its words, which must exist before it starts.
    """

    command: tuple[str, ...]
    creates: Path
    minutes: float
    reads: tuple[str, ...]

    @property
    def done(self) -> bool:
        return self.creates.is_file()

    def __str__(self) -> str:
        return f"`{shlex.join(self.command[:3])} ...`"

    def option(self, name: str) -> str | None:
        """The value of an option of the command."""
        return self.command[self.command.index(name) + 1] if name in self.command else None


def read(recipe: str) -> dict[str, Any]:
    """The title, question and steps of a recipe, as its file has them.

    Raises:
        ValueError: If there is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}; choose among {', '.join(RECIPES)}.")
    return yaml.safe_load((HERE / f"{recipe}.yaml").read_text())


def steps_of(recipe: dict[str, Any], places: dict[str, str]) -> list[Step]:
    """The steps of a recipe, one for every combination of what each is repeated for.

    Args:
        places: `data`, `models` and `out`, the folders that commands name.
    """
    common = yaml.safe_load((HERE / "common.yaml").read_text())
    steps = []
    for entry in recipe["steps"]:
        axes = [[{axis: name} | (more or {}) for name, more in common[axis].items()] for axis in entry.get("for", [])]
        for combination in itertools.product(*axes):
            values = dict(places)
            for chosen in combination:
                values |= {name: str(value).format(**places) for name, value in chosen.items()}
            steps.append(_step(entry, values, places))
    return steps


def _step(entry: dict[str, Any], values: dict[str, str], places: dict[str, str]) -> Step:
    command = tuple(shlex.split(entry["run"].format(**values)))
    creates = Path(entry["creates"].format(**values))
    own = (str(creates), str(creates.parent))
    inputs = [word for word in command if word.startswith((*places.values(), "tve_hf/")) and word not in own]
    return Step(command, creates, entry["minutes"], tuple(inputs))


def check(steps: list[Step]) -> None:
    """Refuse what could not be computed, before anything is.

    Raises:
        ValueError: Naming the file that is missing, or the explainer that does not fit, and what to do.
    """
    made = [str(step.creates) for step in steps]
    for step in steps:
        if step.done:
            continue
        for read in step.reads:
            if not glob.glob(read) and not any(path == read or path.startswith(f"{read}/") for path in made):
                raise ValueError(
                    f"{read} is missing, which {step} reads; see --data and --models, or run the recipe that makes it."
                )
        classifier, explainer = step.option("--classifier"), step.option("--model")
        if classifier and explainer and all(Path(name, "config.json").is_file() for name in (classifier, explainer)):
            _check_fit(classifier, explainer)


def _check_fit(classifier: str, explainer: str) -> None:
    from tve_hf import split_classifier

    verdict = verdict_by_name(explainer, split_classifier(classifier))
    if verdict.fit == "no":
        raise ValueError(
            f"The explainer {explainer} does not serve {classifier}: it {verdict.reason}; {verdict.remedy}."
        )


def describe(steps: list[Step]) -> str:
    """The steps that are left, with their minutes."""
    left = [step for step in steps if not step.done]
    lines = [f"{step.minutes:6.0f} min  {step.creates}" for step in left]
    total = sum(step.minutes for step in left)
    return "\n".join(
        [*lines, f"{len(left)} of {len(steps)} steps are left: about {total:.0f} minutes on two CPU cores."]
    )


def run(steps: list[Step], out: Path) -> None:
    """Run the steps that are left, one after another.

    Raises:
        ValueError: If one ends with an error, or without its file.
    """
    for step in steps:
        if step.done:
            continue
        print(f"$ {shlex.join(step.command)}", flush=True)
        words = step.command
        if words[0] in ("python", "tve-hf"):  # of this environment
            words = (sys.executable, *(("-m", "tve_hf") if words[0] == "tve-hf" else ()), *words[1:])
        started = time.monotonic()
        try:
            code = subprocess.run(words, cwd=ROOT, env=os.environ | ENVIRONMENT, check=False).returncode
        finally:
            _add(out, str(step.creates.relative_to(out)), time.monotonic() - started)
        if code or not step.done:
            raise ValueError(
                f"{step} ended with {code}, without {step.creates}; what it said is above, and the same command goes "
                "on from there."
            )


def _add(out: Path, step: str, seconds: float) -> None:
    """Add the seconds that a step took to those of its earlier runs."""
    ledger = out / "compute" / f"{step}.json"
    total = round(spent(out, step) + seconds, 3)
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_whole(ledger, lambda path: Path(path).write_text(dumps({"seconds": total}) + "\n"))


def spent(out: Path, step: str) -> float:
    """The seconds of a step, by the file that it leaves; 0 where it was not run."""
    ledger = out / "compute" / f"{step}.json"
    return json.loads(ledger.read_text())["seconds"] if ledger.is_file() else 0.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help=", ".join(RECIPES))
    parser.add_argument("--data", required=True, help="folder of the parquet image sets")
    parser.add_argument("--models", required=True, help="folder of pretrained classifiers")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--only", default="*", help="pattern of the files to make, so that machines share the work")
    parser.add_argument("--dry_run", action="store_true", help="say what is left, and end")
    args = parser.parse_args(arguments)
    places = {"data": args.data, "models": args.models, "out": str(args.output_dir)}
    try:
        recipes = [read(name) for name in args.recipes]
        steps = [step for recipe in recipes for step in steps_of(recipe, places)]
        steps = [step for step in steps if fnmatch(str(step.creates), f"*{args.only}*")]
        if not steps:
            raise ValueError(
                f"--only {args.only} fits no file of {', '.join(args.recipes)}; see --dry_run without it."
            )
        check(steps)
        for recipe in recipes:
            print(f"{recipe['title']}: {recipe['question']}")
        print(describe(steps), flush=True)
        if not args.dry_run:
            run(steps, args.output_dir)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
