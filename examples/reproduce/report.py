"""Write a page of results from what the recipes left: tables beside the published numbers, and what they say.

    python examples/reproduce/report.py --data data --models models --page docs/results.md

A recipe names its tables: of what kind of file each is, what its rows and columns are repeated for, and the published
numbers. Its findings are sentences that were written once the numbers were there: one with a decimal number that is in
no table of the study is refused. The cells are kept as JSON beside the page, with the seconds of every step that is
done. What is kept there and not to be found now was left before, or on another machine: it stays, so that several can
share the work. Of a study that is not done the page has what there is, and says so last.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import run as recipes
from kinds import KINDS

from tve_hf.files import dumps, write_whole

Cells = dict[str, dict[str, str]]  # row -> column -> cell


def cells_of(table: dict[str, Any], places: dict[str, str], before: Cells) -> Cells:
    """What a table shows; files that are not there leave their cells as they were.

    Args:
        table: of a recipe: `kind`, a key of `KINDS`, and its `options`; `rows` and `columns`, names of things in
            `common.yaml`; `reads`, the file of a row and a column, or several by name, each with rows of its own.
        places: as for `run.steps_of`.
        before: the cells that were kept of this table.
    """
    common = yaml.safe_load((recipes.HERE / "common.yaml").read_text())
    axes = [*table["rows"], *table["columns"]]
    reads = table["reads"] if isinstance(table["reads"], dict) else {"": table["reads"]}
    cells: Cells = {}
    for names in itertools.product(*(common[axis] for axis in axes)):
        row, column = names[: len(table["rows"])], " ".join(names[len(table["rows"]) :])
        for label, pattern in reads.items():
            whose = ", ".join(filter(None, (*row, label)))
            path = Path(pattern.format(**places, **dict(zip(axes, names, strict=True))))
            if path.is_file():
                found = KINDS[table["kind"]](json.loads(path.read_text()), **table.get("options", {}))
                found = {", ".join(filter(None, (whose, part))): cell for part, cell in found.items()}
            else:
                kept = {name: of[column] for name, of in before.items() if column in of}
                found = {name: cell for name, cell in kept.items() if f"{name}, ".startswith(whose and f"{whose}, ")}
            for name, cell in found.items():
                cells.setdefault(name, {})[column] = cell
    return cells


def markdown(columns: list[str], rows: dict[str, list[Any]]) -> str:
    """A table, of which each row starts with its name."""
    lines = [["", *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def pictures_of(name: str, figure: dict[str, Any], places: dict[str, str], page: Path) -> dict[str, Path]:
    """The pictures of a figure by their places beside the page; those that are nowhere are left out.

    Args:
        name: of the recipe.
        figure: of it: `caption`; `for`, as in steps; and `reads`, the file of each.
        places: as for `run.steps_of`.
        page: which may have pictures of before.
    """
    common = yaml.safe_load((recipes.HERE / "common.yaml").read_text())
    found = {}
    for names in itertools.product(*(common[axis] for axis in figure["for"])):
        path = Path(figure["reads"].format(**places, **dict(zip(figure["for"], names, strict=True))))
        place = f"{page.stem}/{'-'.join([name, *names, path.name]).replace(' ', '-')}"
        if path.is_file() or (page.parent / place).is_file():
            found[place] = path if path.is_file() else page.parent / place
    return found


def section(recipe: dict[str, Any], tables: list[Cells], pictures: list[dict[str, Path]]) -> str:
    """A study's part of the page.

    Args:
        pictures: of each figure, as `pictures_of` gives them.

    Raises:
        ValueError: If a finding has a number that is in none of its tables.
    """
    head, parts = [f"## {recipe['title']}", recipe["question"]], []
    for table, cells in zip(recipe["tables"], tables, strict=True):
        if not cells:
            continue
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        rows = {name: [row.get(column, "") for column in columns] for name, row in cells.items()}
        parts += [table["caption"], markdown(columns, rows)]
        if published := table.get("published"):
            parts += [published["caption"], markdown(published["columns"], published["rows"])]
    for figure, names in zip(recipe.get("figures", []), pictures, strict=True):
        parts += [figure["caption"], *(f"![{Path(name).stem}]({name})" for name in names)]
    shown = set(re.findall(r"\d+\.\d+", "\n".join(parts)))
    findings = recipe.get("findings", [])
    for finding in findings:
        if strange := [number for number in re.findall(r"\d+\.\d+", finding) if number not in shown]:
            raise ValueError(f"{recipe['title']}: {strange[0]} is in none of its tables, but in: {finding}")
    return "\n\n".join([*head, *["\n".join(f"* {finding}" for finding in findings)] * bool(findings), *parts])


def seconds_of(steps: list[recipes.Step], places: dict[str, str], before: dict[str, float]) -> dict[str, float]:
    """The seconds of every step that is done, here or before, by the file that it left."""
    out, found = Path(places["out"]), {}
    for step in steps:
        name = str(step.creates.relative_to(out))
        if step.done or name in before:
            found[name] = recipes.spent(out, name) or before.get(name, 0.0)
    return found


def page_of(places: dict[str, str], page: Path) -> tuple[str, dict[str, Any], dict[str, Path]]:
    """The page; what is kept beside it; and its pictures by their places beside it.

    Args:
        page: where it will be, with what was kept of the one before, if there is one.
    """
    kept = page.with_suffix(".json")
    before: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"seconds": {}, "tables": {}}
    now: dict[str, Any] = {"seconds": dict(before["seconds"]), "tables": {}}
    copied: dict[str, Path] = {}
    sections, open_studies = [], []
    for recipe, name in sorted(
        ((recipes.read(name), name) for name in recipes.RECIPES), key=lambda pair: pair[0]["number"]
    ):
        steps = recipes.steps_of(recipe, places)
        done = seconds_of(steps, places, before["seconds"])
        now["seconds"] |= done
        left = len(steps) - len(done)
        open_studies += [f"* {recipe['title']}: {left} of {len(steps)} steps are left."] * bool(left)
        cells_before = itertools.chain(before["tables"].get(name, []), itertools.repeat({}))
        tables = [cells_of(*pair) for pair in zip(recipe["tables"], itertools.repeat(places), cells_before)]
        if not any(tables):
            continue
        now["tables"][name] = tables
        pictures = [pictures_of(name, figure, places, page) for figure in recipe.get("figures", [])]
        for own in pictures:
            copied |= own
        sections.append(section(recipe, tables, pictures))
    hours = sum(now["seconds"].values()) / 3600
    head = (
        "# Results\n\nThe studies of the papers in miniature, written by `examples/reproduce/report.py` from what the "
        f"recipes beside it left. They took {hours:.1f} hours."
    )
    rest = ["## Not done\n\n" + "\n".join(open_studies)] * bool(open_studies)
    return "\n\n".join([head, *sections, *rest]) + "\n", now, copied


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for run.py, like those below")
    parser.add_argument("--models", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    try:
        places = {"data": args.data, "models": args.models, "out": str(args.output_dir)}
        page, kept, pictures = page_of(places, args.page)
    except ValueError as error:
        sys.exit(str(error))
    for name, source in pictures.items():
        (args.page.parent / name).parent.mkdir(parents=True, exist_ok=True)
        if source != args.page.parent / name:
            write_whole(args.page.parent / name, partial(shutil.copyfile, source))
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.page, lambda path: path.write_text(page))
    write_whole(args.page.with_suffix(".json"), lambda path: path.write_text(dumps(kept, indent=1) + "\n"))


if __name__ == "__main__":
    main()
